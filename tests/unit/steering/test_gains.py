"""Gains against the recursions that they are the closed form of."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from trimtab.errors import SteeringError
from trimtab.steering import Add, Constant, Decay, Ramp, Rows, Steering


def test_a_ramp_is_an_exponential_moving_average_over_decode_steps() -> None:
    a, average = Fraction(0.8), Fraction(0)
    gains = Ramp(0.8).at(torch.arange(20)).tolist()
    for gain in gains:
        average = a * average + (1 - a) * 1
        assert gain == pytest.approx(float(average), rel=1e-7)  # float32 rounds once: 2^-24


def test_decay_multiplies_at_every_step() -> None:
    value = Fraction(1)
    for gain in Decay(0.5).at(torch.arange(12)).tolist():
        assert gain == float(value)
        value *= Fraction(0.5)


def test_steps_count_from_the_first_generated_token_and_the_prompt_is_step_zero() -> None:
    assert Rows(torch.arange(6), 3).steps().tolist() == [0, 0, 0, 0, 1, 2]


def test_the_gain_multiplies_the_correction_row_by_row() -> None:
    v = torch.tensor([1.0, 2.0, -4.0])
    h = torch.zeros(5, 3)
    program = Steering({"embed": Add(v)}, positions="generated", gain=Decay(0.5)).resolve(num_layers=1, hidden_size=3)
    (site,) = program.values()
    out = site.apply(h, positions=torch.arange(5), prompt_length=2).h
    expected = torch.tensor([0, 0, 1, 0.5, 0.25])[:, None] * v
    assert torch.equal(out, expected)


def test_a_constant_gain_is_folded_and_zero_switches_off() -> None:
    h = torch.tensor([[1.0, -0.0, 3.0]])
    for gain, expected in [(0.5, [2.0, 1.0, 4.0]), (Constant(0.0), [1.0, -0.0, 3.0])]:
        program = Steering({"embed": Add([2.0, 2.0, 2.0])}, gain=gain).resolve(num_layers=1, hidden_size=3)
        (site,) = program.values()
        out = site.apply(h, positions=torch.tensor([0]), prompt_length=1).h
        assert torch.equal(out.view(torch.int32), torch.tensor([expected]).view(torch.int32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(1.0), "between 0 and 1"),
        (lambda: Decay(-0.1), "between 0 and 1"),
        (lambda: Constant(float("nan")), "finite number"),
        (lambda: Steering({"embed": Add([1.0])}, gain="fast"), "a number was expected"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        make()  # type: ignore[operator]
