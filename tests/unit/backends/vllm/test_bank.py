"""Banks against SiteProgram.apply, against float64, and their promises about bits, ranges, counts and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.backends.vllm.bank import SiteBank, StepRows, update_residual_
from trimtab.errors import SteeringError, VectorError
from trimtab.sites import Site
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    Cap,
    CapSubspace,
    Edit,
    LowRank,
    Patch,
    SetProjection,
    Steering,
)

SITE = Site.parse("layers.0.resid_post")
W, N = 64, 12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("auto", "torch")
NAN = float("nan")
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(x):
    return x.view(INTEGERS[x.element_size()])


def program(*ops, gain=1.0, width=W):
    made = Steering({"layers.0.resid_post": ops}, gain=gain)
    return made.resolve(num_layers=1, hidden_size=width, sites=[SITE])[SITE]


def bank(kernel, dtype, *programs, ops=3, directions=9, width=W, storage=torch.float32, keys=None):
    made = SiteBank(
        SITE,
        width,
        max_steering=3,
        ops_per_site=ops,
        max_directions=directions,
        max_bound=4,
        device="cpu",
        model_dtype=dtype,
        storage=storage,
        kernel=kernel,
    )
    for slot, one in enumerate(programs, 1):
        made.put(slot, made.pack(one, keys or {step.key: 0 for step in one.steps}))
    return made


def rows(gain, binding=None, slots=(0, 1, 2, 3, 0)):
    """A step of which row i belongs to binding[i] (1 unless told), whose steering is slots[binding]."""
    gain = torch.as_tensor(gain, dtype=torch.float32).reshape(-1, 1) if not isinstance(gain, torch.Tensor) else gain
    n = gain.shape[0]
    owner = torch.ones(n, dtype=torch.int32) if binding is None else torch.tensor(binding, dtype=torch.int32)
    return StepRows(n, owner, torch.tensor(slots, dtype=torch.int32), gain)


def signs(count, seed):
    """Directions whose elements are +-1/8: unit vectors that every dtype holds."""
    return (torch.randint(0, 2, (count, W), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1) / 8


def grid(dtype, n=N, seed=0):
    """States that are small multiples of 1/4: float32 sums them exactly in any order."""
    return (torch.randint(-12, 13, (n, W), generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)


U, V = signs(3, 1), signs(1, 2)[0]
OPS = {
    "add": lambda m: [Add(V * 4, 0.75, math=m)],
    "add token": lambda m: [Add(V, -0.25, "token_norm", math=m)],
    "add median": lambda m: [Add(V, -0.3, "median_norm", median_norm=7.0, math=m)],
    "add none": lambda m: [Add(V, 0.0, math=m)],
    "cap": lambda m: [Cap(U[0], -0.3, 0.7, math=m)],
    "cap min": lambda m: [Cap(U[0], min=1.1, math=m)],
    "ablate": lambda m: [Ablate(U[0], 0.3, math=m)],
    "set": lambda m: [SetProjection(U[0], -1.7, math=m)],
    "subspace": lambda m: [AblateSubspace(U[:1], 0.4, math=m)],
    "bounds": lambda m: [CapSubspace(U[:2], -0.5, [0.25, None], math=m)],
    "limited": lambda m: [Cap(U[0], max=-2.0, max_ratio=0.11, math=m)],
    "add limited": lambda m: [Add(V * 4, 3.0, max_ratio=0.4, math=m)],
    "two": lambda m: [Cap(U[0], -0.3, 0.7, math=m), Add(V, 0.5, math="bfloat16")],
    "three": lambda m: [Add(V, 0.5, math=m), Ablate(U[1], 0.0, math="float16"), Cap(U[0], max=0.1, math="float32")],
}
ROOTS = ("add token", "limited", "add limited")
"""Ops with a root, which torch takes within an ulp where the kernels round it correctly."""


def close(a, b, ulps):
    """Whether a and b differ by at most so many ulps of the larger row maximum; equal where ulps is 0."""
    if ulps == 0:
        return torch.equal(a, b)
    step = torch.finfo(a.dtype).eps * b.double().abs().amax(1, keepdim=True)
    return bool(((a.double() - b.double()).abs() <= ulps * step).all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_rows_are_those_of_the_reference(name, dtype, kernel):
    for mathematics in ("float32", "bfloat16", "float16", "model"):
        for gain in (1.0, 0.3):
            reference = program(*OPS[name](mathematics), gain=gain)
            x = grid(dtype)
            want = reference.apply(x, positions=torch.arange(N), prompt_length=N).h
            selected = torch.arange(N) % 3 != 0
            step = rows(torch.where(selected, gain, NAN)[:, None])
            made = bank(kernel, dtype, reference)
            got = x.clone()
            made.apply_(got, None, step)
            wide = mathematics == "float32" or (mathematics == "model" and dtype is torch.float32)
            # sums are exact on this grid, so the order of reduction does not show: roots of float32 do, by an ulp; and
            # what follows the first op of several is no longer on the grid
            ulps = 2 if (wide and name in ROOTS) or name == "three" else 0
            assert close(got[selected], want[selected], ulps), (mathematics, gain)
            assert torch.equal(bits(got[~selected]), bits(x[~selected]))
            assert made.counts[1, : len(reference.steps), 0].tolist() == [int(selected.sum())] * len(reference.steps)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_rows_are_those_of_the_reference_off_the_grid(name, dtype, kernel):
    """Another order of summing moves a projection by an ulp of the math dtype now and then, and with it the row."""
    for mathematics in ("float32", "bfloat16", "float16"):
        reference = program(*OPS[name](mathematics), gain=0.6)
        x = (torch.randn(N, W) * 3).to(dtype)
        want = reference.apply(x, positions=torch.arange(N), prompt_length=N).h
        got = x.clone()
        bank(kernel, dtype, reference).apply_(got, None, rows([0.6] * N))
        h = x.double()
        # two ulps of the largest projection or correction, on elements of a direction that are 1/8; an ulp of the model
        projection = (h @ torch.cat([U, V[None]]).double().T).abs().amax(1, keepdim=True)
        size = torch.maximum((want.double() - h).abs().amax(1, keepdim=True), projection / 8)
        bound = 2 * torch.finfo(DTYPES[mathematics]).eps * size + torch.finfo(dtype).eps * want.double().abs()
        summing = 4 * torch.finfo(torch.float32).eps * h.norm(dim=1, keepdim=True) / 8
        assert bool(((got.double() - want.double()).abs() <= bound + summing).all()), mathematics


def exact(name, h, gain):
    """The ops in float64, from the formulas of the design."""
    u, v = U.double(), V.double()
    p = h @ u[0]
    along = {
        "cap": p.clamp(-0.3, 0.7),
        "cap min": p.clamp(min=1.1),
        "ablate": p * 0.3,
        "set": torch.full_like(p, -1.7),
        "limited": p.clamp(max=-2.0),
    }
    if name in along:
        c = (along[name] - p)[:, None] * u[0]
    else:
        c = {
            "add": 0.75 * (4 * v).expand_as(h),
            "add token": -0.25 * h.norm(dim=1, keepdim=True) * v,
            "add median": (-0.3 * 7.0 * v).expand_as(h),
            "add limited": (12.0 * v).expand_as(h),
        }[name]
    ratio = {"limited": 0.11, "add limited": 0.4}.get(name, math.inf)
    c = c * (ratio * h.norm(dim=1, keepdim=True) / c.norm(dim=1, keepdim=True)).nan_to_num(nan=1.0).clamp(max=1.0)
    return c * gain[:, None]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "name", [one for one in OPS if one in (*ROOTS, "add", "add median", "cap", "cap min", "ablate", "set")]
)
def test_float32_ops_are_the_formula(name, streamed, dtype, kernel):
    x, r = (torch.randn(N, W) * 2).to(dtype), torch.randn(N, W).mul(5).to(dtype)
    gain = torch.rand(N) * 2
    got = x.clone()
    step = rows(gain[:, None])
    bank(kernel, dtype, program(*OPS[name]("float32"))).apply_(got, r if streamed else None, step)
    h = x.double() + r.double() if streamed else x.double()
    c = exact(name, h, gain.double())
    size = h.norm(dim=1, keepdim=True) + c.abs().amax(1, keepdim=True)
    bound = torch.finfo(dtype).eps / 2 * (x.double() + c).abs() + 8 * 2.0**-24 * size + 2.0**-24
    assert bool(((got.double() - (x.double() + c)).abs() <= bound).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_several_directions_are_the_formula(kernel):
    us = torch.nn.functional.normalize(torch.randn(3, W).double(), dim=1)
    h = torch.randn(N, W)
    got = h.clone()
    bank(kernel, torch.float32, program(AblateSubspace(us, 0.25))).apply_(got, None, rows([1.0] * N))
    basis, _ = torch.linalg.qr(us.T)
    want = h.double() - 0.75 * (h.double() @ basis) @ basis.T
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)
    got = h.clone()
    made = bank(kernel, torch.float32, program(CapSubspace(us, -0.2, 0.3)))
    made.apply_(got, None, rows([1.0] * N))
    p = got.double() @ us.T
    assert bool(((p > -0.2 - 1e-5) & (p < 0.3 + 1e-5)).all())
    before = h.double() @ us.T
    assert made.counts[1, 0, 1] == int(((before < -0.2) | (before > 0.3)).any(1).sum())
    change = got.double() - h.double()  # the smallest change lies in the span of the directions
    torch.testing.assert_close(change, (change @ basis) @ basis.T, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_not_corrected_keeps_its_bits(dtype, kernel):
    direction = torch.zeros(W)
    direction[:4] = 0.5
    x = torch.randn(6, W).to(dtype)
    x[:, ::2] = -0.0
    x[0, 9] = NAN
    first = bank(kernel, dtype, program(SetProjection(direction, 3.0)), program(Cap(direction, -99.0, 99.0)))
    step = rows([NAN, 1.0, 1.0, 1.0, 1.0, 0.0], binding=[1, 0, 1, 2, 3, 1])  # slot 3 is empty
    got = x.clone()
    first.apply_(got, None, step)
    untouched = [0, 1, 3, 4, 5]
    assert torch.equal(bits(got[untouched]), bits(x[untouched]))
    assert torch.equal(bits(got[2, 4:]), bits(x[2, 4:]))
    assert not torch.equal(got[2, :4], x[2, :4])
    assert first.counts[:, 0].tolist() == [[0, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    first.clear(1)
    again = x.clone()
    first.apply_(again, None, step)
    assert torch.equal(bits(again), bits(x))
    first.clear(2)
    first.apply_(again, None, step)
    assert torch.equal(bits(again), bits(x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_op_follows_its_own_key_and_each_row_its_own_slot(kernel):
    two = program(Add(V, 1.0), Cap(U[0], max=-1.0))
    made = SiteBank(
        SITE, W, max_steering=2, ops_per_site=2, max_directions=2, max_bound=3, device="cpu",
        model_dtype=torch.float32, kernel=kernel,
    )  # fmt: skip
    keyed = Steering({"layers.0.resid_post": [Add(V, 1.0)]}, gain=0.5) + Steering(
        {"layers.0.resid_post": [Cap(U[0], max=-1.0)]}, positions="generated"
    )
    two = keyed.resolve(num_layers=1, hidden_size=W, sites=[SITE])[SITE]
    made.put(1, made.pack(program(Add(V, 2.0)), {program(Add(V, 2.0)).steps[0].key: 0}))
    made.put(2, made.pack(two, {two.steps[0].key: 3, two.steps[1].key: 1}))
    gain = torch.full((4, 4), NAN)
    gain[0, 0], gain[1, 3], gain[2, 1], gain[3] = 1.0, 0.5, 1.0, 1.0
    x = grid(torch.float32, 4)
    got = x.clone()
    made.apply_(got, None, rows(gain, binding=[2, 3, 3, 3], slots=(0, 0, 1, 2)))
    assert torch.equal(got[0], x[0] + 2 * V)
    assert torch.equal(got[1], x[1] + 0.5 * V)

    def cap(h):
        return h + (h @ U[0]).clamp(max=-1.0).sub(h @ U[0]) * U[0]

    torch.testing.assert_close(got[2], cap(x[2]))
    torch.testing.assert_close(got[3], cap(x[3] + V))
    assert made.counts[:, :, 0].tolist() == [[0, 0], [0, 0], [1, 0], [2, 2]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_slot_that_is_packed_again_forgets_what_it_held(kernel):
    made = bank(kernel, torch.float32, program(Add(V, 1.0), Add(V, 2.0), Cap(U[0], max=-9.0)))
    one = program(Add(V, -1.0))
    made.put(1, made.pack(one, {one.steps[0].key: 0}))
    got = torch.zeros(1, W)
    made.apply_(got, None, rows([1.0]))
    assert torch.equal(got[0], -V)
    assert made.counts[1, :, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_correction_is_added_to_x_once_and_never_through_the_stream(dtype, kernel):
    r, x = torch.full((1, W), 1024.0).to(dtype), torch.full((1, W), 0.0078125).to(dtype)
    got = x.clone()
    bank(kernel, dtype, program(Add(torch.full((W,), 0.0009765625)))).apply_(got, r, rows([1.0]))
    assert torch.equal(got, (x.float() + 0.0009765625).to(dtype))
    seen = r.float() + x.float()
    got = x.clone()
    u = torch.full((W,), 0.125)
    bank(kernel, dtype, program(SetProjection(u, 0.0))).apply_(got, r, rows([1.0]))
    change = -(seen @ u)
    assert torch.equal(got, (x.float() + change * 0.125).to(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_that_leaves_the_range_is_held_at_its_edge_and_counted(sign, dtype, kernel):
    top = torch.finfo(dtype).max
    step = rows([1.0, 1.0, 1.0])
    push = bank(kernel, dtype, program(Add(torch.full((W,), 0.75 * top), sign)))
    x = torch.zeros(3, W, dtype=dtype)
    x[1, 3] = sign * 0.75 * top
    x[2, 4], x[2, 5] = sign * math.inf, NAN
    want = torch.full((3, W), 0.75 * top * sign).to(dtype)
    want[1, 3] = sign * top
    want[2, 4:6] = x[2, 4:6]
    got = x.clone()
    push.apply_(got, None, step)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert push.counts[1, 0].tolist() == [3, 0, 1]
    stream, got = torch.zeros(3, W, dtype=dtype), torch.zeros(3, W, dtype=dtype)
    stream[1, 3] = sign * 0.5 * top
    push.apply_(got, stream, step)
    h = stream + got
    assert bool(torch.isfinite(h).all())
    assert bool((h[1, 3].abs() >= top * 0.99).item())
    assert torch.equal(got[[0, 2]], want[[0, 0]])
    assert push.counts[1, 0].tolist() == [6, 0, 2]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_that_an_op_cannot_hold_is_left_and_counted(kernel):
    x = torch.full((1, W), 1e6).to(torch.bfloat16)
    made = bank(kernel, torch.bfloat16, program(Cap(U[0], max=0.0, math="float16")))
    got = x.clone()
    made.apply_(got, None, rows([1.0]))
    assert torch.equal(got, x)
    assert made.counts[1, 0].tolist()[::2] == [1, 1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPS)
def test_full_doses_are_those_of_the_reference(name, kernel):
    reference = program(*OPS[name]("float32"), gain=0.5)
    x = grid(torch.bfloat16)
    selected = torch.arange(N) % 4 != 1
    want = reference.apply(x, positions=torch.arange(N), prompt_length=N, detail="full").dose
    dose = torch.full((N, 3, 5), -7.0)
    made = bank(kernel, torch.bfloat16, reference)
    made.apply_(x.clone(), None, rows(torch.where(selected, 0.5, NAN)[:, None]), dose)
    for j, one in enumerate(want):
        columns = [one.p_before, one.p_after, one.cap_delta, one.clamped.float(), one.ratio]
        torch.testing.assert_close(dose[selected, j], torch.stack(columns, 1)[selected], rtol=2e-6, atol=4e-6)
        assert made.counts[1, j, 1] == int(one.clamped[selected].sum())
    assert bool((dose[~selected] == -7.0).all())
    assert bool((dose[:, len(want) :] == -7.0).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_of_a_wider_tensor_and_rows_of_padding(kernel):
    fused = torch.randn(N + 2, 3 * W).to(torch.bfloat16)
    whole = fused.clone()
    reference = program(Ablate(U[0], 0.0))
    step = rows([1.0] * (N + 2))
    step.n = N
    bank(kernel, torch.bfloat16, reference).apply_(fused[:, W : 2 * W], None, step)
    want = reference.apply(whole[:N, W : 2 * W].contiguous(), positions=torch.arange(N), prompt_length=N).h
    assert close(fused[:N, W : 2 * W], want, 1)
    assert not torch.equal(fused[:N, W : 2 * W], whole[:N, W : 2 * W])
    for part in (slice(0, W), slice(2 * W, None)):
        assert torch.equal(fused[:, part], whole[:, part])
    assert torch.equal(fused[N:], whole[N:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_directions_may_be_stored_in_bfloat16(kernel):
    x = torch.randn(N, W)
    full, half = (
        bank(kernel, torch.float32, program(Cap(torch.randn(W), max=-1.0, math="float32")), storage=storage)
        for storage in (torch.float32, torch.bfloat16)
    )
    assert half.tables.directions.nbytes * 2 == full.tables.directions.nbytes
    assert half.nbytes == full.nbytes - half.tables.directions.nbytes
    direction = torch.randn(W)
    program_ = program(Cap(direction, max=-1.0), Add(direction, 0.5))
    got = x.clone()
    bank(kernel, torch.float32, program_, storage=torch.bfloat16).apply_(got, None, rows([1.0] * N))
    want = program_.apply(x, positions=torch.arange(N), prompt_length=N).h
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_stream_follows_tracked_rows_only(dtype):
    r, x = torch.randn(5, W).to(dtype), torch.randn(4, W).to(dtype)
    step = rows([1.0] * 5, binding=[1, 0, 4, 2, 3])
    step.n = 3
    for mode, new in (("set", x), ("add", r[:4] + x)):
        got = r.clone()
        update_residual_(got, x, step, mode)
        assert torch.equal(bits(got), bits(torch.stack([new[0], r[1], new[2], r[3], r[4]])))


def test_what_does_not_fit_is_refused():
    small = bank("auto", torch.float32, program(Add(V, 1.0)), ops=1, directions=2)
    with pytest.raises(SteeringError, match=r"2 ops were given and the engine holds 1 .*ops_per_site=2"):
        small.pack(program(Add(V, 1.0), Add(V, 2.0)), {})
    with pytest.raises(SteeringError, match=r"3 directions and the engine holds 2 .*directions_per_op=3"):
        small.pack(program(CapSubspace(U, max=0.0)), {})
    with pytest.raises(SteeringError, match=r"0:Patch cannot lie in a bank"):
        small.pack(program(Patch(V)), {})
    with pytest.raises(VectorError, match=r"width 8; the states are 64 wide"):
        small.pack(program(Add(torch.ones(8), 1.0), width=8), {})
    got = torch.zeros(1, W)
    small.apply_(got, None, rows([1.0]))
    assert torch.equal(got[0], V)
    with pytest.raises(SteeringError, match=r"float64"):
        bank("auto", torch.float64)


def test_which_ops_a_bank_takes():
    takes = [Add(V), Cap(U[0], max=1.0), Ablate(U[0], 0.0), SetProjection(U[0], 0.0)]
    takes += [AblateSubspace(U, 0.0), CapSubspace(U, max=0.0)]
    assert all(SiteBank.supports(op) for op in takes)
    others = [Patch(V), LowRank(U, None, U.T), Edit(lambda h: h)]
    assert not any(SiteBank.supports(op) for op in others)
