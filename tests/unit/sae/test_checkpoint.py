"""Checkpoints, and runs that are stopped anywhere: the steps that follow have the bits of the run that was not."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trimtab.errors import InputError, UnfinishedError
from trimtab.results.sae import SAERun, SAEStepLine
from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.data import Stream, StreamConfig, SyntheticSource, TensorSource
from trimtab.sae.precision import Precision
from trimtab.sae.synthetic import SparseDictionary
from trimtab.sae.train import Plan, TrainConfig, train_stream
from trimtab.sae.train.checkpoint import Checkpoint, Checkpoints

STEPS = 24
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "topk": {"k": 4, "dead_tokens": 300},
    "batchtopk": {"k": 4, "dead_tokens": 300},
    "gated": {},
    "standard": {},
    "matryoshka-batchtopk": {"k": 4},
    "matryoshka-jumprelu": {"penalty": "tanh", "pre_act_coefficient": 1e-3},
}


def stream(**given: Any) -> Stream:
    source = SyntheticSource(SparseDictionary(32, 16, mean_active=3), rows=1000, chunk_rows=100)
    settings = {"batch_size": 64, "buffer_rows": 256, "held_out": 100, "seed": 3, **given}
    return Stream(source, StreamConfig(**settings))


def plan(kind: str = "jumprelu", name: str = "sae", *, precision: Precision | None = None, **optim: Any) -> Plan:
    config = SAEConfig(architecture=kind, d_in=16, d_sae=48, **KINDS[kind])  # type: ignore[arg-type]
    settings = OptimConfig(lr=3e-3, warmup=4, **optim)
    return Plan(name=name, config=config, optim=settings, precision=precision or Precision(), seed=7)


def config(**given: Any) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "eval_every": 10, "save_every": 5, "seed": 3, **given})


def files(out: Path, name: str = "sae") -> dict[str, str]:
    """Digests of every line of figures and of the weights."""
    parts = {"weights": (out / name / "sae_weights.safetensors").read_bytes()}
    parts |= {
        f"line {number}": line for number, line in enumerate((out / name / "steps.jsonl").read_bytes().splitlines(), 1)
    }
    return {one: hashlib.sha256(data).hexdigest() for one, data in parts.items()}


@contextmanager
def limited(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stopping(stop: int, sent: signal.Signals = signal.SIGTERM) -> Callable[[Any], None]:
    """Send this process a signal in the middle of a step."""
    return lambda line: os.kill(os.getpid(), sent) if line.step == stop else None


def run_in_pieces(out: Path, plans: Plan | list[Plan], stops: list[int]) -> SAERun:
    for stop in stops:
        with pytest.raises(UnfinishedError):
            train_stream(plans, stream(), config(), out=out, on_line=stopping(stop))
    return train_stream(plans, stream(), config(), out=out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_at_any_step_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    optim = {"beta1": 0.9} if kind == "gated" else {}
    optim |= {"target_l0": 5.0} if kind == "jumprelu" else {}
    stops = sorted(random.Random(kind).sample(range(1, STEPS), 2))
    whole = train_stream(plan(kind, **optim), stream(), config(), out=tmp_path / "whole")
    found = run_in_pieces(tmp_path / "pieces", plan(kind, **optim), stops)
    assert files(tmp_path / "pieces") == files(tmp_path / "whole"), stops
    assert found.saes[0].checks == whole.saes[0].checks
    assert found.saes[0].last == whole.saes[0].last
    assert found.data == whole.data
    assert (found.resumed, whole.resumed) == (2, 0)


def test_the_same_in_low_precision_with_rmsprop(tmp_path: Path) -> None:
    for precision in (Precision(torch.float32, torch.bfloat16), Precision(torch.bfloat16, torch.bfloat16)):
        one = plan(precision=precision, optimizer="rmsprop")
        train_stream(one, stream(), config(), out=tmp_path / f"{precision.dtype}")
        run_in_pieces(tmp_path / f"{precision.dtype}-pieces", one, [13])
        assert files(tmp_path / f"{precision.dtype}-pieces") == files(tmp_path / f"{precision.dtype}")


def test_two_deterministic_runs_have_the_same_bits_and_another_seed_has_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        found = train_stream(plan("topk"), stream(), config(deterministic=True), out=tmp_path / name)
        assert found.deterministic
        assert not torch.are_deterministic_algorithms_enabled()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    train_stream(replace(plan("topk"), seed=8), stream(), config(deterministic=True), out=tmp_path / "c")
    assert files(tmp_path / "a") != files(tmp_path / "c")
    train_stream(plan("topk"), stream(seed=4), config(deterministic=True), out=tmp_path / "d")
    assert files(tmp_path / "a") != files(tmp_path / "d")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_call_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(sent)
    with pytest.raises(UnfinishedError, match=f"{sent.name} received after 7 of 24 steps; the state is saved"):
        train_stream(plan(), stream(), config(save_every=0), out=tmp_path / "a", on_line=stopping(7, sent))
    assert signal.getsignal(sent) == before
    assert not (tmp_path / "a" / "run.json").exists()
    seen: list[int] = []
    train_stream(
        plan(), stream(), config(save_every=0), out=tmp_path / "a", on_line=lambda line: seen.append(line.step)
    )
    assert seen == [*range(8, STEPS + 1)]
    train_stream(plan(), stream(), config(save_every=0), out=tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_lines_beyond_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    """A killed process has lines of steps that its checkpoint does not know, the last of them perhaps cut."""
    train_stream(plan(), stream(), config(), out=tmp_path / "whole")
    with pytest.raises(UnfinishedError):
        train_stream(plan(), stream(), config(), out=tmp_path / "a", on_line=stopping(10))
    lines = tmp_path / "a" / "sae" / "steps.jsonl"
    ahead = (tmp_path / "whole" / "sae" / "steps.jsonl").read_bytes().splitlines(keepends=True)[10:13]
    lines.write_bytes(lines.read_bytes() + b"".join(ahead)[:-40])
    train_stream(plan(), stream(), config(), out=tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train_stream(plan(), stream(), config(keep_last=3), out=tmp_path)
    names = sorted(one.name for one in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:09d}.safetensors" for step in (15, 20, 24)]


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(UnfinishedError):
        train_stream(plan(), stream(), config(), out=tmp_path, on_line=stopping(6))
    kept = {one: one.read_bytes() for one in (tmp_path / "checkpoints").iterdir()}
    with (
        pytest.raises(UnfinishedError, match=r"checkpoint of step 10 cannot be written .*step-000000006.* stays"),
        limited(20_000),
    ):
        train_stream(plan(), stream(), config(), out=tmp_path)
    assert {one: one.read_bytes() for one in (tmp_path / "checkpoints").iterdir()} == kept
    train_stream(plan(), stream(), config(), out=tmp_path)
    train_stream(plan(), stream(), config(), out=tmp_path / "whole")
    assert files(tmp_path) == files(tmp_path / "whole")


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    first = train_stream(plan(), stream(), config(), out=tmp_path)
    again = train_stream(plan(), stream(), config(), out=tmp_path, on_line=lambda line: pytest.fail("trained again"))
    assert again == first


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"plan": plan(clip=1.0)}, r"saes.sae.optim.clip is None there, 1.0 here"),
        ({"plan": plan("standard")}, r"saes.sae.config.architecture is 'jumprelu' there, 'standard' here"),
        ({"plan": plan(precision=Precision.parse("bf16", "bf16"))}, r"precision is 'fp32/fp32' there, 'bf16/bf16'"),
        ({"config": {"steps": 25}}, r"run.steps is 24 there, 25 here"),
        ({"stream": {"batch_size": 32}}, r"stream.config.batch_size is 64 there, 32 here"),
    ],
)
def test_a_checkpoint_of_another_configuration_names_what_differs(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    train_stream(plan(), stream(), config(early_exit=3), out=tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=rf"checkpoint of another configuration: \S*{words}"):
        train_stream(
            changed.get("plan", plan()),
            stream(**changed.get("stream", {})),
            config(**changed.get("config", {})),
            out=tmp_path,
        )


def test_settings_that_change_no_figure_may_change(tmp_path: Path) -> None:
    train_stream(plan(), stream(), config(early_exit=3), out=tmp_path)
    train_stream(plan(), stream(), config(log_every=2, keep_last=1, save_every=7, strict=True), out=tmp_path)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    store.save(Checkpoint(step=1, tensors={"a": torch.zeros(100)}, state={}, identity={}))
    path = store.save(Checkpoint(step=2, tensors={"a": torch.zeros(100)}, state={"x": [1.5]}, identity={"b": 1}))
    found = store.load({"b": 1})
    assert found is not None
    assert (found.step, found.state) == (2, {"x": [1.5]})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"or damaged.*remove it to go on from the one before"):
        store.load({"b": 1})
    path.unlink()
    found = store.load({})
    assert found is not None
    assert found.step == 1
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no checkpoint that this version reads"):
        store.load({})


def test_every_sae_of_a_stream_is_trained_as_if_alone(tmp_path: Path) -> None:
    both = [plan("jumprelu", "a"), replace(plan("topk", "b"), seed=1)]
    train_stream(both, stream(), config(), out=tmp_path / "both")
    for one in both:
        train_stream(one, stream(), config(), out=tmp_path / one.name)
        assert files(tmp_path / "both", one.name) == files(tmp_path / one.name, one.name)
    run_in_pieces(tmp_path / "pieces", both, [11])
    assert files(tmp_path / "pieces", "b") == files(tmp_path / "both", "b")


def test_what_was_trained_before_a_nan_is_saved(tmp_path: Path) -> None:
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    x[1500, 3] = torch.nan

    def source(values: torch.Tensor) -> Stream:
        settings = StreamConfig(batch_size=64, buffer_rows=128, held_out=0, prefetch=2, storage="float32")
        return Stream(TensorSource(values, chunk_rows=50), settings)

    # The scale is measured on the first rows, so the whole of the data is read at once unless there are more of them.
    big = torch.cat([torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1)), x])
    steps = TrainConfig(steps=400, eval_every=0, save_every=0, log_every=0)
    with pytest.raises(Exception, match=r"x: row 21500 \(token -1\) holds 1 elements that are NaN"):
        train_stream(plan(), source(big), steps, out=tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_warning_is_told_once_however_often_a_run_is_stopped(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - {name: high, metric: recon, max: 1.0e-6, level: flag, text: too high}\n")
    for stop in (4, 9):
        with pytest.raises(UnfinishedError):
            train_stream(plan(), stream(), config(monitor=str(rules)), out=tmp_path / "run", on_line=stopping(stop))
    found = train_stream(plan(), stream(), config(monitor=str(rules)), out=tmp_path / "run")
    assert [(one.rule, one.step) for one in found.warnings] == [("high", 1)]


def test_lines_know_their_format(tmp_path: Path) -> None:
    from trimtab.results import from_json

    train_stream(plan(), stream(), config(), out=tmp_path)
    lines = (tmp_path / "sae" / "steps.jsonl").read_text().splitlines()
    assert [from_json(SAEStepLine, line).step for line in lines] == [*range(1, STEPS + 1)]
