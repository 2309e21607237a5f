"""Runs sglang's own dumper and comparator; a program, started as `python sglang_oracle.py ORACLE < jobs.json`.

Its package needs CUDA libraries, but the two need only torch and a few plain packages: the modules that they import
from the rest of sglang are stood in for by empty ones. Each job is one of

    {"do": "dump", "dir": D, "exp": E, "calls": FILE.pt}     dump tensors: [{"name", "value", "tags", "ctx", "step"}]
    {"do": "train", "dir": D, "exp": E, "steps": N}          a small model, forward and backward, everything on
    {"do": "compare", "baseline": A, "target": B, "args": []}

and answers one line of JSON.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

STUBS = {
    "sglang.srt.managers.io_struct": ("sock_recv", "sock_send", "wrap_as_pickle"),
    "sglang.srt.runtime_context": ("get_parallel", "get_server_args", "get_serving"),
    "sglang.srt.utils": ("get_device",),
}


def shim(oracle: Path) -> None:
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        module = types.ModuleType(name)
        module.__path__ = [str(oracle.joinpath(*name.split(".")))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    for name, members in STUBS.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, lambda *_: None)
        sys.modules[name] = module


def make_dumper(job: dict[str, Any], **more: Any) -> Any:
    from sglang.srt.debug_utils.dumper import DumperConfig, _Dumper

    config = {"enable": True, "dir": job["dir"], "exp_name": job["exp"], "enable_output_console": False}
    return _Dumper(config=DumperConfig(**config, **more))


def dump(job: dict[str, Any]) -> dict[str, Any]:
    dumper = make_dumper(job)
    calls = torch.load(job["calls"], weights_only=True)
    for call in calls:
        dumper.set_ctx(**call.get("ctx", {}))
        dumper.dump(call["name"], call["value"], **call.get("tags", {}))
        if call.get("step"):
            dumper.step()
    return {"dumped": len(calls)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, dumper: Any) -> torch.Tensor:
        h = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            dumper.set_ctx(layer_id=number)
            h = layer(h)
            dumper.set_ctx(layer_id=number)  # the hook of the layer has cleared it
            dumper.dump("hidden", h, dims="b s h", dims_grad="b s h[tp:partial]", part="a")
            dumper.set_ctx(layer_id=None)
        return h


def keep_gradient(grads: dict[int, torch.Tensor], number: int) -> Any:
    """A hook that keeps the gradient of a layer's output: what the dumper's files are checked against."""

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: grads.__setitem__(number, gradient.clone()))

    return hook


def train(job: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(job.get("seed", 0))
    options = {"enable_grad": True, "enable_model_value": True, "enable_model_grad": True, "non_intrusive_mode": "all"}
    dumper = make_dumper(job, **options)
    model = Model()
    dumper.register_non_intrusive_dumper(model)
    truth: list[dict[str, Any]] = []
    for step in range(job["steps"]):
        grads: dict[int, torch.Tensor] = {}
        handles = [layer.register_forward_hook(keep_gradient(grads, n)) for n, layer in enumerate(model.layers)]
        model(input_ids=torch.arange(6).reshape(2, 3), dumper=dumper).pow(2).sum().backward()
        dumper.dump_model(model)
        truth += [{"step": step, "layer": number, "sum": grads[number].double().sum().item()} for number in grads]
        for handle in handles:
            handle.remove()
        model.zero_grad()
        dumper.step()
    return {"truth": truth, "parameters": [name for name, _ in model.named_parameters()]}


def compare(job: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.debug_utils.comparator.entrypoint import parse_args, run

    report = Path(job["report"])
    argv = ["--baseline-path", job["baseline"], "--target-path", job["target"], "--report-path", str(report)]
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        code = run(parse_args([*argv, *job.get("args", [])]))
    finally:
        sys.stdout = stdout
    return {"code": code, "records": [json.loads(line) for line in report.read_text().splitlines()]}


def main() -> None:
    shim(Path(sys.argv[1]))
    for job in json.load(sys.stdin):
        sys.stdout.write(json.dumps({"dump": dump, "train": train, "compare": compare}[job["do"]](job)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
