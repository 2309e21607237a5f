"""A sweep: its options from three sources, and going on batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import trimtab as tt
from trimtab.backends.hf import HFBackend
from trimtab.errors import BackendError, TraceLockedError, UnfinishedError
from trimtab.testing.models import tiny, tiny_tokenizer
from trimtab.workflows import _sweep_files
from trimtab.workflows.config import SWEEP_DEFAULTS, SweepOptions
from trimtab.workflows.sweep import _settings


def saved(place: Path, family: str) -> str:
    tiny(family).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


def test_arguments_win_over_the_file_and_both_over_the_defaults(tmp_path: Path) -> None:
    spec = tmp_path / "sweep.yaml"
    spec.write_text("max_tokens: 3\nseed: 5\nconfigs: bf16\ndevice: null\n")
    settings = _settings(spec, {"seed": SWEEP_DEFAULTS.seed, "prompts": "a"})
    assert (settings["max_tokens"], settings["seed"], settings["logprobs"]) == (3, 0, 5)
    assert (settings["configs"], settings["prompts"]) == (("bf16",), ("a",))
    assert SweepOptions().given() == {} and SweepOptions(seed=0).given() == {"seed": 0}


def test_a_model_of_unknown_family_is_swept_by_consent(tmp_path: Path) -> None:
    model = saved(tmp_path / "falcon", "falcon")
    options: dict[str, Any] = {
        "steering": tt.Steering({"layers.0.resid_post": [tt.Add(torch.ones(64))]}),
        "configs": ["float32"],
        "max_tokens": 1,
        "out": tmp_path,
    }
    with pytest.raises(BackendError, match="allow_fallback=True"):
        tt.sweep(model, ["ab"], run_id="no", **options)
    assert not (tmp_path / "no").exists()
    made = tt.sweep(model, ["ab"], run_id="yes", allow_fallback=True, **options)
    assert made.finished
    assert tt.rerun(made.path, out=tmp_path / "again").finished


PASSES = [(label, which) for label in ("float32", "bf16") for which in ("free", "forced")]
TEXTS = ["ab cd", "hello", "q", "xyz ab", "cd"]


class Cut:
    """Ends the n-th batch of a sweep in its middle: after its tokens were written, before it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.error: type[BaseException] = KeyboardInterrupt
        self.batches = self.forwards = 0
        real = HFBackend.generate

        def generate(backend: HFBackend, requests: Any, **options: Any) -> Any:
            counter = backend.model.register_forward_pre_hook(self.count)
            try:
                made = real(backend, requests, **options)
            finally:
                counter.remove()
            self.batches += 1
            if self.batches == self.at:
                options["writer"].flush()
                raise self.error
            return made

        monkeypatch.setattr(HFBackend, "generate", generate)

    def count(self, *_: object) -> None:
        self.forwards += 1

    def start(self, at: int | None = None) -> None:
        self.at, self.batches, self.forwards = at, 0, 0


def run(model: str, out: Path, name: str = "run", **options: Any) -> Path:
    steering = tt.Steering({"layers.0.resid_post": [tt.Cap(torch.ones(64), max=0.1)]})
    options = {"configs": ["float32", "bf16"], "max_tokens": 3, "batch_size": 2, "steering": steering} | options
    return Path(tt.sweep(model, TEXTS, out=out, run_id=name, **options).path)


def contents(path: Path) -> dict[str, Any]:
    """All that a sweep holds: every table, and every tensor's bytes."""
    found: dict[str, Any] = {}
    for label, which in PASSES:
        trace = tt.Trace.open(path / label / which)
        assert not trace.problems
        found[label, which] = trace.index.drop("shard").to_dicts(), trace.tokens.to_dicts(), trace.dose.to_dicts()
        found[label, which, "values"] = [trace.tensor(one) for one in trace.index["record_id"]]
        assert tt.trace.verify(trace.path).passed
    return found


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    for key, value in one.items():
        if key[-1] != "values":
            assert value == two[key], key
            continue
        assert len(value) == len(two[key])
        for a, b in zip(value, two[key], strict=True):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), key


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return Cut(monkeypatch)


def test_a_sweep_that_was_cut_anywhere_repeats_only_the_batch_it_was_cut_in(
    llama: str, tmp_path: Path, cut: Cut
) -> None:
    whole = contents(run(llama, tmp_path, "whole"))
    batches, forwards = cut.batches, cut.forwards
    assert batches == 12
    each = forwards // batches
    for at in (1, 2, 5, 9, 12):
        cut.start(at)
        with pytest.raises(UnfinishedError):
            run(llama, tmp_path, f"cut{at}")
        assert cut.batches == at
        cut.start()
        again = run(llama, tmp_path, f"cut{at}")
        assert cut.batches == batches - (at - 1)
        assert cut.forwards == each * cut.batches
        assert not list(again.rglob(_sweep_files.PROGRESS))
        assert_equal(whole, contents(again))
        assert tt.analyze(again).passed


def test_batches_are_kept_whatever_ended_the_sweep(llama: str, tmp_path: Path, cut: Cut) -> None:
    cut.error = BackendError
    cut.start(2)
    with pytest.raises(BackendError):
        run(llama, tmp_path)
    cut.start()
    path = run(llama, tmp_path)
    assert cut.batches == 11
    assert tt.analyze(path).passed


@pytest.mark.parametrize("damage", ["torn", "lost"])
def test_a_pass_whose_progress_cannot_be_trusted_is_run_again(
    llama: str, tmp_path: Path, cut: Cut, damage: str
) -> None:
    cut.start(3)
    with pytest.raises(UnfinishedError):
        run(llama, tmp_path)
    free = tmp_path / "run" / "float32" / "free"
    if damage == "torn":
        (free / _sweep_files.PROGRESS).write_text('{"prompts": 4')
    else:
        next(free.rglob("tokens/part-00000*")).unlink()
    cut.start()
    path = run(llama, tmp_path)
    assert cut.batches == 12
    assert tt.analyze(path).passed


def test_two_processes_do_not_run_one_sweep(llama: str, tmp_path: Path, cut: Cut) -> None:
    cut.start(2)
    with pytest.raises(UnfinishedError):
        run(llama, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with _sweep_files.load(tmp_path / "run").lock(), pytest.raises(TraceLockedError, match="being written by process"):
        run(llama, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_tokens_and_seconds_of_a_resumed_pass_are_those_of_all_its_batches(
    llama: str, tmp_path: Path, cut: Cut
) -> None:
    cut.start(3)
    with pytest.raises(UnfinishedError):
        run(llama, tmp_path)
    first = _sweep_files.load(tmp_path / "run").committed("float32", "free")
    assert (first.prompts, first.tokens) == (4, 12) and first.seconds > 0
    cut.start()
    files = _sweep_files.load(run(llama, tmp_path))
    done = files.done("float32", "free")
    assert done is not None and done["seconds"] > first.seconds
    assert done["tokens"] == int(files.trace("float32", "free").tokens.select(pl.col("generated").sum()).item()) == 15
