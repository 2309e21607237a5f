"""Rows of random schedules, gathered by the sink and by a plain loop."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.backends._capture import RowOwner, RowSink, Slot, Taken
from trimtab.errors import BackendError
from trimtab.sites import Site
from trimtab.testing.conformance import MemoryWriter

SITE = Site("resid_post", layer=0)
OWNERS = [RowOwner(name, 0) for name in "abc"]


def make(writer: Any, buffer_bytes: int = 1 << 20) -> RowSink:
    return RowSink(writer, OWNERS, slots=1, config="c", counts={}, buffer_bytes=buffer_bytes)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.sampled_from([1, 1, 1, 2, 4]), min_size=1, max_size=9),
    marks=st.randoms(use_true_random=False),
    members=st.sampled_from([(0, 1, 2), (0, 2), (1,)]),
    steps=st.integers(1, 4),
)
def test_every_wanted_row_is_written_once_and_in_order(
    widths: list[int], marks: Any, members: tuple[int, ...], steps: int
) -> None:
    writer = MemoryWriter()
    sink = make(writer, buffer_bytes=2 * steps * 3 * 4 * 4)
    slot = Slot(SITE, "none", members)
    expected: dict[int, list[tuple[int, float]]] = {member: [] for member in members}
    place, value = 0, 0.0
    for width in widths:
        x = torch.arange(3 * width * 4, dtype=torch.float32).reshape(3, width, 4) + value
        places = [[at for at in range(width) if marks.random() < 0.7] for _ in OWNERS]
        sink.take(slot, x, Taken(places, [[place + at for at in row] for row in places], width))
        for member in members:
            expected[member] += [(place + at, float(x[member, at, 0])) for at in places[member]]
        x.fill_(-1.0)  # the sink must have copied
        place, value = place + width, value + 1000.0
    sink.flush(slot)
    sink.flush(slot)  # nothing is left to be written twice
    for member in members:
        if expected[member]:
            positions, rows = writer.rows(str(SITE), OWNERS[member].name)
            assert list(zip(positions, rows[:, 0].tolist(), strict=True)) == expected[member]
        else:
            assert not writer.edits(str(SITE), OWNERS[member].name)


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    kept = SimpleNamespace(rows=0)

    class Dropping(MemoryWriter):
        def write(self, name: str, tensor: torch.Tensor, **fields: Any) -> int:
            kept.rows += len(tensor)
            return 0

    sink, slot = make(Dropping(), buffer_bytes=1 << 16), Slot(SITE, "none", (0, 1, 2))
    x = torch.zeros(3, 1, 64)

    def run(count: int) -> None:
        for step in range(count):
            sink.take(slot, x, Taken([[0]] * 3, [[step]] * 3, 1))

    run(200)
    assert slot.held is not None and slot.held.nbytes <= 1 << 16
    tracemalloc.start()
    run(200)
    first = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    run(1600)
    assert tracemalloc.get_traced_memory()[1] < 1.5 * first + 4096
    tracemalloc.stop()
    sink.flush(slot)
    assert kept.rows == 3 * 2000


def test_a_tensor_without_one_row_per_token_is_refused() -> None:
    sink, slot = make(MemoryWriter()), Slot(Site("output", module="gate"), "none", (0,))
    with pytest.raises(BackendError, match=r"module:gate\.output has the shape \(6, 4\).*one per token"):
        sink.take(slot, torch.zeros(6, 4), Taken([[0, 1]] * 3, [[0, 1]] * 3, 2))
