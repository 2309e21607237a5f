"""Every metric against exact rational arithmetic, and the two engines of the fused pass against each other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.numerics import compare_pair, compare_pair_coarser, metrics

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("mae", "rmse", "max_abs", "rel_l2", "rel_diff", "cosine", "cosine_min", "cosine_flat", "slope", "mean_error")
COUNTS = ("unequal", "nan_reference", "nan_candidate", "inf_reference", "inf_candidate", "nonfinite_mismatches")

values = st.floats(-1000, 1000, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)
pairs = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 6).flatmap(
        lambda width: st.tuples(
            *[st.lists(st.lists(values, min_size=width, max_size=width), min_size=rows, max_size=rows)] * 2
        )
    )
)


def exact(rows: list[list[float]]) -> list[Fraction]:
    return [Fraction(x) for row in rows for x in row]


def root(x: Fraction) -> float:
    """Square root of a non-negative rational, correct to float64."""
    if x == 0:
        return 0.0
    scale = 1 << 240
    return float(Fraction(math.isqrt(x.numerator * scale * scale // x.denominator), scale))


def close(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, rel=1e-12, abs=1e-300) if math.isfinite(expected) else found == expected


@given(pairs)
def test_every_metric_equals_exact_arithmetic(rows: tuple[list[list[float]], list[list[float]]]) -> None:
    reference, candidate = (torch.tensor(one, dtype=torch.float64) for one in rows)
    r, c = exact(rows[0]), exact(rows[1])
    error = [b - a for a, b in zip(r, c, strict=True)]
    rr, cc, ee = (sum((x * x for x in xs), Fraction(0)) for xs in (r, c, error))
    dot = sum((a * b for a, b in zip(r, c, strict=True)), Fraction(0))
    assert close(metrics.mae(reference, candidate), float(sum(map(abs, error)) / len(error)))
    assert close(metrics.rmse(reference, candidate), root(ee / len(error)))
    assert close(metrics.max_abs(reference, candidate), float(max(map(abs, error))))
    expected = 0.0 if rr == cc == 0 else math.inf if rr == 0 else root(ee / rr)
    assert close(metrics.rel_l2(reference, candidate), expected)
    assert close(metrics.sqnr(reference, candidate), math.inf if expected == 0 else -20 * math.log10(expected))
    assert close(metrics.rel_diff(reference, candidate), 0.0 if rr + cc == 0 else float(ee / (rr + cc)))
    if rr and cc:
        flat = float(dot) / (root(rr) * root(cc))
        assert metrics.cosine_flat(reference, candidate) == pytest.approx(flat, abs=1e-12)
        assert metrics.slope(reference, candidate) == pytest.approx(float(dot / rr), rel=1e-9, abs=1e-12)


@given(pairs)
def test_rows_and_channels_equal_exact_arithmetic(rows: tuple[list[list[float]], list[list[float]]]) -> None:
    found = compare_pair(*(torch.tensor(one, dtype=torch.float32) for one in rows))
    for index, (a, b) in enumerate(zip(*rows, strict=True)):
        r, c = [Fraction(x) for x in a], [Fraction(x) for x in b]
        rr, cc = sum(x * x for x in r), sum(x * x for x in c)
        ee = sum((y - x) ** 2 for x, y in zip(r, c, strict=True))
        dot = sum(x * y for x, y in zip(r, c, strict=True))
        rel = 0.0 if rr == cc == 0 else math.inf if rr == 0 else root(Fraction(ee) / rr)
        cosine = 1.0 if rr == cc == 0 else 0.0 if rr == 0 or cc == 0 else float(dot) / (root(rr) * root(cc))
        assert close(found.row_rel_l2[index], rel)
        assert found.row_cosine[index] == pytest.approx(cosine, abs=1e-12)
    for channel in range(len(rows[0][0])):
        errors = [(Fraction(b[channel]) - Fraction(a[channel])) ** 2 for a, b in zip(*rows, strict=True)]
        assert close(found.channel_rms[channel], root(sum(errors, Fraction(0)) / len(errors)))


def test_rel_diff_keeps_what_the_published_form_loses() -> None:
    reference = torch.ones(1000, dtype=torch.float64)
    candidate = reference.clone()
    candidate[0] += 1e-9
    published = 1 - 2 * float(reference @ candidate) / float(reference @ reference + candidate @ candidate)
    assert metrics.rel_diff(reference, candidate) == pytest.approx(1e-18 / 2000, rel=1e-5)
    assert published <= 0 or published > 1e-17  # not one digit of 5e-22 is left


@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 3, 257), (4, 0)], ids=str)
def test_the_two_engines_agree(pair: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).to(pair[0])
    candidate = (reference.double() + 0.01 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(pair[1])
    if reference.numel() > 4:
        reference.view(-1)[1], candidate.view(-1)[1] = math.nan, math.nan
        reference.view(-1)[2], candidate.view(-1)[3] = math.inf, -math.inf
    one = compare_pair(reference, candidate, engine="numba")
    two = compare_pair(reference, candidate, engine="torch")
    for name in FIELDS:
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-12, abs=1e-14), name
    for name in COUNTS:
        assert getattr(one, name) == getattr(two, name), name
    assert one.max_abs_index == two.max_abs_index
    np.testing.assert_allclose(one.row_rel_l2, two.row_rel_l2, rtol=1e-12)
    np.testing.assert_allclose(one.channel_rms, two.channel_rms, rtol=1e-12, atol=1e-14)


def test_the_largest_difference_has_its_place_and_both_values() -> None:
    reference = torch.zeros(3, 4, 5)
    candidate = reference.clone()
    candidate[2, 1, 3] = -7.0
    found = compare_pair(reference, candidate)
    assert (found.max_abs_index, found.max_abs_reference, found.max_abs_candidate) == ((2, 1, 3), 0.0, -7.0)
    assert found.unequal == 1 and not found.exact


def test_a_view_is_compared_as_it_looks() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    found = compare_pair(base.T[::2], (base.T[::2] + 1).contiguous())
    assert found.mae == 1.0 and found.rows == 3


def test_integers_and_booleans_are_exact() -> None:
    large = torch.tensor([2**24, 2**53 + 1, 2**63 - 1, -(2**63)], dtype=torch.int64)
    other = large + torch.tensor([1, -1, -1, 1])
    found = compare_pair(large, other)
    assert found.exact and found.unequal == 4 and found.max_abs == 1
    assert compare_pair(large, large.clone()).identical
    flags = torch.zeros(4096, dtype=torch.bool)
    flipped = flags.clone()
    flipped[17] = True
    assert compare_pair(flags, flipped).unequal == 1


def test_complex_tensors_count_by_modulus() -> None:
    reference = torch.tensor([3 + 4j, 1j])
    found = compare_pair(reference, torch.tensor([3 + 4j, -1j]))
    assert found.max_abs == pytest.approx(2.0) and found.mae == pytest.approx(1.0)


def test_nan_and_infinity_are_compared_by_position() -> None:
    same = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert compare_pair(same, same.clone()).nonfinite_match
    assert compare_pair(same, same.clone()).identical
    for moved in ([math.nan, 1.0, math.inf, -math.inf], [1.0, math.nan, -math.inf, math.inf]):
        assert not compare_pair(same, torch.tensor(moved)).nonfinite_match


def test_the_coarser_dtype_takes_the_storage_rounding_away() -> None:
    reference = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    candidate = reference.bfloat16()
    assert compare_pair(reference, candidate).rel_l2 > 1e-3
    assert compare_pair_coarser(reference, candidate).identical


def test_cutting_into_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.numerics import pair

    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(50, 33, generator=generator)
    candidate = reference + 0.1 * torch.randn(50, 33, generator=generator)
    whole = {engine: compare_pair(reference, candidate, engine=engine) for engine in ("numba", "torch")}
    monkeypatch.setattr(pair, "_LIMIT", {"numba": 64, "torch": 64})
    for engine, before in whole.items():
        after = compare_pair(reference, candidate, engine=engine)
        for name in FIELDS:
            assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-12), name
        np.testing.assert_allclose(after.row_rel_l2, before.row_rel_l2, rtol=1e-12)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)3.*4"):
        compare_pair(torch.zeros(3), torch.zeros(4))


def test_bands_of_the_mean_absolute_error() -> None:
    assert [metrics.mae_band(x) for x in (0, 0.0099, 0.01, 0.1, 1, 1.01, math.inf)] == [
        *("<0.01", "<0.01", "0.01-0.1", "0.1-1", "0.1-1", ">1", ">1")
    ]
    with pytest.raises(InputError):
        metrics.mae_band(math.nan)
