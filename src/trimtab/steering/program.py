"""A Steering bound to a model: which ops run at which site, made ready for a dtype and device, and applied to rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import InputError, NonFiniteError, VectorError
from trimtab.sites import Site
from trimtab.steering import _chain, _compiled
from trimtab.steering._chain import Step
from trimtab.steering.dose import Detail, OpDose, measure
from trimtab.steering.ops import Raw
from trimtab.steering.rows import Rows, Selected


class Applied(NamedTuple):
    """The rows after the ops of one site, and what each op did."""

    h: Tensor
    dose: tuple[OpDose, ...]


class SiteProgram:
    """The ops of one site, in order.

    Each op sees the state that the ops before it left, held in the widest math among them; the sum of the corrections
    is rounded once into the model's dtype. A number whose correction is zero keeps its bits (-0.0 included), and a row
    that no op selects keeps all of them: both are bit-identical to an unsteered run.

    On an accelerator the check for non-finite results is deferred: it accumulates in a flag on the device and is raised
    by `check`, so that applying an op never stalls the device. On the CPU `apply` raises at once.
    """

    def __init__(self, site: Site, steps: Sequence[Step]) -> None:
        self.site = site
        self.steps = tuple(steps)
        self.width = next((step.op.width for step in steps if step.op.width is not None), None)
        self._ready: dict[tuple[torch.device, torch.dtype], _chain.Chain] = {}
        self._name = _compiled.enroll(self)
        self._flags: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"SiteProgram({self.site}: {', '.join(step.name for step in self.steps)})"

    def prepare(self, device: torch.device, dtype: torch.dtype) -> _chain.Chain:
        """Cast the directions for rows of `dtype` on `device`; done once and kept."""
        found = self._ready.get((device, dtype))
        if found is None:
            if not dtype.is_floating_point:
                raise InputError(f"{self.site}: ops act on floating-point states, and these are {dtype}")
            found = self._ready[device, dtype] = _chain.make(self.steps, device, dtype)
        return found

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
        chain = self._ready.get((h.device, h.dtype)) or self.prepare(h.device, h.dtype)
        chosen = [rows.select(step.positions, step.gain, step.key) for step in self.steps]
        dose = [OpDose(self.site, step.name, one.rows) for step, one in zip(self.steps, chosen, strict=True)]
        narrow = h.numel() <= _chain.BLOCK or chain.final is h.dtype
        if narrow and chain.static is not None and chosen[0].mask is None and detail == "counts":
            out = h + chain.static  # one addition, and no wide copy worth cutting into blocks: as below, but shorter
            if out.dtype is not h.dtype:
                out = out.to(h.dtype)
            self._watch(h, out, rows)
            return Applied(out, tuple(dose))
        if all(one.none for one in chosen):
            return Applied(h, tuple(dose))
        flat = h if h.ndim == 2 else h.reshape(-1, h.shape[-1])
        if detail == "full":
            note = self._measure(chain, chosen, rows, dose)
            out = _chain.run(chain, flat, rows.positions, chosen, note).to(h.dtype)
            self._watch(flat, out, rows)
        else:
            out = self._run(chain, flat, chosen, rows)
        return Applied(out if h.ndim == 2 else out.reshape(h.shape), tuple(dose))

    def _run(self, chain: _chain.Chain, h: Tensor, chosen: Sequence[Selected], rows: Rows) -> Tensor:
        spans = _chain.spans(h, chain)
        if len(spans) == 1:
            out = _chain.run(chain, h, rows.positions, chosen).to(h.dtype)
            self._watch(h, out, rows)
            return out
        out, suspect = torch.empty_like(h), False
        for start, stop in spans:
            part = [one.part(start, stop) for one in chosen]
            new = out[start:stop].copy_(_chain.run(chain, h[start:stop], rows.positions[start:stop], part))
            suspect = suspect or _alarming(new)
        if suspect:
            self._refuse(h, out, rows)
        return out

    def _in_graph(self, h: Tensor, rows: Rows, detail: Detail) -> Applied:
        if detail != "counts":  # Dynamo leaves the graph here and runs this call eagerly
            raise InputError(f"{self.site}: a compiled graph counts rows only; ask for the full dose outside it")
        length = rows.prompt_length
        length = length if isinstance(length, Tensor) else torch.tensor(length)
        out, counts = _compiled.steer(h, rows.positions, length, rows.token_ids, rows.padded, self._name)
        return Applied(out, tuple(OpDose(self.site, one.name, counts[i]) for i, one in enumerate(self.steps)))

    def _measure(self, chain: _chain.Chain, chosen: Sequence[Selected], rows: Rows, dose: list[OpDose]) -> _chain.Note:
        """Return what puts the full dose of an op that ran in the place of its count."""

        def note(index: int, raw: Raw, states: tuple[Tensor, Tensor, Tensor]) -> None:
            measured = {"positions": rows.positions, **measure(chain.steps[index][1], raw, states)}
            mask = chosen[index].mask
            columns: dict[str, Any] = measured if mask is None else {name: one[mask] for name, one in measured.items()}
            dose[index] = replace(dose[index], **columns)

        return note

    def _watch(self, h: Tensor, out: Tensor, rows: Rows) -> None:
        if h.device.type == "cpu":
            if _alarming(out):
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


def _alarming(out: Tensor) -> bool:
    """Return whether rows may be non-finite, by one cheap reduction: a finite sum has finite terms."""
    # bfloat16 is summed in float32 either way, and faster unasked; float16 ends at 65504, far below a usual sum
    return not isfinite(out.sum(dtype=torch.float32 if out.dtype is torch.float16 else None).item())
