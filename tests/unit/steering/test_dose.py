"""The dose against a reckoning of its own in float64."""

from __future__ import annotations

import pytest
import torch

from trimtab.steering import Ablate, AblateSubspace, Add, Applied, Cap, Op, Steering

WIDTH = 12


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(h: torch.Tensor, *ops: Op, positions: str = "all", gain: float = 1.0) -> Applied:
    (site,) = (
        Steering({"embed": list(ops)}, positions=positions, gain=gain).resolve(num_layers=1, hidden_size=WIDTH).values()
    )
    return site.apply(h, positions=torch.arange(10, 10 + len(h)), prompt_length=12, detail="full")


def test_a_cap_reports_projections_adjustment_clamping_and_ratio() -> None:
    h, v = random(8, WIDTH), random(WIDTH, seed=1)
    u = v.double() / v.double().norm()
    (dose,) = run(h, Cap(v, -0.4, 0.4), positions="generated", gain=0.5).dose
    p = h.double()[2:] @ u
    change = p.clamp(-0.4, 0.4) - p
    assert (str(dose.site), dose.op, dose.count) == ("embed", "0:Cap", 6)
    assert dose.positions.tolist() == list(range(12, 18))
    assert dose.clamped.tolist() == (p.abs() > 0.4).tolist()
    assert 0 < int(dose.clamped.sum()) < 6
    for got, expected in [
        (dose.p_before, p),
        (dose.cap_delta, change),
        (dose.p_after, p + 0.5 * change),
        (dose.ratio, 0.5 * change.abs() / h.double()[2:].norm(dim=1)),
    ]:
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    assert dose.violation is None


def test_an_add_reports_its_direction_and_no_adjustment() -> None:
    h, v = random(5, WIDTH), random(WIDTH, seed=1)
    (dose,) = run(h, Add(v, 2.0)).dose
    moved = (dose.p_after - dose.p_before).double()
    torch.testing.assert_close(
        moved, torch.full((5,), 2 * float(v.double().norm()), dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert not dose.cap_delta.any()
    assert not dose.clamped.any()


def test_each_op_is_measured_on_the_state_it_saw() -> None:
    h, u, v = random(5, WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2)
    first, second = run(h, Add(v, 3.0), Ablate(u, 0.0)).dose
    unit = u.double() / u.double().norm()
    torch.testing.assert_close(second.p_before.double(), (h.double() + 3 * v.double()) @ unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(second.p_after, torch.zeros(5), rtol=0, atol=1e-5)
    assert [first.op, second.op] == ["0:Add", "1:Ablate"]


def test_a_subspace_reports_norms_of_coordinates() -> None:
    h, v = random(5, WIDTH), random(3, WIDTH, seed=1)
    (dose,) = run(h, AblateSubspace(v, 0.25)).dose
    inside = torch.linalg.qr(v.double().T)[0]
    norms = (h.double() @ inside).norm(dim=1)
    torch.testing.assert_close(dose.p_before.double(), norms, rtol=0, atol=1e-5)
    torch.testing.assert_close(dose.p_after.double(), 0.25 * norms, rtol=0, atol=1e-5)
    torch.testing.assert_close(dose.cap_delta.double(), 0.75 * norms, rtol=0, atol=1e-5)


def test_counts_are_counts_of_selected_rows_and_zero_where_nothing_is() -> None:
    (site,) = (
        Steering({"embed": Cap(random(WIDTH), max=0.0)}, positions="generated")
        .resolve(num_layers=1, hidden_size=WIDTH)
        .values()
    )
    for length, count in [(0, 6), (4, 2), (6, 0)]:
        dose = site.apply(random(6, WIDTH), positions=torch.arange(6), prompt_length=length).dose[0]
        assert dose.count == count
        assert dose.p_before is None


@pytest.mark.parametrize("index", [torch.tensor([True, False, True]), torch.tensor([0, 2])])
def test_rows_of_one_request_are_picked(index: torch.Tensor) -> None:
    (dose,) = run(random(3, WIDTH), Cap(random(WIDTH, seed=1), max=0.0)).dose
    part = dose.pick(index)
    assert part.count == 2
    assert torch.equal(part.p_before, dose.p_before[[0, 2]])
    assert part.violation is None
