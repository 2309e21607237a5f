"""Top-k routing compared as sets: the order of equal experts says nothing, another expert does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from trimtab.errors import TraceError
from trimtab.trace import Trace
from trimtab.workflows.triage._tensors import Tensor

_IDS = re.compile(r"(?:.*[._:])?(?:topk|top_k|selected|expert|router)_?(?:experts?|ids|indices|index|idx)(?:[._]\w+)?")
_LOGITS = re.compile(r"(?:.*[._:])?(?:gate|router|gate_logits|router_logits)(?:\.output)?")


def is_routing(tensor: Tensor) -> bool:
    """Whether a record holds the experts that tokens took."""
    return _IDS.fullmatch(tensor.name) is not None and not tensor.record.dtype_reference.startswith(("float", "bfloat"))


def same_sets(tensor: Tensor, reference: Trace, candidate: Trace) -> bool:
    """Whether every token took the same experts, in whatever order."""
    sides = _load(tensor, reference, candidate)
    return sides is not None and bool(torch.equal(sides[0].sort(dim=-1)[0], sides[1].sort(dim=-1)[0]))


def routing_notes(tensors: Sequence[Tensor], reference: Trace, candidate: Trace, most: int = 8) -> list[str]:
    """Return one line per recorded routing that is not the same: how many tokens, and how close the ties were."""
    found = []
    for one in tensors:
        if not (is_routing(one) and one.record.status == "failed"):
            continue
        sides = _load(one, reference, candidate)
        if sides is None:
            continue
        ours, theirs = (side.sort(dim=-1)[0].reshape(-1, side.shape[-1]) for side in sides)
        moved = (ours != theirs).any(dim=-1)
        if not bool(moved.any()):
            found.append(f"routing: {one.record.key.text}: every token takes the same experts, listed in another order")
            continue
        margin = _margin(one, tensors, reference, moved, ours.shape[-1])
        tie = f"; {margin}" if margin else "; record the router's logits to see how close the ties were"
        found.append(
            f"routing: {one.record.key.text}: {int(moved.sum())} of {len(moved)} tokens take other experts{tie}"
        )
    return found[:most]


def _margin(one: Tensor, tensors: Sequence[Tensor], reference: Trace, moved: torch.Tensor, top: int) -> str:
    """Margin between the last expert taken and the first left out, of the tokens that moved and of the others."""
    same = [
        other for other in tensors
        if other.group == one.group and other.record.key.layer == one.record.key.layer and _LOGITS.fullmatch(other.name)
    ]  # fmt: skip
    for other in same:
        try:
            logits = reference.tensor(other.pair.reference_ids[0]).double()
        except TraceError:
            continue
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) != len(moved) or logits.shape[-1] <= top:
            continue
        best = logits.topk(top + 1, dim=-1).values
        gap = best[:, top - 1] - best[:, top]
        widest, median = float(gap[moved].max()), float(gap.median())
        return f"their margins in the reference are at most {widest:.3g}, the median of all is {median:.3g}"
    return ""


def _load(tensor: Tensor, reference: Trace, candidate: Trace) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        sides = reference.tensor(tensor.pair.reference_ids[0]), candidate.tensor(tensor.pair.candidate_ids[0])
    except TraceError:
        return None
    return sides if sides[0].shape == sides[1].shape and sides[0].ndim > 1 else None
