"""Mixtures of experts: a near tie of the router that rounding decides sends a token to other experts.

The row that follows is a real difference with a known cause, so it never passes; where both runs recorded the
router's logits (a tensor called `...gate` or `...router`, `[tokens, experts]`), the comparison names the token, the
experts and how close the tie was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.compare._measured import Floats, Measured, relative_rows
from trimtab.compare.align import Aligned
from trimtab.compare.match import Pair
from trimtab.compare.plan import ComparisonPlan
from trimtab.compare.rounding import LAYER, Expected, blocks_upstream, expected_error, layer_of
from trimtab.compare.verdict import Calibrated
from trimtab.errors import SiteError
from trimtab.numerics.dtypes import coarser
from trimtab.results.comparison import Calibration, Fingerprint, RecordKey
from trimtab.sites import Site

_ROUTER = re.compile(r"(?:.*[.:])?(?:gate|router|gate_logits|router_logits)(?:\.output)?")
_BEFORE_MLP = ("resid_pre", "resid_mid", "attn_out", "attn_raw", "attn_z", "q", "k", "v")
_ROWS = 64  # failing rows that are looked up
ROUTED = "differs: routing: "
HINT = (
    "single rows differ behind a mixture of experts, where a near tie of the router does that; record the router's "
    "logits on both sides to tell"
)


@dataclass(frozen=True, slots=True)
class Flip:
    """A token that took other experts."""

    router: str
    position: int
    lost: tuple[int, ...]
    taken: tuple[int, ...]
    rank: int
    """Experts that are taken."""
    gap: float
    """How far the reference's logits of the last expert taken and the first one left out are apart."""
    moved: float
    """How far the candidate moved that gap."""
    rounding: float
    """What rounding moves it by at most; above it the router's input already differed."""
    tied: bool
    """The candidate's logits are equal, so either expert may have been taken."""

    @property
    def text(self) -> str:
        """One sentence."""
        names = [" and ".join(map(str, experts)) for experts in (self.lost, self.taken)]
        verb = f"ties expert {names[1]} with" if self.tied else f"takes expert {names[1]} in place of"
        size = f"its logits are {self.gap:.3g} apart and moved by {self.moved:.3g}"
        why = "rounding explains" if self.by_rounding else "more than rounding explains, so its input differed; up to"
        return (
            f"at position {self.position} {self.router} {verb} {names[0]} among the first {self.rank}: "
            f"{size} ({why} {self.rounding:.3g})"
        )

    @property
    def by_rounding(self) -> bool:
        """Whether rounding alone can have decided."""
        return self.moved <= self.rounding


class Routing:
    """Looks for the router's decisions that lie upstream of rows that fail."""

    def __init__(self, plan: ComparisonPlan) -> None:
        self._plan = plan
        self._traces = (plan.reference.trace, plan.candidate.trace)
        self._top = _experts_taken((plan.reference.manifest, plan.candidate.manifest))
        self._mixtures = _mixture_layers(plan.reference.manifest)
        self._routers: dict[Hashable, list[tuple[int | None, Pair]]] | None = None

    def explain(
        self, pair: Pair, measured: Measured, expected: Expected, calibration: Calibration | None
    ) -> Fingerprint | None:
        """Return which failing rows of a pair took other experts; None when no recorded router says so."""
        routers = self._upstream(pair.key)
        if not routers or measured.exact or not measured.row_error.size:
            return None
        rows = _bad_rows(measured, expected, calibration)[:_ROWS]
        flips = {row: flip for row in rows if (flip := self._flip(pair, row, len(measured.row_error), routers))}
        rounded = {row: flip for row, flip in flips.items() if flip.by_rounding}
        if not flips:
            return None
        start, first = min((rounded or flips).items())
        behind = [row for row in rows if row not in flips and row > start and _attends(pair.key, first.router)]
        routed = len(rounded) + len(behind) * bool(rounded) == len(rows)
        detail = f"{len(flips)} of {len(rows)} failing rows took other experts"
        detail += f", {len(behind)} come after such a row and attend to it" if behind else ""
        detail = f"{ROUTED * routed}{detail}: {first.text}"
        return Fingerprint(
            kind="routing", detail=detail, explained=1.0 if routed else len(rounded) / len(rows), value=first.gap
        )

    def suspected(self, pair: Pair, found: Sequence[Fingerprint]) -> bool:
        """Whether single rows differ behind a mixture of experts whose router was not recorded."""
        if not self._mixtures or not any(one.kind == "few_rows" for one in found) or self._upstream(pair.key):
            return False
        return min(self._mixtures) <= _last_router(pair.key)

    def _upstream(self, key: RecordKey) -> list[Pair]:
        if self._routers is None:
            self._routers = defaultdict(list)
            for pair in self._plan.matched.pairs:
                if pair.key.kind == "value" and _ROUTER.fullmatch(pair.key.tensor):
                    self._routers[_group(pair.key)].append((layer_of(pair.key), pair))
        last = _last_router(key)
        found = [(layer, pair) for layer, pair in self._routers.get(_group(key), []) if pair.stored]
        found = [(layer, pair) for layer, pair in found if layer is None or layer <= last]
        return [pair for _, pair in sorted(found, key=lambda one: (one[0] is None, one[0] or 0, one[1].order))]

    def _flip(self, pair: Pair, row: int, rows: int, routers: Sequence[Pair]) -> Flip | None:
        """The first router upstream that sent this row elsewhere."""
        for router in routers:
            if router.key == pair.key or router.same_digest:
                continue
            aligned = Aligned(router, *self._traces)
            at: int | None = row if aligned.rows == rows else None
            position = row
            if pair.positions is not None and router.positions is not None:
                position = int(pair.positions[row])
                found = np.flatnonzero(router.positions == position)
                at = int(found[0]) if found.size else None
            if at is None or not (aligned.fits and aligned.comparable) or aligned.dtypes[0].is_complex:
                continue
            chunk = aligned.between(at, at + 1)
            ours, theirs = (side[0].double().numpy() for side in chunk[1:])
            flip = self._decided(router.key, aligned, position, ours, theirs)
            if flip is not None:
                return flip
        return None

    def _decided(self, key: RecordKey, aligned: Aligned, position: int, ours: Floats, theirs: Floats) -> Flip | None:
        """Compare the experts that two rows of logits take; of unknown how many, the closest exchange counts."""
        order, other = np.argsort(-ours, kind="stable"), np.argsort(-theirs, kind="stable")
        best: Flip | None = None
        dtype = coarser(*aligned.dtypes)
        if self._plan.compute_dtype is not None:
            dtype = coarser(dtype, self._plan.compute_dtype)
        blocks = blocks_upstream(key, self._plan.num_layers)
        error = expected_error(dtype, blocks=blocks, width=aligned.width).error
        rounding = Calibrated().element * error * float(np.sqrt(np.mean(ours**2)))
        for rank in (self._top,) if self._top else range(1, min(len(ours), 17)):
            if not 0 < rank < len(ours):
                continue
            lost, taken = set(order[:rank].tolist()), set(other[:rank].tolist())
            gone, new = tuple(sorted(lost - taken)), tuple(sorted(taken - lost))
            if lost == taken:
                if theirs[other[rank - 1]] != theirs[other[rank]]:
                    continue
                gone, new = (int(other[rank - 1]),), (int(other[rank]),)
            gap = float(min(ours[list(gone)]) - max(ours[list(new)]))
            moved = gap - float(min(theirs[list(gone)]) - max(theirs[list(new)]))
            if best is None or abs(gap) < best.gap:
                best = Flip(key.tensor, position, gone, new, rank, abs(gap), abs(moved), rounding, lost == taken)
        return best


def _bad_rows(measured: Measured, expected: Expected, calibration: Calibration | None) -> list[int]:
    relative = relative_rows(measured.row_error, measured.row_norm)
    limit = 0.1 * float(relative.max())
    if calibration is not None and calibration.worst > calibration.worst_limit:
        limit = calibration.worst_limit * expected.error
    return [int(row) for row in np.flatnonzero(relative >= limit)]


def _group(key: RecordKey) -> Hashable:
    """Records of one forward pass."""
    if key.prompt is not None:
        return (key.config, key.prompt, key.request)
    return (key.phase, key.step, key.micro_step, key.rank, key.call_index)


def _attends(key: RecordKey, router: str) -> bool:
    """Whether attention lies between a router and a tensor, so that later tokens see what the router did."""
    layer, of_router = layer_of(key), layer_of(RecordKey(site=router))
    return of_router is not None and (layer is None or layer > of_router)


def _last_router(key: RecordKey) -> float:
    """The last layer whose router lies upstream of a tensor."""
    layer = layer_of(key)
    if layer is None:
        return float("inf") if key.tensor in ("final_norm", "logits") else -1.0
    try:
        point = Site.parse(key.site).point if key.site else ""
    except SiteError:
        point = ""
    return layer - 1 if point in _BEFORE_MLP else layer


def _experts_taken(manifests: Sequence[Mapping[str, Any]]) -> int | None:
    """Experts per token, where a plan or the provenance says."""
    for manifest in manifests:
        for part in ("plan", "provenance"):
            section = manifest.get(part)
            value = section.get("num_experts_per_tok") if isinstance(section, dict) else None
            if isinstance(value, int):
                return value
    return None


def _mixture_layers(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without neurons in one tensor, in a run whose manifest lists all sites of a Hugging Face model."""
    provenance = manifest.get("provenance")
    if not isinstance(provenance, dict) or provenance.get("backend") != "hf" or provenance.get("fallback"):
        return ()
    sites = provenance.get("sites")
    if not isinstance(sites, dict):
        return ()
    layers = {int(found[1]) for site in sites if (found := LAYER.search(site)) and site.endswith(".mlp_raw")}
    return tuple(sorted(layer for layer in layers if f"layers.{layer}.mlp_act" not in sites))
