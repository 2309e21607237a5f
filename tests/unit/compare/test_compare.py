"""The whole comparison, from two directories to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.compare import Fixed, Rules, compare
from trimtab.compare import align as align_module
from trimtab.errors import ComparisonError, InputError, TraceError
from trimtab.trace import Trace

Write = Callable[..., Path]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(64, 128)


def test_identical_by_digest_reads_nothing(dump: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = dump("a", {"h": X}), dump("b", {"h": X})

    def refuse(*_: object) -> None:
        raise AssertionError("equal digests need no reading")

    monkeypatch.setattr(Trace, "tensor", refuse)
    result = compare(one, two)
    assert result.passed and result.counts["identical"] == 1
    assert result.to_frame()["rel_l2"].to_list() == [0.0]


def test_bfloat16_against_float32_passes_with_a_note(dump: Write) -> None:
    result = compare(dump("a", {"h": X}), dump("b", {"h": X.bfloat16()}))
    assert result.passed
    record = result.records[0]
    assert record.status == "passed" and record.coarse is not None and record.coarse.rel_l2 == 0
    assert record.coarse_dtype == "bfloat16"
    assert any(text.startswith("dtypes differ: float32 against bfloat16") for text in result.warnings)


def test_a_model_that_computed_coarser_than_it_recorded(dump: Write) -> None:
    noisy = X * (1 + 2**-9 * normal(64, 128, seed=3))  # float32 values with the noise of bfloat16
    assert not compare(dump("a", {"h": X}), dump("b", {"h": noisy})).passed
    said = {"plan": {"dtype": "bfloat16"}}
    assert compare(dump("c", {"h": X}), dump("d", {"h": noisy}, **said)).passed


def test_a_failing_tensor_is_investigated(dump: Write) -> None:
    result = compare(dump("a", {"g": X, "h": X}), dump("b", {"g": X, "h": X * 1.01}))
    assert not result.passed and result.exit_code == 1
    record = result.records[1]
    assert [one.kind for one in record.fingerprints] == ["scale"]
    assert record.fingerprints[0].value == pytest.approx(1.01, rel=1e-5)
    assert record.max_ulp is not None and record.max_ulp > 1000
    gap = (X.double() * 0.01).abs()
    assert record.quantiles == pytest.approx([float(gap.quantile(q)) for q in (0.5, 0.9, 0.99, 0.999)], rel=1e-3)
    assert "h phase=inference step=0" in result.reason


def test_the_first_divergence_of_a_dump_is_the_first_in_execution(write: Write) -> None:
    names = ["z", "m", "a"]
    one = write("a", [(name, X, {"step": step}) for step in (0, 1) for name in names])
    bad = {("a", 0), ("m", 1), ("z", 1)}
    two = write("b", [(n, X + 1.0 * ((n, step) in bad), {"step": step}) for step in (0, 1) for n in names])
    first = compare(one, two).first_divergence
    assert first is not None and (first.key.name, first.key.step) == ("a", 0)


def test_the_first_divergence_of_a_generation_goes_by_position_then_layer(generation: Write) -> None:
    sites = ["layers.10.resid_post", "layers.2.resid_post", "layers.2.attn_out", "embed"]
    values = {(site, 0): normal(8, 32, seed=number) for number, site in enumerate(sites)}
    other = {key: tensor.clone() for key, tensor in values.items()}
    other["layers.10.resid_post", 0][3] += 1
    other["layers.2.resid_post", 0][4] += 1
    other["layers.2.attn_out", 0][4] += 1
    ids = {0: list(range(9))}
    first = compare(generation("a", values, ids), generation("b", other, ids)).first_divergence
    assert first is not None and (first.key.site, first.position) == ("layers.10.resid_post", 3)
    values["layers.10.resid_post", 0] = other["layers.10.resid_post", 0]
    first = compare(generation("c", values, ids), generation("d", other, ids)).first_divergence
    assert first is not None and (first.key.site, first.position) == ("layers.2.attn_out", 4)
    assert first.row_error > 0.1 and first.noise_ratio is not None and first.noise_ratio > 100


def test_a_failed_record_comes_before_an_inconclusive_one(dump: Write) -> None:
    unsure = X + normal(64, 128, seed=2) * 2**-8 * 0.42 * 6
    result = compare(dump("a", {"f": X, "g": X}), dump("b", {"f": unsure.bfloat16(), "g": X + 1}))
    assert [record.status for record in result.records] == ["inconclusive", "failed"]
    assert result.first_divergence is not None and result.first_divergence.key.name == "g"
    only = compare(dump("c", {"f": X}), dump("d", {"f": unsure.bfloat16()}))
    assert only.exit_code == 1 and only.first_divergence is not None
    assert compare(dump("e", {"f": X}), dump("f", {"f": unsure.bfloat16()}), waive=["inconclusive:f"]).passed


def test_integers_give_their_first_difference(dump: Write) -> None:
    ids = torch.arange(2**24, 2**24 + 100)
    off = ids.clone()
    off[40:] += 1
    result = compare(dump("a", {"ids": ids}), dump("b", {"ids": off}))
    assert not result.passed
    first = result.first_divergence
    assert first is not None and (first.index, first.reference, first.candidate) == ((40,), 2**24 + 40, 2**24 + 41)
    assert isinstance(first.reference, int)
    whole = compare(dump("c", {"ids": ids}), dump("d", {"ids": ids + 1}))
    assert [one.kind for one in whole.records[0].fingerprints] == ["shift"]  # of consecutive ids: the same thing


def test_equal_nan_and_inf_pass_with_a_warning(dump: Write) -> None:
    x = X.clone()
    x[3, 4], x[5, 6] = math.nan, -math.inf
    result = compare(dump("a", {"h": x}), dump("b", {"h": x.double()}))
    assert result.passed and any("1 NaN and 1 Inf" in text for text in result.warnings)
    y = x.clone()
    y[3, 4] = 0.0
    failed = compare(dump("c", {"h": x}), dump("d", {"h": y}))
    assert not failed.passed
    first = failed.first_divergence
    assert first is not None and first.index == (3, 4) and math.isnan(first.reference or 0)
    z = x.clone()
    z[9] = math.nan
    named = compare(dump("e", {"h": X}), dump("f", {"h": z}))
    assert named.records[0].fingerprints[0].kind == "nan_rows"


def test_shapes_that_differ_fail(dump: Write, generation: Write) -> None:
    result = compare(dump("a", {"h": X}), dump("b", {"h": X[None]}))
    assert not result.passed and "shapes differ: [64, 128] against [1, 64, 128]" in result.records[0].reasons[0]
    ids = {0: list(range(9))}
    site = ("layers.0.q", 0)
    rows = compare(generation("c", {site: X[:8]}, ids), generation("d", {site: X[:8, :64]}, ids))
    assert not rows.passed and "shapes differ" in rows.records[0].reasons[0]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.complex64, torch.float8_e5m2]
)
def test_every_kind_of_dtype(dump: Write, dtype: torch.dtype) -> None:
    values = (normal(8, 8) * 3).abs()
    values[4, 4] = 3.0
    one = values.to(dtype)
    other = values.clone()
    other[4, 4] = 0.0
    assert compare(dump("a", {"h": one}), dump("b", {"h": one.clone()})).passed
    result = compare(dump("c", {"h": one}), dump("d", {"h": other.to(dtype)}))
    assert not result.passed
    assert result.first_divergence is not None and result.first_divergence.index[:2] == (4, 4)


def test_rows_of_several_dimensions(generation: Write) -> None:
    heads = normal(6, 4, 8)
    other = heads.clone()
    other[2, 3, 5] += 1
    ids = {0: list(range(7))}
    site = ("layers.0.attn_z", 0)
    first = compare(generation("a", {site: heads}, ids), generation("b", {site: other}, ids, cut=2)).first_divergence
    assert first is not None and (first.position, first.index) == (2, (3, 5))


def test_small_chunks_change_nothing(dump: Write, generation: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {0: list(range(65))}
    site = ("layers.0.resid_post", 0)
    pairs = [
        (dump("a", {"h": X}), dump("b", {"h": X * 1.01})),
        (generation("c", {site: X}, ids), generation("d", {site: X * 1.01}, ids, cut=7)),
    ]
    whole = [compare(*pair) for pair in pairs]
    for name in ("CHUNK_ELEMENTS", "FUSED_ELEMENTS"):
        monkeypatch.setattr(align_module, name, 300)
    for pair, before in zip(pairs, whole, strict=True):
        after = compare(*pair)
        ours, theirs = before.records[0], after.records[0]
        assert ours.metrics is not None and theirs.metrics is not None
        assert theirs.metrics.rel_l2 == pytest.approx(ours.metrics.rel_l2, rel=1e-12)
        assert theirs.metrics.max_abs_index == ours.metrics.max_abs_index
        assert theirs.status == ours.status and theirs.max_ulp == ours.max_ulp


def flip_a_byte(run: Path) -> None:
    shard = next(run.glob("rank-*/tensors/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_verify_calls_changed_bytes_corrupt_and_never_different(dump: Write, side: str) -> None:
    one, two = dump("a", {"h": X}), dump("b", {"h": X})
    flip_a_byte(one if side == "reference" else two)
    assert compare(one, two).passed  # equal digests: nothing was read
    result = compare(one, two, verify=True, waive=["corrupt", "*"])
    assert not result.passed and result.counts["corrupt"] == 1
    entry = next(entry for entry in result.ledger.entries if entry.kind == "corrupt")
    assert entry.side == side and "hash" in entry.reason
    assert getattr(result.ledger, side).corrupt == 1 and result.ledger.reference.compared == 0
    clean = compare(dump("c", {"h": X}), dump("d", {"h": X}), verify=True)
    assert clean.passed


def test_rules_judge_single_tensors(dump: Write) -> None:
    one, two = dump("a", {"mlp": X, "attn": X}), dump("b", {"mlp": X * 1.01, "attn": X})
    assert not compare(one, two).passed
    assert compare(one, two, rules=["mlp: rel_l2 < 0.02"]).passed
    assert not compare(one, two, rules=["mlp: rel_l2 < 0.02 and ulp < 4"]).passed
    assert compare(one, two, verdict=Rules(["m.*: rel_l2 < 0.02", ".*: max_abs == 0"])).passed
    assert compare(one, two, verdict=Fixed(rel_l2=0.02)).passed
    assert compare(one, two, verdict="sglang").passed
    unmatched = compare(one, dump("c", {"mlp": X * 1.01, "attn": X * 1.0001}), verdict=Rules(["mlp: rel_l2 < 0.02"]))
    assert not unmatched.passed and "no rule matches" in unmatched.records[1].reasons[0]


def test_a_rule_that_judges_nothing_is_an_error(dump: Write) -> None:
    run = dump("a", {"mlp": X})
    with pytest.raises(InputError, match="rule 'mpl': it matches no tensor; there are mlp"):
        compare(run, run, rules=["mpl: rel_l2 < 1"])
    with pytest.raises(InputError, match="an earlier rule takes all 1"):
        compare(run, run, rules=[".*: rel_l2 < 1", "mlp: rel_l2 < 2"])
    many = dump("b", {f"layers.{layer}.{point}": X for layer in range(4) for point in ("mlp_out", "attn_out")})
    with pytest.raises(InputError, match=r"it matches no tensor; nearest of 8: layers\.2\.mlp_out"):
        compare(many, many, rules=["layers.2.mpl_out: rel_l2 < 1"])


def test_a_rule_whose_tensors_are_never_judged_is_said(dump: Write) -> None:
    ids = torch.arange(5)
    one, two = dump("a", {"h": X, "ids": ids}), dump("b", {"h": X + 1, "ids": ids + 1})
    warnings = compare(one, two, rules=["ids: max_abs < 9", "h: max_abs < 9"]).warnings
    assert [text for text in warnings if "judged nothing" in text] == [
        "the rule 'ids' judged nothing: what it matches has no pair of floating tensors"
    ]
    assert not any("judged nothing" in text for text in compare(one, one, rules=["ids: max_abs < 9"]).warnings)


def noisy(scale: float, seed: int) -> torch.Tensor:
    return X * (1 + scale * normal(64, 128, seed=seed))


def test_a_noise_run_takes_the_place_of_the_model(dump: Write) -> None:
    reference, repeat = dump("a", {"h": X}), dump("b", {"h": noisy(1e-3, 1)})
    candidate = dump("c", {"h": noisy(1e-3, 2)})
    assert not compare(reference, candidate).passed
    result = compare(reference, candidate, noise=repeat)
    assert result.passed
    calibration = result.records[0].calibration
    assert calibration is not None and calibration.source == "noise run"
    assert calibration.expected == pytest.approx(1e-3, rel=0.1)
    assert not compare(reference, dump("d", {"h": noisy(2e-2, 3)}), noise=(reference, repeat)).passed


def test_a_bit_identical_repeat_shows_no_noise(write: Write, dump: Write) -> None:
    reference, candidate = dump("a", {"h": X}), dump("b", {"h": noisy(1e-3, 2)})
    with pytest.raises(ComparisonError, match="bit-identical"):
        compare(reference, candidate, noise=dump("c", {"h": X}))
    stored_wider = dump("d", {"h": X.double()})  # other digests, equal values
    with pytest.raises(ComparisonError, match="bit-identical"):
        compare(reference, candidate, noise=stored_wider)
    with pytest.raises(ComparisonError, match="no record in common"):
        compare(reference, candidate, noise=dump("e", {"g": X}))
    with pytest.raises(InputError, match="does not use it"):
        compare(reference, candidate, noise=candidate, verdict="sglang")


def test_what_the_noise_run_lacks_is_judged_by_the_model(dump: Write) -> None:
    reference = dump("a", {"h": X, "g": X})
    result = compare(reference, dump("b", {"h": X, "g": noisy(1e-7, 2)}), noise=dump("c", {"h": noisy(1e-3, 1)}))
    calibration = result.records[1].calibration
    assert calibration is not None and "not in the noise runs" in calibration.source


def test_rows_are_kept_when_asked_for(generation: Write) -> None:
    ids = {0: list(range(9))}
    site = ("layers.0.resid_post", 0)
    other = X[:8].clone()
    other[5] *= 2
    result = compare(generation("a", {site: X[:8]}, ids), generation("b", {site: other}, ids), keep_rows=True)
    series = result.records[0].series
    assert series is not None and series.positions == tuple(range(8))
    assert series.error[5] == pytest.approx(1.0) and sum(series.error) == pytest.approx(1.0)


def test_a_stale_step_is_recognised_across_records(write: Write) -> None:
    steps = [normal(16, 32, seed=seed) for seed in range(3)]
    one = write("a", [("h", tensor, {"step": step}) for step, tensor in enumerate(steps)])
    two = write("b", [("h", steps[max(step - 1, 0)], {"step": step}) for step in range(3)])
    records = compare(one, two).records
    assert [record.status for record in records] == ["identical", "failed", "failed"]
    assert all(record.fingerprints[0].kind == "stale_step" for record in records[1:])


def test_a_path_that_is_no_trace(tmp_path: Path, dump: Write) -> None:
    with pytest.raises(TraceError, match="no trace at"):
        compare(dump("a", {"h": X}), tmp_path / "nowhere")


def test_traces_may_be_given_open(dump: Write) -> None:
    one, two = dump("a", {"h": X, "g": X}), dump("b", {"h": X, "g": X + 1})
    assert compare(Trace.open(one).filter(name="h"), Trace.open(two).filter(name="h")).passed
