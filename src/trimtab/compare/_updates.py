"""What Adam makes of gradients that agree: parameters that rounding sets apart, and what is computed with them.

Adam divides a gradient by its own size. Where the gradient of an element is only what rounding leaves of terms that
cancel (the bias of a key projection, which softmax does not see; a parameter that starts at 0), the element moves by
the learning rate in a direction that rounding decides. Its gradient and its moments agree beside those of the other
elements; the parameter then differs by far more than rounding, and so does, less and less visibly, all that follows.

The recorded state says how far. With m and v the moments of both sides, both put into the update of the *reference's*
settings, u = m^ / (sqrt(v^) + eps), an element may have moved apart by the sum of lr |u_c - u_r| over the updates so
far. Only what that leaves of the difference is judged, and only where the moments themselves pass. A later tensor is
judged against the root of e^2 + d^2, d the largest distance of a module's parameters over their norm in that step. One
parameter that the state does not explain, and nothing is excused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from trimtab.compare._measured import Measured, energy
from trimtab.compare.align import Aligned
from trimtab.compare.match import Pair
from trimtab.compare.measure import Chunk, measure
from trimtab.compare.plan import ComparisonPlan
from trimtab.compare.rounding import Expected
from trimtab.compare.verdict import Calibrated, Judgement, judge
from trimtab.errors import ComparisonError, TraceError

FURTHEST = 1e-3
"""Distance of a module's parameters over their norm beyond which what follows can no longer be called agreeing."""
MOVED = "differs by what Adam makes of gradients that agree within rounding"
BEHIND = "agrees within what parameters that Adam has moved apart explain"
_SLACK = 1.001  # the update itself was computed in the dtype of its state
_KINDS = re.compile(r"AdamW?(_\d+)?")
_State = tuple[Pair, Pair, float]  # both moments of one update, and how many updates there were


class Settings(NamedTuple):
    """What the update of a parameter group needs besides its learning rate."""

    beta1: float
    beta2: float
    eps: float

    def update(self, mean: torch.Tensor, square: torch.Tensor, count: float) -> torch.Tensor:
        """Adam's step over its learning rate, elementwise in float64 (Kingma and Ba 2015, algorithm 1)."""
        size = torch.sqrt(square.double() / (1 - self.beta2**count)) + self.eps
        return torch.div(mean.double(), (1 - self.beta1**count) * size)


class Updates:
    """Judges again what did not pass after an update of Adam.

    Args:
        plan: what is compared with what.
        expect: the error that rounding explains, of a pair.
    """

    def __init__(self, plan: ComparisonPlan, expect: Callable[[Pair, Aligned], Expected]) -> None:
        self._plan, self._expect = plan, expect
        self._traces = (plan.reference.trace, plan.candidate.trace)
        calibrated = isinstance(plan.verdict, Calibrated) and plan.noise is None
        self._settings = _settings(plan.reference.manifest) if calibrated else ()
        self._found: dict[tuple[str, str, int, int | None], Pair | None] | None = None
        self._distance: dict[int, float] = {}
        self._passed: dict[tuple[str, int, int | None], bool] = {}

    def ease(self, pair: Pair, aligned: Aligned, measured: Measured, expected: Expected) -> Judgement | None:
        """Return the verdict on what the updates so far leave unexplained; None where they explain nothing.

        Args:
            pair: what did not pass.
            aligned: its tensors.
            measured: what the fused pass found.
            expected: the error that rounding explains.
        """
        if not self._settings or pair.positions is not None or measured.exact or measured.mismatch is not None:
            return None
        if self._plan.rule_for(pair.key) is not None:
            return None
        if pair.key.kind == "param":
            return self._parameter(pair, aligned, expected)
        distance = self._apart(pair.key.step)
        if distance == 0 or math.isinf(distance):
            return None
        source = f"{expected.source}, and parameters that Adam has moved {distance:.2g} of their norm apart"
        wider = dataclasses.replace(
            expected, error=math.hypot(expected.error, distance), common=expected.common + distance, source=source
        )
        found = self._judge(pair, aligned, measured, wider)
        if found.status == "passed" and distance > max(FURTHEST, expected.error):
            why = f"its parameters are {distance:.2g} of their norm apart, by what Adam makes of rounding"
            return dataclasses.replace(found, status="inconclusive", reasons=(f"{why}: give a noise run",))
        return found if found.status != "failed" else None

    def _parameter(self, pair: Pair, aligned: Aligned, expected: Expected) -> Judgement | None:
        states = self._states(pair)
        if not states or not all(self._agrees(one) for state in states.values() for one in state[:2]):
            return None
        try:
            left = measure(self._unexplained(aligned, states), aligned.shape, aligned.dtypes)
        except (ComparisonError, TraceError):
            return None
        found = self._judge(pair, aligned, left, expected)
        return found if found.status == "passed" else None

    def _unexplained(self, aligned: Aligned, states: Mapping[int, _State]) -> Iterator[Chunk]:
        """The reference, and the reference plus the part of the difference that no update explains."""
        moments = [
            (Aligned(mean, *self._traces), Aligned(square, *self._traces), count, self._rate(step))
            for step, (mean, square, count) in states.items()
        ]
        for chunk in aligned.chunks():
            end = chunk.start + len(chunk.reference)
            allowed = torch.zeros(chunk.reference.shape, dtype=torch.float64)
            for mean, square, count, rate in moments:
                if mean.shape != aligned.shape or square.shape != aligned.shape:
                    raise ComparisonError("the moments have another shape than the parameter")
                m, v = mean.between(chunk.start, end), square.between(chunk.start, end)
                steps = [
                    one.update(m.candidate, v.candidate, count) - one.update(m.reference, v.reference, count)
                    for one in self._settings
                ]
                allowed += rate * _SLACK * torch.stack(steps).abs().amax(0)
            gap = chunk.candidate.double() - chunk.reference.double()
            left = gap.sign() * (gap.abs() - allowed).clamp(min=0)
            yield Chunk(chunk.start, chunk.reference, (chunk.reference.double() + left).to(chunk.candidate.dtype))

    def _states(self, pair: Pair) -> dict[int, _State]:
        """The moments of every update since the parameter was first recorded; empty where one was not."""
        name, rank, last = pair.key.name, pair.key.rank, pair.key.step
        steps = sorted(key[2] for key in self._index if key[:2] == ("param", name) and key[3] == rank)
        found: dict[int, _State] = {}
        for step in range(steps[0], last):
            mean, square, count = (
                self._index.get(("optim", f"{name}.{part}", step, rank)) for part in ("exp_avg", "exp_avg_sq", "step")
            )
            if mean is None or square is None or count is None or not (count.stored and self._rate(step) > 0):
                return {}
            found[step] = mean, square, float(self._traces[0].tensor(count.reference_ids[0]).reshape(-1)[0])
        return found

    def _rate(self, step: int) -> float:
        """The largest learning rate of the reference in a step; 0 where none was recorded."""
        rates = [
            float(self._traces[0].tensor(pair.reference_ids[0]))
            for key, pair in self._index.items()
            if key[0] == "lr" and key[2] == step and pair is not None and pair.stored
        ]
        return max(rates, default=0.0)

    def _apart(self, step: int) -> float:
        """Largest distance of a module's parameters over their norm so far; 0 where a difference is unexplained."""
        known = sorted({key[2] for key in self._index if key[0] == "param" and key[2] <= step})
        distances = []
        for one in known:
            if one not in self._distance:
                self._distance[one] = self._apart_at(one)
            distances.append(self._distance[one])
        return 0.0 if any(map(math.isnan, distances)) else max(distances, default=0.0)

    def _apart_at(self, step: int) -> float:
        """The same in one step; NaN where a difference is unexplained."""
        pairs = [pair for key, pair in self._index.items() if key[0] == "param" and key[2] == step and pair is not None]
        moved: dict[str, float] = defaultdict(float)
        sizes: dict[str, float] = defaultdict(float)
        excused = False
        for pair in (one for one in pairs if not one.same_digest):
            aligned, measured, expected = self._measure(pair)
            if self._judge(pair, aligned, measured, expected).status != "passed":
                if self._parameter(pair, aligned, expected) is None:
                    return math.nan
                excused = True
            moved[_owner(pair)] += energy(measured.row_error)
        if not excused:
            return 0.0
        for pair in (one for one in pairs if _owner(one) in moved):
            sizes[_owner(pair)] += energy(self._measure(pair)[1].row_norm)
        return max(math.sqrt(moved[name] / size) if size > 0 else math.inf for name, size in sizes.items())

    def _agrees(self, pair: Pair) -> bool:
        """Whether a moment passes, plainly or behind earlier updates."""
        if pair.same_digest:
            return True
        key = (pair.key.name, pair.key.step, pair.key.rank)
        if key not in self._passed:
            aligned, measured, expected = self._measure(pair)
            found = self._judge(pair, aligned, measured, expected)
            eased = found if found.status == "passed" else self.ease(pair, aligned, measured, expected)
            self._passed[key] = eased is not None and eased.status == "passed"
        return self._passed[key]

    def _measure(self, pair: Pair) -> tuple[Aligned, Measured, Expected]:
        aligned = Aligned(pair, *self._traces)
        return aligned, measure(aligned.fused(), aligned.shape, aligned.dtypes), self._expect(pair, aligned)

    def _judge(self, pair: Pair, aligned: Aligned, measured: Measured, expected: Expected) -> Judgement:
        return judge(self._plan.verdict, measured, expected, aligned, rule=None, layer=pair.key.layer)

    @property
    def _index(self) -> Mapping[tuple[str, str, int, int | None], Pair | None]:
        """Parameters, state and learning rates by kind, name, step and rank; None where two share them."""
        if self._found is None:
            self._found = {}
            for pair in self._plan.matched.pairs:
                kind = "lr" if pair.key.name.startswith("lr.") else pair.key.kind
                if kind in ("param", "optim", "lr"):
                    key = (kind, pair.key.name, pair.key.step, pair.key.rank)
                    self._found[key] = None if key in self._found and kind == "optim" else pair
        return self._found


def _owner(pair: Pair) -> str:
    """The module of a parameter, on its rank."""
    return f"{pair.key.rank} {pair.key.name.rpartition('.')[0]}"


def _settings(manifest: Mapping[str, Any]) -> Sequence[Settings]:
    """The settings of every group that Adam or AdamW steps, each once; none where the manifest names none."""
    plan = manifest.get("plan")
    optimizers = plan.get("optimizer") if isinstance(plan, Mapping) else None
    found = []
    for name, groups in optimizers.items() if isinstance(optimizers, Mapping) else ():
        if not (_KINDS.fullmatch(str(name)) and isinstance(groups, Mapping)):
            continue
        for group in groups.values():
            if isinstance(group, Mapping) and not group.get("amsgrad") and {"betas", "eps"} <= group.keys():
                beta1, beta2 = group["betas"]
                found.append(Settings(float(beta1), float(beta2), float(group["eps"])))
    return tuple(dict.fromkeys(found))
