"""The place that made the first error: which module, in which pass, or what stands between modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.results.triage import Origin
from trimtab.workflows.triage._calls import MADE, Call, amplification
from trimtab.workflows.triage._tensors import Tensor, owner

INPUTS = re.compile(
    r"(?:.*[.:_])?(input_ids|positions|position_ids|cu_seqlens(?:_\w+)?|attention_mask|labels|qkv_format|seq_lens)"
)
_LOOSE = re.compile(r"(?:loss|lr|rng|grad_norm)(?:\..*)?")
_CANCELLED = 8.0  # the share of rounding that a sum of cancelling terms may keep, as for medians twice over
_ELEVATED = 0.5  # share of a limit above which an error may have been made here and shown later


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """The first trustworthy divergence on one rank."""

    tensor: Tensor
    """The first wrong tensor that the place made."""
    shown: Tensor
    """The first tensor that fails."""
    origin: Origin
    path: str
    module_class: str
    sources: tuple[Tensor, ...]
    """What the error could have come from."""
    after: Tensor | None
    """The last tensor before it that agrees."""
    call: Call | None = None
    """The call that it belongs to, where it is the output of one."""
    inside: tuple[str, ...] = ()
    """Modules inside the place that were recorded and agree."""

    @property
    def amplification(self) -> float:
        """Error of the tensor over that of its sources."""
        return amplification(self.sources, self.tensor)

    @property
    def rank_order(self) -> tuple[Any, ...]:
        """Where ranks differ, the earliest counts: pipeline stages in the order of the pass, then execution."""
        key, pass_ = self.tensor.record.key, self.tensor.direction
        stage = self.tensor.pp_rank if pass_ == "forward" else -self.tensor.pp_rank
        turn = ("forward", "backward", "update").index(pass_)
        place = self.tensor.place
        return (*place[:2], key.micro_step, turn, stage, place[2], -1 if key.rank is None else key.rank)


def locate(tensors: Sequence[Tensor], calls: Sequence[Call]) -> Found | None:
    """Return the first trustworthy divergence of all ranks; None when every pair passes.

    Args:
        tensors: every pair in causal order.
        calls: the module calls made of them.
    """
    found = []
    for rank in {one.rank for one in tensors}:
        mine = [one for one in tensors if one.rank == rank]
        one = _on_rank(mine, [call for call in calls if call.outputs[0].rank == rank])
        if one is not None:
            found.append(one)
    return min(found, key=lambda one: one.rank_order, default=None)


def ingredients(found: Found, calls: Sequence[Call], most: int = 32) -> tuple[Tensor, ...]:
    """Return what stood at hand where the error was made: inputs and outputs of the modules inside, of that call."""
    inner = [
        one for call in calls
        if call.direction == found.tensor.direction and call.outputs[0].group == found.tensor.group
        and call.path.startswith(_prefix(found.path)) for one in (*call.inputs, *call.outputs)
        if one.place < found.tensor.place and one.path != found.path and one not in found.sources
    ]  # fmt: skip
    return tuple(inner[-most:])


def is_input(tensor: Tensor) -> bool:
    """Whether a record is what the run was given, not what it computed."""
    return tensor.side == "value" and INPUTS.fullmatch(tensor.name) is not None


def _on_rank(tensors: Sequence[Tensor], calls: Sequence[Call]) -> Found | None:
    fed = next((one for one in tensors if is_input(one) and (one.failed or one.doubtful)), None)
    judged = [one for one in tensors if not _LOOSE.fullmatch(one.name)] or list(tensors)
    first = next((one for one in judged if one.failed), None) or next((one for one in judged if one.doubtful), None)
    if first is None:
        first = next((one for one in tensors if one.failed or one.doubtful), None)
    if fed is not None and (first is None or fed.place <= first.place or _same_pass(fed, first)):
        return _outside(fed, fed, "inputs", "", None)
    if first is None:
        return None
    shown = next((one for one in _attributed(first, judged, tensors, calls) if not _cancelled(one)), None)
    if shown is None:
        return _attribute(first, tensors, calls)
    first = shown.tensor
    if shown.origin not in ("module", "between", "parameter_gradient") or _certain(shown):
        return shown
    for found in _attributed(first, judged, tensors, calls):
        # what only carries on an elevated error is not trusted while another place of that step made one
        if found.tensor.place[:2] != first.place[:2]:
            break
        if found.amplification >= 2 * MADE and not any(one.failed for one in found.sources) and not _cancelled(found):
            return dataclasses.replace(found, shown=first)
    return _earlier(shown, calls) or shown


def _attributed(
    first: Tensor, judged: Sequence[Tensor], tensors: Sequence[Tensor], calls: Sequence[Call]
) -> Iterator[Found]:
    """The tensors that fail, from `first` on, each with the place that made it."""
    yield _attribute(first, tensors, calls)
    for other in judged:
        if other.failed and other.place > first.place:
            yield _attribute(other, tensors, calls)


def _certain(found: Found) -> bool:
    """Whether the place itself made the error: much more comes out than went in, or of another nature."""
    calibration = found.tensor.record.calibration
    return found.amplification >= MADE or calibration is None or calibration.systematic


def _attribute(first: Tensor, tensors: Sequence[Tensor], calls: Sequence[Call]) -> Found:
    """Name the place that made one wrong tensor."""
    before = [one for one in tensors if one.place < first.place]
    after = next((one for one in reversed(before) if one.direction == first.direction and not one.failed), None)
    if first.side == "optim":
        return _outside(first, first, "optimizer", first.path or "", after)
    if first.side == "param":
        updated = any(one.direction == "backward" for one in before)
        return _outside(first, first, "optimizer" if updated else "weights", owner(first.record.key.name), after)
    if first.side == "param_grad":
        return _parameter_gradient(first, tensors, calls, after)
    return _made(first, tensors, calls, after)


def _cancelled(found: Found) -> bool:
    """Whether a gradient is what is left of terms that cancel, and its error no larger than their rounding.

    The gradient of a key projection's bias is the common case, which softmax does not see, and that of the first
    token's query, which has one score only.
    """
    if found.tensor.direction != "backward":
        return False
    same = found.call.outputs if found.call is not None and found.tensor.side == "param_grad" else ()
    terms = max((one.norm or 0.0 for one in (*found.sources, *same)), default=0.0)
    return found.tensor.absolute <= _CANCELLED * found.tensor.expected * terms


def _outside(tensor: Tensor, shown: Tensor, origin: Origin, path: str, after: Tensor | None) -> Found:
    return Found(
        tensor=tensor, shown=shown, origin=origin, path=path, module_class=tensor.module_class, sources=(), after=after
    )


def _same_pass(fed: Tensor, first: Tensor) -> bool:
    """An input may have been recorded after what was computed from it."""
    return fed.group == first.group


def _made(first: Tensor, tensors: Sequence[Tensor], calls: Sequence[Call], after: Tensor | None) -> Found:
    """Attribute a wrong tensor: an output to its module, an input to the code around, which lies in the caller."""
    if first.side in ("output", "grad_input") and first.path is not None:
        call = next(one for one in calls if first in one.outputs)
        inner = [one for one in calls if _inside(one, call)]
        return Found(
            tensor=first,
            shown=first,
            origin="module",
            path=first.path,
            module_class=first.module_class,
            sources=tuple(call.sources),
            after=after,
            inside=tuple(sorted({one.path for one in inner if one.status == "agrees"})),
        )
    if first.path is None:
        loose = _LOOSE.fullmatch(first.name) is not None
        found = _outside(first, first, "value" if loose else "tensor", "", after)
        return dataclasses.replace(found, sources=(after,) if after is not None else ())
    first = _outermost(first, tensors)
    consumer = _unfinished(first, calls, after) if first.side == "grad_output" else None
    if consumer is not None:
        return Found(
            tensor=first,
            shown=first,
            origin="module",
            path=consumer.path or "",
            module_class=consumer.module_class,
            sources=(consumer,),
            after=after,
        )
    path = _caller(first, calls)
    own = [one for one in tensors if one.path == path and one.group == first.group]
    siblings = [
        one for one in calls if one.direction == first.direction and one.outputs[0].group == first.group
        and one.path.startswith(_prefix(path)) and one.path != path and one.outputs[0].place < first.place
    ]  # fmt: skip
    came_in = "input" if first.direction == "forward" else "grad_output"
    sources = [one for one in own if one.side == came_in and one.place < first.place]
    sources += [one for call in siblings for one in call.outputs]
    return Found(
        tensor=first,
        shown=first,
        origin="between",
        path=path,
        module_class=next((one.module_class for one in own if one.module_class), ""),
        sources=tuple(sources) or ((after,) if after is not None else ()),
        after=after,
        inside=tuple(sorted({one.path for one in siblings if one.status == "agrees"})),
    )


def _outermost(first: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The gradient of a module's output is also that of its last inner module's; it was made outside of both."""
    if first.side != "grad_output" or None in first.digests:
        return first
    same = [
        one
        for one in tensors
        if one.side == "grad_output"
        and one.group == first.group
        and one.digests == first.digests
        and (first.path or "").startswith(_prefix(one.path or ""))
    ]
    return min([first, *same], key=lambda one: len(one.path or ""))


def _unfinished(first: Tensor, calls: Sequence[Call], after: Tensor | None) -> Tensor | None:
    """The module whose backward pass ran just before and of which no gradient to its input was recorded."""
    if after is None or after.side != "grad_output" or after.path is None or after.path == first.path:
        return None
    inside = (first.path or "").startswith(_prefix(after.path))
    done = any(one.side == "grad_input" for call in calls if after in call.inputs for one in call.outputs)
    return None if inside or done else after


def _inside(one: Call, call: Call) -> bool:
    same = one.direction == call.direction and one.outputs[0].group == call.outputs[0].group
    return same and one is not call and one.path.startswith(_prefix(call.path)) and one.path != call.path


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _caller(tensor: Tensor, calls: Sequence[Call]) -> str:
    """The innermost recorded module around one; a container that is never called does not count."""
    path = tensor.path or ""
    recorded = {call.path for call in calls if call.outputs[0].group == tensor.group}
    around = [one for one in recorded if path.startswith(_prefix(one)) and one != path]
    if any(around):
        return max(around, key=len)
    parent, _, last = path.rpartition(".")
    return owner(parent) if last.isdigit() else parent


def _parameter_gradient(first: Tensor, tensors: Sequence[Tensor], calls: Sequence[Call], after: Tensor | None) -> Found:
    """One module's weight gradient, or, where all are wrong behind a right backward pass, their reduction."""
    key = first.record.key
    same = [
        one for one in tensors
        if one.side == "param_grad" and one.record.key.step == key.step and one.record.key.phase == key.phase
    ]  # fmt: skip
    wrong = [one for one in same if one.failed]
    everywhere = len({owner(one.record.key.name) for one in same}) > 2 and len(wrong) > 0.9 * len(same)
    call = next(one for one in calls if first in one.outputs)
    path = "" if everywhere else first.path if first.path is not None else owner(key.name)
    classes = [one.module_class for one in tensors if one.path == path and one.module_class]
    return Found(
        tensor=first,
        shown=first,
        origin="parameter_gradient",
        path=path,
        module_class=first.module_class or (classes[0] if classes else ""),
        sources=tuple(call.sources),
        after=after,
        call=call,
    )


def _earlier(made: Found, calls: Sequence[Call]) -> Found | None:
    """The call upstream that amplified most, where the first failure only carries on what came in elevated."""
    first = made.tensor
    upstream = [
        call for call in calls
        if call.outputs[0].place < first.place and call.outputs[0].place[:2] == first.place[:2]
        and call.direction == first.direction and call.amplification >= MADE and call.worst_output.excess > _ELEVATED
    ]  # fmt: skip
    if not upstream:
        return None
    best = max(upstream, key=lambda call: call.amplification)
    out = best.worst_output
    return Found(
        tensor=out,
        shown=made.shown,
        origin="module",
        path=best.path,
        module_class=out.module_class,
        sources=tuple(best.sources),
        after=best.sources[-1] if best.sources else None,
    )
