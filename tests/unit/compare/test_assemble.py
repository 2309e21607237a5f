"""Sharing out and putting together is the identity, whatever the dims and sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.compare.sharing import At, share, world
from trimtab.compare.dims import Dims, parse_dims
from trimtab.compare.layout import Assembled, Layout, Piece
from trimtab.compare.layout.assemble import boxes
from trimtab.errors import ComparisonError


def assembled(
    tensor: torch.Tensor, dims: Dims, ranks: Sequence[At], bounds: Sequence[int] | None = None, **options: object
) -> Assembled:
    sizes = {axis: max(at[axis] for at in ranks) + 1 for axis in ranks[0]} if ranks[0] else {}
    parts = [share(tensor, dims, at, sizes, bounds) for at in ranks]
    used = {one.coordinate for one in dims.splits() if one.how != "replicated"}
    pieces: dict[tuple[tuple[str, int], ...], Piece] = {}
    for number, (at, part) in enumerate(zip(ranks, parts, strict=True)):
        place = tuple(sorted((axis, index) for axis, index in at.items() if axis in used))
        pieces.setdefault(place, Piece(number, number, place, tuple(part.shape), None, True))
    sequences = (((), len(parts)),) if bounds is not None else ()
    records = [*parts, torch.tensor(bounds if bounds is not None else [])]
    return Assembled(Layout(dims, tuple(pieces.values()), (), sequences), records.__getitem__, **options)  # type: ignore[arg-type]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, tuple[int, ...], dict[str, int]]:
    """Dims, the shape of the whole, and the size of each parallel axis."""
    free = draw(st.permutations(["tp", "cp", "ep", "dp", "pp", "micro"]))
    texts, shape, sizes = [], [], {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        mods, unit = [], 1
        for _ in range(draw(st.integers(0, 2))):
            if not free:
                break
            axis, size = free.pop(), draw(st.integers(1, 3))
            zigzag = draw(st.booleans())
            mods.append(f"{axis}:zigzag" if zigzag else axis)
            sizes[axis] = size
            unit *= size * (2 if zigzag else 1)
        texts.append(name + (f"[{','.join(mods)}]" if mods else ""))
        shape.append(unit * draw(st.integers(1, 3)))
    if free and draw(st.booleans()):
        sizes[free[0]] = draw(st.integers(1, 3))
        texts.append(f"# {free[0]}:{draw(st.sampled_from(['replicated', 'partial', 'mean']))}")
    return " ".join(texts), tuple(shape), sizes


@settings(max_examples=150, deadline=None)
@given(layouts(), st.randoms(use_true_random=False))
def test_sharing_out_and_putting_together_is_the_identity(
    layout: tuple[str, tuple[int, ...], dict[str, int]], random: object
) -> None:
    text, shape, sizes = layout
    whole = torch.randint(-50, 50, shape).double()
    dims = parse_dims(text)
    if sizes and next((one for one in dims.whole if one.how == "mean"), None) is not None:
        axis = dims.whole[0].coordinate
        sizes[axis] = 2 if sizes[axis] > 1 else 1  # the weights of `share` have the mean 1 over an even number
        whole = whole * 2 if sizes[axis] == 1 else whole
    found = assembled(whole, dims, world(**sizes) if sizes else [{}])
    expected = (
        whole / 2 if dims.whole and dims.whole[0].how == "mean" and sizes[dims.whole[0].coordinate] == 1 else whole
    )
    assert found.shape == shape
    assert torch.equal(found.flat(0, whole.numel()).reshape(shape).round(), expected.round())
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    turned = found.reordered(order)
    moved = expected.permute(order).reshape(-1).round()
    begin = random.randrange(whole.numel())  # type: ignore[attr-defined]
    end = random.randint(begin + 1, whole.numel())  # type: ignore[attr-defined]
    assert torch.equal(turned.flat(begin, end).round(), moved[begin:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int16])
def test_every_dtype_is_read_as_it_is(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 5, (6, 4)).to(dtype)
    found = assembled_raw(whole, "a b[tp]", {"tp": 2})
    read = found.flat(0, 24)
    assert read.dtype == dtype
    assert torch.equal(read.reshape(6, 4).view(torch.uint8), whole.view(torch.uint8))


def assembled_raw(whole: torch.Tensor, text: str, sizes: dict[str, int]) -> Assembled:
    return assembled(whole, parse_dims(text), world(**sizes))


def test_owners_say_who_held_what() -> None:
    whole = torch.arange(16.0).reshape(8, 2)
    found = assembled_raw(whole, "s[cp:zigzag] h", {"cp": 2})
    owners = found.owners(0, 16).reshape(8, 2)[:, 0]
    assert owners.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert [piece.rank for piece in found.holders(1)] == [1]


@pytest.mark.parametrize("zigzag", [True, False])
def test_packed_tokens_are_cut_sequence_by_sequence(zigzag: bool) -> None:
    bounds = [0, 8, 8, 20, 24]
    whole = torch.arange(28.0)[:, None] + torch.zeros(28, 3)  # four tokens of padding behind the last sequence
    dims = parse_dims("t[cp:zigzag] h" if zigzag else "t[cp] h")
    found = assembled(whole, dims, world(cp=2), bounds)
    assert torch.equal(found.flat(0, 84).reshape(28, 3), whole)


def test_the_documented_zigzag_order() -> None:
    """Rank r of n holds chunks r and 2 n - 1 - r of 2 n (Megatron's load balanced context parallelism)."""
    chunks = torch.arange(8).reshape(8, 1)
    parts = [share(chunks, "s[cp:zigzag] h", {"cp": rank}, {"cp": 4}) for rank in range(4)]
    assert [part.flatten().tolist() for part in parts] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize(
    ("dims", "shapes", "said"),
    [
        ("s h[tp]", [(4, 2), (5, 2)], "the pieces do not fit"),
        ("s[tp:zigzag] h", [(3, 2), (3, 2)], "a sequence of 6 tokens cannot be cut into 4 equal chunks"),
        ("s[tp:zigzag] h", [(6, 2), (2, 2)], "hold unequal shares"),
        ("s h[tp] x", [(4, 2), (4, 2)], "name 3 axes"),
        ("s[tp] h", [(4, 2), (4, 2, 1)], "the pieces do not fit"),
    ],
)
def test_pieces_that_do_not_fit(dims: str, shapes: list[tuple[int, ...]], said: str) -> None:
    pieces = tuple(Piece(rank, rank, (("tp", rank),), shape, None, True) for rank, shape in enumerate(shapes))
    with pytest.raises(ComparisonError, match=said):
        Assembled(Layout(parse_dims(dims), pieces), lambda number: torch.zeros(shapes[number]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_cover_every_element_once_in_order(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    numbers = torch.arange(total).reshape(shape)
    found: list[int] = []
    for at, low, high in boxes(shape, begin, end):
        assert at == len(found)
        found += numbers[tuple(itertools.starmap(slice, zip(low, high, strict=True)))].reshape(-1).tolist()
    assert found == list(range(begin, end))
