"""Dtypes' roundoff against torch, and the expected error against layers that really ran in low precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from trimtab.errors import InputError
from trimtab.numerics import coarser, compare_pair, expected_relative_error, is_floating, tolerances, unit_roundoff

LADDER = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("name", LADDER)
def test_unit_roundoff_is_half_of_torch_s_eps(name: str) -> None:
    assert unit_roundoff(name) == torch.finfo(getattr(torch, name)).eps / 2 and is_floating(name)


def test_the_coarser_dtype_has_the_larger_roundoff_or_holds_both() -> None:
    for finer, rougher in pairwise(LADDER):
        assert coarser(finer, rougher) == coarser(rougher, finer) == getattr(torch, rougher)
    assert coarser("float8_e4m3fn", "float8_e4m3fnuz") == torch.float8_e4m3fn
    assert coarser("int64", "bfloat16") == coarser("bfloat16", "int64") == torch.bfloat16
    assert coarser("uint16", "int32") == torch.int32 and coarser("uint32", "int8") == torch.int64
    assert coarser("bool", "uint8") == torch.uint8 and not is_floating("bool")
    with pytest.raises(InputError, match="uint64 and int64"):
        coarser("uint64", "int64")
    with pytest.raises(InputError, match="int8 is exact"):
        unit_roundoff("int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_lands_within_a_factor_of_two(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(384, 256).to(dtype)
    x = torch.randn(64, 384, generator=generator).to(dtype)
    with torch.no_grad():
        found = compare_pair(layer.double()(x.double()), layer.to(dtype)(x)).rel_l2
    expected = expected_relative_error(dtype, reduction_length=384)
    assert expected / 2 < found < expected * 2


def test_a_float32_sum_grows_with_the_root_of_its_length() -> None:
    generator = torch.Generator().manual_seed(1)
    for length in (64, 4096):
        x, w = (torch.randn(256, length, generator=generator) for _ in range(2))
        total = torch.zeros(256)
        for i in range(length):
            total = total + x[:, i] * w[:, i]
        found = compare_pair((x.double() * w.double()).sum(1), total).rel_l2
        expected = expected_relative_error("float32", reduction_length=length)
        assert expected / 2 < found < expected * 2


def test_the_formula_and_what_it_refuses() -> None:
    one = expected_relative_error("float16", reduction_length=0)
    assert one == pytest.approx(0.42 * 2**-11)
    assert expected_relative_error("float16", blocks_upstream=4, reduction_length=0) == pytest.approx(3 * one)
    in_half = expected_relative_error("float16", accumulator="float16", reduction_length=99)
    assert in_half == pytest.approx(10 * one)
    for options in ({"blocks_upstream": -1, "reduction_length": 1}, {"reduction_length": -1}):
        with pytest.raises(InputError, match=">= 0"):
            expected_relative_error("float16", **options)


def test_engines_and_schedules_share_one_bound() -> None:
    for dtype in tolerances.ROW_REL_L2:
        assert (
            tolerances.engine_row_rel_l2(dtype, 4)
            == tolerances.row_rel_l2(dtype, 4)
            == pytest.approx(3 * tolerances.ROW_REL_L2[dtype])
        )
    with pytest.raises(InputError, match="no tolerance for int8"):
        tolerances.row_rel_l2("int8", 0)
