"""The knee: the sample size from which twice the data adds nothing that counts.

Estimates are noisy and not monotone, so the first small gain of a plain scan is mostly noise. Here the gain of a
doubling has an interval, by a bootstrap over prompts and seeds that is paired (both sizes are drawn alike), and more
outputs are drawn until the interval is narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trimtab.errors import InputError
from trimtab.results.stress import Gain, Knee
from trimtab.workflows.stress.figures import Series, effectiveness, resampled

MAX_GAIN, HALF_WIDTH = 0.02, 0.015
DRAWS = 1000

Draw = Callable[[int, int], Sequence[Series]]
"""(size, seeds) -> one series an attribute, with at least that many seeds."""


def find_knee(
    sizes: Sequence[int],
    draw: Draw,
    *,
    seeds: int,
    max_seeds: int,
    linear: bool = False,
    seed: int = 0,
    max_gain: float = MAX_GAIN,
    half_width: float = HALF_WIDTH,
) -> Knee:
    """Return the first size, from the second smallest, whose gain to its double surely stays below `max_gain`.

    Args:
        sizes: sample sizes.
        draw: gives the outputs of a size, drawing what is not there yet.
        seeds: seeds to begin with.
        max_seeds: the cap; a gain that is still uncertain there is undecided, and is passed over.
        linear: take the plain scan's answer, and draw no more than the first seeds.
        seed: of the bootstrap.
        max_gain: a gain below this does not count.
        half_width: of the gain's 95 % interval, at which drawing ends.

    Raises:
        InputError: no size with its double, or a cap below the first seeds.
    """
    listed = sorted(set(sizes))
    doubled = [size for size in listed if 2 * size in listed]
    if not doubled or seeds < 1 or max_seeds < seeds:
        raise InputError(
            f"sizes {listed}, {seeds} to {max_seeds} seeds: a size with its double, and a cap of at least the first "
            "seeds, were expected"
        )
    scan = _scan(doubled, draw, seeds, max_gain)
    gains: list[Gain] = []
    for size in (one for one in doubled if one > listed[0] and not linear):
        gains.append(_gain(size, draw, seeds, max_seeds, seed, max_gain, half_width))
        if gains[-1].high < max_gain:
            return Knee(status="found", size=size, gains=tuple(gains), scan=scan, sentence=_found(gains[-1], max_gain))
    if linear:
        status, sentence = ("found", f"{scan} by a plain scan, without intervals") if scan else (_ABOVE, _above(listed))
        return Knee(status=status, size=scan, gains=(), scan=scan, sentence=sentence)  # type: ignore[arg-type]
    if not gains:
        sentence = "undecided: no size from the second smallest on has its double"
        return Knee(status="undecided", size=None, gains=(), scan=scan, sentence=sentence)
    open_ones = [one for one in gains if not one.decided]
    if open_ones:
        worst = max(open_ones, key=lambda one: one.half_width)
        sentence = (
            f"undecided: at {worst.size} the gain is {worst.gain:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}] with "
            f"{worst.seeds} seeds, wider than +-{half_width:g}"
        )
        return Knee(status="undecided", size=None, gains=tuple(gains), scan=scan, sentence=sentence)
    return Knee(status="above the largest", size=None, gains=tuple(gains), scan=scan, sentence=_above(listed))


_ABOVE = "above the largest"


def _scan(sizes: Sequence[int], draw: Draw, seeds: int, max_gain: float) -> int | None:
    for size in sizes:
        if _mean_se(draw(2 * size, seeds), seeds) - _mean_se(draw(size, seeds), seeds) < max_gain:
            return size
    return None


def _mean_se(listed: Sequence[Series], seeds: int) -> float:
    return float(np.mean([effectiveness(one.first(seeds)).se for one in listed]))


def _gain(size: int, draw: Draw, seeds: int, max_seeds: int, seed: int, max_gain: float, half_width: float) -> Gain:
    count = seeds
    while True:
        gain = _interval(size, draw(size, count), draw(2 * size, count), count, seed, max_gain, half_width)
        if gain.decided or count >= max_seeds:
            return gain
        count = min(2 * count, max_seeds)


def _interval(
    size: int, one: Sequence[Series], two: Sequence[Series], count: int, seed: int, max_gain: float, half_width: float
) -> Gain:
    one, two = [each.first(count) for each in one], [each.first(count) for each in two]
    source = np.random.default_rng([seed, size, count])
    num_prompts = one[0].delta.shape[1]
    prompts = source.integers(0, num_prompts, (DRAWS, num_prompts))
    drawn = source.integers(0, count, (DRAWS, count))
    differences = np.mean(
        [resampled(b, prompts, drawn) - resampled(a, prompts, drawn) for a, b in zip(one, two, strict=True)], axis=0
    )
    low, high = (float(value) for value in np.quantile(differences, (0.025, 0.975)))
    width = (high - low) / 2
    return Gain(
        size=size,
        double=2 * size,
        gain=_mean_se(two, count) - _mean_se(one, count),
        low=low,
        high=high,
        half_width=width,
        seeds=count,
        decided=width <= half_width or low >= max_gain,
    )


def _found(gain: Gain, max_gain: float) -> str:
    return (
        f"{gain.size} examples a label: twice as many add {gain.gain:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] to se, "
        f"under {max_gain:g}"
    )


def _above(sizes: Sequence[int]) -> str:
    return f"above the largest: se still grows up to {sizes[-1]} examples a label"
