"""A Steering bound to a model: which ops run at which site, made ready for a dtype and device, and applied to rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import InputError, NonFiniteError, VectorError
from trimtab.sites import Site
from trimtab.steering import _compiled
from trimtab.steering._arithmetic import accumulator, limit, norm, round_to
from trimtab.steering.dose import Detail, OpDose
from trimtab.steering.gains import Constant, Gain
from trimtab.steering.ops import Kernel, Op, Raw
from trimtab.steering.positions import Positions
from trimtab.steering.rows import Rows, Selected


class Applied(NamedTuple):
    """The rows after the ops of one site, and what each op did."""

    h: Tensor
    dose: tuple[OpDose, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One op of a site: its place among the op list, and the rows and gain it acts with."""

    name: str
    op: Op
    positions: Positions
    gain: Gain
    key: str


class _Ready(NamedTuple):
    """The ops of a site for one dtype and device."""

    state: torch.dtype
    """Widest math of the ops: the state between ops is held in it."""
    final: torch.dtype
    """Dtype in which h + c is formed, before it is rounded once into the model's."""
    steps: tuple[tuple[Step, Kernel, torch.dtype], ...]
    static: Tensor | None
    """[D] in `final`: the whole correction of a site whose only op is the same for every row."""


class SiteProgram:
    """The ops of one site, in order.

    Each op sees the state that the ops before it left, held in the widest math among them; the sum of the corrections
    is rounded once into the model's dtype. An element whose correction is zero keeps its bits (-0.0 included), so rows
    that no op selects, and ops without effect, are bit-identical to an unsteered run.

    On an accelerator the check for non-finite results is deferred: it accumulates in a flag on the device and is raised
    by `check`, so that applying an op never stalls the device. On the CPU `apply` raises at once.
    """

    def __init__(self, site: Site, steps: Sequence[Step]) -> None:
        self.site = site
        self.steps = tuple(steps)
        self.width = next((step.op.width for step in steps if step.op.width is not None), None)
        self._ready: dict[tuple[torch.device, torch.dtype], _Ready] = {}
        self._name = _compiled.enroll(self)
        self._flags: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"SiteProgram({self.site}: {', '.join(step.name for step in self.steps)})"

    def prepare(self, device: torch.device, dtype: torch.dtype) -> _Ready:
        """Cast the directions for rows of `dtype` on `device`; done once and kept."""
        found = self._ready.get((device, dtype))
        if found is not None:
            return found
        if not dtype.is_floating_point:
            raise InputError(f"{self.site}: ops act on floating-point states, and these are {dtype}")
        steps = []
        for step in self.steps:
            math = step.op.math_dtype(dtype)
            steps.append((step, step.op.kernel(math, device), math))
        state = steps[0][2]
        for _, _, math in steps[1:]:
            state = torch.promote_types(state, math)
        final = torch.promote_types(state, dtype)
        static = None
        if len(steps) == 1:
            static = _constant(*steps[0])
        if static is not None:
            # x + (-0.0) is x for every x, -0.0 included: zeros of the correction must not change bits
            static = torch.where(static == 0, torch.full_like(static, -0.0), static).to(final)
        ready = self._ready[device, dtype] = _Ready(state, final, tuple(steps), static)
        return ready

    def apply(
        self,
        h: Float[Tensor, "*rows width"],
        rows: Rows | None = None,
        *,
        positions: Int[Tensor, " rows"] | None = None,
        prompt_length: int | Int[Tensor, " rows"] | None = None,
        token_ids: Int[Tensor, " rows"] | None = None,
        detail: Detail = "counts",
    ) -> Applied:
        """Apply the ops to rows.

        Args:
            h: states [N, D] in the model's dtype; leading dimensions are flattened to N in order.
            rows: positions of the rows; build it once per forward pass and pass it to every site. Or give:
            positions: absolute positions, int64 [N].
            prompt_length: P, one number or int64 [N].
            token_ids: int64 [N], when a selection names token ids.
            detail: "counts" or "full" dose.

        Returns:
            The rows, of the shape and dtype of `h` (`h` itself when no row is selected), and one dose per op.

        Raises:
            NonFiniteError: a correction made a row non-finite or left the range of the dtype (see the class).
            VectorError: `h` has another width than the vectors.
            PositionError: the selection cannot be met.
        """
        if rows is None:
            if positions is None or prompt_length is None:
                raise InputError(f"{self.site}: give rows=, or positions= and prompt_length=")
            rows = Rows(positions, prompt_length, token_ids)
        if self.width is not None and h.shape[-1] != self.width:
            raise VectorError(
                f"{self.site}: the states have width {h.shape[-1]} and the vectors have width {self.width}"
            )
        if torch.compiler.is_compiling():
            return self._in_graph(h, rows, detail)
        ready = self._ready.get((h.device, h.dtype)) or self.prepare(h.device, h.dtype)
        if ready.static is not None and detail == "counts":
            step = self.steps[0]
            selected = rows.select(step.positions, step.gain, step.key)
            if selected.mask is None:
                out = h + ready.static
                if out.dtype is not h.dtype:
                    out = out.to(h.dtype)
                self._watch(h, out, rows)
                return Applied(out, (OpDose(self.site, step.name, selected.rows),))
        return self._general(h, rows, ready, detail)

    def _in_graph(self, h: Tensor, rows: Rows, detail: Detail) -> Applied:
        if detail != "counts":  # Dynamo leaves the graph here and runs this call eagerly
            raise InputError(f"{self.site}: a compiled graph counts rows only; ask for the full dose outside it")
        length = rows.prompt_length
        length = length if isinstance(length, Tensor) else torch.tensor(length)
        out, counts = _compiled.steer(h, rows.positions, length, rows.token_ids, rows.padded, self._name)
        return Applied(out, tuple(OpDose(self.site, one.name, counts[i]) for i, one in enumerate(self.steps)))

    def _general(self, h: Tensor, rows: Rows, ready: _Ready, detail: Detail) -> Applied:
        flat = h.reshape(-1, h.shape[-1])
        state = flat.to(ready.state)
        total: Tensor | None = None
        doses = []
        for step, kernel, math in ready.steps:
            selected = rows.select(step.positions, step.gain, step.key)
            if isinstance(selected.rows, int) and selected.rows == 0:
                doses.append(OpDose(self.site, step.name, 0))
                continue
            if kernel.require is not None and flat.device.type == "cpu":
                kernel.require(rows.positions if selected.mask is None else rows.positions[selected.mask])
            seen = state.to(math)
            raw = kernel.correct(seen, rows.positions)
            change = _shape(raw.correction, seen, step, selected, math).to(ready.state)
            total = change if total is None else total + change
            before, last = state, step is self.steps[-1]
            if detail == "full" or not last:
                state = state + change
            if detail == "full":
                doses.append(self._dose(step, kernel, raw, selected, rows, (before, change, state)))
            else:
                doses.append(OpDose(self.site, step.name, selected.rows))
        if total is None:
            return Applied(h, tuple(doses))
        summed = (flat.to(ready.final) + total.to(ready.final)).to(h.dtype)
        out = torch.where(total == 0, flat, summed).reshape(h.shape)
        self._watch(h, out, rows)
        return Applied(out, tuple(doses))

    def _dose(
        self,
        step: Step,
        kernel: Kernel,
        raw: Raw,
        selected: Selected,
        rows: Rows,
        states: tuple[Tensor, Tensor, Tensor],
    ) -> OpDose:
        before, change, after = states
        zero = torch.zeros_like(before[:, 0], dtype=torch.float32)
        p_before = zero if kernel.probe is None else _along(before, kernel.probe)
        if raw.projection is not None:
            p_before = _size(raw.projection)
        clamped = raw.clamped
        if clamped is None and kernel.clamps and raw.adjustment is not None:
            clamped = raw.adjustment != 0
        measured = {
            "positions": rows.positions,
            "p_before": p_before,
            "p_after": zero if kernel.probe is None else _along(after, kernel.probe),
            "cap_delta": zero if raw.adjustment is None else _size(raw.adjustment),
            "clamped": zero.bool() if clamped is None else clamped[:, 0],
            "ratio": (norm(change.float()) / norm(before.float()))[:, 0].nan_to_num(nan=0.0, posinf=float("inf")),
        }
        if raw.violation is not None:
            measured["violation"] = raw.violation[:, 0].float()
        if selected.mask is not None:
            measured = {name: value[selected.mask] for name, value in measured.items()}
        return OpDose(self.site, step.name, selected.rows, **measured)

    def _watch(self, h: Tensor, out: Tensor, rows: Rows) -> None:
        if h.device.type == "cpu":
            # one cheap reduction; a finite sum has finite terms, and a sum that is not is looked at in full
            if not isfinite(out.sum(dtype=torch.float32).item()):
                self._refuse(h, out, rows)
            return
        bad = (~torch.isfinite(out) & torch.isfinite(h)).any()
        flag = self._flags.get(h.device)
        self._flags[h.device] = bad if flag is None else flag | bad

    def _refuse(self, h: Tensor, out: Tensor, rows: Rows) -> None:
        made = (~torch.isfinite(out) & torch.isfinite(h)).reshape(-1, h.shape[-1]).any(dim=-1)
        if bool(made.any()):
            where = rows.positions[made.nonzero()[0, 0]].item()
            raise NonFiniteError(
                f"{self.site}: {', '.join(step.name for step in self.steps)} made {int(made.sum())} rows non-finite in "
                f"{h.dtype}, the first at position {where}; lower the strength or use a model dtype of wider range"
            )

    def check(self) -> None:
        """Raise what was deferred on an accelerator; call it after a step or at the end of a generation.

        Raises:
            NonFiniteError: a correction made a row non-finite since the last check.
        """
        flags, self._flags = self._flags, {}
        for flag in flags.values():
            if bool(flag):
                raise NonFiniteError(
                    f"{self.site}: {', '.join(step.name for step in self.steps)} made rows non-finite; "
                    "lower the strength or use a model dtype of wider range"
                )


class Program(Mapping[Site, SiteProgram]):
    """The ops of every steered site of a model, in the order of the forward pass."""

    def __init__(self, sites: Mapping[Site, SiteProgram]) -> None:
        self._sites = dict(sites)

    def __getitem__(self, site: Site) -> SiteProgram:
        return self._sites[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Program({', '.join(map(repr, self._sites.values()))})"

    def check_positions(self, prompt_length: int, length: int | None = None) -> None:
        """Refuse a request whose selections cannot be met; call it before running the request.

        Args:
            prompt_length: P.
            length: rows that the sequence will have at most.

        Raises:
            PositionError: the message names the op.
        """
        for program in self._sites.values():
            for step in program.steps:
                step.positions.check(prompt_length, length)

    def check(self) -> None:
        """Raise what was deferred on an accelerator, for every site."""
        for program in self._sites.values():
            program.check()


def _constant(step: Step, kernel: Kernel, math: torch.dtype) -> Tensor | None:
    """Return the correction of an op that is the same for every row, gain included."""
    if kernel.static is None or step.op.max_ratio is not None or not isinstance(step.gain, Constant):
        return None
    return kernel.static * round_to(step.gain.value, math)


def _shape(c: Tensor, seen: Tensor, step: Step, selected: Selected, math: torch.dtype) -> Tensor:
    """Return the correction with the norm limit, the gain and the selection, in the op's math."""
    if step.op.max_ratio is not None:
        c = limit(c, seen, round_to(step.op.max_ratio, math))
    if selected.gain is not None:
        c = c * selected.gain.to(math)[:, None]
    elif isinstance(step.gain, Constant) and step.gain.value != 1:
        c = c * round_to(step.gain.value, math)
    return c if selected.mask is None else torch.where(selected.mask[:, None], c, 0.0)


def _along(state: Tensor, probe: Tensor) -> Tensor:
    wide = state.to(probe.dtype)
    return _size(torch.stack([(wide * u).sum(-1) for u in probe], dim=-1))


def _size(values: Tensor) -> Tensor:
    """Return one number per row: the value itself along one direction, the norm along several; float32 [N]."""
    wide = values.to(accumulator(values.dtype))
    return (wide[:, 0] if wide.shape[1] == 1 else wide.norm(dim=1)).float()
