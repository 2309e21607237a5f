"""Runs: what they write, when they stop, what they refuse, and whether what comes out is what was trained."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.errors import InputError, NonFiniteError, RecipeError
from trimtab.results import from_json, to_json
from trimtab.results.sae import SAERun, SAEStepLine
from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.data import Filters, Stream, StreamConfig, TensorSource
from trimtab.sae.files import load
from trimtab.sae.precision import Precision
from trimtab.sae.train import Plan, train, train_stream
from trimtab.sae.train.opening import open_training

SMALL: dict[str, Any] = {"batch_size": 64, "buffer_rows": 256, "held_out": 128}


def dictionary(out: Path, **given: Any) -> SAERun:
    settings = {"d_sae": 48, "steps": 12, "warmup": 2, "eval_every": 5, **SMALL, **given}
    return train("synthetic:32x16:3", out=out, **settings)


def lines(folder: Path) -> list[SAEStepLine]:
    return [from_json(SAEStepLine, line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_early_exit_takes_exactly_so_many_steps_of_the_same_schedule(tmp_path: Path) -> None:
    whole = dictionary(tmp_path / "whole")
    found = dictionary(tmp_path / "early", early_exit=7)
    assert (found.steps, found.total_steps, found.stopped, found.passed) == (7, 12, "early_exit", True)
    assert (whole.steps, whole.stopped) == (12, "finished")
    early, all_lines = lines(tmp_path / "early" / "sae"), lines(tmp_path / "whole" / "sae")
    assert [(one.loss, one.lr) for one in early] == [(one.loss, one.lr) for one in all_lines[:7]]
    assert found.tokens == 7 * 64


@pytest.mark.parametrize(("every", "steps"), [(1, [*range(1, 13)]), (5, [5, 10, 12]), (0, None)])
def test_lines_are_written_as_often_as_asked(every: int, steps: list[int] | None, tmp_path: Path) -> None:
    seen: list[int] = []
    dictionary(tmp_path, log_every=every, on_line=lambda line: seen.append(line.step))
    assert seen == (steps or [])
    assert (tmp_path / "sae" / "steps.jsonl").exists() == (steps is not None)
    if steps is not None:
        assert [one.step for one in lines(tmp_path / "sae")] == steps


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [0, 5, 10, 12]),
        ({"skip_initial_eval": True}, [5, 10, 12]),
        ({"eval_every": 0}, [0, 12]),
        ({"held_out": 0}, []),
    ],
)
def test_the_held_out_tokens_are_looked_at_as_often_as_asked(
    given: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    found = dictionary(tmp_path, **given)
    assert [one.step for one in found.saes[0].checks] == steps


def test_timing_is_logged_only_when_asked_and_lines_hold_statistics_at_looks(tmp_path: Path) -> None:
    dictionary(tmp_path / "a", log_timing=True)
    dictionary(tmp_path / "b")
    assert set(lines(tmp_path / "a" / "sae")[0].seconds) >= {"data", "step"}
    plain = lines(tmp_path / "b" / "sae")
    assert all(not one.seconds for one in plain)
    assert [one.step for one in plain if one.statistics] == [5, 10, 12]
    known = {f"{kind}/{name}" for kind in ("norm", "mean", "grad_norm", "grad_mean") for name in ("W_enc", "threshold")}
    assert known | {"fvu", "log10_density/0.5"} <= set(plain[4].statistics)


def exact(learned: dict[str, Tensor], x: Tensor) -> Tensor:
    """JumpReLU written down again, float64."""
    p = {name: one.double() for name, one in learned.items()}
    pre = (x.double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    return torch.where(pre > p["threshold"], pre, 0) @ p["W_dec"] + p["b_dec"]


def test_the_files_hold_the_sae_that_was_trained_in_hidden_units(tmp_path: Path) -> None:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 5 + 2
    found = train(x, out=tmp_path, d_sae=32, steps=60, lr=1e-3, storage="float32", max_norm=None, **SMALL)
    sae, check = load(found.saes[0].path), found.saes[0].checks[-1]
    held = x[:128]
    tensors = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    error = (exact(tensors, held) - held.double()).square().sum()
    fvu = float(error / (held.double() - held.double().mean(0)).square().sum())
    assert fvu == pytest.approx(check.fvu, rel=1e-4)
    assert check.fvu < found.saes[0].checks[0].fvu
    norm = found.data["measured"]["x"]["norm"]
    assert norm == pytest.approx(float(x.double().square().sum(1).mean().sqrt()), rel=0.02)


def test_a_transcoder_reconstructs_another_site_in_its_own_units(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    y = torch.relu(x @ torch.randn(8, 6, generator=generator)) * 30 + 1
    found = train(
        {"x": x, "y": y}, out=tmp_path, sites="x", target="y", architecture="topk", k=6, d_sae=64, steps=120, lr=1e-2,
        storage="float32", max_norm=None, seeds=(1,), **SMALL,
    )  # fmt: skip
    made = found.saes[0]
    assert (made.d_in, made.d_out, made.site, made.target) == (8, 6, "x", "y")
    sae = load(made.path)
    held = slice(0, 128)
    predicted = sae.decode(sae.encode(x[held]))
    fvu = float((predicted - y[held]).square().sum() / (y[held] - y[held].mean(0)).square().sum())
    assert fvu == pytest.approx(made.checks[-1].fvu, rel=1e-3)
    assert fvu < 0.8 * made.checks[0].fvu


def test_sites_widths_and_seeds_make_an_sae_each(tmp_path: Path) -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    both = {"a": x, "b": x[:, :4].contiguous()}
    found = train(both, out=tmp_path, d_sae=(16, 24), seeds=(0, 1), steps=2, **SMALL)
    assert [one.name for one in found.saes] == [
        f"{site}-{width}-seed{seed}" for site in "ab" for width in (16, 24) for seed in (0, 1)
    ]
    assert all((tmp_path / one.name / "cfg.json").is_file() for one in found.saes)


def test_a_live_model_trains(tmp_path: Path) -> None:
    found = train(
        "testbed:40", sites="layers.2.mlp_out", out=tmp_path, expansion=2, steps=4, lower_dtype="bf16", **SMALL
    )
    assert found.data["source"]["texts"] == "testbed:40"
    assert found.data["left_out_by_token"] > 0
    assert (found.saes[0].dtype, found.saes[0].compute) == ("fp32", "bf16")
    assert load(found.saes[0].path).site == "layers.2.mlp_out"
    json.loads(to_json(found))


# --- red flags --------------------------------------------------------------------------------------------------------


def rules(path: Path, limit: float) -> str:
    path.write_text(f"rules:\n  - {{name: high, metric: recon, max: {limit}, level: flag, text: too high}}\n")
    return str(path)


def test_a_red_flag_is_told_and_stops_a_strict_run(tmp_path: Path) -> None:
    file = rules(tmp_path / "r.yaml", 1e-6)
    told = dictionary(tmp_path / "told", monitor=file)
    assert [(one.rule, one.step, one.level) for one in told.warnings] == [("high", 1, "flag")]
    assert (told.passed, told.steps) == (True, 12)
    strict = dictionary(tmp_path / "strict", monitor=file, strict=True)
    assert (strict.passed, strict.stopped, strict.steps) == (False, "flag", 1)
    assert "too high" in strict.reason
    assert from_json(SAERun, (tmp_path / "strict" / "run.json").read_text()) == strict


def test_parameters_that_cannot_learn_are_told_before_the_first_step(tmp_path: Path) -> None:
    """Thresholds far above every activation: no latent fires, so that nothing has a gradient."""
    found = dictionary(tmp_path, threshold=1e4, early_exit=1)
    assert [(one.rule, one.step) for one in found.warnings][:1] == [("gradient self-test", 0)]
    assert "W_enc: the gradient is 0 everywhere" in found.warnings[0].text


def test_a_run_that_left_the_numbers_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.sae.learner import Learner

    whole = Learner.parameters_unscaled

    def broken(self: Learner) -> dict[str, Tensor]:
        found = whole(self)
        found["W_enc"][0, 0] = torch.nan
        return found

    monkeypatch.setattr(Learner, "parameters_unscaled", broken)
    with pytest.raises(NonFiniteError, match="sae: W_enc hold NaN or Inf after 12 steps at fp32/fp32"):
        dictionary(tmp_path, eval_every=0, held_out=0)


# --- TensorBoard, wandb -----------------------------------------------------------------------------------------------


def test_tensorboard_holds_figures_and_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dictionary(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "sae" / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss", "recon", "l0", "dead", "grad_norm", "coefficient", "norm/W_dec", "grad_norm/W_enc", "fvu"} <= {
        *tags["scalars"]
    }
    assert {"log10_density", "parameter_values/W_enc", "grad_values/threshold"} <= {*tags["histograms"]}
    written = [(one.step, one.value) for one in events.Scalars("recon")]
    expected = [(one.step, one.recon) for one in lines(tmp_path / "sae")]
    assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_wandb_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    logged: list[tuple[int, dict[str, Any]]] = []
    begun: list[dict[str, Any]] = []
    ended: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(True))

    def init(**given: Any) -> Any:
        begun.append(given)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Histogram=lambda values: len(values)))
    dictionary(tmp_path, wandb="project")
    assert begun[0]["project"] == "project"
    figures = [(step, values["recon"]) for step, values in logged if "recon" in values]
    assert figures == [(one.step, one.recon) for one in lines(tmp_path / "sae")]
    assert any("log10_density" in values for _, values in logged)
    assert ended == [True]


@pytest.mark.parametrize(
    ("device", "own"), [(None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_every_process_that_torchrun_starts_has_a_device_of_its_own(
    device: str | None, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    given = {
        name: None for name in ("model", "backend", "model_dtype", "engine", "context_size", "model_batch", "column")
    }
    opened = open_training("synthetic:32x16:3", sites=None, target="", device=device, settings=SMALL, **given)
    opened.stream.close()
    assert opened.device == own


def test_one_process_shares_its_parameters_with_nobody_and_says_so(tmp_path: Path) -> None:
    run = dictionary(tmp_path / "shared", shard_parameters=True)
    assert run.notes[0] == "shard_parameters changed nothing: one process sees all tokens"
    assert run.saes[0].last == dictionary(tmp_path / "plain").saes[0].last


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "bf16", "lower_dtype": "fp16"}, r"bfloat16/float16; one of fp32/fp32, fp32/bf16, fp32/fp16, bf16"),
        ({"lower_dtype": "fp16"}, "add adam_trick"),
        ({"target_l0": 49.0}, "at most d_sae = 48 latents"),
        ({"nonsense": 1}, "no setting 'nonsense'; there are adam_trick, architecture"),
        ({"early_exit": 13}, "early_exit is 13; 1 to 12"),
        ({"monitor": "loud"}, "neither auto, off, one of"),
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"architecture": "topk", "k": 49}, "needs 1 to d_sae = 48"),
        ({"sites": "layers.1.mlp_out"}, "the stream has no site layers.1.mlp_out; it has x"),
        ({"shard_latents": 2}, "2 processes are to share the latents, and 1 are running"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, InputError), match=words):
        dictionary(tmp_path / "out", **given)
    assert not (tmp_path / "out" / "run.json").exists()


def test_data_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for data, words in (
        ("synthetic:4", "write synthetic, synthetic:FxD"),
        ("nothing.txt", "no such file"),
        (torch.ones(500, 4), "all 500 activations of x are the same vector"),
        (torch.zeros(0, 4), "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            train(data, sites="layers.1.mlp_out" if data == "nothing.txt" else None, out=tmp_path, steps=2, **SMALL)
    with pytest.raises(InputError, match="no site was given"):
        train("testbed:4", out=tmp_path, steps=2)
    with pytest.raises(InputError, match="a target has one input"):
        train("testbed:4", sites=("a", "b"), target="c", out=tmp_path, steps=2)


def plan(d_in: int = 8, name: str = "sae", **given: Any) -> Plan:
    return Plan(name=name, config=SAEConfig(d_in=d_in, d_sae=16), optim=OptimConfig(), **given)


def test_another_width_than_the_saes_is_refused(tmp_path: Path) -> None:
    stream = Stream(TensorSource(torch.randn(400, 8)), StreamConfig(**SMALL))
    with pytest.raises(InputError, match="activations of x have width 8, the SAE is for 9"):
        train_stream(plan(9), stream, out=tmp_path)
    with pytest.raises(RecipeError, match="every one needs a name of its own"):
        train_stream([plan(), plan()], stream, out=tmp_path)
    with pytest.raises(InputError, match="no SAE is to be trained"):
        train_stream([], stream, out=tmp_path)
    with pytest.raises(RecipeError, match="fp32/fp16: float16 gradients underflow"):
        plan(precision=Precision.parse("fp32", "fp16"))


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    from trimtab.errors import TraceLockedError

    found: list[BaseException] = []

    def second(line: SAEStepLine) -> None:
        if line.step == 1:
            try:
                dictionary(tmp_path)
            except TraceLockedError as error:
                found.append(error)

    dictionary(tmp_path, on_line=second)
    assert "is being written by process" in str(found[0])


def test_the_reading_thread_ends_with_the_run(tmp_path: Path) -> None:
    dictionary(tmp_path)
    assert not [one for one in threading.enumerate() if one.name == "trimtab-prefetch"]


def test_filters_are_stated(tmp_path: Path) -> None:
    tokens = torch.arange(1000) % 5
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    source = TensorSource(x, tokens=tokens, special=frozenset({0}))
    found = train(source, out=tmp_path, d_sae=16, steps=2, tokens=(3,), **SMALL)
    assert found.data["left_out_by_token"] / found.data["tokens_read"] == pytest.approx(0.4)
    assert found.data["config"]["filters"] == {"special": True, "tokens": [3], "max_norm": Filters().max_norm}
