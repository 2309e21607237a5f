"""What a worker answers the client: one verb each, bytes in, bytes out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from trimtab.backends.vllm import wire
from trimtab.backends.vllm.counts import NOTHING, Names
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.backends.vllm.state import Left
    from trimtab.backends.vllm.worker import SteeredWorker

DOCUMENT = "trimtab"
"""Key of the JSON document in the metadata of a collected file."""
COUNTS = "counts"
"""Its tensor of what ops did, int64 [ops of every result, 4]; see counts.py."""


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
    return wire.to_bytes({"digest": worker.state.register(payload)})


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


def _collect(worker: SteeredWorker, payload: bytes) -> bytes:
    """A safetensors file: recorded rows and full doses; its metadata says whose they are."""
    tensors: dict[str, Tensor] = {}
    found = worker.state.collect(wire.from_bytes(payload)["labels"])
    replicated = worker.tp_rank == 0
    columns = worker.state.tap_of
    ops: dict[Names, int] = {}
    places: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    results = []
    for lefts in found.values():
        for left in lefts:
            results.append(_result(left, tensors, columns, replicated, ops, places))
    counts = [left.doses.values for lefts in found.values() for left in lefts]
    tensors[COUNTS] = torch.from_numpy(np.concatenate([NOTHING.values, *counts]))
    document = {
        "results": results,
        "ops": list(ops),
        "positions": [positions for _, positions in places.values()],
        "tp_rank": worker.tp_rank,
        "pp_rank": worker.pp_rank,
        "engine": worker.engine,
        "dropped": worker.state.dropped,
    }
    return safetensors.torch.save(tensors, {DOCUMENT: json.dumps(document)})


def _result(
    left: Left,
    tensors: dict[str, Tensor],
    columns: dict[Any, Any],
    replicated: bool,
    ops: dict[Names, int],
    places: dict[int, tuple[int, list[tuple[int, int]]]],
) -> dict[str, Any]:
    """Say what one request left; ops and positions are named by their numbers in the document's lists."""
    captured, full = [], []

    def place(positions: Tensor) -> int:
        if id(positions) not in places:
            places[id(positions)] = (len(places), wire.runs(positions.tolist()))
        return places[id(positions)][0]

    for (site, edit), (rows, positions) in left.captured.items():
        tap = columns.get(site)
        sharded = tap is not None and tap.sharded
        if not sharded and not replicated:
            continue
        key = str(len(tensors))
        tensors[key] = rows.contiguous()
        captured.append(
            {
                "site": str(site),
                "edit": edit,
                "key": key,
                "positions": place(positions),
                "module": None if tap is None else tap.module_path,
                "offset": tap.offset if tap is not None and sharded else None,
            }
        )
    for pairs, positions, values in left.full if replicated else ():
        key = str(len(tensors))
        tensors[key] = values.contiguous()
        full.append({"ops": [(str(site), op) for site, op in pairs], "key": key, "positions": place(positions)})
    return {
        "label": left.label,
        "req": left.req_id,
        "digest": left.digest,
        "prompt_length": left.prompt_length,
        "rows": left.rows,
        "cached": left.cached,
        "problems": left.problems,
        "nonfinite_logits": left.nonfinite_logits,
        "reduce": left.reduce,
        "ops": ops.setdefault(left.doses.names, len(ops)),
        "captured": captured,
        "full": full,
    }


_VERBS = {
    "hello": _hello,
    "register": _register,
    "directions": _directions,
    "forget": _forget,
    "discard": _discard,
    "collect": _collect,
    "stats": _stats,
}
