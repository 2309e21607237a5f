"""Calibration against numpy on the same rows, strength units, and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.directions import calibrate, convert_strength, load_direction, permuted_control, random_control
from trimtab.errors import InputError, VectorError
from trimtab.steering import Add, Steering, SteeringVector
from trimtab.trace import Trace, TraceWriter

WIDTH = 7
SITE = "layers.1.resid_post"


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(st.integers(0, 2**31), st.integers(1, 60))
def test_median_and_quantiles_are_those_of_numpy_in_float64(seed: int, count: int) -> None:
    rows, v = random(count, WIDTH, seed=seed, scale=4.0), random(WIDTH, seed=seed + 1)
    got = calibrate(rows, v, site=SITE, quantiles=(0.0, 0.25, 0.5, 0.9, 1.0))
    wide = rows.double().numpy()
    projections = wide @ got.direction.double().numpy()
    assert got.median_norm == pytest.approx(float(np.median(np.linalg.norm(wide, axis=1))), rel=1e-12)
    for fraction, value in got.quantiles.items():
        assert value == pytest.approx(float(np.quantile(projections, fraction)), rel=1e-9, abs=1e-12)
    assert str(got.site) == SITE
    assert got.provenance["calibration_rows"] == count


def test_rows_may_come_in_parts_or_from_a_trace(tmp_path: Path) -> None:
    rows, vector = random(9, WIDTH), SteeringVector.of(random(WIDTH, seed=1), site=SITE, data_hash="kept")
    whole = calibrate(rows, vector)
    assert whole.data_hash == "kept"
    assert calibrate([rows[:4], rows[4:]], vector) == whole
    with TraceWriter(tmp_path / "run", kind="generation") as writer:
        for index, part in enumerate((rows[:4], rows[4:])):
            where = {"site": SITE, "layer": 1, "prompt": index, "request": f"r{index}"}
            writer.write(SITE, part, positions=list(range(len(part))), **where)
    assert calibrate(Trace.open(tmp_path / "run"), vector) == whole


def test_reduced_precision_rows_are_measured_in_float64() -> None:
    rows = random(5, WIDTH).bfloat16()
    assert calibrate(rows, random(WIDTH, seed=1)) == calibrate(rows.double(), random(WIDTH, seed=1))


def test_a_strength_in_one_unit_is_the_same_correction_in_the_other() -> None:
    vector = calibrate(random(20, WIDTH, scale=3.0), SteeringVector.of(random(WIDTH, seed=1), site=SITE))
    absolute = convert_strength(0.3, to="absolute", vector=vector)
    assert convert_strength(absolute, to="median_norm", vector=vector) == pytest.approx(0.3)
    h = torch.zeros(1, WIDTH)
    moved = []
    for op in (Add(vector, absolute), Add(vector, 0.3, unit="median_norm")):
        (site,) = Steering({SITE: op}).resolve(num_layers=2, hidden_size=WIDTH).values()
        moved.append(site.apply(h, positions=torch.tensor([0]), prompt_length=1).h)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda: calibrate(random(3, 4), random(WIDTH)),
            VectorError,
            r"rows of shape \[3, 4\] were given; \[n, 7\] was expected",
        ),
        (lambda: calibrate([], random(WIDTH)), InputError, "no rows to calibrate on"),
        (lambda: calibrate(random(0, WIDTH), random(WIDTH)), InputError, "no rows"),
        (lambda: calibrate(random(2, WIDTH) * float("nan"), random(WIDTH)), VectorError, "not finite"),
        (lambda: calibrate(torch.zeros(2, WIDTH), random(WIDTH)), VectorError, "all zero"),
        (lambda: calibrate(random(2, WIDTH), random(WIDTH), quantiles=[2.0]), InputError, "fractions from 0 to 1"),
        (
            lambda: calibrate(random(2, WIDTH), SteeringVector.of(random(WIDTH), site=SITE), site="embed"),
            VectorError,
            r"made at layers\.1\.resid_post and the rows were taken at embed",
        ),
        (
            lambda: convert_strength(1.0, to="absolute", vector=SteeringVector.of([1.0])),
            VectorError,
            "calibrate it first",
        ),
    ],
)
def test_refusals(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_random_control_has_the_norm_and_is_named_by_its_seed(orthogonal: bool) -> None:
    vector = SteeringVector.of(random(400, scale=7.0), site=SITE)
    control = random_control(vector, seed=3, orthogonal=orthogonal)
    assert control.norm == pytest.approx(vector.norm, rel=1e-6)
    assert str(control.site) == SITE
    cosine = float(control.unit.double() @ vector.direction.double())
    assert abs(cosine) < (1e-6 if orthogonal else 0.2)  # 4 standard deviations of a random cosine at width 400
    assert torch.equal(control.vector, random_control(vector, seed=3, orthogonal=orthogonal).vector)
    assert not torch.equal(control.vector, random_control(vector, seed=4, orthogonal=orthogonal).vector)


def test_a_permuted_control_has_the_same_values() -> None:
    direction = load_direction("random:1", hidden_size=50)
    control = permuted_control(direction, seed=0)
    assert torch.equal(control.vector.sort().values, direction.vector.sort().values)
    assert not torch.equal(control.vector, direction.vector)
    assert control.norm == direction.norm
