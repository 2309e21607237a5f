"""Dumping turned on from outside: the command, the environment, the Trainer's callback."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from trimtab import dump
from trimtab.dump.config import DumpConfig
from trimtab.dump.session import Dump
from trimtab.errors import InputError, TraceExistsError
from trimtab.trace import Trace

from .conftest import Net

Make = Callable[..., Net]

SCRIPT = """
import os, sys
import torch
from torch import nn

class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.nn.Linear(3, 3, bias=False)(torch.full((3,), float(index))).detach() * 0 + index

if __name__ == "__main__":
    torch.manual_seed(0 if sys.argv[1] == "seeded" else int.from_bytes(os.urandom(4), "little"))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.register_buffer("scale", torch.ones(1))
    optimizer = torch.optim.AdamW(model.parameters())
    loss_function = nn.MSELoss()
    loader = torch.utils.data.DataLoader(Noise(), batch_size=2, num_workers=1, multiprocessing_context="fork")
    for batch in loader:
        loss_function(model(batch), torch.ones(2, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step done")
        if "fail" in sys.argv:
            raise RuntimeError("the disk is on fire")
"""


def test_a_python_without_trimtab_goes_on(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    (tmp_path / "torch.py").write_text("version = 'of another Python'")
    startup = Path(dump.__file__).with_name("_startup")
    environment = {
        **os.environ,
        "TRIMTAB_DUMP": str(tmp_path / "d"),
        "PYTHONPATH": f"{startup}{os.pathsep}{tmp_path}",
    }
    ran = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", "import torch; print(torch.version)"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "of another Python\n")
    assert ran.stderr.startswith("trimtab: ") and ran.stderr.count("\n") == 1 and "is not recorded" in ran.stderr
    assert not (tmp_path / "d").exists()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_an_untouched_script_is_recorded_and_proved(
    script: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(script), "seeded"]
    found = dump.run(command, tmp_path / "d", tag="target", expect="input,positions", prove=True)
    trace = Trace.open(tmp_path / "d", incomplete_ok=False)
    assert found.counts[0].steps == (0, 1, 2) and found.counts[0].phase == "fwd_bwd"
    assert sum(count.records for count in found.counts) == trace.index.height
    assert found.proof is not None and found.proof.equal and (found.proof.losses, found.proof.outputs) == (2, 2)
    assert found.missing == ("fwd_bwd: positions",) and not found.passed
    assert trace.manifest["plan"]["tag"] == "target"
    assert trace.manifest["provenance"]["argv"] == [str(script), "seeded"]
    step = trace.filter(step=1).index
    assert {"input", "module:0.output", "module:2.grad_output", "loss", "0.weight", "0.weight.exp_avg", "lr.0"} <= set(
        step["name"]
    )
    assert trace.filter(step=2, kind="param").index.height == 4  # what the last update left
    text = str(found)
    assert (
        found.counts[0].left == trace.filter(step=2).index.height == 5 and found.counts[0].fewest > found.counts[0].left
    )
    assert "fwd_bwd rank 0: steps 0 to 1, " in text
    assert f"; {found.counts[0].left} of what the last update left; {found.counts[0].records} in all" in text
    assert "missing: fwd_bwd: positions" in text and "to the bit" in text
    out, err = capfd.readouterr()
    assert "step done" in err and not out  # standard output is the command's own


@pytest.mark.parametrize(
    ("seeds", "words"), [((1, 2, 3), "not deterministic"), ((1, 2, 2), "recording changed the run")]
)
def test_a_run_that_differs_is_told_from_a_program_that_does(
    seeds: tuple[int, ...], words: str, tmp_path: Path, net: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(seeds)

    def execute(command: Any, config: DumpConfig) -> int:
        with Dump(config) as session:
            session.watch(net())
            session.loss(torch.tensor(float(next(left))))
        return 0

    monkeypatch.setattr(importlib.import_module("trimtab.dump.command"), "_execute", execute)
    found = dump.run(["program"], tmp_path / "d", prove=True)
    assert found.proof is not None and not found.proof.equal and not found.passed and words in found.reason


@pytest.mark.full
def test_a_program_that_is_not_deterministic_proves_nothing(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "unseeded"]
    found = dump.run(command, tmp_path / "d", level="digests", parts="loss outputs", prove=True)
    assert found.proof is not None and not found.proof.equal and not found.passed
    assert "not deterministic" in found.reason


def test_a_program_that_fails_keeps_what_it_recorded(script: Path, tmp_path: Path) -> None:
    found = dump.run([sys.executable, str(script), "seeded", "fail"], tmp_path / "d", ring=3, steps="0:9")
    assert found.returncode == 1 and not found.finished and found.counts[0].steps[0] == 0
    assert any("the disk is on fire" in problem for problem in Trace.open(tmp_path / "d").problems)


def test_a_ring_that_nothing_emptied_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "healthy.py"
    path.write_text("import torch\nwith torch.no_grad():\n    torch.nn.Linear(2, 2)(torch.ones(1, 2))\n")
    found = dump.run([sys.executable, str(path)], tmp_path / "d", ring=2)
    assert found.passed and found.finished and not found.counts
    assert found.reason.startswith("no NaN or Inf appeared")


def test_a_program_without_a_model_records_nothing_and_does_not_pass(tmp_path: Path) -> None:
    found = dump.run([sys.executable, "-c", "print(1)"], tmp_path / "d")
    assert not found.passed and found.reason.startswith("nothing was recorded")
    assert not (tmp_path / "d").exists()


def test_bad_commands_are_one_clear_line(tmp_path: Path, net: Make) -> None:
    with pytest.raises(InputError, match="no command"):
        dump.run([], tmp_path / "d")
    with pytest.raises(InputError, match="'--setps' is no option of dump"):
        dump.run(["--setps", "3", "--", "true"], tmp_path / "a")
    with pytest.raises(InputError, match="nowhere-to-be-found"):
        dump.run(["nowhere-to-be-found"], tmp_path / "d")
    with dump.record(tmp_path / "e") as session:
        session.watch(net())
    with pytest.raises(TraceExistsError, match="already holds"):
        dump.run([sys.executable, "-c", "0"], tmp_path / "e")


def test_a_config_survives_the_environment() -> None:
    config = DumpConfig.make(
        "runs/a", tag="target", level="digests", sites="layers.{0,2}.mlp_out module:a.*.input", depth=3, classes="A,B",
        steps=range(0, 9, 2), phase="x", ring=2, max_bytes=10, max_seconds=0.5, expect="megatron", parts="loss",
    )  # fmt: skip
    environment = {"PATH": "/bin", **config.to_environment()}
    assert DumpConfig.from_environment(environment) == config
    assert DumpConfig.from_environment({"TRIMTAB_DUMP": "0", "TRIMTAB_DUMP_LEVEL": "digests"}) is None
    for name, value, words in (("LEVLE", "digests", "TRIMTAB_DUMP_LEVLE"), ("DEPTH", "deep", "TRIMTAB_DUMP_DEPTH")):
        with pytest.raises(InputError, match=words):
            DumpConfig.from_environment({"TRIMTAB_DUMP": "d", f"TRIMTAB_DUMP_{name}": value})


def test_a_bad_environment_ends_the_program_with_one_line() -> None:
    code = "import trimtab.dump.environment as e; e.start()"
    environment = {"TRIMTAB_DUMP": "d", "TRIMTAB_DUMP_STEPS": "often", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "often" in done.stderr


def test_a_wrapper_takes_the_place_of_what_it_wraps(tmp_path: Path, net: Make) -> None:
    model, other = net(), nn.Linear(2, 2)
    with Dump(DumpConfig.make(tmp_path / "d", parts="outputs"), counts_steps=True) as session:
        session.watch_found(model)
        model(torch.ones(1, 3))
        session.watch_found(other)
        other(torch.ones(1, 2))
        wrapped = torch.compile(model, backend="eager")
        session.watch_found(wrapped)
        wrapped(torch.ones(1, 3))
    index = Trace.open(tmp_path / "d").index
    names = index.filter(pl.col("name").str.contains("output"))["name"].to_list()
    assert names.count("output.logits") == 2 and names.count("model1.output") == 1
    assert names.count("module:embed.output") == 1


def test_a_found_model_without_the_sites_does_not_end_the_program(tmp_path: Path, net: Make) -> None:
    model, other = net(), nn.Linear(2, 2)
    config = DumpConfig.make(tmp_path / "d", sites="module:blocks.*.output", parts="outputs")
    with Dump(config, counts_steps=True) as session:
        session.watch_found(other)
        other(torch.ones(1, 2))
        session.watch_found(model)
        model(torch.ones(1, 3))
    trace = Trace.open(tmp_path / "d")
    assert "module:blocks.1.output" in trace.index["site"]
    entry = trace.manifest["plan"]["not_hooked"][0]
    assert entry["class"] == "Linear" and "has no module 'blocks.*'" in entry["reason"]


def test_the_callback_follows_a_trainer(tmp_path: Path, net: Make) -> None:
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    callback: Any = dump.DumpCallback(dump.record(tmp_path / "d", parts="loss param_grads optimizer lr"))
    wrapped = SimpleNamespace(optimizer=optimizer)  # as accelerate does
    handler = CallbackHandler([callback], model, None, wrapped, None)
    state, control = TrainerState(), TrainerControl()
    handler.on_train_begin(None, state, control)
    for _ in range(2):
        handler.on_step_begin(None, state, control)
        for _ in range(2):
            model(torch.ones(2, 3))["logits"].square().mean().backward()
            handler.on_substep_end(None, state, control)
        handler.on_pre_optimizer_step(None, state, control)
        optimizer.step()
        handler.on_optimizer_step(None, state, control)
        optimizer.zero_grad()
        handler.on_step_end(None, state, control)
    handler.on_train_end(None, state, control)
    index = Trace.open(tmp_path / "d", incomplete_ok=False).index
    assert index.filter(pl.col("name") == "loss").select("step", "micro_step").rows() == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert index.filter(pl.col("name") == "head.weight.exp_avg")["step"].to_list() == [0, 1]
    assert index.filter((pl.col("name") == "head.weight") & (pl.col("kind") == "grad"))["step"].to_list() == [0, 1]
