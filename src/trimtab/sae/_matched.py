"""Families of autoencoders at one L0: what each reaches where all can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from trimtab.results.sae_evaluation import MatchedValue, SAEScore

_MOST = 9


def matched(scores: Sequence[SAEScore]) -> tuple[MatchedValue, ...]:
    """Interpolate every family, linearly in log L0, at the L0s of any autoencoder that all families span.

    Args:
        scores: autoencoders with their families.

    Returns:
        One value per family and L0; nothing with fewer than two families or without a common range.
    """
    families: dict[str, list[SAEScore]] = {}
    for one in scores:
        if one.l0.value > 0:
            families.setdefault(one.family, []).append(one)
    if len(families) < 2:
        return ()
    for listed in families.values():
        listed.sort(key=lambda one: one.l0.value)
    low = max(listed[0].l0.value for listed in families.values())
    high = min(listed[-1].l0.value for listed in families.values())
    places = sorted({one.l0.value for one in scores if low <= one.l0.value <= high})
    if len(places) > _MOST:
        places = [places[round(step * (len(places) - 1) / (_MOST - 1))] for step in range(_MOST)]
    return tuple(
        MatchedValue(
            family=family,
            l0=place,
            fvu=_at(listed, place, lambda one: one.fvu.value),
            recovered=_known(
                _at(listed, place, lambda one: math.nan if one.splice is None else one.splice.recovered.value)
            ),
            kl=_known(_at(listed, place, lambda one: math.nan if one.splice is None else one.splice.kl.value)),
        )
        for place in places
        for family, listed in families.items()
    )


def _at(listed: Sequence[SAEScore], place: float, read: Callable[[SAEScore], float]) -> float:
    across = [math.log(one.l0.value) for one in listed]
    return float(np.interp(math.log(place), across, [read(one) for one in listed]))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
