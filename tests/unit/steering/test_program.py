"""How ops meet at a site: order, state, the one rounding, the watch for non-finite results, and binding to a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError, NonFiniteError, PositionError, SiteError, VectorError
from trimtab.sites import Site, resolve_sites
from trimtab.steering import Ablate, Add, Cap, Op, Rows, SiteProgram, Steering

WIDTH = 16


def site_of(*ops: Op, width: int = WIDTH, **options: Any) -> SiteProgram:
    (site,) = Steering({"embed": list(ops)}, **options).resolve(num_layers=1, hidden_size=width).values()
    return site


def apply(h: torch.Tensor, *ops: Op, **options: Any) -> torch.Tensor:
    site = site_of(*ops, width=h.shape[-1], **options)
    return site.apply(h, positions=torch.arange(h.shape[0]), prompt_length=1).h


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_op_sees_what_the_ones_before_it_left() -> None:
    h, u, v = random(5, WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2)
    capped_last = apply(h, Add(v, 9.0), Cap(u, max=0.1))
    capped_first = apply(h, Cap(u, max=0.1), Add(v, 9.0))
    unit = u.double() / u.double().norm()
    assert float((capped_last.double() @ unit).max()) <= 0.1 + 1e-5
    assert float((capped_first.double() @ unit).abs().max()) > 1.0
    torch.testing.assert_close(capped_last, apply(apply(h, Add(v, 9.0)), Cap(u, max=0.1)), rtol=0, atol=1e-5)


def test_a_repeated_op_applies_twice() -> None:
    h = torch.zeros(1, 2)
    assert apply(h, Add([1.0, 0.5]), Add([1.0, 0.5])).tolist() == [[2.0, 1.0]]


def test_the_sum_of_corrections_is_rounded_once() -> None:
    """At 256 a bfloat16 step is 2: two additions of 0.75 vanish when each is rounded; together they make 258."""
    h = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    small = Add([0.75, 0.75])
    assert apply(apply(h, small), small).tolist() == [[256.0, 256.0]]
    assert apply(h, small, small).tolist() == [[258.0, 258.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31))
def test_float32_math_in_a_reduced_model_is_one_rounding_of_the_float32_sum(dtype: torch.dtype, seed: int) -> None:
    h = (random(3, WIDTH, seed=seed) * 8).to(dtype)
    v, u = random(WIDTH, seed=seed + 1), random(WIDTH, seed=seed + 2)
    unit = (u.double() / u.double().norm()).float()
    state = h.float() + v * 1.0
    total = v + ((state * unit).sum(-1, keepdim=True).clamp(max=0.5) - (state * unit).sum(-1, keepdim=True)) * unit
    assert torch.equal(apply(h, Add(v), Cap(u, max=0.5)), (h.float() + total).to(dtype))


def test_the_state_is_held_in_the_widest_math() -> None:
    """After an Add of 2^-9 in bfloat16 an op in float32 must see it, although bfloat16 cannot hold it beside 1."""
    h = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    nudge = Add([2.0**-9, 1.0], math="bfloat16")
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, float(x[0, 0])))
        return x

    from trimtab.steering import Edit

    apply(h, nudge, Edit(look, math="float32"))
    apply(h, nudge, Edit(look, math="bfloat16"))
    assert seen == [(torch.float32, 1.0 + 2.0**-9), (torch.bfloat16, 1.0)]


def test_bfloat16_and_float16_together_are_held_in_float32() -> None:
    site = site_of(Add([1.0] * WIDTH, math="bfloat16"), Add([1.0] * WIDTH, math="float16"))
    assert site.prepare(torch.device("cpu"), torch.bfloat16).state is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("math", ["float32", "bfloat16", "float16", "model"])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_the_short_way_of_one_add_and_the_general_way_agree_in_every_bit(
    dtype: torch.dtype, math: Any, gain: float
) -> None:
    h = (random(7, WIDTH) * 4).to(dtype)
    site = site_of(Add(random(WIDTH, seed=1), 0.7, math=math), gain=gain)
    rows = Rows(torch.arange(7), 3)
    short, general = site.apply(h, rows), site.apply(h, rows, detail="full")
    assert site.prepare(h.device, dtype).static is not None
    assert torch.equal(short.h, general.h)
    assert short.dose[0].count == general.dose[0].count == 7


def test_leading_dimensions_are_kept_and_nothing_selected_returns_the_input() -> None:
    h = random(2, 3, WIDTH)
    site = site_of(Cap(random(WIDTH, seed=1), max=-5.0), positions="generated")
    positions = torch.tensor([0, 1, 2, 0, 1, 2])
    out = site.apply(h, positions=positions, prompt_length=2).h
    assert out.shape == h.shape
    assert torch.equal(out[:, :2], h[:, :2])
    assert site.apply(h, positions=positions, prompt_length=9).h is h


def test_padding_rows_are_never_changed() -> None:
    h = random(4, WIDTH)
    for op in (Add(random(WIDTH, seed=1)), Cap(random(WIDTH, seed=1), max=-9.0)):
        out = site_of(op).apply(h, positions=torch.tensor([-1, -1, 0, 1]), prompt_length=2)
        assert torch.equal(out.h[:2], h[:2])
        assert not torch.equal(out.h[2:], h[2:])
        assert out.dose[0].count == 2


def test_masks_are_computed_once_per_pass() -> None:
    rows = Rows(torch.arange(6), 3)
    first, second = (
        site_of(Cap([1.0] * WIDTH, max=0.0), positions="generated"),
        site_of(Add([1.0] * WIDTH), positions="generated"),
    )
    h = random(6, WIDTH)
    first.apply(h, rows)
    before = rows.select(first.steps[0].positions, first.steps[0].gain, first.steps[0].key)
    second.apply(h, rows)
    assert rows.select(second.steps[0].positions, second.steps[0].gain, second.steps[0].key) is before


@pytest.mark.parametrize(
    "ops", [[Add([1e38, 1.0], 30.0)], [Cap([1.0, 0.0], min=3e38), Add([1e38, 1.0], 30.0)], [Ablate([1.0, 0.0], 1e30)]]
)
def test_a_correction_that_leaves_float32_is_an_error(ops: list[Op]) -> None:
    h = (
        torch.tensor([[1.0, 2.0], [3e18, 1.0]])
        if isinstance(ops[0], Ablate)
        else torch.tensor([[1.0, 2.0], [3e38, 1.0]])
    )
    with pytest.raises(
        NonFiniteError, match=r"embed: 0:\w+.* made [12] rows non-finite in torch.float32, the first at"
    ):
        apply(h, *ops)


def test_a_correction_that_leaves_float16_is_an_error_with_the_position() -> None:
    h = torch.tensor([[1.0, 2.0], [60000.0, 1.0]], dtype=torch.float16)
    site = site_of(Add([10000.0, 0.0]), width=2)
    with pytest.raises(NonFiniteError, match=r"1 rows non-finite in torch\.float16, the first at position 6"):
        site.apply(h, positions=torch.tensor([5, 6]), prompt_length=1)


def test_rows_that_were_not_finite_before_are_not_blamed_on_the_op() -> None:
    h = torch.tensor([[float("inf"), 2.0], [3.0, 1.0]])
    out = apply(h, Add([1.0, 1.0]))
    assert out.tolist() == [[float("inf"), 3.0], [4.0, 2.0]]


def test_large_finite_sums_are_no_alarm() -> None:
    h = torch.full((4, 8), 60000.0, dtype=torch.float16)
    assert bool(torch.isfinite(apply(h, Add([1.0] * 8))).all())


def test_the_deferred_check_raises_once_when_asked() -> None:
    site = site_of(Add([1.0, 0.0]), width=2)
    meta = torch.empty(1, 2, device="meta")
    site._flags[meta.device] = torch.tensor(True)
    with pytest.raises(NonFiniteError, match="made rows non-finite"):
        site.check()
    site.check()


def test_resolve_orders_sites_as_the_forward_pass_and_names_ops_by_place() -> None:
    steering = Steering({"layers.*.resid_post": Add([1.0, 0.0]), "layers.1.resid_post": Cap([1.0, 1.0], max=0.0)})
    program = (steering + Steering({"embed": Ablate([0.0, 1.0], 0.0)})).resolve(num_layers=2, hidden_size=2)
    assert [(str(site), [step.name for step in one.steps]) for site, one in program.items()] == [
        ("embed", ["0:Ablate"]),
        ("layers.0.resid_post", ["0:Add"]),
        ("layers.1.resid_post", ["0:Add", "1:Cap"]),
    ]


def test_resolve_refuses_what_the_model_does_not_have() -> None:
    with pytest.raises(
        VectorError, match=r"layers\.3\.resid_post: the vector of Add has width 2 and the states there have width 8"
    ):
        Steering({"layers.3.resid_post": Add([1.0, 1.0])}).resolve(num_layers=4, hidden_size=8)
    with pytest.raises(SiteError, match="layer 9 is outside this model, which has layers 0 to 3"):
        Steering({"layers.9.resid_post": Add([1.0, 1.0])}).resolve(num_layers=4, hidden_size=2)
    sites = resolve_sites("embed layers.*.resid_post", 4)
    with pytest.raises(SiteError, match="layer 2 has: resid_post"):
        Steering({"layers.2.resid_mid": Add([1.0, 1.0])}).resolve(num_layers=4, hidden_size=2, sites=sites)
    with pytest.raises(SiteError, match="no final_norm; nearest: "):
        Steering({"final_norm": Add([1.0, 1.0])}).resolve(num_layers=4, hidden_size=2, sites=sites)


def test_widths_other_than_the_stream_are_checked_when_known_and_when_applied() -> None:
    steering = Steering({"layers.0.q": Add([1.0] * 6)})
    with pytest.raises(VectorError, match="width 6 and the states there have width 12"):
        steering.resolve(num_layers=1, hidden_size=4, widths=lambda site: 12)
    (site,) = steering.resolve(num_layers=1, hidden_size=4).values()
    with pytest.raises(VectorError, match=r"layers\.0\.q: the states have width 12 and the vectors have width 6"):
        site.apply(torch.zeros(1, 12), positions=torch.tensor([0]), prompt_length=1)


def test_apply_refuses_missing_rows_integer_states_and_selections_before_the_prompt() -> None:
    site = site_of(Add([1.0] * WIDTH), positions="-4:")
    with pytest.raises(InputError, match="give rows=, or positions= and prompt_length="):
        site.apply(torch.zeros(1, WIDTH))
    with pytest.raises(InputError, match="floating-point"):
        site.apply(torch.zeros(1, WIDTH, dtype=torch.int64), positions=torch.tensor([0]), prompt_length=5)
    for length in (3, torch.tensor([3])):
        with pytest.raises(PositionError, match="which has 3 tokens"):
            site.apply(torch.zeros(1, WIDTH), positions=torch.tensor([0]), prompt_length=length)


def test_a_program_checks_positions_before_a_request_runs() -> None:
    program = Steering({"embed": Add([1.0, 1.0])}, positions="-4:P").resolve(num_layers=1, hidden_size=2)
    program.check_positions(4)
    with pytest.raises(PositionError, match="which has 3 tokens"):
        program.check_positions(3)


def test_a_program_is_a_mapping_by_site() -> None:
    program = Steering({"embed": Add([1.0, 1.0])}).resolve(num_layers=1, hidden_size=2)
    assert Site("embed") in program
    assert len(program) == 1
    program.check()
