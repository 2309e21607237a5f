"""Large passes go through in blocks of rows, which leave no trace in the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.errors import NonFiniteError
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    Applied,
    Cap,
    CapSubspace,
    Edit,
    LowRank,
    Op,
    Patch,
    Ramp,
    Rows,
    SiteProgram,
    Steering,
    _chain,
)

WIDTH = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V = random(4, WIDTH, seed=1)
OPS: dict[str, list[Op]] = {
    "add": [Add(V[0])],
    "token_norm": [Add(V[0], 0.1, unit="token_norm")],
    "cap": [Cap(V[0], max=0.1)],
    "several": [Add(V[0]), Cap(V[1], -0.2, 0.2), Ablate(V[2], 0.0, max_ratio=0.1)],
    "subspace": [AblateSubspace(V[:2], 0.3)],
    "bounds": [CapSubspace(V[:2], max=0.2)],
    "patch": [Patch(random(40, WIDTH, seed=3), 0.5)],
    "low_rank": [LowRank(V[:2], None, V[2:].T)],
}


def site_of(ops: list[Op], **options: Any) -> SiteProgram:
    (site,) = Steering({"embed": ops}, **options).resolve(num_layers=1, hidden_size=WIDTH).values()
    return site


def in_blocks(monkeypatch: pytest.MonkeyPatch, site: SiteProgram, h: torch.Tensor, rows: Rows, size: int) -> Applied:
    with monkeypatch.context() as patch:
        patch.setattr(_chain, "BLOCK", size * WIDTH // torch.get_num_threads())
        return site.apply(h, rows)


def bits(h: torch.Tensor) -> torch.Tensor:
    return h.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", OPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(2, 12),
    positions=st.sampled_from(["all", "prompt", "generated", "last_prompt", "all,!5:9"]),
    gain=st.sampled_from([1.0, Ramp(0.9)]),
)
def test_blocks_and_all_rows_at_once_agree_in_every_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, size: int, positions: str, gain: Any
) -> None:
    h = (random(37, WIDTH) * 4).to(dtype)
    h[:, ::5] = -0.0
    where = torch.arange(37)
    site = site_of(OPS[name], positions=positions, gain=gain)
    whole, parts = site.apply(h, Rows(where, 20)), in_blocks(monkeypatch, site, h, Rows(where, 20), size)
    assert torch.equal(bits(parts.h), bits(whole.h))
    assert [one.count for one in parts.dose] == [one.count for one in whole.dose]


@pytest.mark.parametrize("count", [1, 2, 3, 37, 64])
def test_blocks_cover_the_rows_in_order_and_none_is_a_single_row(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """torch sums one long row in pieces, one per thread; two rows or more it sums row by row."""
    monkeypatch.setattr(_chain, "BLOCK", WIDTH)
    chain = _chain.make(site_of([Cap(V[0], max=0.0)]).steps, torch.device("cpu"), torch.float32)
    spans = _chain.spans(torch.zeros(count, WIDTH), chain)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(count))
    assert count == 1 or min(stop - start for start, stop in spans) >= 2
    assert (len(spans) > 1) == (count > 3)


def test_an_edit_is_given_all_rows_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def center(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x - x.mean(0)

    h = random(37, WIDTH)
    out = in_blocks(monkeypatch, site_of([Edit(center)]), h, Rows(torch.arange(37), 20), 4).h
    assert seen == [37]
    torch.testing.assert_close(out.mean(0), torch.zeros(WIDTH), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_leaves_the_range_in_any_block_is_counted_over_all(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    h = torch.zeros(37, WIDTH, dtype=dtype)
    largest = torch.finfo(dtype).max
    h[[13, 30], 2] = largest
    site = site_of([Add([largest] * WIDTH)])
    with pytest.raises(NonFiniteError, match=r"2 rows non-finite in torch\.\w+, the first at position 113"):
        in_blocks(monkeypatch, site, h, Rows(torch.arange(100, 137), 120), 4)


@pytest.mark.parametrize("name", ["add", "cap", "several"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4, 1000])
def test_rows_that_no_op_selects_keep_the_bits_of_their_nans(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, size: int
) -> None:
    h = random(37, WIDTH).to(dtype)
    as_ints = h.view(torch.int32 if dtype is torch.float32 else torch.int16)
    as_ints[[3, 9], 1] = -3  # a NaN with a sign and a payload
    site = site_of(OPS[name], positions="10:35")
    out = in_blocks(monkeypatch, site, h, Rows(torch.arange(37), 36), size).h
    assert torch.equal(bits(out[:10]), bits(h[:10]))
    assert torch.equal(bits(out[35:]), bits(h[35:]))
    assert not torch.equal(out[10:35], h[10:35])


def test_gradients_pass_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    site, where = site_of([Ablate(V[0], 0.0)], positions="10:35"), torch.arange(37)
    grads = []
    for size in (4, 1000):
        h = random(37, WIDTH).requires_grad_()
        (in_blocks(monkeypatch, site, h, Rows(where, 36), size).h * random(37, WIDTH, seed=5)).sum().backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert not torch.equal(grads[0], random(37, WIDTH, seed=5))


def test_a_selection_of_every_row_of_a_pass_is_no_mask() -> None:
    site = site_of([Add(V[0])], positions="prompt")
    step = site.steps[0]
    assert Rows(torch.arange(5), 5).select(step.positions, step.gain, step.key).mask is None
    assert Rows(torch.arange(5), 4).select(step.positions, step.gain, step.key).mask is not None
    assert Rows(torch.arange(5) - 1, 5).select(step.positions, step.gain, step.key).mask is not None


@pytest.mark.parametrize("size", [4, 1000])
@pytest.mark.parametrize("second", ["25:30", "all"])
def test_ops_with_selections_of_their_own_change_the_rows_of_either(
    monkeypatch: pytest.MonkeyPatch, size: int, second: str
) -> None:
    h, rows = random(37, WIDTH), Rows(torch.arange(37), 36)
    both = Steering({"embed": Add(V[0])}, positions="3:9") + Steering({"embed": Add(V[1])}, positions=second)
    (site,) = both.resolve(num_layers=1, hidden_size=WIDTH).values()
    expected = h.clone()
    expected[3:9] += V[0]
    expected[slice(25, 30) if second == "25:30" else slice(None)] += V[1]
    applied = in_blocks(monkeypatch, site, h, rows, size)
    torch.testing.assert_close(applied.h, expected, rtol=0, atol=1e-6)
    assert [one.count for one in applied.dose] == [6, 5 if second == "25:30" else 37]
