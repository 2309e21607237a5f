"""Reductions of rows that come in pieces, against the rows all at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.backends.vllm.reduced import Kind, Reduced, Reduction


def pieces(cuts: list[int], rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    edges = [0, *sorted({cut % len(rows) for cut in cuts} - {0}), len(rows)]
    return [(rows[a:b], torch.arange(a, b)) for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1e6]))
@pytest.mark.parametrize("kind", ["mean", "statistics", "projection"])
def test_pieces_give_what_the_whole_gives(kind: Kind, cuts: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(17, 6, generator=generator) + offset
    directions = torch.randn(2, 6, generator=generator).double() if kind == "projection" else None
    held = Reduced(Reduction(kind, directions))
    for part, positions in pieces(cuts, rows):
        held.add(part, positions)
        held.add(part, positions)  # computed again after a preemption
    found, positions = held.result()
    wide = rows.double()
    if directions is not None:
        expected = wide @ directions.T
    else:
        expected = torch.stack([wide.mean(0), wide.std(0, correction=0), wide.abs().amax(0)])[
            : 1 if kind == "mean" else 3
        ]
    assert positions.tolist() == list(range(17))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_part_of_a_site_is_projected_on_its_own_columns() -> None:
    rows, directions = torch.randn(3, 8), torch.randn(2, 8).double()
    parts = []
    for offset in (0, 4):
        held = Reduced(Reduction("projection", directions), offset)
        held.add(rows[:, offset : offset + 4], torch.arange(3))
        parts.append(held.result()[0])
    torch.testing.assert_close(parts[0] + parts[1], (rows.double() @ directions.T).float())
