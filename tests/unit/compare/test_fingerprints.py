"""Every mistake is planted and must be named first; noise must not be named at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.compare.fingerprints import find_fingerprints

ROWS, WIDTH = 48, 64
E_BF16 = 0.42 * 2.0**-8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(x: Tensor, seed: int = 99) -> Tensor:
    """Values with the rounding noise of bfloat16, but not its grid."""
    return x * (1 + E_BF16 * normal(*x.shape, seed=seed))


def changed(x: Tensor, where: object, value: float) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def halved_block(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 16:24] *= 0.5
    return x


def swapped_heads(x: Tensor) -> Tensor:
    return x.view(ROWS, 4, 16)[:, [0, 2, 1, 3]].reshape(ROWS, WIDTH)


def flipped_half(x: Tensor) -> Tensor:
    return torch.cat([x[:, :32], -x[:, 32:]], 1)


PLANTED: dict[str, tuple[Callable[[Tensor], Tensor], str, float | None]] = {
    "scale by a constant": (lambda x: x * 1.037, "scale", 1.037),
    "sign": (lambda x: -x, "sign", -1),
    "sign of half the channels": (flipped_half, "sign", -1),
    "double reduction": (lambda x: x * 4, "double_reduction", 4),
    "missing reduction": (lambda x: x / 8, "missing_reduction", 0.125),
    "transpose of a square": (lambda x: x[:, :ROWS].T.contiguous(), "transpose", None),
    "transpose read as the old shape": (lambda x: x.T.reshape(ROWS, WIDTH), "transpose", None),
    "rows permuted": (
        lambda x: x[torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))],
        "permutation",
        None,
    ),
    "two heads swapped": (swapped_heads, "permutation", 32),
    "shift by one token": (lambda x: torch.cat([normal(1, WIDTH, seed=7), x[:-1]]), "shift", 1),
    "shift back by two": (lambda x: torch.cat([x[2:], normal(2, WIDTH, seed=7)]), "shift", -2),
    "zero rows": (lambda x: changed(x, slice(5, 8), 0.0), "zero_rows", 3),
    "NaN rows": (lambda x: changed(x, slice(5, 7), math.nan), "nan_rows", 2),
    "one bad shard of the channels": (halved_block, "bad_shard", 2),
    "one bad shard of the rows": (lambda x: torch.cat([x[:24], -0.5 * x[24:]]), "bad_shard", 1),
    "missing bias": (lambda x: x - 0.3 * normal(WIDTH, seed=5), "missing_bias", None),
    "a few rows": (lambda x: changed(x, (9, slice(None)), 0.7), "few_rows", 1),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_named_first(name: str) -> None:
    fault, kind, value = PLANTED[name]
    reference = normal(ROWS, WIDTH)
    candidate = noisy(fault(reference))
    if candidate.shape != reference.shape:
        reference = reference[:, :ROWS]
    found = find_fingerprints(reference, candidate, tolerance=4 * E_BF16)
    assert found, "nothing was recognised"
    assert found[0].kind == kind, found
    if value is not None:
        assert found[0].value == pytest.approx(value, rel=2e-3)
    assert found[0].explained > 0.9 or kind == "few_rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_coarser_dtypes_rounding_is_named(dtype: torch.dtype) -> None:
    reference = normal(ROWS, WIDTH)
    found = find_fingerprints(reference, reference.to(dtype).float(), tolerance=4 * 0.42 * 2.0**-24)
    assert found[0].kind == "coarse_rounding"
    assert str(dtype).removeprefix("torch.") in found[0].detail


def test_a_stale_step_is_named() -> None:
    steps = {-1: normal(ROWS, WIDTH, seed=4), 1: normal(ROWS, WIDTH, seed=6)}
    found = find_fingerprints(normal(ROWS, WIDTH), noisy(steps[-1]), tolerance=4 * E_BF16, neighbour=steps.get)
    assert (found[0].kind, found[0].value) == ("stale_step", -1)


def test_dimensions_of_higher_rank_are_named() -> None:
    reference = normal(6, 4, 8)
    found = find_fingerprints(reference, reference.transpose(0, 1).reshape(6, 4, 8), tolerance=1e-6)
    assert found[0].kind == "transpose" and "dimensions 0 and 1" in found[0].detail


@pytest.mark.parametrize(("offset", "kind"), [(1, "offset"), (-3, "offset")])
def test_ids_off_by_a_constant(offset: int, kind: str) -> None:
    ids = torch.tensor([5, 9, 2, 2, 77, 31])
    found = find_fingerprints(ids, ids + offset, tolerance=0.0)
    assert (found[0].kind, found[0].value) == (kind, offset)


def test_ids_shifted() -> None:
    ids = torch.tensor([5, 9, 2, 2, 77, 31])
    found = find_fingerprints(ids, torch.roll(ids, 1), tolerance=0.0)
    assert (found[0].kind, found[0].value) == ("shift", 1)


def test_unrelated_values_get_no_name() -> None:
    assert find_fingerprints(normal(ROWS, WIDTH), normal(ROWS, WIDTH, seed=8), tolerance=4 * E_BF16) == ()


def plain(x: Tensor) -> Tensor:
    return x


def massive_channel(x: Tensor) -> Tensor:
    x[:, 3] = 1234.5
    return x


def near_zero_rows(x: Tensor) -> Tensor:
    x[::2] *= 1e-6
    return x


def identical_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float8_e5m2]),
    st.sampled_from([plain, massive_channel, near_zero_rows, identical_rows]),
)
def test_rounding_gets_no_name(
    seed: int, rows: int, width: int, dtype: torch.dtype, shape: Callable[[Tensor], Tensor]
) -> None:
    reference = normal(rows, max(width, 4), seed=seed)
    reference = shape(reference).clamp_min(2.0**-10)  # what float8 can hold, above its subnormals
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float8_e5m2: 2.0**-3}[dtype]
    assert find_fingerprints(reference, reference.to(dtype), tolerance=4 * 0.42 * u) == ()


def test_a_row_of_nan_does_not_hide_a_permutation() -> None:
    reference = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    candidate = reference[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))].clone()
    candidate[3] = float("nan")
    kinds = [one.kind for one in find_fingerprints(reference, candidate, tolerance=1e-5)]
    assert kinds[0] == "nan_rows" and "permutation" in kinds
