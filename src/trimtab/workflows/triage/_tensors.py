"""The compared pairs with what the index says about them: module, side, rank, and their place in the causal order."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.compare import ComparisonPlan
from trimtab.compare.match import Pair
from trimtab.errors import SiteError
from trimtab.numerics.dtypes import resolve_dtype, unit_roundoff
from trimtab.results.comparison import Comparison, RecordVerdict
from trimtab.results.triage import Direction
from trimtab.sites import Site

SideOf = Literal["input", "output", "grad_output", "grad_input", "param", "param_grad", "optim", "value"]
PHASES = ("inference", "fwd_only", "fwd_bwd")
_INPUT_POINTS = ("resid_pre", "resid_mid", "attn_z", "mlp_act")
_NAMED = re.compile(
    r"(?:non_intrusive__)?(?:module:)?(?:(?P<path>.*?)\.)?(?P<side>inputs?|outputs?|grad_output|grad_input)"
    r"(?:\.(?P<part>\w+))?"
)
_COLUMNS = (
    "record_id", "module_path", "module_class", "source_file", "source_line", "pp_rank", "dims", "shape", "mean", "std",
    "digest",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tensor:
    """One compared pair."""

    record: RecordVerdict
    pair: Pair
    path: str | None
    """The module; "" is the model, None is unknown."""
    side: SideOf
    module_class: str
    source_file: str | None
    source_line: int | None
    pp_rank: int
    dims: str | None
    norm: float | None
    """Norm of the reference; None when its statistics were not kept."""
    digests: tuple[str | None, str | None]

    @property
    def name(self) -> str:
        """Its name for people."""
        return self.record.key.tensor

    @property
    def direction(self) -> Direction:
        """Which pass made it."""
        if self.side in ("grad_output", "grad_input", "param_grad"):
            return "backward"
        return "update" if self.side in ("param", "optim") else "forward"

    @property
    def failed(self) -> bool:
        """Whether it certainly differs."""
        return self.record.status in ("failed", "corrupt") and self.record.waived_by is None

    @property
    def doubtful(self) -> bool:
        """Whether it neither passes nor fails."""
        return self.record.status == "inconclusive" and self.record.waived_by is None

    @property
    def error(self) -> float:
        """rel_l2; 0 when identical, inf when it cannot be measured."""
        return self._measure("rel_l2")

    @property
    def worst(self) -> float:
        """Relative error of the worst row."""
        return self._measure("worst_row_error")

    @property
    def absolute(self) -> float:
        """Norm of the error."""
        metrics = self.record.metrics
        return metrics.rmse * math.sqrt(metrics.numel) if metrics is not None else 0.0

    @property
    def excess(self) -> float:
        """By what factor a limit is exceeded; 1 for what failed without a measure."""
        calibration = self.record.calibration
        return calibration.excess if calibration is not None else float(self.failed)

    @property
    def expected(self) -> float:
        """Relative error that rounding explains."""
        if self.record.calibration is not None:
            return self.record.calibration.expected
        try:
            return 0.42 * unit_roundoff(resolve_dtype(self.record.dtype_reference or "float32"))
        except (ValueError, KeyError):
            return 0.0

    @property
    def rank(self) -> int | None:
        """The rank whose tensor this is."""
        return self.record.key.rank

    @property
    def group(self) -> tuple[Any, ...]:
        """Tensors of one micro step on one rank."""
        key = self.record.key
        return (key.phase, key.step, key.micro_step, key.rank, key.recompute, key.config, key.prompt, key.request)

    @property
    def place(self) -> tuple[Any, ...]:
        """Order of causes on one rank: phase, step, execution."""
        key = self.record.key
        phase = PHASES.index(key.phase) if key.phase in PHASES else len(PHASES)
        return (phase, key.step, self.record.order)

    def _measure(self, name: str) -> float:
        if self.record.status == "identical":
            return 0.0
        if self.record.metrics is None or not self.record.metrics.nonfinite_match:
            return math.inf
        return float(getattr(self.record.metrics, name))


def read_tensors(plan: ComparisonPlan, comparison: Comparison) -> list[Tensor]:
    """Return every compared pair in causal order, with what the reference's index knows of it."""
    frame = plan.reference.trace.index.select(_COLUMNS)
    facts = {row["record_id"]: row for row in frame.iter_rows(named=True)}
    other = plan.candidate.trace.index.select("record_id", "digest")
    digests = dict(zip(other["record_id"], other["digest"], strict=True))
    pairs = {pair.key: pair for pair in plan.matched.pairs}
    found = []
    for record in comparison.records:
        pair = pairs[record.key]
        row = facts.get(pair.reference_ids[0], {})
        path, side = _module(record, row)
        found.append(
            Tensor(
                record=record,
                pair=pair,
                path=path,
                side=side,
                module_class=row.get("module_class") or "",
                source_file=row.get("source_file"),
                source_line=row.get("source_line"),
                pp_rank=row.get("pp_rank") or 0,
                dims=row.get("dims"),
                norm=_norm(row),
                digests=(row.get("digest"), digests.get(pair.candidate_ids[0])),
            )
        )
    return sorted(found, key=lambda one: one.place)


def owner(parameter: str) -> str:
    """Return the path of the module that holds a parameter, of a gradient or an optimizer state too."""
    return parameter.rpartition(".")[0]


def _norm(row: dict[str, Any]) -> float | None:
    if row.get("mean") is None or row.get("std") is None:
        return None
    return math.sqrt(math.prod(row["shape"]) * (row["mean"] ** 2 + row["std"] ** 2))


def _module(record: RecordVerdict, row: dict[str, Any]) -> tuple[str | None, SideOf]:
    """Return path and side: from the site, the index's module, or the name."""
    key, path = record.key, row.get("module_path")
    if key.kind == "param":
        return path if path is not None else owner(key.name), "param"
    if key.kind == "optim":
        return path if path is not None else owner(owner(key.name)), "optim"
    side: SideOf = "value"
    found = _NAMED.fullmatch(key.tensor)
    if found is not None and (found["path"] or path == "" or key.site):
        path = path if path is not None else found["path"] or ""
        word = found["side"]
        side = word if word.startswith("grad_") else word.rstrip("s")  # type: ignore[assignment]
    elif key.site:
        try:
            side = "input" if Site.parse(key.site).point in _INPUT_POINTS else "output"
        except SiteError:
            path = None
    elif key.kind == "grad":
        return path if path is not None else owner(key.name), "param_grad"
    else:
        path = None  # dumped by a name of its own, wherever that was
    if key.kind == "grad":
        side = {"output": "grad_output", "input": "grad_input"}.get(side, side)  # type: ignore[assignment]
    return path, side
