"""From blocks to the result: figures of every point, curves with their knees, bands of the controls, one sentence."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trimtab._base.files import atomic_write_text
from trimtab.results import to_dict, to_json
from trimtab.results.stress import MethodCurve, RandomBand, StrengthPoint, Stress, StressPlan, StressPoint
from trimtab.workflows.stress.figures import Series, effectiveness
from trimtab.workflows.stress.knee import find_knee
from trimtab.workflows.stress.outputs import Block, Blocks


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks of one vector: (unsteered, steered) for every span of seeds."""

    attribute: str
    pairs: list[tuple[Block, Block]]

    @property
    def series(self) -> Series:
        """The outputs as one grid, strength 0 first."""

        def grid(name: str, attribute: str = "") -> Any:
            spans = [np.concatenate([a.grid(name, attribute), b.grid(name, attribute)]) for a, b in self.pairs]
            return np.concatenate(spans, axis=2)

        unsteered, steered = self.pairs[0]
        return Series(
            strength=np.array([*unsteered.strengths, *steered.strengths]),
            delta=grid("delta", self.attribute),
            judge=grid("judge", self.attribute),
            coherent=grid("coherent"),
        )


Draw = Callable[[str, int, int], list[Parts]]
"""(method, size, seeds) -> the blocks of every attribute."""


def summarise(path: Path, plan: StressPlan, blocks: Blocks, draw: Draw, *, linear: bool) -> Stress:
    """Return the result; the knee may draw more outputs."""
    curves = tuple(_curve(plan, method, draw, linear=linear) for method in plan.methods)
    points, strengths = [], []
    for method in plan.methods:
        for size in plan.sizes:
            for parts in draw(method, size, plan.seeds):
                points.append(_point(parts, method, size))
                strengths += _strengths(parts, method, size)
    controls = tuple(_band(plan, blocks, name) for name in plan.attributes) if plan.controls else ()
    every = blocks.all()
    return Stress(
        path=str(path),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        points=tuple(points),
        strengths=tuple(strengths),
        curves=curves,
        controls=controls,
        conclusion=_conclusion(plan, curves, points, controls),
        outputs=sum(int(np.size(one.coherent)) for one in every),
        seconds=sum(one.seconds + float(one.about.get("extract_seconds", 0.0)) for one in every),
        notes=tuple(dict.fromkeys(why for one in points for why in one.effectiveness.reasons)),
    )


def write(result: Stress) -> None:
    """Write result.json, points.csv and strengths.csv into the run's directory."""
    path = Path(result.path)
    points = [_flat(to_dict(one)) for one in result.points]
    atomic_write_text(path / "points.csv", _csv(points))
    atomic_write_text(path / "strengths.csv", _csv([to_dict(one) for one in result.strengths]))
    atomic_write_text(path / "result.json", to_json(result) + "\n")


def _curve(plan: StressPlan, method: str, draw: Draw, *, linear: bool) -> MethodCurve:
    def series(size: int, seeds: int) -> list[Series]:
        return [one.series for one in draw(method, size, seeds)]

    listed = [draw(method, size, plan.seeds) for size in plan.sizes]
    return MethodCurve(
        method=method,
        sizes=plan.sizes,
        se=tuple(float(np.mean([effectiveness(one.series).se for one in parts])) for parts in listed),
        f1=tuple(float(np.mean([one.pairs[0][1].about["f1"] for one in parts])) for parts in listed),
        knee=find_knee(plan.sizes, series, seeds=plan.seeds, max_seeds=plan.max_seeds, linear=linear, seed=plan.seed),
    )


def _point(parts: Parts, method: str, size: int) -> StressPoint:
    steered = parts.pairs[0][1]
    return StressPoint(
        attribute=parts.attribute,
        method=method,
        size=size,
        effectiveness=effectiveness(parts.series),
        f1=float(steered.about["f1"]),
        extract_seconds=float(steered.about["extract_seconds"]),
        generate_seconds=steered.seconds,
        tokens_per_second=steered.tokens / steered.seconds if steered.seconds else 0.0,
        ram_bytes=steered.ram_bytes,
        vram_bytes=steered.vram_bytes,
    )


def _strengths(parts: Parts, method: str, size: int) -> list[StrengthPoint]:
    series = parts.series
    perplexity = np.concatenate([one.grid("perplexity") for one in parts.pairs[0]])
    found = []
    for index in np.argsort(series.strength):
        judged = series.judge[index][np.isfinite(series.judge[index])]
        found.append(
            StrengthPoint(
                attribute=parts.attribute,
                method=method,
                size=size,
                strength=float(series.strength[index]),
                delta=float(series.delta[index].mean()),
                judge=float(judged.mean()) if judged.size else float("nan"),
                coherence=float(series.coherent[index].mean()),
                perplexity=float(np.nanmedian(perplexity[index])),
            )
        )
    return found


def _band(plan: StressPlan, blocks: Blocks, attribute: str) -> RandomBand:
    unsteered = blocks.get("unsteered-000")
    found = [blocks.get(f"random-{index:03d}-000") for index in range(plan.controls)]
    assert unsteered is not None, "made before any control"
    values = [effectiveness(Parts(attribute, [(unsteered, one)]).series).se for one in found if one is not None]
    return RandomBand(
        attribute=attribute,
        directions=len(values),
        mean=float(np.mean(values)),
        p95=float(np.quantile(values, 0.95)),
        p99=float(np.quantile(values, 0.99)),
        highest=max(values),
    )


def _conclusion(
    plan: StressPlan, curves: Sequence[MethodCurve], points: Sequence[StressPoint], controls: Sequence[RandomBand]
) -> str:
    best = max(curves, key=lambda one: max(one.se))
    at = plan.sizes[int(np.argmax(best.se))] if best.knee.size is None else best.knee.size
    chosen = [one for one in points if one.method == best.method and one.size == at]
    low = min(chosen, key=lambda one: one.effectiveness.se)
    p95 = {one.attribute: one.p95 for one in controls}
    beaten = sum(one.effectiveness.se > p95[one.attribute] for one in chosen) if p95 else 0
    against = (
        f"{beaten} of {len(chosen)} attributes above the 95th percentile of {plan.controls} random directions (highest "
        f"{max(p95.values()):.2f})"
        if p95
        else "no random directions were run"
    )
    mean = float(np.mean([one.effectiveness.se for one in chosen]))
    held = float(np.mean([one.f1 for one in chosen]))
    return (
        f"{best.method}: se {mean:.2f} at {at} examples a label (lowest {low.effectiveness.se:.2f}, {low.attribute}; "
        f"{low.effectiveness.n} outputs an attribute), {against}, F1 {held:.2f} on held-out texts; knee: "
        f"{best.knee.sentence}."
    )


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    inner = row.pop("effectiveness")
    inner["reasons"] = "; ".join(inner["reasons"])
    return {**row, **inner}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
