"""How rows and records find their partners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.compare import compare, plan_comparison
from trimtab.errors import ComparisonError, InputError
from trimtab.trace import TraceWriter

Write = Callable[..., Path]
IDS = [5, 6, 7, 8, 20, 21, 22, 23]  # four prompt tokens, four generated ones
SITES = ("layers.0.resid_post", "layers.1.resid_post")


def rows(seed: int = 0, count: int = 7) -> dict[tuple[str, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {(site, prompt): torch.randn(count, 16, generator=generator) for site in SITES for prompt in (0, 1)}


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_how_an_engine_cut_the_rows_does_not_matter(generation: Write, cut: int) -> None:
    values, ids = rows(), {0: IDS, 1: IDS}
    reference = generation("a", values, ids)
    result = compare(reference, generation("b", values, ids, cut=cut))
    assert result.passed, result.reason
    assert result.ledger.unit == "rows"
    assert result.ledger.reference.compared == result.ledger.candidate.compared == 4 * 7
    values[SITES[1], 1][5, 3] += 0.5
    result = compare(reference, generation("c", values, ids, cut=cut))
    assert not result.passed
    first = result.first_divergence
    assert first is not None
    assert (first.key.site, first.key.prompt, first.position, first.index) == (SITES[1], 1, 5, (3,))
    assert first.candidate == pytest.approx(first.reference + 0.5)


def test_rows_may_lie_in_any_order(write: Write, generation: Write) -> None:
    values = rows()
    reference = generation("a", {(SITES[0], 0): values[SITES[0], 0]}, {0: IDS})
    with TraceWriter(reference.parent / "b", kind="generation", provenance={}) as writer:
        tensor = values[SITES[0], 0]
        for positions in ([6, 2, 0], [1, 5, 3, 4]):
            fields = {"site": SITES[0], "prompt": 0, "request": "r0", "positions": positions, "rank": 3, "step": 9}
            writer.write("x", tensor[positions], **fields)
    result = compare(reference, reference.parent / "b")
    assert result.counts["passed"] + result.counts["identical"] == 1
    assert result.ledger.reference.compared == 7


def test_rows_after_the_tokens_diverge_are_skipped_with_the_reason(generation: Write) -> None:
    values = rows()
    other = {key: tensor.clone() for key, tensor in values.items()}
    for (_, prompt), tensor in other.items():
        if prompt == 0:
            tensor[6:] = 100.0  # another token went in: not comparable, whatever it holds
    changed = [*IDS[:6], 99, 23]
    result = compare(
        generation("a", values, {0: IDS, 1: IDS}), generation("b", other, {0: changed, 1: IDS}, prompt_length=4)
    )
    assert all(record.passing for record in result.records)
    assert [(one.prompt, one.position, one.reference_id, one.candidate_id) for one in result.token_divergences] == [
        (0, 6, 22, 99)
    ]
    assert not result.passed  # skipped rows are short
    assert result.ledger.reference.skipped == 2 and result.ledger.reference.compared == 4 * 7 - 2
    entry = result.ledger.entries[0]
    assert entry.kind == "skipped" and "tokens diverge at position 6" in entry.reason
    waived = compare(result.reference, result.candidate, waive=["skipped:tokens prompt=0*"])
    assert waived.passed, waived.reason
    assert not compare(result.reference, result.candidate, waive=["skipped:tokens prompt=1*"]).passed


def test_a_difference_before_the_divergence_still_fails(generation: Write) -> None:
    values, other = rows(), rows()
    other[SITES[0], 0][2] *= 1.5
    changed = [*IDS[:6], 99, 23]
    result = compare(generation("a", values, {0: IDS}), generation("b", other, {0: changed}), waive=["skipped"])
    assert [record.status for record in result.records if not record.passing] == ["failed"]


def test_teacher_forced_rows_compare_to_the_end(generation: Write) -> None:
    values = rows()
    result = compare(generation("a", values, {0: IDS, 1: IDS}), generation("b", values, {0: IDS, 1: IDS}))
    assert result.passed and not result.token_divergences


@pytest.mark.parametrize(
    ("ids", "length", "said"),
    [
        ([5, 6, 99, 8, 20, 21], 4, "at position 2 token 7 in the reference, 99"),
        (IDS, 5, "4 tokens in the reference, 5"),
    ],
)
def test_other_prompts_are_refused(generation: Write, ids: list[int], length: int, said: str) -> None:
    reference = generation("a", rows(), {0: IDS, 1: IDS})
    candidate = generation("b", rows(), {0: ids, 1: IDS}, prompt_length=length)
    with pytest.raises(ComparisonError, match=said):
        compare(reference, candidate)


def test_missing_rows_and_requests_are_unmatched(generation: Write) -> None:
    values = rows()
    fewer = {key: tensor for key, tensor in values.items() if key[1] == 0}
    fewer[SITES[0], 0] = fewer[SITES[0], 0][:5]
    result = compare(generation("a", values, {0: IDS, 1: IDS}), generation("b", fewer, {0: IDS}))
    assert not result.passed
    reasons = {(entry.side, entry.name.split()[0]): entry.reason for entry in result.ledger.entries}
    assert reasons["reference", SITES[0]] in (
        "the candidate has no row at position 5-6",
        "the candidate has no such record",
    )
    assert result.ledger.reference.unmatched == 7 + 7 + 2
    assert result.ledger.candidate.unmatched == 0


def test_steered_rows_do_not_match_unsteered_ones(write: Write) -> None:
    fields = {"site": SITES[0], "prompt": 0, "request": "r0", "positions": [0, 1]}
    x = torch.ones(2, 4)
    one = write("a", [("x", x, {**fields, "edit": "after"})], kind="generation")
    two = write("b", [("x", x, {**fields, "edit": "before"})], kind="generation")
    result = compare(one, two)
    assert not result.passed and result.reason.startswith("nothing was compared")


def test_a_position_recorded_twice_counts_once_if_equal(write: Write) -> None:
    fields = {"site": SITES[0], "prompt": 0, "request": "r0"}
    x = torch.randn(4, 8)
    whole = write("a", [("x", x, {**fields, "positions": [0, 1, 2, 3]})], kind="generation")
    parts = [("x", x[:3], {**fields, "positions": [0, 1, 2]}), ("x", x[2:].clone(), {**fields, "positions": [2, 3]})]
    twice = write("b", parts, kind="generation")
    assert compare(whole, twice).passed
    parts[1][1][0, 0] += 1
    result = compare(whole, write("c", parts, kind="generation"))
    assert not result.passed
    assert "position 2 is recorded more than once, with different values" in result.reason


def test_plain_records_match_by_their_identity(write: Write) -> None:
    x = torch.randn(3, 4)
    base = {"phase": "fwd_bwd", "step": 1, "micro_step": 0, "call_index": 0, "rank": 0}
    variants = [{}, {"phase": "fwd_only"}, {"step": 2}, {"micro_step": 1}, {"call_index": 1}, {"rank": 1}]
    variants += [{"kind": "grad"}, {"layer": 3}, {"recompute": True}]
    records = [("h", x + number, {**base, **fields}) for number, fields in enumerate(variants)]
    one = write("a", records)
    two = write("b", list(reversed(records)))
    result = compare(one, two)
    assert result.passed and len(result.records) == len(variants)
    assert {record.key.kind for record in result.records} == {"value", "grad"}
    for number in range(len(variants)):
        changed = [(name, x + 100 * (place == number), fields) for place, (name, x, fields) in enumerate(records)]
        result = compare(one, write(f"c{number}", changed))
        assert [one.passing for one in result.records].count(False) == 1


def test_equal_identities_pair_in_order_with_a_warning(write: Write) -> None:
    first, second = torch.zeros(3), torch.ones(3)
    one = write("a", [("h", first, {}), ("h", second, {})])
    result = compare(one, write("b", [("h", first, {}), ("h", second, {})]))
    assert result.passed and any("share their identity" in text for text in result.warnings)
    assert not compare(one, write("c", [("h", second, {}), ("h", first, {})])).passed
    fewer = compare(one, write("d", [("h", first, {})]))
    assert not fewer.passed and fewer.ledger.reference.unmatched == 1


def test_hostile_names_match(write: Write) -> None:
    names = ["a/b", "a___b", "a___c", "x" * 400, "[red]", "*", "h[tp]", "", "\N{SNOWMAN}", "a: b"]
    records = [(name, torch.full((3,), float(number)), {}) for number, name in enumerate(names)]
    result = compare(write("a", records), write("b", records))
    assert result.passed and len(result.records) == len(names)


def test_configurations_pair_by_name_or_by_choice(write: Write) -> None:
    x = torch.randn(4, 8)

    def one(name: str, configs: dict[str, torch.Tensor]) -> Path:
        return write(name, [("h", tensor, {"config": config}) for config, tensor in configs.items()])

    both = one("a", {"fp32": x, "bf16": x.bfloat16()})
    result = compare(both, both)
    assert result.passed and {record.key.config for record in result.records} == {"fp32", "bf16"}
    within = compare(both, both, config="bf16", reference_config="fp32")
    assert within.passed and within.records[0].dtype_candidate == "bfloat16"
    other = one("b", {"named differently": x})
    with pytest.raises(ComparisonError, match="choose one each"):
        compare(both, other)
    assert compare(both, other, reference_config="fp32").passed
    assert compare(one("c", {"x": x}), other).passed  # one each: the names do not matter
    with pytest.raises(InputError, match="no configuration 'fp64'; it has: bf16, fp32"):
        compare(both, both, config="fp64")


def test_a_plan_reads_no_tensor_and_can_be_printed(generation: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = generation("a", rows(), {0: IDS, 1: IDS}), generation("b", rows(1), {0: IDS, 1: IDS}, cut=3)

    def refuse(*_: object) -> None:
        raise AssertionError("a plan must not read")

    monkeypatch.setattr("trimtab.trace.Trace.tensor", refuse)
    plan = plan_comparison(one, two)
    text = plan.describe(limit=2)
    assert "pairs: 4 (4 by row and position, 0 whole" in text
    assert "7 rows in 3 pieces, positions 0 to 6" in text and "... and 2 more" in text
