"""What the run was given: token ids, packed sequence lengths, and which micro-batches diverge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import TraceError
from trimtab.results.triage import MicroBatches
from trimtab.trace import Trace
from trimtab.workflows.triage._locate import is_input
from trimtab.workflows.triage._tensors import Tensor

_MOST = 64


def check_lengths(tensors: Sequence[Tensor], reference: Trace, candidate: Trace) -> list[str]:
    """Return what is wrong with recorded `cu_seqlens`: their start, order and end, on either side."""
    found = []
    for one in tensors:
        if "cu_seqlens" not in one.name or one.side != "value":
            continue
        for label, trace, ids in (
            ("reference", reference, one.pair.reference_ids),
            ("candidate", candidate, one.pair.candidate_ids),
        ):
            said = _lengths(trace, ids[0], _packed_tokens(one, tensors, trace, label))
            if said:
                found.append(f"{one.name} of the {label} ({one.record.key.text}): {said}")
        if one.failed:
            found.append(f"{one.name} differs: {one.record.key.text}")
    return found


def _lengths(trace: Trace, record: int, tokens: int | None) -> str:
    try:
        values = trace.tensor(record).flatten()
    except TraceError:
        return ""
    if values.is_floating_point() or values.numel() < 2:
        return "expected integers, at least 0 and the number of tokens"
    gaps = torch.diff(values.to(torch.int64))
    if int(values[0]) != 0:
        return f"begins with {int(values[0])}, not 0"
    if bool((gaps < 0).any()):
        return f"falls at entry {int((gaps < 0).nonzero()[0]) + 1}"
    if tokens is not None and int(values[-1]) != tokens:
        return f"ends with {int(values[-1])} and the batch has {tokens} tokens"
    return ""


def _packed_tokens(one: Tensor, tensors: Sequence[Tensor], trace: Trace, label: str) -> int | None:
    for other in tensors:
        if other.group == one.group and other.name == "input_ids":
            shape = other.record.shape_reference if label == "reference" else other.record.shape_candidate
            if not shape:
                ids = other.pair.reference_ids if label == "reference" else other.pair.candidate_ids
                shape = tuple(trace.tensor(ids[0]).shape)
            total = 1
            for size in shape:
                total *= size
            return total
    return None


def micro_batches(tensors: Sequence[Tensor], reference: Trace) -> MicroBatches | None:
    """Return which micro-batches diverge and what only these share; None when all or none do."""
    groups: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for one in tensors:
        if one.side not in ("param", "optim", "param_grad"):
            groups[one.group[:4]].append(one)
    bad = {name for name, group in groups.items() if any(one.failed for one in group)}
    if not bad or len(bad) == len(groups):
        return None
    first = min(min(one.place for one in groups[name] if one.failed) for name in bad)
    kept = [name for name in groups if groups[name][0].place[:2] == first[:2]][:_MOST]  # later steps inherit the error
    diverging = [name for name in kept if name in bad]
    agreeing = [name for name in kept if name not in bad]
    if not diverging or not agreeing:
        return None
    facts = {name: _facts(name, groups[name], reference) for name in kept}
    shared = set[str].intersection(*(facts[name] for name in diverging))
    shared -= {fact for name in agreeing for fact in facts[name]}
    return MicroBatches(
        diverging=tuple(map(_label, diverging)),
        agreeing=tuple(map(_label, agreeing)),
        shared=tuple(sorted(shared)),
    )


def _label(name: tuple[Any, ...]) -> str:
    rank = "" if name[3] is None else f" rank {name[3]}"
    return f"{name[0]} step {name[1]} micro-batch {name[2]}{rank}"


def _facts(name: tuple[Any, ...], group: Sequence[Tensor], reference: Trace) -> set[str]:
    """What a micro-batch is like: its phase, rank, length, padding, packing."""
    found = {f"phase {name[0]}", f"micro-batch {name[2]}"}
    if name[3] is not None:
        found.add(f"rank {name[3]}")
    for one in group:
        if not is_input(one):
            continue
        try:
            values = reference.tensor(one.pair.reference_ids[0])
        except TraceError:
            continue
        if one.name.endswith("input_ids"):
            found |= {f"length {values.shape[-1]}", f"batch of {values.shape[0] if values.ndim > 1 else 1}"}
        if "attention_mask" in one.name:
            found.add("padding" if bool((values == 0).any()) else "no padding")
        if "cu_seqlens" in one.name:
            found.add(f"{values.numel() - 1} packed sequences")
    return found
