"""z-scores against controls are standard normal where nothing is special, and know their own error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tests.unit.weights.weights_pairs import noisy, saved_pair
from trimtab.errors import InputError
from trimtab.weights import LayerMath, isotropic, pair
from trimtab.weights.statistics import compare_groups, control_false_discoveries, of_controls, of_pairs, rank_components

ALPHA = 1e-3


def brute_force(values: np.ndarray, x: float, leave: list[np.ndarray]) -> tuple[float, float]:
    """z of x, and its jackknife error from the values that are left without each control."""
    z = (x - values.mean()) / values.std(ddof=1)
    others = np.array([(x - left.mean()) / left.std(ddof=1) for left in leave])
    count = len(leave)
    return z, math.sqrt((count - 1) / count * np.sum((others - others.mean()) ** 2))


def test_controls_one_by_one_against_brute_force() -> None:
    source = np.random.default_rng(0)
    values, x = source.normal(3, 2, size=(2, 15)), source.normal(3, 2, size=(2, 4))
    baseline = of_controls(values)
    for row in range(2):
        leave = [np.delete(values[row], i) for i in range(15)]
        for place in range(4):
            z, error = brute_force(values[row], x[row, place], leave)
            assert baseline.z(x)[row, place] == pytest.approx(z, rel=1e-12)
            assert baseline.error(x)[row, place] == pytest.approx(error, rel=1e-9)


def test_pairs_against_brute_force() -> None:
    source = np.random.default_rng(1)
    values = source.normal(1, 0.5, size=(9, 9))
    off = ~np.eye(9, dtype=bool)
    leave = []
    for i in range(9):
        keep = np.delete(np.arange(9), i)
        block = values[np.ix_(keep, keep)]
        leave.append(block[~np.eye(8, dtype=bool)])
    z, error = brute_force(values[off], 2.5, leave)
    values[np.diag_indices(9)] = 1e6  # what a control does to itself is not read
    baseline = of_pairs(values)
    assert baseline.z(np.array([2.5]))[0] == pytest.approx(z, rel=1e-10)
    assert baseline.error(np.array([2.5]))[0] == pytest.approx(error, rel=1e-8)


def test_the_error_of_z_is_what_redrawing_the_controls_does() -> None:
    source = np.random.default_rng(2)
    x = np.array([0.0, 3.0])
    drawn = [of_controls(source.normal(size=64)) for _ in range(400)]
    spread = np.std([one.z(x) for one in drawn], axis=0)
    stated = np.median([one.error(x) for one in drawn], axis=0)
    assert np.allclose(stated, spread, rtol=0.15)


def test_what_no_control_does_is_zero_or_far_away() -> None:
    baseline = of_controls(np.zeros(10))
    assert baseline.z(np.array([0.0]))[0] == 0
    assert baseline.z(np.array([-1.0]))[0] == -math.inf
    floored = of_controls(np.zeros(10), floor=1e-3)
    assert floored.z(np.array([0.0, 1e-4, 1.0])) == pytest.approx([0, 0.1, 1000])
    with pytest.raises(InputError, match="at least 8"):
        of_controls(np.zeros(7))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerMath, LayerMath]:
    with pair(*saved_pair(tmp_path_factory.mktemp("ks"), noisy, "qwen3", 2)) as opened:
        return tuple(LayerMath(one, "float64") for one in opened.layer(1))  # type: ignore[return-value]


@pytest.mark.parametrize("what", ["base", "delta"])
@pytest.mark.parametrize("part", ["qk", "vo", "mlp"])
def test_z_scores_of_disjoint_control_pairs_are_standard_normal(
    part: str, what: str, layers: tuple[LayerMath, LayerMath]
) -> None:
    """1,000 pairs that share no control, scored against 300 other controls."""
    first, second, others = (isotropic(count, 64, seed=seed).units for count, seed in ((1000, 1), (1000, 2), (300, 3)))

    def effect(math: LayerMath, a: torch.Tensor, b: torch.Tensor, *, pairs: bool) -> torch.Tensor:
        if part == "qk" and pairs:
            return math.qk(a, b).mean(0)
        if part == "qk":
            spans = zip(a.split(50), b.split(50), strict=True)
            return torch.cat([math.qk(one, other).mean(0).diagonal() for one, other in spans])
        written = math.vo(a).total if part == "vo" else math.mlp(a)
        return written @ b.T if pairs else (written * b).sum(-1)

    def measured(a: torch.Tensor, b: torch.Tensor, *, pairs: bool) -> np.ndarray:
        base, tuned = (effect(math, a, b, pairs=pairs) for math in layers)
        return (base if what == "base" else tuned - base).numpy()

    scored = of_pairs(measured(others, others, pairs=True)).z(measured(first, second, pairs=False))
    assert stats.kstest(scored, "norm").pvalue > ALPHA
    wrong = of_pairs(measured(others, others, pairs=True) * 1.5).z(measured(first, second, pairs=False))
    assert stats.kstest(wrong, "norm").pvalue < ALPHA  # the test sees a deviation that is half as large again


def test_groups_against_scipy() -> None:
    source = np.random.default_rng(3)
    roles, traits = source.normal(1, 1, 30), source.normal(0, 2, 20)
    kinds = ["role"] * 30 + ["trait"] * 20
    one = compare_groups(np.concatenate([roles, traits]), kinds)
    assert one is not None
    expected = stats.ttest_ind(roles, traits, equal_var=False)
    assert (one.t, one.p) == pytest.approx((expected.statistic, expected.pvalue))
    pooled = math.sqrt((29 * roles.var(ddof=1) + 19 * traits.var(ddof=1)) / 48)
    assert one.effect == pytest.approx((roles.mean() - traits.mean()) / pooled * (1 - 3 / (4 * 50 - 9)))
    assert compare_groups([1.0, 2.0, 3.0], ["role", "role", "trait"]) is None
    tests = [compare_groups(source.normal(size=50), kinds) for _ in range(20)]
    adjusted = control_false_discoveries([found for found in tests if found is not None])
    assert [found.q for found in adjusted] == pytest.approx(
        stats.false_discovery_control([found.p for found in adjusted])
    )


def test_components_by_effect() -> None:
    rows, rho = rank_components([2, 1, 3], [0.2, 0.5, 0.1], [1.0, 3.0, 2.0], measure="absolute", part="mlp")
    assert [(one.number, one.rank) for one in rows] == [(1, 1), (2, 3), (3, 2)]
    assert rho == pytest.approx(0.5)
    assert math.isnan(rank_components([1, 2], [0.5, 0.1], [1.0, 2.0], measure="a", part="b")[1])
