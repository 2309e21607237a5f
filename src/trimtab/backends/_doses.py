"""Counting what every op did to every request, in bounded memory, and refusing ops that did nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import NotAppliedError, UnfiredError
from trimtab.results.runs import DoseSummary
from trimtab.sites import Site
from trimtab.trace import DoseRow

if TYPE_CHECKING:
    from trimtab.steering import OpDose, Program, Rows, SiteProgram
    from trimtab.trace import Writer

_PENDING = 64  # doses of one op that wait on the device before they are summed and written


class DoseOwner(NamedTuple):
    """The request that a row belongs to."""

    name: str
    prompt_index: int
    program: Program | None
    prompt_length: int


@dataclass(slots=True)
class _Totals:
    rows: int = 0
    clamped: int = 0
    before: float = 0.0
    after: float = 0.0
    ratio: float = 0.0
    measured: bool = False


@dataclass(slots=True)
class _Pending:
    owners: list[Tensor] = field(default_factory=list)
    doses: list[OpDose] = field(default_factory=list)


class DoseLedger:
    """The doses of one batch.

    Args:
        owners: the requests of the batch; rows name them by index.
        config: name of the configuration, for the dose table.
        writer: where the dose table goes, or None.
    """

    def __init__(self, owners: Sequence[DoseOwner], *, config: str = "", writer: Writer | None = None) -> None:
        self._owners = owners
        self._config = config
        self._writer = writer
        self._pending: dict[tuple[Site, str], _Pending] = {}
        self._totals: dict[tuple[int, Site, str], _Totals] = {}

    def add(self, program: SiteProgram, doses: Sequence[OpDose], rows: Rows, owners: Tensor) -> None:
        """Take the doses of one site in one forward pass.

        Args:
            program: what was applied.
            doses: one per op.
            rows: the rows it was applied to.
            owners: index of the request of each row, int64 [N].
        """
        for step, dose in zip(program.steps, doses, strict=True):
            if isinstance(dose.rows, int) and dose.rows == 0:
                continue
            mask = rows.select(step.positions, step.gain, step.key).mask
            pending = self._pending.setdefault((program.site, step.name), _Pending())
            pending.owners.append(owners if mask is None else owners[mask])
            pending.doses.append(dose)
            if len(pending.doses) >= _PENDING:
                self._settle(program.site, step.name, pending)

    def _settle(self, site: Site, op: str, pending: _Pending) -> None:
        owners = torch.cat(pending.owners).tolist()
        doses = pending.doses
        self._pending[site, op] = _Pending()
        if not doses or doses[0].positions is None:
            for owner in owners:
                self._total(owner, site, op).rows += 1
            return
        names = ("positions", "p_before", "p_after", "cap_delta", "clamped", "ratio")
        columns = [torch.cat([getattr(dose, name) for dose in doses]).tolist() for name in names]
        table = []
        for owner, position, before, after, delta, clamped, ratio in zip(owners, *columns, strict=True):
            total = self._total(owner, site, op)
            total.measured = True
            total.rows += 1
            total.clamped += bool(clamped)
            total.before += before
            total.after += after
            total.ratio = max(total.ratio, ratio)
            table.append(
                DoseRow(
                    config=self._config,
                    prompt=self._owners[owner].prompt_index,
                    request=self._owners[owner].name,
                    site=str(site),
                    op=op,
                    position=position,
                    p_before=before,
                    p_after=after,
                    cap_delta=delta,
                    clamped=bool(clamped),
                    ratio=ratio,
                )
            )
        if self._writer is not None:
            self._writer.write_dose(table)

    def _total(self, owner: int, site: Site, op: str) -> _Totals:
        return self._totals.setdefault((owner, site, op), _Totals())

    def finish(
        self, rows: Sequence[int], calls: Mapping[Site, int], *, allow_unfired: bool
    ) -> list[tuple[DoseSummary, ...]]:
        """Sum up what is left, and return the doses of every request.

        Args:
            rows: how many rows each request ran.
            calls: how often each site ran.
            allow_unfired: accept ops that selected no row.

        Raises:
            NotAppliedError: the site of an op never ran.
            UnfiredError: an op selected no row, and that was not allowed.
        """
        for (site, op), pending in list(self._pending.items()):
            if pending.doses:
                self._settle(site, op, pending)
        return [
            self._summaries(index, owner, count, calls, allow_unfired)
            for index, (owner, count) in enumerate(zip(self._owners, rows, strict=True))
        ]

    def _summaries(
        self, index: int, owner: DoseOwner, rows: int, calls: Mapping[Site, int], allow_unfired: bool
    ) -> tuple[DoseSummary, ...]:
        found = []
        for site, program in (owner.program or {}).items():
            for step in program.steps:
                if not calls.get(site, 0):
                    raise NotAppliedError(
                        f"request {owner.name!r}: {step.name} at {site} was not applied: the site never ran; "
                        "the module it names is not on the path of this forward pass"
                    )
                total = self._totals.get((index, site, step.name), _Totals())
                reason = "" if total.rows else step.positions.unfired_reason(owner.prompt_length, rows)
                if reason and not allow_unfired:
                    raise UnfiredError(
                        f"request {owner.name!r}: {step.name} at {site} selected no row: {reason}; positions "
                        f"{step.positions} in a run of {rows} rows, {owner.prompt_length} of them prompt; choose other "
                        "positions, or accept it with allow_unfired=True"
                    )
                found.append(_summary(str(site), step.name, total, reason))
        return tuple(found)


def _summary(site: str, op: str, total: _Totals, reason: str) -> DoseSummary:
    mean = total.measured and total.rows > 0
    return DoseSummary(
        site=site,
        op=op,
        rows=total.rows,
        clamped=total.clamped if total.measured or not total.rows else None,
        mean_projection_before=total.before / total.rows if mean else None,
        mean_projection_after=total.after / total.rows if mean else None,
        max_ratio=total.ratio if mean else None,
        reason=reason,
    )
