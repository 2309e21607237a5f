"""Packed batches against padded ones, token by token, by their ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.compare.sharing import world, write_run
from trimtab.compare import compare
from trimtab.compare.layout.tokens import pair_tokens
from trimtab.errors import ComparisonError
from trimtab.results.comparison import Comparison
from trimtab.trace import TraceWriter

LENGTHS, LONGEST, WIDTH = (8, 4, 12), 12, 6
BOUNDS = [0, 8, 12, 24]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.randint(5, 1000, (24,), generator=torch.Generator().manual_seed(1))
H = normal(24, WIDTH)


def padded(packed: torch.Tensor, left: bool, filler: float = 0) -> torch.Tensor:
    rows = torch.full((len(LENGTHS), LONGEST, *packed.shape[1:]), filler, dtype=packed.dtype)
    for row, (part, length) in enumerate(zip(packed.split(LENGTHS), LENGTHS, strict=True)):
        start = LONGEST - length if left else 0
        rows[row, start : start + length] = part
    return rows


def padded_run(path: Path, *, left: bool = False, mask: bool = True, h: torch.Tensor = H, axes: str = "b s h") -> Path:
    with TraceWriter(path, provenance={}) as writer:
        writer.write("input_ids", padded(IDS, left), dims="b s")
        if mask:
            writer.write("attention_mask", padded(torch.ones(24, dtype=torch.int64), left), dims="b s")
        rows = padded(h, left, filler=7.0)
        writer.write("h", rows if axes == "b s h" else rows.transpose(0, 1).contiguous(), dims=axes)
    return path


def packed_run(path: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Path:
    with TraceWriter(path, provenance={}) as writer:
        writer.write("input_ids", IDS, dims="t")
        writer.write("cu_seqlens_q", torch.tensor(BOUNDS, dtype=torch.int32))
        writer.write("h", change(H.clone()), dims="t h")
    return path


def reasons(result: Comparison) -> str:
    return " | ".join(f"{one.side} {one.kind} {one.name}: {one.reason}" for one in result.ledger.entries)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("axes", ["b s h", "s b h"])
def test_packed_against_padded(tmp_path: Path, left: bool, mask: bool, axes: str) -> None:
    one = padded_run(tmp_path / "padded", left=left, mask=mask, axes=axes)
    two = packed_run(tmp_path / "packed")
    for result in (compare(one, two), compare(two, one)):
        assert result.passed, result.reason + reasons(result)
        record = next(record for record in result.records if record.key.name == "h")
        assert record.shape_reference == record.shape_candidate == (24, WIDTH)
        assert record.metrics is not None and record.metrics.max_abs == 0
        assert {one.waived_by for one in result.ledger.entries} == {"tokens are aligned by ids"}


def test_a_bad_token_is_named_by_its_place_among_the_packed_ones(tmp_path: Path) -> None:
    def bad(h: torch.Tensor) -> torch.Tensor:
        h[10, 2] += 1
        return h

    result = compare(padded_run(tmp_path / "padded"), packed_run(tmp_path / "packed", bad))
    assert not result.passed
    record = next(record for record in result.records if not record.passing)
    assert record.worst_elements[0].index == (10, 2) and record.worst_rows[0].index == (10,)


def test_context_parallel_packed_shards_against_padded(tmp_path: Path) -> None:
    """THD: every sequence is cut zigzag over two ranks; the mistake is in the second half of one rank's share."""
    records = [
        ("input_ids", IDS, {"dims": "t[cp:zigzag]"}),
        ("cu_seqlens_q", torch.tensor(BOUNDS, dtype=torch.int32), {}),
        ("h", H, {"dims": "t[cp:zigzag] h # tp:replicated"}),
    ]

    def bad(rank: int, name: str, part: torch.Tensor) -> torch.Tensor:
        if name == "h" and rank == 1:
            part[-1] += 1
        return part

    one = padded_run(tmp_path / "padded")
    good = write_run(tmp_path / "good", records, world(cp=2), bounds=BOUNDS)
    assert compare(one, good).passed
    assert torch.equal(good_part(good, 0), torch.cat([H[:2], H[6:8], H[8:9], H[11:12], H[12:15], H[21:24]]))
    wrong = compare(one, write_run(tmp_path / "wrong", records, world(cp=2), bounds=BOUNDS, change=bad))
    record = next(record for record in wrong.records if not record.passing)
    assert record.ranks == (1,) and record.worst_rows[0].index == (20,)


def good_part(path: Path, rank: int) -> torch.Tensor:
    from trimtab.trace import Trace

    trace = Trace.open(path).filter(name="h", rank=rank)
    return trace.tensor(trace.index["record_id"][0])


def test_other_sequences_are_entered_in_the_ledger(tmp_path: Path) -> None:
    one, two = padded_run(tmp_path / "padded"), tmp_path / "packed"
    with TraceWriter(two, provenance={}) as writer:
        ids = IDS.clone()
        ids[9] += 1
        writer.write("input_ids", ids, dims="t")
        writer.write("cu_seqlens", torch.tensor(BOUNDS))
        writer.write("h", H, dims="t h")
    result = compare(one, two)
    assert not result.passed
    assert (
        "candidate unmatched tokens phase=inference step=0: the other side has no such tokens: sequence 1"
        in reasons(result)
    )
    assert "reference unmatched tokens phase=inference step=0: the other side has no such tokens: row 1" in reasons(
        result
    )


def test_without_ids_nothing_is_guessed(tmp_path: Path) -> None:
    for name, h, dims in (("one", padded(H, False), "b s h"), ("two", H, "t h")):
        with TraceWriter(tmp_path / name, provenance={}) as writer:
            writer.write("h", h, dims=dims)
            writer.write("g", h[:1], dims=None)
    result = compare(tmp_path / "one", tmp_path / "two", waive=["g"])
    assert not result.passed and "record input_ids with dims on both sides" in reasons(result)


def test_a_batch_of_one_needs_no_ids(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "one", provenance={}) as writer:
        writer.write("h", H[:, None], dims="s 1 h")
    with TraceWriter(tmp_path / "two", provenance={}) as writer:
        writer.write("h", H, dims="t h")
    assert compare(tmp_path / "one", tmp_path / "two").passed


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.randoms(use_true_random=False), st.booleans())
def test_pairs_are_the_same_tokens(lengths: list[int], random: object, masked: bool) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    ids = [np.arange(100 * n, 100 * n + size) for n, size in enumerate(lengths)]
    rows = np.full((len(lengths), 8), -1)
    for row, number in enumerate(order):
        rows[row, : lengths[number]] = ids[number]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    found = pair_tokens(np.concatenate(ids), bounds, rows, rows >= 0 if masked else None)
    assert not found.alone_packed and found.packed.tokens == found.padded.tokens == sum(lengths)
    packed, flat = np.concatenate(ids), rows.reshape(-1)
    for start, other, size in zip(found.packed.starts, found.padded.starts, found.packed.lengths, strict=True):
        assert np.array_equal(packed[start : start + size], flat[other : other + size])


def test_bounds_and_masks_that_make_no_sense() -> None:
    ids, rows = np.arange(6), np.arange(6).reshape(2, 3)
    with pytest.raises(ComparisonError, match="do not cut 6 packed tokens"):
        pair_tokens(ids, [0, 9], rows, None)
    with pytest.raises(ComparisonError, match="the attention mask of row 1 has holes"):
        pair_tokens(ids, [0, 3, 6], rows, np.array([[True] * 3, [True, False, True]]))
