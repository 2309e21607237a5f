"""What a worker answers the client: one verb each, bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from trimtab.backends.vllm import wire
from trimtab.backends.vllm.counts import NOTHING, Ints, Names
from trimtab.backends.vllm.wire import Result
from trimtab.errors import TrimtabError
from trimtab.numerics import dtype_name
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.backends.vllm.doses import Ops
    from trimtab.backends.vllm.state import Left
    from trimtab.backends.vllm.taps import Tap
    from trimtab.backends.vllm.worker import SteeredWorker


def answer(worker: SteeredWorker, verb: str, payload: bytes) -> bytes:
    """Run one verb; a refusal comes back as a document of its kind and message."""
    try:
        return _VERBS[verb](worker, payload)
    except TrimtabError as error:
        return wire.to_bytes({"error": type(error).__name__, "message": str(error)})


def _hello(worker: SteeredWorker, payload: bytes) -> bytes:
    state = worker.state
    sites = state.map
    return wire.to_bytes(
        {
            "family": sites.family,
            "num_layers": sites.num_layers,
            "hidden_size": sites.hidden_size,
            "vocab_size": sites.widths("logits"),
            "sites": [[str(site), sites.widths(site)] for site in sites.sites()],
            "steered": [str(site) for site in state.steered],
            "recorded": [str(site) for site in state.recorded],
            "max_steering": state.config.max_steering,
            "max_payload_bytes": state.config.max_payload_bytes,
            "buffer_bytes": state.nbytes,
            "graphs": state.graphs,
            "tp_rank": worker.tp_rank,
            "pp_rank": worker.pp_rank,
            "engine": worker.engine,
            "workers": worker.workers,
        }
    )


def _register(worker: SteeredWorker, payload: bytes) -> bytes:
    digest = worker.state.register(payload)
    return wire.to_bytes({"digest": digest, "bytes": worker.state.bytes_of(digest)})


def _directions(worker: SteeredWorker, payload: bytes) -> bytes:
    (digest, directions), *_ = safetensors.torch.load(payload).items()
    worker.state.register_directions(digest, directions)
    return wire.to_bytes({})


def _forget(worker: SteeredWorker, payload: bytes) -> bytes:
    worker.state.forget(wire.from_bytes(payload)["digests"])
    return wire.to_bytes({})


def _discard(worker: SteeredWorker, payload: bytes) -> bytes:
    worker.state.discard(wire.from_bytes(payload)["labels"])
    return wire.to_bytes({})


def _stats(worker: SteeredWorker, payload: bytes) -> bytes:
    return wire.to_bytes(worker.state.stats() | {"taps": {tap.tap.name: tap.calls for tap in worker.taps}})


class _Parcel:
    """What a parcel is made of: results, and what they name by number or place.

    Rows lie one below another in a few large tensors, which travel faster than many small ones.
    """

    def __init__(self) -> None:
        self.ops: dict[Names, int] = {}
        self.pairs: dict[Ops, int] = {}
        self.positions: dict[bytes, tuple[int, list[tuple[int, int]]]] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._ends: dict[str, int] = {}

    def number(self, pairs: Ops) -> int:
        """Return the number of the ops of a full dose."""
        return self.pairs.setdefault(pairs, len(self.pairs))

    def place(self, positions: Ints) -> int:
        """Return the number of some positions, int64 [n]."""
        key = positions.tobytes()
        if key not in self.positions:
            self.positions[key] = len(self.positions), wire.runs(positions)
        return self.positions[key][0]

    def rows(self, rows: Tensor) -> tuple[str, int, int]:
        """Take rows [n, width]; return the name of their tensor, the first of them in it, and the end."""
        name = f"{dtype_name(rows.dtype)}.{rows.shape[1]}"
        first = self._ends.get(name, 0)
        self._rows.setdefault(name, []).append(rows)
        self._ends[name] = end = first + rows.shape[0]
        return name, first, end

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, and let go of what they were made of."""
        return {name: torch.cat(self._rows.pop(name)) for name in list(self._rows)}


def _collect(worker: SteeredWorker, payload: bytes) -> bytes:
    """A parcel: recorded rows, full doses and counts; its document says whose they are."""
    lefts = [left for several in worker.state.collect(wire.from_bytes(payload)["labels"]).values() for left in several]
    parcel = _Parcel()
    results = [_result(left, parcel, worker.state.tap_of, worker.tp_rank == 0) for left in lefts]
    document = {
        "results": results,
        "counts": wire.counts_text(_counts(lefts)),
        "ops": list(parcel.ops),
        "pairs": list(parcel.pairs),
        "positions": [runs for _, runs in parcel.positions.values()],
        "tp_rank": worker.tp_rank,
        "pp_rank": worker.pp_rank,
        "engine": worker.engine,
        "dropped": worker.state.dropped,
    }
    del lefts  # rows can be many: the parcel copies them
    return wire.to_parcel(document, parcel.tensors())


def _counts(lefts: Sequence[Left]) -> Ints:
    """Return what the ops of some requests did, int64 [ops of all, 4]; neighbours with equal ops are read together."""
    parts = [NOTHING.values]
    for counted, group in groupby(lefts, key=lambda left: left.counted):
        if counted is not None:
            several = list(group)
            values = counted.values([one.counts for one in several], [one.selected for one in several])
            parts.append(values.reshape(-1, 4))
    return np.concatenate(parts)


def _result(left: Left, parcel: _Parcel, taps: Mapping[Site, Tap], replicated: bool) -> Result:
    """Say what one request left; `replicated`: this rank speaks for what every tensor-parallel rank holds."""
    captured, full = [], []
    for (site, edit), (rows, positions) in left.captured.items():
        tap = taps.get(site)
        sharded = tap is not None and tap.sharded
        if not sharded and not replicated:
            continue
        captured.append(
            {
                "site": str(site),
                "edit": edit,
                "rows": parcel.rows(rows),
                "positions": parcel.place(positions.numpy()),
                "module": None if tap is None else tap.module_path,
                "offset": tap.offset if tap is not None and sharded else None,
            }
        )
    for pairs, where, values in left.full if replicated else ():
        own, number = parcel.rows(torch.from_numpy(values).flatten(0, 1)), parcel.number(pairs)
        full.append({"pairs": number, "rows": own, "positions": parcel.place(where)})
    return Result(
        left.label,
        left.req_id,
        left.digest,
        left.prompt_length,
        left.rows,
        left.cached,
        left.problems,
        left.nonfinite_logits,
        left.reduce,
        parcel.ops.setdefault(() if left.counted is None else left.counted.names, len(parcel.ops)),
        captured,
        full,
    )


_VERBS = {
    "hello": _hello,
    "register": _register,
    "directions": _directions,
    "forget": _forget,
    "discard": _discard,
    "collect": _collect,
    "stats": _stats,
}
