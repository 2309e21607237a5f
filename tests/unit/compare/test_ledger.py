"""Complete, or failed: what was expected, what is short, and what a waiver excuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.compare import compare
from trimtab.compare.waivers import waived_by
from trimtab.errors import InputError, TraceVersionError

Write = Callable[..., Path]
X = torch.arange(12.0).reshape(3, 4)
SITES = ["layers.0.resid_post", "layers.1.resid_post"]
IDS = [5, 6, 7, 8, 20, 21, 22, 23]


def expect(path: Path, document: Any) -> Path:
    file = path.parent / "expect.json"
    file.write_text(json.dumps(document))
    return file


def balanced(result: Any) -> bool:
    """found = compared + unmatched + skipped + corrupt, in total and in every group."""
    ledger = result.ledger
    sides = [ledger.reference, ledger.candidate]
    sides += [side for group in ledger.groups for side in (group.reference, group.candidate)]
    return all(side.found == side.compared + side.unmatched + side.skipped + side.corrupt for side in sides)


def test_a_tensor_missing_on_either_side_fails(dump: Write) -> None:
    both, fewer = dump("a", {"h": X, "ids": X}), dump("b", {"h": X})
    for reference, candidate, side in ((both, fewer, "reference"), (fewer, both, "candidate")):
        result = compare(reference, candidate)
        assert not result.passed and result.exit_code == 1 and balanced(result)
        assert [(entry.side, entry.kind, entry.count) for entry in result.ledger.entries] == [(side, "unmatched", 1)]
        assert compare(reference, candidate, waive=["ids"]).passed
        assert compare(reference, candidate, waive=["unmatched:id*"]).passed
        assert not compare(reference, candidate, waive=["skipped:ids"]).passed


def test_fewer_steps_fail(write: Write) -> None:
    two = write("a", [("h", X, {"step": 0}), ("h", X, {"step": 1})])
    result = compare(two, write("b", [("h", X, {"step": 0})]))
    assert not result.passed
    steps = {group.value: group for group in result.ledger.groups if group.axis == "step"}
    assert steps["1"].reference.unmatched == 1 and steps["0"].reference.compared == 1
    assert balanced(result)


def test_ranks_are_counted(write: Write) -> None:
    one = write("a", [("h", X, {"rank": rank}) for rank in (0, 1)])
    result = compare(one, write("b", [("h", X, {"rank": 0})]))
    ranks = {group.value: group.reference.unmatched for group in result.ledger.groups if group.axis == "rank"}
    assert ranks == {"0": 0, "1": 1}


def test_nothing_compared_fails(dump: Write, write: Write) -> None:
    result = compare(dump("a", {"h": X}), dump("b", {"g": X}))
    assert not result.passed and result.reason.startswith("nothing was compared")
    assert not compare(result.reference, result.candidate, waive=["*"]).passed
    empty = compare(write("c", []), write("d", []))
    assert not empty.passed and empty.reason == "nothing was compared"


def test_a_plan_notices_what_both_sides_lack(write: Write) -> None:
    plan = {"names": ["h", "ids"], "steps": [0, 1], "note": "plans may say more"}
    runs = [
        write(name, [("h", X, {"step": 0}), ("h", X, {"step": 1}), ("ids", X, {"step": 0})], plan=plan) for name in "ab"
    ]
    result = compare(*runs)
    assert not result.passed
    assert result.ledger.reference.expected == 4 and result.ledger.reference.found == 3
    missing = [(entry.side, entry.kind, entry.name) for entry in result.ledger.entries]
    assert missing == [(side, "missing", "ids phase=any step=1") for side in ("reference", "candidate")]
    assert compare(*runs, waive=["missing:ids*"]).passed


def test_an_expectation_file_by_phase(write: Write) -> None:
    runs = [write(name, [("h", X, {"phase": "fwd_only"}), ("layers.1", X, {"phase": "fwd_bwd"})]) for name in "ab"]
    good = expect(runs[0], {"phases": {"fwd_only": ["h"], "fwd_bwd": ["layers.*"]}})
    assert compare(*runs, expect=good).passed
    bad = expect(runs[0], {"phases": {"fwd_only": ["h", "input_ids"]}})
    result = compare(*runs, expect=bad)
    assert not result.passed and "input_ids" in result.reason and str(bad) in result.ledger.expectation


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"sites": ["embed"], "prompt": [0]}, "unknown key 'prompt'"),
        ({}, "expects nothing"),
        ([1], "is a JSON object"),
        ({"phases": ["h"]}, "phases is list"),
        ({"names": ["h"], "steps": "first"}, "cannot be read"),
    ],
)
def test_expectations_that_cannot_be_read(dump: Write, document: Any, said: str) -> None:
    run = dump("a", {"h": X})
    with pytest.raises(InputError, match=said):
        compare(run, run, expect=expect(run, document))


def test_a_missing_expectation_file_and_bad_json(dump: Write) -> None:
    run = dump("a", {"h": X})
    with pytest.raises(InputError, match="cannot be read"):
        compare(run, run, expect=run / "nowhere.json")
    file = run.parent / "expect.json"
    file.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        compare(run, run, expect=file)


def generated(count: int = 7) -> dict[tuple[str, int], torch.Tensor]:
    return {(site, 0): torch.ones(count, 4) for site in SITES}


def test_the_rows_law_is_checked(generation: Write) -> None:
    plan = {"sites": ["layers.*.resid_post"], "num_layers": 2, "requests": [[0, "r0"]], "positions": "all"}
    whole = [generation(name, generated(), {0: IDS}, plan=plan) for name in "ab"]
    result = compare(*whole)
    assert result.passed and result.ledger.reference.expected == 14
    short = [generation(name, generated(6), {0: IDS}, plan=plan) for name in "cd"]
    result = compare(*short)
    assert not result.passed
    assert "1 of 7 rows of the rows law are not recorded, first at position 6" in result.reason


def test_logits_have_one_row_per_generated_token(write: Write, tokens: Callable[..., Any]) -> None:
    plan = {"sites": ["logits"], "prompts": 1, "positions": "all"}
    for count, passed in ((4, True), (3, False)):
        records = [
            (
                "l",
                torch.ones(count, 4),
                {"site": "logits", "prompt": 0, "request": "r0", "positions": range(3, 3 + count)},
            )
        ]
        runs = [write(f"{name}{count}", records, tokens(IDS, 4), kind="generation", plan=plan) for name in "ab"]
        assert compare(*runs).passed is passed


def test_a_layer_missing_on_both_sides_is_noticed(generation: Write) -> None:
    plan = {"sites": ["layers.*.resid_post"], "num_layers": 3, "prompts": 1}
    result = compare(*[generation(name, generated(), {0: IDS}, plan=plan) for name in "ab"])
    assert not result.passed and "layers.2.resid_post" in result.reason


def test_no_plan_is_said(dump: Write) -> None:
    result = compare(dump("a", {"h": X}), dump("b", {"h": X}))
    assert result.passed
    assert result.ledger.reference.expected is None
    assert any("no plan says what must be there" in text for text in result.warnings)


def test_an_interrupted_trace_fails(write: Write) -> None:
    from trimtab.trace import TraceWriter

    whole = write("a", [("h", X, {})])
    with pytest.raises(KeyboardInterrupt), TraceWriter(whole.parent / "b", provenance={}) as writer:
        writer.write("h", X)
        raise KeyboardInterrupt
    result = compare(whole, whole.parent / "b")
    assert not result.passed and "incomplete" in result.reason
    assert [entry.kind for entry in result.ledger.entries] == ["incomplete"]
    assert compare(whole, whole.parent / "b", waive=["incomplete"]).passed


def test_values_that_were_not_kept_are_skipped_unless_identical(write: Write) -> None:
    one = write("a", [("h", X, {}), ("g", X, {})], level="statistics")
    assert compare(one, write("b", [("h", X, {}), ("g", X, {})])).passed
    result = compare(one, write("c", [("h", X, {}), ("g", X + 1, {})]))
    assert not result.passed and balanced(result)
    assert [(entry.kind, entry.name.split()[0]) for entry in result.ledger.entries] == [("skipped", "g")]
    assert result.reason.startswith("incomplete: skipped in both: g") and "values were not kept" in result.reason


def test_waivers_are_globs_and_failures_need_their_kind(dump: Write) -> None:
    one, two = dump("a", {"h": X, "g": X}), dump("b", {"h": X + 1, "g": X})
    assert not compare(one, two, waive=["h", "*"]).passed
    result = compare(one, two, waive=["failed:h"])
    assert result.passed and result.records[0].waived_by == "failed:h" and result.first_divergence is None
    with pytest.raises(InputError, match="is one text"):
        compare(one, two, waive="h")


def test_a_waiver_that_excuses_nothing_is_said(dump: Write) -> None:
    run = dump("a", {"h": X})
    for waiver in ("h", "missing:h", "h phase=* step=0*", "corrupt"):
        assert any(f"{waiver!r} excused nothing" in text for text in compare(run, run, waive=[waiver]).warnings)


@pytest.mark.parametrize(
    ("waiver", "said"),
    [
        ("layers.0.mpl_out", "'layers.0.mpl_out' names nothing in the two runs; nearest of 4: layers.0.mlp_out"),
        ("failed:layers.0.mpl_out", "nearest of 4: layers.0.mlp_out"),
        ("nothing*", "names nothing"),
        ("inconclusiv:layers.*", "did you mean 'inconclusive:layers.*'"),
        ("skiped", "did you mean 'skipped'"),
        ("ids step=9*", "names nothing"),
    ],
)
def test_a_waiver_that_can_excuse_nothing_is_refused_with_the_nearest_names(
    dump: Write, waiver: str, said: str
) -> None:
    run = dump("a", {"layers.0.mlp_out": X, "layers.0.attn_out": X, "ids": X, "loss": X})
    with pytest.raises(InputError, match=re.escape(said)):
        compare(run, run, waive=["ids", waiver])


def test_what_is_only_expected_can_be_waived(dump: Write, tmp_path: Path) -> None:
    run = dump("a", {"ids": X})
    wanted = tmp_path / "expect.json"
    wanted.write_text('{"names": ["ids", "labels"]}')
    assert compare(run, run, expect=wanted, waive=["labels"]).passed
    with pytest.raises(InputError, match="nearest of 2: labels"):
        compare(run, run, expect=wanted, waive=["lables"])


def test_corruption_is_never_waived() -> None:
    assert waived_by(["*", "corrupt", "corrupt:*"], "corrupt", "h") is None
    assert waived_by(["h[tp]"], "skipped", "h[tp]") == "h[tp]"


def run(write: Write, name: str, steps: Iterable[int], ranks: Iterable[int] = (0,), names: str = "abc") -> Path:
    """A dump of some tensors by step and rank."""
    return write(
        name,
        [
            (
                one,
                torch.randn(4, 8, generator=torch.Generator().manual_seed(step)),
                {"step": step, "rank": rank, "phase": "fwd_bwd"},
            )
            for rank in ranks
            for step in steps
            for one in names
        ],
    )


def test_overlapping_step_ranges_are_one_entry_a_side_and_what_overlaps_is_compared(write: Write) -> None:
    result = compare(run(write, "one", range(6)), run(write, "two", range(3, 9)))
    assert not result.passed and result.counts["identical"] == 9
    assert [(one.side, one.name, one.count) for one in result.ledger.entries] == [
        ("reference", "steps 0-2", 9),
        ("candidate", "steps 6-8", 9),
    ]
    assert result.ledger.entries[0].reason.startswith("the candidate has no such step; it has 3-8 (9 records of 3 tens")
    assert result.reason.startswith("incomplete: unmatched in the reference: steps 0-2: ")
    one, two = run(write, "three", range(6)), run(write, "four", range(3, 9))
    assert compare(one, two, waive=["steps 0-2", "unmatched:steps 6-8"]).passed
    some = compare(one, two, waive=["a phase=fwd_bwd step=1 *", "b"])
    assert [(entry.count, entry.waived_by) for entry in some.ledger.entries if entry.waived_by is None] == [
        (5, None),
        (6, None),
    ]


def test_a_rank_that_one_side_lacks_is_one_entry(write: Write) -> None:
    result = compare(run(write, "one", range(3), (0, 1)), run(write, "two", range(3)))
    (entry,) = result.ledger.entries
    assert (entry.side, entry.name, entry.count) == ("reference", "rank 1", 9)
    assert "the candidate has no rank 1" in entry.reason and result.counts["identical"] == 9


def test_different_models_are_doubted_in_one_line(write: Write) -> None:
    result = compare(run(write, "one", range(2), names="abcd"), run(write, "two", range(2), names="axyz"))
    assert not result.passed and result.counts["identical"] == 2
    assert "only 1 of 4 tensors of the reference and of 4 of the candidate have the same name" in result.warnings[0]
    assert sorted(entry.name for entry in result.ledger.entries) == list("bcdxyz")
    assert {entry.count for entry in result.ledger.entries} == {2}
    none = compare(run(write, "three", range(2), names="ab"), run(write, "four", range(2), names="xy"))
    assert none.reason.startswith(
        "nothing was compared: unmatched in the reference: a: the candidate has no such tensor"
    )


def test_a_side_of_a_newer_format_is_refused_in_one_line(dump: Write) -> None:
    old, new = dump("old", {"h": X}), dump("new", {"h": X})
    manifest = new / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    for sides in ((old, new), (new, old)):
        with pytest.raises(TraceVersionError, match="format version 2; this trimtab reads versions up to 1") as error:
            compare(*sides)
        assert str(new) in str(error.value) and "\n" not in str(error.value)
