"""Teacher-forced hidden states of two configurations, row by row; dose tables beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from trimtab.numerics import coarser, ulp_distance
from trimtab.numerics.metrics import mae_band
from trimtab.results import CapStep, DriftCell, LogprobStep
from trimtab.sites import Site
from trimtab.trace import Rows, Trace
from trimtab.workflows._agreement import Tokens


@dataclass(frozen=True, slots=True)
class Side:
    """One configuration's forced pass."""

    label: str
    trace: Trace
    tokens: pl.DataFrame

    def forced(self, prompt: int) -> Tokens:
        return Tokens.of(self.tokens, prompt)


def comparable_steps(reference: Tokens, candidate: Tokens) -> int:
    """Return how many steps were fed the same tokens: row s has seen the generated tokens before s."""
    same = 0
    for a, b in zip(reference.ids, candidate.ids, strict=False):
        if a != b:
            break
        same += 1
    shorter = min(len(reference.ids), len(candidate.ids))
    return shorter if same == shorter else same + 1


def promised_layers(trace: Trace) -> tuple[int, ...]:
    """Return the layers whose `resid_post` a trace was to hold, by its plan."""
    sites = map(Site.parse, trace.manifest["plan"]["sites"])
    return tuple(site.layer for site in sites if site.point == "resid_post" and site.layer is not None)


def drift_cells(
    reference: Side, candidate: Side, prompt: int, layers: Sequence[int], steps: int
) -> Iterator[DriftCell]:
    """Yield one cell for each layer and step that both sides hold."""
    if steps == 0:
        return
    first = reference.forced(prompt).positions[0] - 1
    for layer in layers:
        site = f"layers.{layer}.resid_post"
        ours, theirs = _rows(reference.trace, site, prompt), _rows(candidate.trace, site, prompt)
        if ours is None or theirs is None:
            continue
        keep = _common(ours.positions, theirs.positions, first, steps)
        yield from _cells(candidate.label, prompt, layer, first, keep, ours.values[keep[0]], theirs.values[keep[1]])


def _rows(trace: Trace, site: str, prompt: int) -> Rows | None:
    edit = final_edit(trace, site)
    here = (pl.col("site") == site) & (pl.col("prompt") == prompt) & (pl.col("edit") == edit)
    return None if trace.index.filter(here).is_empty() else trace.rows(site=site, prompt=prompt, edit=edit)


def final_edit(trace: Trace, site: str) -> str:
    """Return the edit column of the state that goes on through the model: after steering, or none."""
    edits = set(trace.index.filter(pl.col("site") == site)["edit"].unique().to_list())
    return "after" if "after" in edits else "none"


def _common(reference: Tensor, candidate: Tensor, first: int, steps: int) -> tuple[list[int], list[int], list[int]]:
    where = {int(position): row for row, position in enumerate(candidate.tolist())}
    pairs = [
        (row, where[position], position)
        for row, position in enumerate(reference.tolist())
        if position in where and 0 <= position - first < steps
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]


def _cells(
    label: str,
    prompt: int,
    layer: int,
    first: int,
    keep: tuple[list[int], list[int], list[int]],
    ours: Tensor,
    theirs: Tensor,
) -> Iterator[DriftCell]:
    measured = row_metrics(ours, theirs)
    for row, position in enumerate(keep[2]):
        values = {name: float(column[row]) for name, column in measured.items()}
        ulp, _ = values.pop("max_ulp"), values.pop("max_abs")
        yield DriftCell(
            config=label,
            prompt=prompt,
            step=position - first,
            position=position,
            layer=layer,
            band=mae_band(math.inf if math.isnan(values["mae"]) else values["mae"]),
            max_ulp=int(ulp) if math.isfinite(ulp) and ulp >= 0 else None,
            **values,
        )


def row_metrics(reference: Tensor, candidate: Tensor) -> dict[str, Tensor]:
    """Measure each row in float64.

    Args:
        reference: [rows, d], any floating dtype.
        candidate: [rows, d].

    Returns:
        [rows] each: mae, rmse, rel_l2, cosine, max_abs, and max_ulp (in the coarser dtype; -1 where not finite). The
        formulas are those of `trimtab.numerics.metrics`, taken over the last dimension.
    """
    dtype = coarser(reference.dtype, candidate.dtype)
    r, c = reference.double(), candidate.double()
    error = c - r
    norm_r, norm_c, norm_e = (one.norm(dim=-1) for one in (r, c, error))
    dot = (r * c).sum(-1)
    both = norm_r * norm_c
    finite = torch.isfinite(error).all(-1)
    ulp = torch.full_like(norm_r, -1.0)
    if bool(finite.any()):
        ulp[finite] = ulp_distance(reference[finite], candidate[finite], dtype).amax(-1).double()
    return {
        "mae": error.abs().mean(-1),
        "rmse": error.square().mean(-1).sqrt(),
        "max_abs": error.abs().amax(-1),
        "rel_l2": torch.where(norm_e == 0, 0.0, norm_e / norm_r),
        "cosine": torch.where(both > 0, dot / both.clamp_min(torch.finfo(torch.float64).tiny), (norm_e == 0).double()),
        "max_ulp": ulp,
    }


def cap_steps(reference: Side, candidate: Side, prompt: int, steps: int) -> list[CapStep]:
    """Return what each op did at each step, with the reference's adjustment beside it."""
    if steps == 0:
        return []
    first = reference.forced(prompt).positions[0] - 1
    theirs = _doses(candidate.trace, prompt, first, steps)
    ours = {
        (row["site"], row["op"], row["position"]): row["cap_delta"]
        for row in _doses(reference.trace, prompt, first, steps)
    }
    return [
        CapStep(
            config=candidate.label,
            prompt=prompt,
            step=row["position"] - first,
            site=row["site"],
            op=row["op"],
            projection_before=row["p_before"],
            projection_after=row["p_after"],
            cap_delta=row["cap_delta"],
            cap_delta_norm=abs(row["cap_delta"]),
            clamped=row["clamped"],
            reference_cap_delta=ours.get((row["site"], row["op"], row["position"])),
        )
        for row in theirs
    ]


def _doses(trace: Trace, prompt: int, first: int, steps: int) -> list[dict[str, Any]]:
    inside = (pl.col("prompt") == prompt) & (pl.col("position") >= first) & (pl.col("position") < first + steps)
    return trace.dose.filter(inside).sort("site", "op", "position").to_dicts()


def logprob_steps(
    reference: Side, candidate: Side, prompt: int, steps: int, names: dict[int, str]
) -> list[LogprobStep]:
    """Compare the top-k log-probabilities of each step that both sides were fed the same tokens for."""
    ours, theirs = reference.forced(prompt), candidate.forced(prompt)
    found = []
    for step in range(min(steps, len(ours.top_ids), len(theirs.top_ids))):
        mine = dict(zip(ours.top_ids[step], ours.top_logprobs[step], strict=True))
        other = dict(zip(theirs.top_ids[step], theirs.top_logprobs[step], strict=True))
        if not mine or not other:
            continue
        shared = mine.keys() & other.keys()
        best, best_other = ours.top_ids[step][0], theirs.top_ids[step][0]
        found.append(
            LogprobStep(
                config=candidate.label,
                prompt=prompt,
                step=step,
                reference_top=names.get(best, str(best)),
                top=names.get(best_other, str(best_other)),
                same_top=best == best_other,
                shared=len(shared),
                num_top=len(mine),
                delta_top=other[best] - mine[best] if best in other else math.nan,
                max_delta=max((abs(other[one] - mine[one]) for one in shared), default=math.nan),
                reference_margin=ours.margin(step),
            )
        )
    return found
