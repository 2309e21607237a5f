"""Sweep, analyze, capture, rerun and debug-decode on the embedded model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from inspect import signature
from pathlib import Path

import polars as pl
import pytest
import torch

import trimtab as tt
from trimtab import testbed
from trimtab.cli import main
from trimtab.errors import ComparisonError, InputError, RecipeError, SteeringError, TraceExistsError, UnfinishedError
from trimtab.report import render_text
from trimtab.results import Analysis, SweepRun
from trimtab.sites import Site
from trimtab.workflows import sweep as sweep_module


def prompts(count: int) -> list[str]:
    return list(testbed.prompts(count, seed=1))


@pytest.fixture(scope="module")
def cap() -> tt.Steer:
    ready = testbed.direction("animal")
    return tt.Steer(vector="testbed:animal", layer=Site.parse(ready.site).layer, cap=ready.cap)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cap: tt.Steer) -> SweepRun:
    place = tmp_path_factory.mktemp("sweeps")
    return tt.sweep("testbed", prompts(4), steering=cap, max_tokens=12, out=place, run_id="first")


@pytest.fixture(scope="module")
def analysis(run: SweepRun) -> Analysis:
    return tt.analyze(run.path)


def test_a_sweep_finishes_every_configuration(run: SweepRun) -> None:
    assert run.finished
    assert [config.label for config in run.configs] == ["bf16", "bf16_cap_fp32", "float16", "float32"]
    assert all((config.free, config.forced) == ("done", "done") for config in run.configs)


def test_every_row_of_every_layer_was_compared(run: SweepRun, analysis: Analysis) -> None:
    assert analysis.passed, analysis.reason
    generated = sum(len(one.reference_ids) for one in analysis.agreements)
    assert analysis.ledger.expected_rows == analysis.ledger.compared_rows == generated * analysis.num_layers
    assert {cell.layer for cell in analysis.drift} == set(range(analysis.num_layers))


def test_drift_is_what_the_captured_tensors_say(run: SweepRun, analysis: Analysis) -> None:
    reference = tt.Trace.open(Path(run.path) / "float32" / "forced")
    candidate = tt.Trace.open(Path(run.path) / "bf16" / "forced")
    cell = next(one for one in analysis.drift if one.config == "bf16" and one.prompt == 2 and one.step == 5)
    site = f"layers.{cell.layer}.resid_post"
    rows = []
    for trace in (reference, candidate):
        found = [
            trace.rows(site=site, prompt=2, edit=edit)
            for edit in set(trace.index.filter(pl.col("site") == site)["edit"])
        ]
        values, positions = found[0].values, found[0].positions.tolist()
        rows.append(values[positions.index(cell.position)].double())
    assert cell.rel_l2 == pytest.approx(float((rows[1] - rows[0]).norm() / rows[0].norm()), rel=1e-12)
    assert cell.mae == pytest.approx(float((rows[1] - rows[0]).abs().mean()), rel=1e-12)
    assert cell.cosine == pytest.approx(float(torch.cosine_similarity(*rows, dim=0)), abs=1e-12)


def test_lower_precision_drifts_more(analysis: Analysis) -> None:
    mean = {row.label: row.rel_l2_mean for row in analysis.configs}
    assert mean["float32"] is None
    assert mean["bf16"] is not None and mean["float16"] is not None
    assert mean["bf16"] > 4 * mean["float16"] > 0


def test_the_cap_acted_and_its_adjustment_is_the_clamp_s(analysis: Analysis, cap: tt.Steer) -> None:
    assert cap.cap is not None
    steps = [step for step in analysis.cap_steps if step.config == "float32"]
    clamped = [step for step in steps if step.clamped]
    assert clamped and len(clamped) < len(steps)
    for step in steps:
        expected = min(step.projection_before, cap.cap) - step.projection_before
        assert step.cap_delta == pytest.approx(expected, abs=1e-5)
        assert step.clamped == (step.projection_before > cap.cap)


def test_free_tokens_of_an_equal_configuration_are_equal(run: SweepRun) -> None:
    alone = tt.generate("testbed", prompts(4), max_tokens=12, steering=Path(run.path) / "steering.safetensors")
    swept = tt.Trace.open(Path(run.path) / "float32" / "free").tokens
    for index, text in enumerate(alone.texts):
        mine = swept.filter((pl.col("prompt") == index) & pl.col("generated")).sort("position")["token_id"].to_list()
        assert mine == list(text.token_ids)


def test_the_advice_has_its_evidence(analysis: Analysis) -> None:
    advice = analysis.recommendation
    assert advice is not None
    assert (advice.baseline, advice.alternative, advice.num_pairs) == ("bf16", "bf16_cap_fp32", 4)
    assert advice.low <= advice.estimate <= advice.high
    assert ("no measurable difference" in advice.sentence) == (advice.low <= 0 <= advice.high)


def test_one_prompt_and_one_configuration_can_be_chosen(run: SweepRun) -> None:
    one = tt.analyze(run.path, prompt_idx=3, config="float16")
    assert [prompt.index for prompt in one.prompts] == [3]
    assert {cell.config for cell in one.drift} == {"float16"}
    with pytest.raises(InputError, match="it has prompts 0 to 3"):
        tt.analyze(run.path, prompt_idx=4)
    with pytest.raises(InputError, match="it has bf16, bf16_cap_fp32, float16, float32"):
        tt.analyze(run.path, config="fp8")


def test_two_runs_can_be_compared_and_other_prompts_cannot(run: SweepRun, cap: tt.Steer, tmp_path: Path) -> None:
    other = tt.sweep(
        "testbed", prompts(4), steering=cap, max_tokens=12, configs=["float32"], out=tmp_path, run_id="second"
    )
    between = tt.analyze(run.path, other.path, config="float32", reference_config="float32")
    assert between.passed
    assert all(cell.rel_l2 == 0 for cell in between.drift)
    assert any(step.reference_cap_delta == step.cap_delta != 0 for step in between.cap_steps)
    different = tt.sweep(
        "testbed", prompts(5), steering=cap, max_tokens=4, configs=["float32"], out=tmp_path, run_id="third"
    )
    with pytest.raises(ComparisonError, match="4 and 5 prompts"):
        tt.analyze(run.path, different.path)


def test_an_interrupted_sweep_resumes_without_repeating(
    tmp_path: Path, cap: tt.Steer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"steering": cap, "max_tokens": 4, "configs": ["bf16", "float32"], "out": tmp_path, "run_id": "cut"}
    real, passes = sweep_module._run_pass, []

    def cut(files: object, config: object, *rest: object) -> None:
        if len(passes) == 3:
            raise KeyboardInterrupt
        passes.append(config)
        real(files, config, *rest)

    monkeypatch.setattr(sweep_module, "_run_pass", cut)
    with pytest.raises(UnfinishedError, match="the same command again"):
        tt.sweep("testbed", prompts(3), **options)
    assert main(["analyze", str(tmp_path / "cut")]) == 3
    assert "is not finished" in capsys.readouterr().err
    again: list[object] = []
    monkeypatch.setattr(sweep_module, "_run_pass", lambda *all_: (again.append(all_), real(*all_)))
    assert tt.sweep("testbed", prompts(3), **options).finished
    assert len(passes) == 3 and len(again) == 1
    assert tt.analyze(tmp_path / "cut").passed
    with pytest.raises(RecipeError, match="max_tokens differ"):
        tt.sweep("testbed", prompts(3), **(options | {"max_tokens": 5}))


def test_a_sweep_reads_its_options_from_yaml(tmp_path: Path) -> None:
    spec = tmp_path / "sweep.yaml"
    spec.write_text(
        "model: testbed\nprompts: [The keeper]\nmax_tokens: 3\nconfigs: [bf16, float32]\n"
        "steering: {vector: 'random:0', layer: -1, cap: 1.0}\n"
    )
    made = tt.sweep(spec=spec, out=tmp_path, run_id="yaml")
    assert made.finished and made.max_tokens == 3 and "layers.5" in made.steering
    spec.write_text("model: testbed\nmax_tokns: 3\n")
    with pytest.raises(RecipeError, match="unknown option 'max_tokns'"):
        tt.sweep(spec=spec, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "float64"}, "is not among the configurations"),
        ({"configs": ["bf16", "bf16", "float32"]}, "two configurations are called 'bf16'"),
        ({"prompts": [" "]}, "prompt is empty"),
        (
            {"steering": tt.Steer(vector="random:0", layer=2, cap=1.0, op_math="model")},
            "each configuration has its own",
        ),
        ({"max_tokens": 0}, "at least 1 token"),
        ({"run_id": "../x"}, "run id '../x'"),
        ({"model": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_impossible_sweeps_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    arguments = {"model": "testbed", "prompts": ["The keeper"], "out": tmp_path, "run_id": "x"} | options
    with pytest.raises(tt.TrimtabError, match=message):
        tt.sweep(**arguments)
    assert not (tmp_path / "x" / "float32").exists()


def test_a_teacher_forced_capture_follows_the_trace(tmp_path: Path, cap: tt.Steer) -> None:
    texts = prompts(2)
    first = tt.capture("testbed", texts, sites="layers.*.resid_post", out=tmp_path / "a", max_tokens=6, steering=cap)
    second = tt.capture(
        "testbed", texts, sites="layers.*.resid_post", out=tmp_path / "b", along=first, dtype="bfloat16", steering=cap
    )
    assert second.tokens["token_id"].to_list() == first.tokens["token_id"].to_list()
    result = tt.compare(first, second)
    assert result.passed, result.reason
    with pytest.raises(ComparisonError, match="prompt 0 is not the one"):
        tt.capture("testbed", texts[::-1], sites="logits", out=tmp_path / "c", along=first)
    with pytest.raises(TraceExistsError):
        tt.capture("testbed", texts, sites="logits", out=tmp_path / "a")


def test_a_capture_repeats_from_its_manifest(tmp_path: Path, cap: tt.Steer) -> None:
    first = tt.capture(
        "testbed", prompts(1), sites="layers.{0,3}.resid_post", out=tmp_path / "a", max_tokens=4, steering=cap
    )
    again = tt.rerun(tmp_path / "a")
    assert isinstance(again, tt.Trace)
    assert Path(again.path) == tmp_path / "a-rerun"
    keys = ["site", "edit", "digest"]
    assert again.index.select(keys).sort(keys).equals(first.index.select(keys).sort(keys))
    shutil.rmtree(tmp_path / "a-rerun")
    assert main(["rerun", str(tmp_path / "a" / "manifest.json"), "--json"]) == 0


def test_a_sweep_repeats_from_its_manifest(run: SweepRun, tmp_path: Path) -> None:
    again = tt.rerun(Path(run.path) / "sweep.json", out=tmp_path / "again")
    assert isinstance(again, SweepRun) and again.finished
    between = tt.analyze(run.path, again.path, config="bf16", reference_config="bf16")
    assert between.passed and all(cell.rel_l2 == 0 for cell in between.drift)


def test_nothing_to_repeat_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither sweep\.json nor manifest\.json"):
        tt.rerun(tmp_path)
    with tt.TraceWriter(tmp_path / "mine") as writer:
        writer.write("x", torch.ones(2))
    with pytest.raises(InputError, match="does not say which call made it"):
        tt.rerun(tmp_path / "mine")


def test_debug_decode_of_the_op_s_arithmetic_and_of_the_model_s(cap: tt.Steer) -> None:
    text = prompts(1)[0]
    dtype = tt.debug_decode("testbed", text, steering=cap, max_tokens=8, compare_dtype="float32")
    assert len(dtype.steps) == 8
    assert all(step.num_top == 5 and step.shared_top >= 1 for step in dtype.steps)
    assert all(step.max_abs_after > 0 for step in dtype.steps)
    arithmetic = tt.debug_decode("testbed", text, steering=cap, max_tokens=8, compare_precision="float32")
    before = [step.max_abs_before for step in arithmetic.steps]
    assert max(before) < max(step.max_abs_before for step in dtype.steps)


def test_debug_decode_names_the_token_that_the_other_side_chose() -> None:
    cap = tt.Steer(vector="random:0", layer=2, cap=0.1)
    result = tt.debug_decode("testbed", "The", steering=cap, max_tokens=2, compare_dtype="float32")
    assert result.first_divergence == 0 and not result.steps[0].same_token
    assert result.text.startswith(result.steps[0].token.strip())
    assert result.reference_text.startswith(result.steps[0].reference_token.strip())
    text = render_text(result)
    assert "'bleak'" in text and "'growth'" in text, "whole tokens in a line"
    assert "Cap(max=0.1, model) at layers.2.resid_post on all\n" in text


def test_the_help_of_debug_decode_shows_its_own_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug-decode", "--help"]) == 0
    row = next(part for part in capsys.readouterr().out.split("--") if part.startswith("dtype"))
    default = signature(tt.debug_decode).parameters["dtype"].default
    assert f"[default: {default}]" in " ".join(row.split())


def test_debug_decode_refuses_what_it_cannot_show(cap: tt.Steer) -> None:
    with pytest.raises(InputError, match="not both"):
        tt.debug_decode("testbed", "The", steering=cap, compare_dtype="float32", compare_precision="float32")
    with pytest.raises(InputError, match="both sides would run the model in bfloat16"):
        tt.debug_decode("testbed", "The", steering=cap, compare_dtype="bfloat16")
    with pytest.raises(SteeringError, match="looks at an op"):
        tt.debug_decode("testbed", "The", steering=None)
    with pytest.raises(InputError, match="op_math='bfloat16' would be ignored here: the two sides differ in it"):
        tt.debug_decode("testbed", "The", steering=dataclasses.replace(cap, op_math="bfloat16"))
    several = tt.Steering({"layers.{0,1}.resid_post": [tt.Cap(torch.ones(128), max=1.0)]})
    with pytest.raises(SteeringError, match="one site, and this steering has 2"):
        tt.debug_decode("testbed", "The", steering=several)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (tt.Steer(vector="random:0", layer=99, cap=1.0), "layers 0 to 5"),
        (tt.Steer(vector="random:0", cap=1.0), "does not say its layer"),
        (tt.Steer(vector="random:0", layer=1, cap=1.0, cap_min=2.0), "min"),
        (tt.Steer(vector="nowhere.pt", layer=1, cap=1.0), "nowhere.pt"),
        (tt.Steer(vector="random:0", layer=1, cap=1.0, point="resid_pst"), "resid_post"),
        (tt.Steer(vector="testbed:vegetable", layer=1, cap=1.0), "vegetable"),
    ],
)
def test_bad_steering_is_one_clear_error(steer: tt.Steer, message: str) -> None:
    with pytest.raises(tt.TrimtabError, match=message):
        tt.generate("testbed", ["The keeper"], steering=steer, max_tokens=1)


def test_a_vector_of_another_width_says_both_numbers(tmp_path: Path) -> None:
    torch.save(torch.ones(64), tmp_path / "v.pt")
    steer = tt.Steer(vector=str(tmp_path / "v.pt"), layer=1, cap=1.0)
    with pytest.raises(tt.TrimtabError, match=r"64.*128|128.*64"):
        tt.generate("testbed", ["The keeper"], steering=steer)


def test_the_demo_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo"), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["kind"] == "analysis" and document["passed"] is True
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<html" in page and len(page.encode()) < 3_000_000


def test_doctor_finds_the_testbed_and_names_what_was_not_tested(capsys: pytest.CaptureFixture[str]) -> None:
    report = tt.doctor()
    state = {one.name: one for one in report.findings}
    assert state["testbed model"].state == "ok"
    if not torch.cuda.is_available():
        assert state["CUDA"].state == "untested"
    assert all(one.mend for one in report.findings if one.state == "broken")
    main(["doctor"])
    assert "testbed model" in capsys.readouterr().out
