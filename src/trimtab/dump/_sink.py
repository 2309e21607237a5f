"""Where records go: at once to the trace, or into a ring of the last steps; within a budget, counted."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from torch import Tensor

from trimtab._base.log import get_logger
from trimtab.dump import _manifest
from trimtab.dump._ranks import columns, coordinates, local, rank_and_size
from trimtab.dump.config import DumpConfig
from trimtab.dump.only import identity_of
from trimtab.errors import InputError
from trimtab.numerics import tensor_statistics
from trimtab.trace import TraceWriter

_log = get_logger(__name__)
_Held = tuple[str, Tensor, dict[str, Any]]


class Sink:
    """Takes the records of one process.

    The trace is opened by the first record, because the rank may not be known before. What cannot be stored is noted,
    never passed over.
    """

    def __init__(self, config: DumpConfig, place: Any = None) -> None:
        self.config = config
        self.counts: Counter[tuple[str, int]] = Counter()
        """Records by phase and step."""
        self.names: dict[str, set[str]] = {}
        """Names recorded in each phase; kept only where something is expected."""
        self.unstored: dict[str, str] = {}
        """Names that were not stored, and why."""
        self.stopped = ""
        """Why recording ended early; empty when it did not."""
        self.coordinates = coordinates(place)
        self.rank = 0
        self._writer: TraceWriter | None = None
        self._fixed: dict[str, int] = {}
        self._only = frozenset(config.only)
        self._ring: deque[list[_Held]] = deque([[]])
        self._bytes, self._seconds = 0, 0.0

    def write(self, name: str, tensor: Tensor, fields: dict[str, Any]) -> None:
        """Record a tensor as it is now."""
        if self.stopped:
            return
        began = time.perf_counter()
        try:
            self._take(name, tensor, fields)
        except InputError as error:  # a sparse, quantised or meta tensor must not end the run that is watched
            self._note(name, str(error))
        self._seconds += time.perf_counter() - began

    def open(self) -> TraceWriter:
        """Return the writer of this process's part of the trace."""
        if self._writer is None:
            self.rank, size = rank_and_size()
            self._writer = _manifest.open_writer(self.config, self.rank, size)
            self._fixed = columns(self.coordinates)
        return self._writer

    def end_step(self) -> None:
        """A step has ended: look for NaN and Inf in it where a ring is kept."""
        if not self.config.ring:
            return
        bad = next((name for name, tensor, _ in self._ring[-1] if not _finite(tensor)), None)
        if bad is not None:
            _log.warning("%s holds NaN or Inf: the steps in memory are written", bad)
            self.empty_ring()
        self._ring.append([])
        if len(self._ring) > self.config.ring:
            self._drop_oldest()

    def empty_ring(self) -> None:
        """Write the steps that are kept in memory."""
        for held in self._ring:
            for name, tensor, fields in held:
                self._store(name, tensor, fields)
            held.clear()

    def close(self, interrupted: str | None) -> None:
        """Commit what was recorded."""
        self.open().close(interrupted=interrupted or self.stopped or None)

    def _take(self, name: str, tensor: Tensor, fields: dict[str, Any]) -> None:
        tensor, shard = local(tensor)
        if shard.dims is not None:
            fields = {"dims": shard.dims, **columns(shard.coordinates), **fields}
        if self._only and identity_of(name, fields) not in self._only:
            return
        if not self._within_budget(tensor, fields):
            return
        if self.config.ring:
            self._ring[-1].append((name, tensor.clone(), fields))
        else:
            self._store(name, tensor, fields)

    def _store(self, name: str, tensor: Tensor, fields: dict[str, Any]) -> None:
        writer = self._writer or self.open()
        if self._fixed:
            fields = {**self._fixed, **fields}
        writer.write(name, tensor, **fields)
        phase = fields["phase"]
        self.counts[phase, fields["step"]] += 1
        if self.config.expect:
            self.names.setdefault(phase, set()).add(name)

    def _within_budget(self, tensor: Tensor, fields: dict[str, Any]) -> bool:
        config = self.config
        if config.max_seconds is not None and self._seconds > config.max_seconds:
            self._stop(f"max_seconds={config.max_seconds:g} were spent", fields)
        if config.level == "values" or config.ring:
            size = tensor.numel() * tensor.element_size()
            while config.ring and config.max_bytes is not None and self._bytes + size > config.max_bytes:
                if len(self._ring) == 1:
                    break
                self._drop_oldest()
            if config.max_bytes is not None and self._bytes + size > config.max_bytes:
                self._stop(f"max_bytes={config.max_bytes} are reached", fields)
            else:
                self._bytes += size
        return not self.stopped

    def _stop(self, reason: str, fields: dict[str, Any]) -> None:
        self.stopped = f"recording stopped in {fields['phase']} step {fields['step']}: {reason}"
        _log.warning("%s: %s", self.config.out, self.stopped)

    def _drop_oldest(self) -> None:
        self._bytes -= sum(tensor.nbytes for _, tensor, _ in self._ring.popleft())

    def _note(self, name: str, reason: str) -> None:
        if name not in self.unstored:
            self.unstored[name] = reason
            _log.warning("%s is not recorded: %s", name, reason)


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    found = tensor_statistics(tensor)
    return not (found.nan_count or found.inf_count)
