"""The findings in words: what diverged, how badly, the likely cause, what is ruled out, what to do next."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Sequence

from trimtab.compare.rounding import LAYER
from trimtab.results.comparison import Fingerprint
from trimtab.results.triage import (
    Direction,
    Divergence,
    HeatCell,
    Hunk,
    ManifestDifference,
    RuledOut,
    Severity,
    SourceReference,
    Transplanted,
)
from trimtab.workflows.triage._locate import Found, is_input
from trimtab.workflows.triage._source import fitting
from trimtab.workflows.triage._tensors import Tensor, owner

_BANDS: tuple[tuple[float, Severity], ...] = ((1e-5, "equivalent"), (1e-3, "minor"), (1e-1, "significant"))


def describe(found: Found, tensors: Sequence[Tensor], prints: Sequence[Fingerprint], text: str) -> str:
    """Return one sentence that names pass, place, rank, rows and size.

    Args:
        found: the divergence.
        tensors: every pair.
        prints: its fingerprints, best first.
        text: the rows that carry the error, in words.
    """
    tensor, key = found.tensor, found.tensor.record.key
    head = _subject(found)
    ranks = ranks_of(tensor, tensors)
    where = f"phase {key.phase}, step {key.step}" + (f", micro-batch {key.micro_step}" if key.micro_step else "")
    if len(ranks[0]) + len(ranks[1]) > 1 and not (ranks[1] == () and len(ranks[0]) > 1):
        where += f", rank {', '.join(map(str, ranks[0]))} of {len(ranks[0]) + len(ranks[1])}"
    size = f"{_named(tensor)} is off by {_ratio(tensor.error)} of its norm"
    if tensor.expected > 0 and math.isfinite(tensor.error):
        size += f" where rounding explains {tensor.expected:.2g}"
    kinds = f"; {prints[0].kind}: {prints[0].detail}" if prints else ""
    return f"{head} ({where}): {size}" + (f", {text}" if text else "") + kinds


def _subject(found: Found) -> str:
    name = f"{found.path} ({found.module_class})" if found.module_class else found.path or "the model"
    forward = found.tensor.direction == "forward"
    if found.origin == "module":
        return f"{name} makes the error" if forward else f"the backward pass of {name} makes the error"
    if found.origin == "between":
        inner = found.tensor.path
        pass_ = "" if forward else " backward"
        return f"the{pass_} code of {name} makes the error, {'before' if forward else 'behind'} {inner}"
    if found.origin == "parameter_gradient":
        return f"the parameter gradient of {name} is wrong" if found.path else "all parameter gradients are wrong"
    if found.origin == "weights":
        return f"the weights of {name} differ before they are used"
    if found.origin == "optimizer":
        return f"the optimizer updates {name} otherwise"
    if found.origin == "inputs":
        return f"the inputs differ: {found.tensor.name}"
    return f"{_named(found.tensor)} is the first to differ"


def _named(tensor: Tensor) -> str:
    """Its name, with the layer where the name does not hold it."""
    key = tensor.record.key
    return f"{tensor.name} of layer {key.layer}" if key.layer is not None and not key.site else tensor.name


def _ratio(error: float) -> str:
    return "an unmeasurable part" if not math.isfinite(error) else f"{error:.3g}"


def severity_of(tensor: Tensor) -> Severity:
    """Return the published band of rel_diff; what differs beyond measure is severe."""
    metrics = tensor.record.metrics
    if metrics is None or not metrics.nonfinite_match or metrics.differing:
        return "severe"
    return next((name for bound, name in _BANDS if metrics.rel_diff < bound), "severe")


def ranks_of(tensor: Tensor, tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ranks on which this tensor differs, and those on which it agrees."""
    key, shards = tensor.record.key, tensor.record.shards
    if shards:  # put together from several ranks
        limit = max(8 * tensor.expected, 1e-3 * max(one.rel_l2 for one in shards))
        wrong = {rank for one in shards if one.rel_l2 > limit for rank in one.ranks}
        return tuple(sorted(wrong)), tuple(sorted({rank for one in shards for rank in one.ranks} - wrong))
    same = [
        one for one in tensors
        if one.name == tensor.name and one.rank is not None
        and dataclasses.replace(one.record.key, rank=key.rank) == key
    ]  # fmt: skip
    bad = sorted({one.rank for one in same if one.rank is not None and (one.failed or one is tensor)})
    agreeing = sorted({one.rank for one in same if one.rank is not None} - set(bad))
    return tuple(bad) or tensor.record.ranks, tuple(agreeing)  # of a pipeline stage only one rank has it


def rule_out(
    found: Found, tensors: Sequence[Tensor], manifest: Sequence[ManifestDifference], known: Collection[str]
) -> tuple[RuledOut, ...]:
    """Return the causes that the evidence excludes.

    Args:
        found: the divergence.
        tensors: every pair.
        manifest: settings that differ.
        known: groups of settings that both manifests name.
    """
    said = []
    place = found.tensor.place
    fed = [one for one in tensors if is_input(one) and one.group == found.tensor.group]
    if fed and not any(one.failed or one.doubtful for one in fed):
        said.append(RuledOut(what="other inputs", why=f"{_names(fed)} agree"))
    weights = [one for one in tensors if one.side == "param" and one.place < place]
    mine = [one for one in weights if found.path and owner(one.record.key.name).startswith(found.path)] or weights
    if weights and not any(one.failed for one in weights):
        said.append(RuledOut(what="other weights", why=f"{len(weights)} parameters agree, {len(mine)} of them its own"))
    before = [
        one
        for one in tensors
        if one.place < place and one.direction == found.tensor.direction and one.group == found.tensor.group
    ]
    if before and not any(one.failed for one in before):
        last = found.after.name if found.after is not None else before[-1].name
        why = f"all {len(before)} tensors before it in this pass agree, the last is {last}"
        said.append(RuledOut(what="an error from upstream", why=why))
    if found.origin == "between" and found.inside:
        said.append(RuledOut(what="the modules inside", why=f"{_listed(found.inside)} agree up to there"))
    if found.tensor.direction == "backward":
        forward = [one for one in tensors if one.direction == "forward" and one.group == found.tensor.group]
        if forward and not any(one.failed for one in forward):
            said.append(RuledOut(what="the forward pass", why=f"its {len(forward)} tensors agree"))
    excess = found.tensor.excess
    if excess > 2:
        said.append(RuledOut(what="rounding", why=f"a limit is exceeded {excess:.3g} times"))
    ranks = ranks_of(found.tensor, tensors)
    if ranks[1]:
        said.append(RuledOut(what="all ranks", why=f"rank {', '.join(map(str, ranks[1]))} agrees"))
    random = [one for one in tensors if one.name.startswith("rng.") and one.place < place]
    if random and not any(one.failed for one in random):
        said.append(RuledOut(what="random state", why=f"{len(random)} recorded states agree"))
    groups = Counter(one.group for one in manifest)
    for group, what in (
        ("versions", "library versions"),
        ("precision", "precision settings"),
        ("optimizer", "optimizer settings"),
    ):
        if group in known and not groups[group]:  # type: ignore[index]
            said.append(RuledOut(what=what, why="the manifests agree"))
    return tuple(said)


def _names(tensors: Sequence[Tensor]) -> str:
    return _listed(tuple(dict.fromkeys(one.name for one in tensors)))


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def likely_cause(
    found: Found, prints: Sequence[Fingerprint], hunk: Hunk | None, manifest: Sequence[ManifestDifference]
) -> str:
    """Return the cause that fits best, in one sentence, with its evidence."""
    if found.origin == "inputs":
        return f"the two runs were given other inputs ({found.tensor.name}); nothing behind can be judged"
    parts = []
    stepped = [one for one in manifest if one.group == "optimizer"] if found.origin == "optimizer" else []
    if stepped:
        parts.append(_settings(stepped))
    if prints and not stepped:
        parts.append(prints[0].detail)
    if hunk is not None:
        fits = fitting(hunk, prints)
        kinds = fits or tuple(dict.fromkeys(one.kind for one in hunk.suspicions))
        lines = [one for one in hunk.suspicions if one.kind in kinds]
        said = f"{hunk.file} changed there" if hunk.distance == 0 else f"{hunk.file} changed"
        if lines:
            one = lines[0]
            said += f": {one.kind} at line {one.line} ({one.side} `{one.code}`)"
        parts.append(said)
    settings = [one for one in manifest if one.group in ("precision", "optimizer", "versions")]
    if hunk is None and settings and not stepped:
        parts.append(_settings(settings))
    return "; ".join(parts)


def _settings(differences: Sequence[ManifestDifference]) -> str:
    said = ", ".join(f"{one.key} ({one.reference} against {one.candidate})" for one in differences[:3])
    return f"the runs differ in {said}"


def next_step(
    found: Found, source: SourceReference | None, hunk: Hunk | None, transplant: Transplanted | None, passed: bool
) -> str:
    """Return the check that would tell most."""
    site = found.tensor.name
    if passed or found.origin == "inputs":
        return "give both runs the same inputs and record them again"
    if transplant is not None and transplant.followers and not transplant.reproduced:
        return "transplant into the code and the weights that diverged: this run agrees without one"
    if transplant is not None and transplant.agrees:
        return (
            "apply the patch, record again, and compare"
            if hunk is not None
            else f"read the code of {found.path or site}"
        )
    if transplant is not None and transplant.reproduced:
        return f"something behind {site} is wrong as well: mend this one, record again, and triage again"
    if found.origin in ("weights", "optimizer"):
        name = found.tensor.record.key.name
        return f"compare how {name} is loaded or updated; record parameters before and after the step"
    if found.tensor.side == "grad_output" and found.origin == "module":
        return f"record {found.path}.grad_input: it tells this module's backward pass from the code behind it"
    if found.after is None and found.origin in ("module", "tensor"):
        return f"record what goes into {found.path or site}: nothing before it was recorded"
    if not found.tensor.record.key.site:
        return f"record {site} as the input or output of a module: then the reference's can take its place in a run"
    step = f"transplant the reference's {site} and see whether what follows agrees"
    if source is not None and not source.revision:
        step += "; give BASE..HEAD to see what changed in " + source.file
    return step


def heat_map(tensors: Sequence[Tensor], found: Found) -> tuple[HeatCell, ...]:
    """Return the largest error by layer and kind of tensor, of the step in which the divergence lies."""
    cells: dict[tuple[Direction, str, str], Tensor] = {}
    for one in tensors:
        unread = one.record.metrics is None and one.record.status != "identical"
        if one.place[:2] != found.tensor.place[:2] or unread or is_input(one):
            continue
        name = one.name.removeprefix("module:")
        match = LAYER.search(name)
        layer = str(one.record.key.layer if match is None or one.record.key.layer is not None else match[1])
        layer = "" if layer == "None" else layer
        _, mark, tail = name.partition(f".{layer}.")
        key = (one.direction, layer, tail if layer and mark else name)
        if key not in cells or (one.failed, one.error) > (cells[key].failed, cells[key].error):
            cells[key] = one
    return tuple(
        HeatCell(direction=direction, layer=layer, tensor=name, error=one.error, status=one.record.status)
        for (direction, layer, name), one in cells.items()
    )


def to_divergence(
    found: Found, tensors: Sequence[Tensor], prints: Sequence[Fingerprint], where: object, sentence: str
) -> Divergence:
    """Return the result's own form."""
    ranks = ranks_of(found.tensor, tensors)
    return Divergence(
        key=found.tensor.record.key,
        direction=found.tensor.direction,
        origin=found.origin,
        module_path=found.path,
        module_class=found.module_class,
        layer=found.tensor.record.key.layer,
        sentence=sentence,
        input_error=max((one.error for one in found.sources), default=None),
        output_error=found.tensor.error,
        expected=found.tensor.expected,
        amplification=found.amplification,
        after=found.after.record.key.text if found.after is not None else "",
        first_shown=found.shown.record.key.text,
        ranks=ranks[0],
        ranks_agreeing=ranks[1],
        where=where,  # type: ignore[arg-type]
        fingerprints=tuple(prints),
        reasons=found.tensor.record.reasons,
    )
