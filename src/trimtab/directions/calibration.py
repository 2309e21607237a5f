"""Strength units: what a vector's strength means at its site, measured on rows of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.directions.direction import Direction
from trimtab.errors import InputError, VectorError
from trimtab.sites import Site
from trimtab.steering import SteeringVector

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def calibrate(
    rows: Any,
    vector: SteeringVector | Direction | Tensor,
    *,
    site: str | Site | None = None,
    edit: Literal["none", "before", "after"] | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> SteeringVector:
    """Measure the states that a vector meets: their median norm, and the quantiles of their projections on it.

    Quantiles are of the whole sample, by linear interpolation between order statistics, in float64.

    Args:
        rows: states [n, d]; an iterable of such tensors; or a Trace, whose requests are all read at `site`.
        vector: the vector; what it already knows about itself is kept.
        site: where the rows were taken; defaults to the vector's own site.
        edit: which rows of a Trace, when it holds those before and those after steering.
        quantiles: fractions to store.

    Returns:
        The vector with `site`, `median_norm` and `quantiles` set.

    Raises:
        VectorError: the rows have another width, belong to another site, are not finite, or are all zero.
        InputError: no rows.
    """
    known = _as_vector(vector)
    where = known.site if site is None else Site.parse(site)
    if known.site is not None and where != known.site:
        raise VectorError(
            f"the vector was made at {known.site} and the rows were taken at {where}; use rows of its site"
        )
    norms, projections = [], []
    for part in _parts(rows, where, edit):
        if part.ndim != 2 or part.shape[1] != known.direction.shape[0]:
            raise VectorError(
                f"{where}: rows of shape {list(part.shape)} were given; [n, {known.direction.shape[0]}] was expected"
            )
        wide = part.double()
        norms.append(wide.norm(dim=1))
        projections.append(wide @ known.direction.double())
    if not norms or not sum(one.numel() for one in norms):
        raise InputError(f"{where}: no rows to calibrate on")
    sizes, along = torch.cat(norms), torch.cat(projections)
    if not bool(torch.isfinite(sizes).all()) or not bool(sizes.any()):
        raise VectorError(f"{where}: the rows are not finite, or all zero; calibrate on the states of a sound run")
    fractions = torch.tensor(sorted(set(quantiles)), dtype=torch.float64)
    if fractions.numel() and (fractions.min() < 0 or fractions.max() > 1):
        raise InputError(f"quantiles {list(quantiles)}: fractions from 0 to 1 were expected")
    values = _quantiles(along, fractions)
    return replace(
        known,
        site=where,
        median_norm=float(_quantiles(sizes, torch.tensor([0.5], dtype=torch.float64))[0]),
        quantiles=dict(zip(fractions.tolist(), values.tolist(), strict=True)),
        provenance={**known.provenance, "calibration_rows": sizes.numel()},
    )


def convert_strength(
    scale: float,
    *,
    to: Literal["absolute", "median_norm"],
    vector: SteeringVector,
) -> float:
    """Say one strength in the other unit, for the same correction.

    `absolute` adds `scale * vector`, `median_norm` adds `scale * m * direction`: absolute = median_norm * m / norm.

    Args:
        scale: strength in the unit that is not `to`.
        to: unit to return.
        vector: a calibrated vector.

    Raises:
        VectorError: the vector was not calibrated.
    """
    if vector.median_norm is None:
        raise VectorError("the vector has no median norm; calibrate it first")
    factor = vector.median_norm / vector.norm
    return scale * factor if to == "absolute" else scale / factor


def _quantiles(values: Tensor, fractions: Tensor) -> Tensor:
    """Linear interpolation between order statistics; torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    place = fractions * (ordered.numel() - 1)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low], ordered[high], place - low)


def _as_vector(vector: SteeringVector | Direction | Tensor) -> SteeringVector:
    if isinstance(vector, SteeringVector):
        return vector
    if isinstance(vector, Direction):
        return vector.calibrated or SteeringVector.of(vector.vector, site=vector.site)
    return SteeringVector.of(vector)


def _parts(rows: Any, site: Site | None, edit: str | None) -> Iterable[Tensor]:
    if isinstance(rows, Tensor):
        return [rows]
    if hasattr(rows, "requests") and hasattr(rows, "rows"):
        if site is None:
            raise InputError("calibrating on a trace needs a site; give site=, or a vector that knows its own")
        return (rows.rows(site=site, edit=edit, **key._asdict()).values for key in rows.requests())
    return (part if isinstance(part, Tensor) else part.values for part in rows)
