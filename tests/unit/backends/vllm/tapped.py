"""Run in a process of its own: vLLM's models beside transformers' with the same weights, tapped and hooked alike.

Attention is replaced in both by its own query, so that no cache is needed; everything around it is the real thing.
Prints one JSON object: family -> what was found.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import vllm.model_executor.models.registry as registry
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from trimtab import architectures, hooks
from trimtab.backends.vllm.taps import Tap, VllmMap, describe
from trimtab.sites import Site

END = Site("final_norm")
TOKENS = torch.tensor([5, 17, 99, 3, 64, 28, 7])


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the place of attention, [tokens, heads, head_dim]: every projection reaches the output, no cache is needed."""
    groups = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(groups, dim=-2) for x in (k, v))
    return v + 0.3 * (q * k).mean(-1, keepdim=True)


def replace_attention() -> None:
    def of_transformers(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **__: Any) -> tuple[Tensor, None]:
        return mixed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), None

    def of_vllm(self: Any, q: Tensor, k: Tensor, v: Tensor, output_shape: Any = None) -> Tensor:
        heads = [x.reshape(len(TOKENS), -1, self.head_size) for x in (q, k, v)]
        return mixed(*heads).reshape(q.shape)

    ALL_ATTENTION_FUNCTIONS.register("mixed", of_transformers)
    Attention.forward = of_vllm


def halve_linear_attention(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith(".linear_attn"):
            module.forward = lambda hidden_states, **_: hidden_states * 0.5


class Tapping:
    """What the backend will do at every tap, with plain hooks: keep r, read the states, add a shift at one site."""

    def __init__(self, model: nn.Module, taps: tuple[Tap, ...], shift: tuple[Site, Tensor] | None = None) -> None:
        self.residual: Tensor | None = None
        self.states: dict[Site, Tensor] = {}
        self.names: list[str] = []
        self.shift = shift
        self.handles = [self._install(model.get_submodule(tap.module_path), tap) for tap in taps]

    def _install(self, module: nn.Module, tap: Tap) -> Any:
        if tap.side == "input":
            assert tap.argument is not None
            position, name = tap.argument

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.act(tap, kwargs[name] if name in kwargs else args[position])

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if tap.element is None:
                assert isinstance(output, Tensor), f"{tap.name} returns {type(output)}"
            self.act(tap, output if tap.element is None else output[tap.element])

        return module.register_forward_hook(after)

    def act(self, tap: Tap, x: Tensor) -> None:
        x = x.view(-1, x.shape[-1])
        if tap.columns is not None:
            x = x[:, slice(*tap.columns)]
        assert x.shape == (len(TOKENS), tap.width), f"{tap.name}: {tuple(x.shape)}"
        self.names.append(tap.name)
        for stage in tap.stages:
            if self.shift is not None and stage.site == self.shift[0]:
                x += self.shift[1].to(x.dtype)
            state = x if not stage.over_residual else self.residual + x
            self.states[stage.site] = state.clone()
        if tap.after == "set":
            self.residual = x.clone()
        elif tap.after == "add":
            self.residual = self.residual + x

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Pair:
    """One family: both models, on the same weights."""

    def __init__(self, path: str, dtype: str) -> None:
        arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64}
        self.config = EngineArgs(model=path, dtype=dtype, **arguments).create_engine_config()
        with self.context():
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{path}/rendezvous", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            self.model = get_model(vllm_config=self.config)
        halve_linear_attention(self.model)
        self.map: VllmMap = describe(self.model, self.config.model_config.hf_config)

    @contextmanager
    def context(self) -> Iterator[None]:
        with set_current_vllm_config(self.config), torch.inference_mode():
            yield

    def run(self, taps: tuple[Tap, ...], shift: tuple[Site, Tensor] | None = None) -> Tapping:
        tapping = Tapping(self.model, taps, shift)
        with self.context(), set_forward_context(None, self.config, num_tokens=len(TOKENS)):
            self.model(input_ids=TOKENS, positions=torch.arange(len(TOKENS)), intermediate_tensors=None)
        tapping.remove()
        return tapping


class Reference:
    """The sites of a transformers model, as they are and with a shift at each of them in turn."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.config._attn_implementation = "mixed"
        halve_linear_attention(self.model)
        self.map = architectures.describe(self.model)
        sites = [site for site in self.map.sites() if site != Site("logits")]
        self.states = self.read(sites)
        self.shifts = {site: torch.randn(self.map.handle(site).width) for site in sites}
        self.shifted = {site: self.read([site, END], (site, shift)) for site, shift in self.shifts.items()}

    def read(self, sites: list[Site], shift: tuple[Site, Tensor] | None = None) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}

        def visitor(site: Site) -> Any:
            def visit(x: Tensor) -> Tensor | None:
                changed = x + shift[1] if shift is not None and shift[0] == site else None
                found[site] = (x if changed is None else changed).clone().reshape(len(TOKENS), -1)
                return changed

            return visit

        visitors = [(self.map.handle(site), visitor(site)) for site in dict.fromkeys(sites)]
        with torch.inference_mode(), hooks.attach(self.model, visitors):
            self.model(TOKENS[None])
        return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def examine(path: str, reference: Reference) -> dict[str, Any]:
    pair = Pair(path, "float32")
    sites = [site for site in pair.map.sites() if site != Site("logits")]
    taps = pair.map.taps(sites)
    tapping = pair.run(taps)
    shifted, moved = {}, {}
    for site in sites:
        found = pair.run(pair.map.taps([site, END]), (site, reference.shifts[site])).states
        expected = reference.shifted[site]
        shifted[str(site)] = max(distance(found[one], expected[one]) for one in (site, END))
        moved[str(site)] = distance(expected[END], reference.states[END])
    theirs, ours = set(reference.map.sites()), set(pair.map.sites())
    return {
        "class": type(pair.model).__name__,
        "states": {str(site): distance(tapping.states[site], reference.states[site]) for site in sites},
        "shifted": shifted,
        "moved": min(moved.values()),
        "widths": {str(site): [pair.map.widths(site), reference.map.handle(site).width] for site in ours & theirs},
        "missing": sorted(map(str, theirs - ours)),
        "extra": sorted(map(str, ours - theirs)),
        "order": tapping.names == [tap.name for tap in taps],
        "rounding": rounding(path),
    }


def rounding(path: str) -> list[bool] | None:
    """Whether r holds, bit for bit, what the blocks themselves return as residual, in a 16-bit dtype."""
    pair = Pair(path, "bfloat16")
    family = next(one for one in architectures.FAMILIES.values() if one.name == pair.map.family)
    if not family.vllm.returns_residual:
        return None
    sites = [Site("resid_post", layer=layer) for layer in range(pair.map.num_layers)]
    seen: list[tuple[Tensor, Tensor]] = []
    blocks = pair.model.get_submodule(family.vllm.layers)
    handles = [
        block.register_forward_hook(lambda _, a, out: seen.append((out[0].clone(), out[1].clone()))) for block in blocks
    ]
    states = pair.run(pair.map.taps(sites)).states
    for handle in handles:
        handle.remove()
    return [torch.equal(states[site], sum(own)) for site, own in zip(sites, seen, strict=True)]


class Pretence(type):
    """A class whose every attribute is a name: enough for image code that is imported and never run."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def pretend_torchvision() -> None:
    """vLLM's multimodal modules import it, and no build of it suits a CPU torch; text needs nothing of it."""
    parts = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".io")
    for name in (f"torchvision{part}" for part in parts):
        module = ModuleType(name)
        module.__getattr__ = lambda attribute: Pretence(attribute, (), {})  # type: ignore[method-assign]
        module.__path__, module.__spec__ = [], ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module


def look(path: str) -> dict[str, Any]:
    """Describe a multimodal class without running it."""
    config = EngineArgs(model=path, dtype="float32", skip_tokenizer_init=True, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
    taps = describe(model, config.model_config.hf_config).every_tap
    return {
        "class": type(model).__name__,
        "inside": all(tap.module_path.startswith("language_model.model.") for tap in taps),
        "entries": [tap.name for tap in taps if tap.name.endswith(".in")],
        "argument": taps[0].argument,
    }


def main() -> None:
    registry._run_in_subprocess = lambda function: function()  # one process is enough to look at a class
    _set_torch_accelerator_to_noop()
    replace_attention()
    paths, multimodal = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    references = {name: Reference(path) for name, path in paths.items()}  # first: vLLM changes their classes
    for name, path in paths.items():
        try:
            found[name] = examine(path, references[name])
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    pretend_torchvision()
    for name, path in multimodal.items():
        try:
            found[name] = look(path)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(found))


main()
