"""The workflows at their edges: short generations, odd models, several ops, damaged runs, other kinds of prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import trimtab as tt
from trimtab import testbed
from trimtab.cli import main
from trimtab.errors import InputError, RecipeError, SiteError, SteeringError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.analysis import Analysis
from trimtab.sites import resolve_sites
from trimtab.testing.models import tiny, tiny_tokenizer
from trimtab.workflows import _drift
from trimtab.workflows._agreement import Tokens

TEXTS = ["ab cd", "hello"]
PAIR = ["bf16", "float32"]


def save_tiny(place: Path, family: str, **options: Any) -> str:
    model = tiny(family, **options)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def direction(seed: int, width: int = 64) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def mixed() -> tt.Steering:
    """Several ops at one site, and several sites."""
    return tt.Steering(
        {
            "layers.0.resid_post": [tt.Add(direction(0), scale=0.5), tt.Cap(direction(1), max=0.1)],
            "layers.1.attn_out": [tt.Ablate(direction(2), keep=0.0)],
        }
    )


def swept(model: str, out: Path, **options: Any) -> Path:
    arguments = {"configs": PAIR, "max_tokens": 4, "run_id": "run", "steering": None} | options
    prompts = arguments.pop("prompts", TEXTS)
    run = tt.sweep(model, prompts, out=out, **arguments)
    assert run.finished
    return Path(run.path)


@pytest.fixture(scope="module")
def mixed_run(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swept(llama, tmp_path_factory.mktemp("mixed"), steering=mixed(), max_tokens=6)


def generated(run: Path, label: str, which: str, prompt: int) -> list[int]:
    tokens = tt.Trace.open(run / label / which).tokens
    rows = tokens.filter((pl.col("prompt") == prompt) & pl.col("generated")).sort("position")
    return rows["token_id"].to_list()


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("gemma2", {}), ("gemma3", {}), ("qwen3", {"layers": 1})]
)
def test_other_models_from_disk_sweep_from_a_saved_steering(family: str, options: Any, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / family, family, **options)
    file = tmp_path / "steering.safetensors"
    tt.Steering({"layers.0.mlp_out": [tt.Cap(direction(0), max=0.05)]}).save(file)
    run = swept(model, tmp_path, steering=file, max_tokens=3)
    analysis = tt.analyze(run)
    assert analysis.passed, analysis.reason
    assert analysis.num_layers == options.get("layers", 2)
    assert any(step.clamped for step in analysis.cap_steps)
    assert from_json(Analysis, to_json(analysis)) == analysis
    assert tt.generate(model, TEXTS, steering=file, max_tokens=2).texts[0].doses[0].rows > 0
    trace = tt.capture(model, TEXTS, sites="layers.0.mlp_out", out=tmp_path / "t", steering=file, max_tokens=2)
    assert set(trace.index["edit"]) == {"after"}


def test_a_sweep_without_steering_goes_through_to_its_report(llama: str, tmp_path: Path) -> None:
    run = swept(llama, tmp_path, configs=["bf16", "bf16_cap_fp32", "float32"], prompts=[*TEXTS, "xyz"])
    analysis = tt.analyze(run)
    assert analysis.passed and not analysis.cap_steps
    assert {row.op_math for row in analysis.configs} == {"none"}
    assert analysis.recommendation is None, "there is no op to do in more precision"
    assert all(row.clamp_rate is None for row in analysis.configs)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["analyze", str(run), "--json"]) == 0


def test_clamp_rate_and_match_ratio_are_what_the_tables_say(mixed_run: Path) -> None:
    analysis = tt.analyze(mixed_run)
    assert analysis.passed, analysis.reason
    for row in analysis.configs:
        trace = tt.Trace.open(mixed_run / row.label / "forced")
        first = {
            prompt: trace.tokens.filter((pl.col("prompt") == prompt) & pl.col("generated"))["position"].min() - 1
            for prompt in range(len(TEXTS))
        }
        clamped, deltas = [], []
        for dose in trace.dose.to_dicts():
            if dose["op"] == "1:Cap" and dose["position"] >= first[dose["prompt"]]:
                assert dose["clamped"] == (dose["cap_delta"] != 0)
                clamped.append(dose["p_before"] > 0.1)
                deltas.append(min(dose["p_before"], 0.1) - dose["p_before"])
        assert row.clamp_rate == pytest.approx(sum(clamped) / len(clamped), abs=1e-12)
        assert 0 < row.clamp_rate < 1
        assert row.cap_delta_rms == pytest.approx((sum(d * d for d in deltas) / len(deltas)) ** 0.5, rel=2e-2)
        ours = [generated(mixed_run, "float32", "free", prompt) for prompt in range(len(TEXTS))]
        theirs = [generated(mixed_run, row.label, "free", prompt) for prompt in range(len(TEXTS))]
        equal = sum(a == b for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=False))
        assert row.match_ratio == equal / sum(map(len, ours))
    assert {step.op for step in analysis.cap_steps} == {"0:Add", "1:Cap", "0:Ablate"}


def test_without_a_clamp_there_is_no_clamp_rate(llama: str, tmp_path: Path) -> None:
    steering = tt.Steering({"layers.0.resid_post": [tt.Add(direction(0), scale=0.5)]})
    analysis = tt.analyze(swept(llama, tmp_path, steering=steering))
    assert analysis.cap_steps and all(row.clamp_rate is row.cap_delta_rms is None for row in analysis.configs)


def test_one_generated_token_is_enough(llama: str, tmp_path: Path) -> None:
    analysis = tt.analyze(swept(llama, tmp_path, steering=mixed(), max_tokens=1, prompts=["q"]))
    assert analysis.passed, analysis.reason
    assert {cell.step for cell in analysis.drift} == {0}
    assert analysis.prompts[0].num_tokens == 1


def test_a_reference_that_stops_early_is_followed_to_its_end(llama: str, tmp_path: Path) -> None:
    place = tmp_path / "stops"
    model = tiny("llama")
    free = tt.generate(llama, TEXTS, max_tokens=6).texts
    model.generation_config.eos_token_id = model.config.eos_token_id = free[0].token_ids[0]
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    run = swept(str(place), tmp_path, max_tokens=6)
    assert len(generated(run, "float32", "free", 0)) == 1
    assert generated(run, "bf16", "forced", 0) == generated(run, "float32", "free", 0)
    analysis = tt.analyze(run)
    assert analysis.passed, analysis.reason
    rows = sum(len(generated(run, "float32", "free", prompt)) for prompt in range(2))
    assert len(analysis.drift) == rows * analysis.num_layers


def test_an_op_that_never_fires_is_refused_unless_that_is_allowed(llama: str, tmp_path: Path) -> None:
    never = tt.Steering({"layers.0.resid_post": [tt.Cap(direction(0), max=0.1)]}, positions="generated")
    with pytest.raises(tt.TrimtabError, match="selected no row"):
        swept(llama, tmp_path, steering=never, max_tokens=1, run_id="no")
    run = swept(llama, tmp_path, steering=never, max_tokens=1, allow_unfired=True)
    analysis = tt.analyze(run)
    assert analysis.passed and analysis.configs[0].clamp_rate is None
    assert main(["analyze", str(run)]) == 0


def test_prompts_may_be_messages_and_token_ids(llama: str, tmp_path: Path) -> None:
    prompts = ["ab", [10, 11, 12], [{"role": "user", "content": "hi"}]]
    run = swept(llama, tmp_path, prompts=prompts)
    assert tt.sweep(llama, prompts, out=tmp_path, run_id="run", configs=PAIR, max_tokens=4).finished
    analysis = tt.analyze(run)
    assert analysis.passed, analysis.reason
    assert [one.num_tokens for one in analysis.prompts][:2] == [2, 3]
    assert "hi" in analysis.prompts[2].text and analysis.prompts[0].text == "ab"
    alone = tt.generate(llama, prompts, max_tokens=4)
    assert [list(one.token_ids) for one in alone.texts] == [generated(run, "float32", "free", i) for i in range(3)]
    assert tt.rerun(run, out=tmp_path / "again").finished
    for wrong in (["ab", ""], ["ab", 7], [[]], [{"role": "user"}]):
        with pytest.raises(InputError, match="prompt"):
            tt.sweep(llama, wrong, out=tmp_path, run_id="wrong")


def test_any_configuration_can_be_the_reference(llama: str, tmp_path: Path) -> None:
    run = swept(
        llama, tmp_path, steering=mixed(), configs=["float64", "bf16", "bf16_cap_fp32"], reference="bf16",
        prompts=[*TEXTS, "xyz"],
    )  # fmt: skip
    analysis = tt.analyze(run)
    assert analysis.passed and analysis.reference == "bf16"
    exact = tt.analyze(run, reference_config="float64")
    assert exact.recommendation is not None
    assert (exact.recommendation.baseline, exact.recommendation.alternative) == ("bf16", "bf16_cap_fp32")


def test_two_runs_with_equal_labels_keep_their_own_figures(mixed_run: Path, llama: str, tmp_path: Path) -> None:
    weaker = tt.Steering({"layers.0.resid_post": [tt.Add(direction(0), scale=0.5), tt.Cap(direction(1), max=1e6)]})
    other = swept(llama, tmp_path, steering=weaker, max_tokens=6, configs=["float32"])
    analysis = tt.analyze(mixed_run, other, config="float32", reference_config="float32")
    reference, candidate = analysis.configs
    assert reference.label != candidate.label
    assert reference.clamp_rate > 0 and candidate.clamp_rate == 0
    assert {one.config for one in analysis.agreements} == {candidate.label}
    assert analysis.next_command.count("--config ") == 1


def test_sites_of_a_sweep_choose_the_layers_whose_drift_is_expected(llama: str, tmp_path: Path) -> None:
    run = swept(llama, tmp_path, sites="layers.1.resid_post layers.0.mlp_out")
    analysis = tt.analyze(run)
    assert analysis.passed, analysis.reason
    assert {cell.layer for cell in analysis.drift} == {1}
    with pytest.raises(RecipeError, match="resid_post"):
        swept(llama, tmp_path, sites="layers.*.mlp_out", run_id="none")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steering": tt.Steering({"layers.0.resid_post": [tt.Cap(direction(0, 32), max=1.0)]})}, VectorError),
        ({"steering": tt.Steering({"layers.7.resid_post": [tt.Cap(direction(0), max=1.0)]})}, SiteError),
        ({"sites": "layers.9.resid_post"}, SiteError),
        ({"steering": "nowhere.safetensors"}, SteeringError),
        ({"steering": tt.Steering({"layers.0.resid_post": [tt.Edit(lambda h: h)]})}, SteeringError),
    ],
)
def test_what_cannot_run_leaves_no_directory(
    llama: str, tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        swept(llama, tmp_path, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["free", "forced"])
def test_missing_tokens_are_said(llama: str, tmp_path: Path, which: str) -> None:
    run = swept(llama, tmp_path)
    for part in (run / "bf16" / which).rglob("tokens/*.parquet"):
        part.unlink()
    analysis = tt.analyze(run)
    assert not analysis.passed and "bf16" in analysis.reason


def test_missing_rows_are_said(mixed_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {prompt: len(generated(mixed_run, "float32", "free", prompt)) for prompt in (0, 1)}
    real = tt.Trace.open

    def without(path: Any, **options: Any) -> tt.Trace:
        trace = real(path, **options)
        kept = [one for one in trace.index["record_id"] if not lost(trace, one)]
        return trace.filter(record_id=kept) if Path(path).parts[-2:] == ("bf16", "forced") else trace

    def lost(trace: tt.Trace, record: int) -> bool:
        row = trace.index.row(by_predicate=pl.col("record_id") == record, named=True)
        return bool(row["site"] == "layers.1.resid_post" and row["prompt"] == 1)

    monkeypatch.setattr(tt.Trace, "open", without)
    analysis = tt.analyze(mixed_run)
    assert not analysis.passed
    assert analysis.ledger.expected_rows == 2 * sum(steps.values())
    assert analysis.ledger.compared_rows == analysis.ledger.expected_rows - steps[1]
    assert f"bf16, prompt 1: {steps[1]} captured rows are missing" in analysis.reason


def test_a_damaged_index_is_said(llama: str, tmp_path: Path) -> None:
    run = swept(llama, tmp_path)
    part = next((run / "bf16" / "forced").rglob("records/*.parquet"))
    part.write_bytes(part.read_bytes()[:-50])
    analysis = tt.analyze(run)
    assert not analysis.passed and "bf16" in analysis.reason


def test_rows_that_are_not_finite_are_shown_as_such(mixed_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _drift.row_metrics

    def broken(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, torch.Tensor]:
        spoilt = candidate.clone()
        spoilt[0, 0] = float("nan")
        spoilt[1, 0] = float("inf")
        return real(reference, spoilt)

    monkeypatch.setattr(_drift, "row_metrics", broken)
    analysis = tt.analyze(mixed_run)
    assert {cell.band for cell in analysis.drift if cell.step < 2} == {">1"}
    assert all(cell.max_ulp is None for cell in analysis.drift if cell.step < 2)
    row = next(one for one in analysis.configs if one.label == "bf16")
    assert str(row.rel_l2_max) == str(row.rel_l2_mean) == "nan"
    document = json.loads(to_json(analysis))
    assert document["configs"][1 if document["configs"][0]["is_reference"] else 0]["rel_l2_mean"] == "nan"
    assert main(["analyze", str(mixed_run)]) == 0


def test_a_state_of_zeros_has_a_drift() -> None:
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(_drift.row_metrics(zeros, zeros)["rel_l2"]) == 0
    assert float(_drift.row_metrics(zeros, zeros)["cosine"]) == 1
    assert float(_drift.row_metrics(zeros, ones)["rel_l2"]) == float("inf")


def test_debug_decode_shows_what_all_ops_of_the_site_did(llama: str) -> None:
    two = [tt.Cap(direction(1), max=0.1), tt.Add(direction(0), scale=0.5)]
    both = tt.debug_decode(llama, "ab cd", steering=tt.Steering({"layers.0.resid_post": two}), max_tokens=4)
    alone = tt.debug_decode(llama, "ab cd", steering=tt.Steering({"layers.0.resid_post": two[:1]}), max_tokens=4)
    assert both.steps[0].reference_cap_delta == pytest.approx(alone.steps[0].reference_cap_delta, rel=1e-5)
    assert any(step.reference_clamped for step in both.steps)
    with pytest.raises(InputError, match="both sides"):
        tt.debug_decode(llama, "ab", steering=tt.Steering({"layers.0.resid_post": two}), dtype="bf16",
                        compare_dtype="bfloat16")  # fmt: skip


def test_a_wrong_word_is_not_taken_for_the_default(llama: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'befor'"):
        tt.capture(llama, TEXTS, sites="layers.0.resid_post", out=tmp_path / "a", edit="befor")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a prompt is"):
        tt.generate(llama, [1, 2, 3])  # type: ignore[list-item]


def test_a_capture_with_an_edit_cannot_be_repeated_and_says_so(llama: str, tmp_path: Path) -> None:
    steering = tt.Steering({"layers.0.resid_post": [tt.Edit(lambda h: h * 0.5)]})
    tt.capture(llama, TEXTS, sites="layers.0.resid_post", out=tmp_path / "a", steering=steering, max_tokens=2)
    with pytest.raises(InputError, match="cannot be repeated"):
        tt.rerun(tmp_path / "a")
    tt.capture(llama, TEXTS, sites="layers.0.resid_post", out=tmp_path / "b", steering=tt.Steer(), max_tokens=2)
    assert tt.rerun(tmp_path / "b")


def test_options_that_would_be_ignored_are_refused(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n  \n")
    both = ["--steering", "s.safetensors", "--vector", "random:0", "--cap", "1"]
    for argv, message in (
        (["sweep", "--prompt-file", str(empty), "--print-python"], "holds no prompt"),
        (["generate", "ab", *both, "--print-python"], "not both"),
        (["capture", "ab", "--out", "x", *both, "--print-python"], "not both"),
        (["sweep", *both, "--print-python"], "not both"),
        (["debug-decode", "-p", "ab", *both, "--print-python"], "not both"),
        (["generate", "ab", "--layer", "2", "--print-python"], "without a vector"),
    ):
        assert main(argv) == 2, argv
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["max_tokens: five\n", "steering: {vector: 'random:0', layer: two, cap: 1}\n", "prompts: 3\n", "seed: [1]\n"],
)
def test_a_value_of_the_wrong_kind_in_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    spec = tmp_path / "sweep.yaml"
    spec.write_text("model: testbed\n" + text)
    with pytest.raises(RecipeError, match=text.partition(":")[0]):
        tt.sweep(spec=spec, out=tmp_path)


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    spec = tmp_path / "sweep.yaml"
    spec.write_bytes(b"model: \xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot be read|is not YAML"):
        tt.sweep(spec=spec, out=tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": 1, "plan": {"model": "x"}}'])
def test_a_damaged_sweep_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=r"sweep\.json"):
        tt.analyze(tmp_path)


def test_a_run_of_fewer_tokens_is_not_blamed_on_other_tokens(llama: str, tmp_path: Path) -> None:
    long = swept(llama, tmp_path, max_tokens=4, configs=["float32"], run_id="long")
    short = swept(llama, tmp_path, max_tokens=2, configs=["float32"], run_id="short")
    analysis = tt.analyze(long, short)
    assert not analysis.passed
    assert "ended after 2 of 4" in analysis.reason


def test_steer_and_testbed_names_reach_a_sweep(tmp_path: Path) -> None:
    ready = testbed.direction("animal")
    steer = tt.Steer(vector="testbed:animal", add=1.0, layer=-1)
    run = swept("testbed", tmp_path, steering=steer, prompts=["The keeper"], max_tokens=2)
    analysis = tt.analyze(run)
    assert analysis.passed and "layers.5" in analysis.steering and ready.site
    assert replace(analysis.configs[0], tokens_per_second=None).clamp_rate is None


def test_a_range_that_runs_backwards_in_this_model_is_refused() -> None:
    assert [site.layer for site in resolve_sites("layers.-4-2.q", 5)] == [1, 2]
    with pytest.raises(SiteError, match="runs backwards"):
        resolve_sites("layers.-4-2.q", 12)


def test_a_view_by_site_keeps_all_tokens(mixed_run: Path) -> None:
    trace = tt.Trace.open(mixed_run / "bf16" / "forced")
    view = trace.filter(site="layers.1.resid_post")
    assert set(view.index["site"]) == {"layers.1.resid_post"}
    assert view.tokens.equals(trace.tokens)
    assert trace.filter().index.equals(trace.index)


def test_a_divergence_of_a_wide_margin_is_not_called_a_near_tie(mixed_run: Path, monkeypatch: Any) -> None:
    real = Tokens.of.__func__  # type: ignore[attr-defined]

    def other(cls: Any, frame: pl.DataFrame, prompt: int) -> Tokens:
        """The candidate's free tokens, with step 2 replaced and its log-probabilities turned around."""
        found = real(cls, frame, prompt)
        if frame["config"][0] != "bf16":
            return found
        ids = (*found.ids[:2], found.top_ids[2][1], *found.ids[3:])
        top = (*found.top_ids[:2], (found.top_ids[2][1], found.top_ids[2][0], *found.top_ids[2][2:]))
        return replace(found, ids=ids, top_ids=(*top, *found.top_ids[3:]))

    monkeypatch.setattr("trimtab.workflows.analyze.Tokens.of", classmethod(other))
    one = next(one for one in tt.analyze(mixed_run).agreements if one.first_divergence == 2)
    assert one.reference_margin is not None and one.reference_margin > 0.2
    assert "does not explain it" in one.explanation, one.explanation
