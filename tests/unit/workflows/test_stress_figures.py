"""The figures and the knee of the scaling test, on series whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from trimtab.errors import InputError
from trimtab.workflows.stress import Series, effectiveness, find_knee
from trimtab.workflows.stress.figures import f1, resampled

STRENGTHS = np.array([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])


def _series(effect: float, noise: float = 1.0, agreement: float = 1.0, *, seed: int = 0, seeds: int = 4) -> Series:
    """Outputs whose delta and judge share `agreement` of what is not the effect."""
    source = np.random.default_rng(seed)
    shape = (7, 10, seeds)
    shared = source.standard_normal(shape)
    own = source.standard_normal((2, *shape))
    pushed = effect * STRENGTHS[:, None, None]
    delta, judge = (pushed + noise * (agreement * shared + np.sqrt(1 - agreement**2) * one) for one in own)
    return Series(strength=STRENGTHS, delta=delta, judge=judge, coherent=np.ones(shape, dtype=bool))


def test_se_is_the_mean_rank_correlation_with_strength_times_coherence() -> None:
    series = _series(1.0, 0.4, 0.5)
    coherent = series.coherent.copy()
    coherent[:, :2] = False
    found = effectiveness(Series(strength=STRENGTHS, delta=series.delta, judge=series.judge, coherent=coherent))
    strength = np.repeat(STRENGTHS, 40)
    expected = [spearmanr(one.ravel(), strength).statistic for one in (series.delta, series.judge)]
    assert (found.rho_delta, found.rho_judge) == pytest.approx(expected)
    assert found.se == pytest.approx(0.8 * sum(expected) / 2)
    assert (found.n, found.judged, found.coherence) == (280, 280, 0.8)
    assert found.reasons == ()


def test_a_direction_without_effect_gets_0_by_ours_and_0_44_by_the_published_figure() -> None:
    # Two scorers that agree at r = 0.88 on texts that no steering moved: 0.5 (0 + 0.88) = 0.44.
    found = [effectiveness(_series(0.0, agreement=np.sqrt(0.88), seed=seed)) for seed in range(40)]
    assert abs(np.mean([one.se for one in found])) < 0.02
    assert np.mean([one.published for one in found]) == pytest.approx(0.44, abs=0.03)


@pytest.mark.parametrize("which", ["delta", "judge", "both"])
def test_a_constant_series_is_0_with_the_reason(which: str) -> None:
    series = _series(1.0, 0.1)
    flat = np.full_like(series.delta, 0.3)
    delta = flat if which in ("delta", "both") else series.delta
    judge = flat if which in ("judge", "both") else series.judge
    one = Series(strength=STRENGTHS, delta=delta, judge=judge, coherent=series.coherent)
    found = effectiveness(one)
    assert np.isfinite([found.se, found.published, found.rho_delta, found.rho_judge, found.slope]).all()
    assert (found.rho_delta == 0) == (which != "judge")
    assert (found.rho_judge == 0) == (which != "delta")
    assert any(f"{'delta' if which == 'both' else which} constant, counted as 0" in why for why in found.reasons)
    drawn = resampled(one, np.zeros((3, 10), dtype=int), np.zeros((3, 4), dtype=int))
    assert np.isfinite(drawn).all()


def test_a_judge_without_values_is_left_out_and_counted() -> None:
    series = _series(1.0, 0.2)
    judge = series.judge.copy()
    judge[0] = np.nan
    one = Series(strength=STRENGTHS, delta=series.delta, judge=judge, coherent=series.coherent)
    found = effectiveness(one)
    assert (found.n, found.judged) == (280, 240)
    everything = np.tile(np.arange(10), (2, 1)), np.tile(np.arange(4), (2, 1))
    assert resampled(one, *everything) == pytest.approx([found.se] * 2)
    none = Series(strength=STRENGTHS, delta=series.delta, judge=np.full_like(judge, np.nan), coherent=series.coherent)
    assert effectiveness(none).rho_judge == 0
    assert "fewer than two outputs have values" in " ".join(effectiveness(none).reasons)


def test_the_resampling_of_everything_in_order_is_the_figure_itself() -> None:
    series = _series(0.7, seed=3)
    drawn = resampled(series, np.arange(10)[None], np.arange(4)[None])
    assert drawn == pytest.approx([effectiveness(series).se])


def test_series_that_do_not_fit_are_refused() -> None:
    series = _series(1.0)
    with pytest.raises(InputError, match="one shape"):
        Series(strength=STRENGTHS, delta=series.delta, judge=series.judge[:, :, :2], coherent=series.coherent)
    with pytest.raises(InputError, match="not finite"):
        Series(strength=STRENGTHS, delta=series.delta * np.nan, judge=series.judge, coherent=series.coherent)


def test_f1() -> None:
    assert f1([1.0, 0.5, -1.0, 2.0], [True, True, False, False]) == pytest.approx(0.8)
    assert f1([-1.0, -1.0], [False, False]) == 0.0


def _curve(effects: dict[int, float], noise: float = 0.5) -> tuple[list[tuple[int, int]], object]:
    asked: list[tuple[int, int]] = []

    def draw(size: int, seeds: int) -> list[Series]:
        asked.append((size, seeds))
        found = [_series(effects[size], noise, seed=100 + number, seeds=16) for number in range(2)]
        return [one.first(seeds) for one in found]

    return asked, draw


def test_the_knee_is_where_doubling_surely_adds_nothing() -> None:
    # Equal noise on both sides of a doubling: the plateau's gains are exactly 0.
    _, draw = _curve({2: 0.2, 4: 0.5, 8: 1.2, 16: 1.2, 32: 1.2, 64: 1.2})
    found = find_knee((2, 4, 8, 16, 32, 64), draw, seeds=4, max_seeds=16)  # type: ignore[arg-type]
    assert (found.status, found.size) == ("found", 8)
    assert found.gains[0].low > 0.02 and found.gains[-1].high < 0.02
    assert "8 examples" in found.sentence


def test_a_planted_dip_stops_the_scan_and_not_the_knee() -> None:
    _, draw = _curve({2: 0.5, 4: 0.45, 8: 1.0, 16: 2.0, 32: 2.0})
    found = find_knee((2, 4, 8, 16, 32), draw, seeds=4, max_seeds=16)  # type: ignore[arg-type]
    assert (found.scan, found.size) == (2, 16)
    plain = find_knee((2, 4, 8, 16, 32), draw, seeds=4, max_seeds=16, linear=True)  # type: ignore[arg-type]
    assert (plain.size, plain.status, plain.gains) == (2, "found", ())


def test_se_that_grows_to_the_end_has_its_knee_above_the_largest() -> None:
    _, draw = _curve({2: 0.1, 4: 0.3, 8: 0.7, 16: 1.5})
    found = find_knee((2, 4, 8, 16), draw, seeds=4, max_seeds=8)  # type: ignore[arg-type]
    assert (found.status, found.size) == ("above the largest", None)


def test_more_is_drawn_until_the_interval_is_narrow_and_the_cap_says_undecided() -> None:
    def noisy(size: int, seeds: int) -> list[Series]:
        asked.append(seeds)
        return (
            [_series(0.5, 1.0, 0.5, seed=size).first(seeds)] if seeds <= 4 else [_series(0.5, seed=size, seeds=seeds)]
        )

    asked: list[int] = []
    found = find_knee((2, 4, 8), noisy, seeds=4, max_seeds=12, half_width=0.001)
    assert (found.status, found.size) == ("undecided", None)
    assert sorted(set(asked)) == [4, 8, 12]
    assert not found.gains[0].decided and found.gains[0].seeds == 12
    assert "12 seeds" in found.sentence
    asked.clear()
    wide = find_knee((2, 4, 8), noisy, seeds=4, max_seeds=12, half_width=1.0)
    assert set(asked) == {4} and wide.gains[0].decided


def test_sizes_without_a_double_are_refused() -> None:
    with pytest.raises(InputError, match="with its double"):
        find_knee((2, 5), lambda size, seeds: [], seeds=1, max_seeds=1)
