"""The fused pass over every dtype and layout, against numpy on widened copies and against Python integers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.errors import InputError
from trimtab.numerics import compare_pair, compare_pair_coarser, metrics, pair

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
EXACT = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.sampled_from([(2, 300), (3, 1, 257), (1, 1025)])


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in COMPLEX:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_complex():
        return tensor.to(torch.complex128).numpy()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor.double().numpy()


@given(shapes, st.sampled_from(FLOATS + EXACT + COMPLEX), st.sampled_from(FLOATS + EXACT + COMPLEX), st.integers(0, 9))
def test_both_engines_are_numpy_s_sums(
    shape: tuple[int, ...], left: torch.dtype, right: torch.dtype, seed: int
) -> None:
    reference, candidate = make(shape, left, seed), make(shape, right, seed + 10)
    r, c = wide(reference), wide(candidate)
    d = c - r
    n, rr, cc = max(d.size, 1), float(np.sum(np.abs(r) ** 2)), float(np.sum(np.abs(c) ** 2))
    dd, rc = float(np.sum(np.abs(d) ** 2)), float(np.sum((r * np.conj(c)).real))
    mean = np.abs if r.dtype.kind == "c" or c.dtype.kind == "c" else float  # a mean that has a phase counts by modulus
    rows = r.reshape(-1, r.shape[-1] if r.ndim else 1) if r.size else None
    for engine in ("numba", "torch"):
        found = compare_pair(reference, candidate, engine=engine)
        assert found.numel == d.size and found.unequal == int(np.sum(r != c)) and found.nonfinite_match
        assert found.identical == bool(np.all(r == c))
        assert found.mae == pytest.approx(float(np.sum(np.abs(d))) / n, rel=1e-12)
        assert found.rmse == pytest.approx(math.sqrt(dd / n), rel=1e-12)
        assert found.max_abs == pytest.approx(float(np.max(np.abs(d), initial=0.0)), rel=1e-12)
        assert found.mean_candidate == pytest.approx(mean(np.sum(c) / n), rel=1e-11, abs=1e-12)
        assert found.mean_error == pytest.approx(mean(np.sum(d) / n), rel=1e-11, abs=1e-12)
        if rr > 0:
            assert found.rel_l2 == pytest.approx(math.sqrt(dd / rr), rel=1e-12)
            assert found.slope == pytest.approx(rc / rr, rel=1e-11, abs=1e-12)
            assert found.rel_diff == pytest.approx(dd / (rr + cc), rel=1e-12)
        assert found.row_norm.shape == (found.rows,) == found.row_cosine.shape
        if rows is not None:
            np.testing.assert_allclose(found.row_norm, np.sqrt(np.sum(np.abs(rows) ** 2, axis=1)), rtol=1e-12)
            channel = np.sqrt(np.mean(np.abs(d.reshape(rows.shape)) ** 2, axis=0))
            np.testing.assert_allclose(found.channel_rms, channel, rtol=1e-12)
        if d.size and d.ndim:
            assert abs(d[found.max_abs_index]) == pytest.approx(found.max_abs, rel=1e-12)
            assert found.max_abs_reference == pytest.approx(abs_or_self(r[found.max_abs_index]))
            assert found.max_abs_candidate == pytest.approx(abs_or_self(c[found.max_abs_index]))


def abs_or_self(value: complex) -> float:
    return float(abs(value) if np.iscomplexobj(value) else value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_bit_pattern_of_16_bits_is_read_right(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    found = compare_pair(every.double(), every, engine="numba")
    assert found.identical and found.nonfinite_match and found.inf_candidate == 2
    assert found.nan_candidate == found.nan_reference == int(every.isnan().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu])
def test_every_bit_pattern_of_8_bits_is_read_right(dtype: torch.dtype) -> None:
    every = torch.arange(256).to(torch.uint8).view(dtype)
    found = compare_pair(every.float(), every, engine="numba")
    assert found.identical and found.nan_candidate == int(every.float().isnan().sum()) > 0


@given(
    st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2), min_size=1, max_size=6),
    st.sampled_from(["numba", "torch"]),
)
def test_64_bit_integers_are_python_s(rows: list[tuple[int, int]], engine: pair.Engine) -> None:
    reference, candidate = (torch.tensor(xs, dtype=torch.int64) for xs in zip(*rows, strict=True))
    found = compare_pair(reference, candidate, engine=engine)
    assert found.unequal == sum(a != b for a, b in rows)
    assert found.max_abs == pytest.approx(float(max(abs(a - b) for a, b in rows)), rel=1e-15)
    assert found.mae == pytest.approx(float(sum(abs(a - b) for a, b in rows)) / len(rows), rel=1e-12)


def test_neighbours_that_floats_merge_differ() -> None:
    near = torch.tensor([2**24, 2**24 + 1], dtype=torch.int32)
    assert float(near[0]) == float(near[1].float())
    assert compare_pair(near[:1], near[1:]).max_abs == 1 and compare_pair(near[:1], near[1:].float()).unequal == 0
    far = compare_pair(torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]))
    assert (far.max_abs_reference, far.max_abs_candidate, far.max_abs) == (-(2**63), 2**63 - 1, 2.0**64)
    unsigned = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert compare_pair(torch.tensor([-1]), unsigned).unequal == 1
    assert compare_pair(unsigned, torch.tensor([2**64 - 2], dtype=torch.uint64)).max_abs == 1


def test_the_range_of_float64_is_kept() -> None:
    for size in (1e-200, 1e200):
        reference = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64) * size
        for engine in ("numba", "torch"):
            found = compare_pair(reference, 2 * reference, engine=engine)
            assert found.rel_l2 == pytest.approx(1.0, rel=1e-12) and found.slope == pytest.approx(2.0, rel=1e-12)
            assert found.rmse == pytest.approx(2.5 * size) and found.mae == pytest.approx(1.75 * size)
            assert list(found.row_norm) == pytest.approx([5 * size, 0.0])
            assert list(found.row_cosine) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_zero_rows_have_defined_figures(engine: pair.Engine) -> None:
    reference, candidate = torch.tensor([[0.0, 0], [0, 0], [3, 4]]), torch.tensor([[0.0, 0], [1, 0], [0, 0]])
    found = compare_pair(reference, candidate, engine=engine)
    assert list(found.row_rel_l2) == [0.0, math.inf, 1.0] and list(found.row_cosine) == [1.0, 0.0, 0.0]
    assert found.cosine == pytest.approx(1 / 3) and found.cosine_min == 0.0
    both = compare_pair(reference[:1], candidate[:1], engine=engine)
    assert (both.rel_l2, both.cosine_flat, both.slope, both.rel_diff) == (0.0, 1.0, 1.0, 0.0)
    one = compare_pair(reference[1:2], candidate[1:2], engine=engine)
    assert (one.rel_l2, one.cosine_flat, one.slope, one.rel_diff) == (math.inf, 0.0, math.inf, 1.0)
    empty = compare_pair(torch.zeros(4, 0), torch.zeros(4, 0), engine=engine)
    assert (empty.rows, empty.cosine, empty.cosine_min, list(empty.row_cosine)) == (4, 1.0, 1.0, [1.0] * 4)
    assert empty.identical and empty.max_abs_index == () and empty.mae == 0.0


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_what_is_not_finite_is_counted_and_left_out(engine: pair.Engine) -> None:
    nan, inf = math.nan, math.inf
    reference = torch.tensor([1.0, nan, nan, inf, inf, -inf, 2.0, 4.0])
    candidate = torch.tensor([1.5, nan, 1.0, inf, -inf, -inf, nan, 4.0])
    found = compare_pair(reference, candidate, engine=engine)
    counts = (found.nan_reference, found.nan_candidate, found.inf_reference, found.inf_candidate)
    assert counts == (2, 2, 3, 3) and found.nonfinite_mismatches == 3 and not found.nonfinite_match
    assert (found.mae, found.max_abs, found.max_abs_index, found.unequal) == (0.25, 0.5, (0,), 4)
    assert found.mean_reference == 2.5 and found.rel_l2 == pytest.approx(0.5 / math.sqrt(17), rel=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation wrote into memory of its own."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        owned = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in owned:
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_memory_does_not_grow_with_the_tensors(engine: pair.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_LIMIT", {"numba": 1024, "torch": 1024})
    base = torch.randn(8, 24, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    views = [
        (base, base.float()),
        (base.transpose(0, 1), base.transpose(0, 1).contiguous()),
        (base.flip(2).mT, base.mT),
    ]
    for reference, candidate in views:
        with Largest() as seen:
            found = compare_pair(reference, candidate, engine=engine)
        assert seen.size <= 1024, engine
        expected = np.abs(wide(candidate) - wide(reference))
        assert found.mae == pytest.approx(expected.mean(), rel=1e-12)
        assert found.max_abs_index == np.unravel_index(int(expected.argmax()), expected.shape)


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j])
    assert compare_pair(x.conj(), torch.tensor([1 - 2j, 3 + 1j])).identical
    assert compare_pair(x.conj().imag, torch.tensor([-2.0, 1.0])).identical


def test_the_coarser_comparison_rounds_both_sides_once() -> None:
    tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)  # through float32 it would be a tie and go down
    assert compare_pair_coarser(tie, torch.tensor([1 + 2.0**-7]).bfloat16()).identical
    found = compare_pair_coarser(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]).half())
    assert (found.dtype_reference, found.dtype_candidate, found.max_abs) == ("float16", "float16", 1.0)
    mixed = compare_pair_coarser(torch.tensor([2**16 - 1], dtype=torch.uint16), torch.tensor([-1], dtype=torch.int32))
    assert mixed.exact and mixed.max_abs == 2**16


def test_bad_input_is_refused_in_one_line() -> None:
    cases = [
        (torch.zeros(2, 3), torch.zeros(3, 2), {}, r"\(2, 3\) float32.*\(3, 2\) float32.*equal shapes"),
        (torch.zeros(2), torch.zeros(1), {}, "no broadcasting"),
        (torch.zeros(2), torch.zeros(2), {"engine": "cuda"}, "'numba' or 'torch'"),
        (torch.zeros(2), torch.zeros(2, device="meta"), {}, "dense"),
        (torch.zeros(2), [0.0, 0.0], {}, "list"),
    ]
    for reference, candidate, options, said in cases:
        with pytest.raises(InputError, match=said) as raised:
            compare_pair(reference, candidate, **options)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(7, 900), (2, 1300), (1, 5)], ids=str)
def test_threads_share_rows_or_columns_without_a_trace(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = make(shape, torch.float32, 1), make(shape, torch.bfloat16, 2)
    reference[-1, 3] = math.nan
    alone = compare_pair(reference, candidate)
    monkeypatch.setattr(pair, "_THREAD_WORTH", 1)
    monkeypatch.setattr(pair.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(pair.os, "sched_getaffinity", lambda _: range(3), raising=False)
    together = compare_pair(reference, candidate)
    assert together.max_abs_index == alone.max_abs_index and together.nan_reference == 1
    for name in ("mae", "rmse", "max_abs", "cosine", "slope", "mean_error", "unequal"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-12)
    np.testing.assert_allclose(together.row_error, alone.row_error, rtol=1e-12)
    np.testing.assert_allclose(together.channel_rms, alone.channel_rms, rtol=1e-12)


def test_the_first_of_equal_differences_is_named() -> None:
    for engine in ("numba", "torch"):
        candidate = torch.zeros(3, 9000)
        candidate[2, 5] = candidate[1, 8500] = candidate[1, 8700] = -1.0
        assert compare_pair(torch.zeros(3, 9000), candidate, engine=engine).max_abs_index == (1, 8500)


def test_metrics_are_figures_of_the_pass() -> None:
    reference, candidate = make((4, 33), torch.float32, 3), make((4, 33), torch.float16, 4)
    reference[1, 2], candidate[2, 1] = math.inf, math.nan
    found = compare_pair(reference, candidate)
    for name in ("mae", "rmse", "max_abs", "rel_l2", "rel_diff", "cosine_flat", "slope"):
        assert getattr(metrics, name)(reference, candidate) == getattr(found, name)
    assert list(metrics.cosine(reference, candidate)) == list(found.row_cosine)
    assert metrics.sqnr(reference, reference) == math.inf
    assert metrics.sqnr(torch.zeros(2), torch.ones(2)) == -math.inf


@given(shapes, st.sampled_from(FLOATS + EXACT), st.sampled_from(FLOATS + EXACT), st.integers(0, 9), st.booleans())
def test_small_tensors_take_a_short_way_to_the_same_figures(
    shape: tuple[int, ...], left: torch.dtype, right: torch.dtype, seed: int, holes: bool
) -> None:
    reference, candidate = make(shape, left, seed), make(shape, right, seed + 10)
    if holes and left.is_floating_point and left.itemsize > 1 and reference.numel():
        reference.view(-1)[seed % reference.numel()] = math.nan if seed % 2 else math.inf
    found = compare_pair(reference, candidate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "_THREAD_WORTH", 0)
        general = compare_pair(reference, candidate)
    for one in dataclasses.fields(found):
        ours, theirs = getattr(found, one.name), getattr(general, one.name)
        if isinstance(ours, float | np.ndarray):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
        else:
            assert ours == theirs, one.name


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_sums_of_squares_by_channel_leave_out_what_is_not_finite(dtype: torch.dtype) -> None:
    values = make((7, 300), dtype, 1)
    if dtype in FLOATS[:4]:
        values[2, 5], values[3, 6] = math.nan, -math.inf
    expected = np.sum(np.nan_to_num(wide(values), posinf=0, neginf=0) ** 2, axis=0)
    np.testing.assert_allclose(pair.channel_square_sums(values), expected, rtol=1e-13)
    np.testing.assert_allclose(
        pair.channel_square_sums(values[::2]),
        np.nansum(np.where(np.isfinite(wide(values[::2])), wide(values[::2]), 0) ** 2, axis=0),
        rtol=1e-13,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (4, 2), (9, 1024), (6, 8194), (2, 16385), (262, 24)])
@pytest.mark.parametrize("trouble", ["none", "nan", "tiny", "zero", "tie"])
def test_rows_that_are_read_where_they_lie_are_numpy_s_sums(
    dtype: torch.dtype, shape: tuple[int, int], trouble: str
) -> None:
    """Four rows are reduced side by side, leftovers one by one; a row that needs care sends its strip the other way."""
    reference = make(shape, dtype, 0)
    candidate = (reference.float() + 0.01 * make(shape, torch.float32, 1)).to(dtype)
    row, column = shape[0] - 1, shape[1] // 2
    if trouble == "nan":
        candidate[row, column] = math.nan
        reference[0, 0] = math.inf
    elif trouble == "tiny":  # the product of sides this far apart is lost between their squares
        candidate[row] = reference[row] * 1e-9
    elif trouble == "zero":
        candidate[row] = 0
    elif trouble == "tie":
        for side, value in ((reference, 1), (candidate, 9)):  # the first of them in the order of the elements
            side[0, -1] = side[1:, 0] = value
    r, c = wide(reference), wide(candidate)
    good = np.isfinite(r) & np.isfinite(c)
    r, c = np.where(good, r, 0.0), np.where(good, c, 0.0)
    d = c - r
    found = compare_pair(reference, candidate)
    assert found.unequal == int(np.sum(d != 0)) + (~good).sum() and found.nonfinite_mismatches == (~good).sum()
    assert found.max_abs_index == np.unravel_index(np.abs(d).argmax(), shape) and found.max_abs == np.abs(d).max()
    assert found.mean_reference == pytest.approx(r.sum() / good.sum(), rel=1e-12, abs=1e-14)
    assert found.mean_error == pytest.approx(d.sum() / good.sum(), rel=1e-11, abs=1e-14)
    assert found.mae == pytest.approx(np.abs(d).sum() / good.sum(), rel=1e-12)
    assert found.slope == pytest.approx((r * c).sum() / (r * r).sum(), rel=1e-12)
    norms = np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1)
    cosine = np.divide((r * c).sum(axis=1), norms, out=np.zeros(shape[0]), where=norms > 0)
    np.testing.assert_allclose(found.row_cosine, cosine, rtol=1e-12)
    np.testing.assert_allclose(found.row_error, np.linalg.norm(d, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.channel_rms, np.sqrt((d * d).mean(axis=0)), rtol=1e-12)
    without = dataclasses.replace(found, unequal=None)
    assert_equal(compare_pair(reference, candidate, count_unequal=False), without)


def assert_equal(found: pair.PairStats, expected: pair.PairStats) -> None:
    for one in dataclasses.fields(pair.PairStats):
        np.testing.assert_array_equal(getattr(found, one.name), getattr(expected, one.name))


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_a_small_difference_beside_values_that_are_scaled_is_one(engine: pair.Engine) -> None:
    reference = torch.tensor([1e300, 1e-30], dtype=torch.float64)
    found = compare_pair(reference, torch.tensor([1e300, 0.0], dtype=torch.float64), engine=engine)
    assert found.unequal == 1 and not found.identical
    assert compare_pair(reference, reference.clone(), engine=engine).identical
