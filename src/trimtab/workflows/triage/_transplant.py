"""Cause by substitution: the candidate runs again with the suspect's tensor replaced by the reference's."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from trimtab.architectures import describe
from trimtab.compare import compare
from trimtab.errors import InputError, SiteError, TrimtabError
from trimtab.hooks import HookPoint, HookSet, Visitor, attach, module_handle
from trimtab.numerics.dtypes import coarser, dtype_name
from trimtab.results.comparison import Comparison, RecordKey
from trimtab.results.triage import Follower, Transplanted
from trimtab.trace import Trace, TraceWriter

Candidate = Callable[[], tuple[nn.Module, Callable[[], object]]]
Values = dict[int, torch.Tensor]
_MOST = 2000
_FIELDS = ("phase", "step", "micro_step", "rank", "site", "layer", "call_index", "kind", "recompute", "config", "dims")


def find_candidate(name: str) -> Candidate:
    """Import the function that "module:function" names; modules of the working directory are found.

    Raises:
        InputError: it is not written so, or cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"transplant={name!r}: write module:function, such as train:build_for_debug")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Candidate = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"transplant={name!r} cannot be imported: {error}") from error
    except Exception as error:
        raise InputError(f"transplant={name!r} cannot be imported: {_line(error)}") from error
    finally:
        sys.path.remove(here)
    return found


def open_candidate(candidate: Candidate, name: str) -> tuple[nn.Module, Callable[[], object]]:
    """Return the model and the function that runs it once.

    Raises:
        InputError: the function fails, or returns something else.
    """
    try:
        made = candidate() if callable(candidate) else None
    except Exception as error:
        raise InputError(f"transplant={name!r} failed: {_line(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise InputError(
            f"transplant={name!r} returned {type(made).__name__}; expected (model, function that runs it once)"
        )
    return made


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def transplant(
    model: nn.Module, run: Callable[[], object], *, reference: Trace | str | Path, key: RecordKey | str
) -> Transplanted:
    """Replace one tensor of the candidate by the reference's and see whether what follows agrees.

    The candidate runs twice from the same parameters and buffers: as it is, and with the replacement. Both are
    compared with what the reference recorded behind the tensor in the same micro step.

    Args:
        model: the candidate's model.
        run: runs the model once as it was recorded; everything random must be seeded by it.
        reference: the run that is trusted; a trace or its path.
        key: which tensor: a record's key, or a site of which the first record is taken.

    Raises:
        InputError: the reference holds no such tensor, it does not fit the model, or the run fails.
        SiteError: the model has no such site.
    """
    trace = reference if isinstance(reference, Trace) else Trace.open(reference)
    row = _find(trace, key)
    site = row["site"] or ""
    if not site:
        why = "it is no tensor of a module, so nothing can take its place in a run"
        return Transplanted(site=row["name"], agrees=False, reproduced=False, reason=why)
    watched = _behind(trace, row, model)
    if not watched:
        why = "the reference recorded nothing behind it that this model has"
        return Transplanted(site=site, agrees=False, reproduced=False, reason=why)
    given = trace.tensor(row["record_id"])
    kept = [(one, one.detach().to("cpu", copy=True)) for one in (*model.parameters(), *model.buffers())]
    before = _observe(model, run, watched, None, site, 0)
    _put_back(kept)
    after = _observe(model, run, watched, given, site, row["call_index"])
    return _result(site, watched, _judge(trace, watched, before, model), _judge(trace, watched, after, model))


def _put_back(kept: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give parameters and buffers that a run changed, an optimizer step or running statistics, their values again."""
    with torch.no_grad():
        for tensor, value in kept:
            if not torch.equal(tensor, value.to(tensor.device)):
                tensor.copy_(value)


def _find(trace: Trace, key: RecordKey | str) -> dict[str, Any]:
    if isinstance(key, str):
        wanted = pl.col("site") == key
    else:
        wanted = (pl.col("site") == key.site) if key.site else (pl.col("name") == key.name) & pl.col("site").is_null()
        for name in ("phase", "step", "micro_step", "call_index", "kind", "recompute"):
            wanted &= pl.col(name) == getattr(key, name)
        if key.rank is not None:
            wanted &= pl.col("rank") == key.rank
    rows = trace.index.filter(wanted).sort("order")
    if rows.is_empty():
        text = key if isinstance(key, str) else key.text
        raise InputError(f"{trace.path} holds no tensor {text!r}; it has, for example, {', '.join(trace.sites()[:3])}")
    return rows.row(0, named=True)


def _behind(trace: Trace, row: Mapping[str, Any], model: nn.Module) -> dict[int, tuple[dict[str, Any], HookPoint]]:
    """Records after the replaced one in its micro step, with their places in this model; of one pass."""
    same = pl.col("order") > row["order"]
    for name in ("phase", "step", "micro_step", "rank", "recompute"):
        same &= pl.col(name) == row[name]
    same &= pl.col("site").is_not_null() & pl.col("shard").is_not_null() & pl.col("kind").is_in([row["kind"], "value"])
    found: dict[int, tuple[dict[str, Any], HookPoint]] = {}
    for one in trace.index.filter(same).sort("order").head(_MOST).iter_rows(named=True):
        try:
            found[one["record_id"]] = (one, _handle(model, one["site"]))
        except SiteError:
            continue
    return found


def _handle(model: nn.Module, site: str) -> HookPoint:
    return module_handle(model, site) if site.startswith("module:") else describe(model).handle(site)


def _observe(
    model: nn.Module, run: Callable[[], object], watched: Mapping[int, tuple[dict[str, Any], HookPoint]],
    given: torch.Tensor | None, site: str, call_index: int,
) -> Values:  # fmt: skip
    """Run once, keep what passes the watched places, put `given` in its place."""
    seen: Values = {}
    hooks: list[HookSet] = []
    calls: dict[str, int] = {}

    def keep(name: str, ids: Mapping[int, int]) -> Visitor:
        def visit(x: torch.Tensor) -> None:
            number = calls[name] = calls.get(name, -1) + 1
            if number in ids:
                seen[ids[number]] = x.detach().clone()

        return visit

    def put(x: torch.Tensor) -> torch.Tensor | None:
        assert given is not None
        if hooks[0].call_index(_handle(model, site).site) != call_index:
            return None
        if given.shape != x.shape:
            raise InputError(
                f"{site}: the reference holds {list(given.shape)}, this run {list(x.shape)}; run the same batch"
            )
        return given.to(x.dtype).to(x.device)

    places: dict[str, dict[int, int]] = {}
    handles: dict[str, HookPoint] = {}
    for record, (row, handle) in watched.items():
        places.setdefault(row["site"], {})[row["call_index"]] = record
        handles[row["site"]] = handle
    visitors: list[tuple[HookPoint, Visitor]] = [(_handle(model, site), put)] if given is not None else []
    visitors += [(handles[name], keep(name, ids)) for name, ids in places.items()]
    with attach(model, visitors) as set_hooks:
        hooks.append(set_hooks)
        try:
            run()
        except TrimtabError:
            raise
        except Exception as error:
            raise InputError(f"the candidate's run failed: {_line(error)}") from error
    return seen


def _judge(
    trace: Trace, watched: Mapping[int, tuple[dict[str, Any], HookPoint]], seen: Values, model: nn.Module
) -> Comparison:
    """Compare what was seen with what the reference recorded, by the calibrated verdict."""
    dtypes = [one.dtype for one in model.parameters() if one.is_floating_point()] or [torch.float32]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = coarser(dtype, other)
    with tempfile.TemporaryDirectory(prefix="trimtab-transplant-") as folder:
        path = Path(folder) / "run"
        with TraceWriter(path, plan={"dtype": dtype_name(dtype)}, provenance={}) as writer:
            for record, tensor in seen.items():
                row = watched[record][0]
                fields = {name: row[name] for name in _FIELDS if row[name] is not None}
                writer.write(row["name"], tensor, **fields)
        if not seen:
            raise InputError("the run passed none of the places behind the transplant; it must call the model once")
        return compare(trace.filter(record_id=list(seen)), path)


def _result(site: str, watched: Iterable[int], before: Comparison, after: Comparison) -> Transplanted:
    errors = {one.key: one.metrics.rel_l2 if one.metrics is not None else 0.0 for one in before.records}
    followers = tuple(
        Follower(
            tensor=one.key.tensor,
            before=errors.get(one.key, float("nan")),
            after=one.metrics.rel_l2 if one.metrics is not None else 0.0,
            status=one.status,
        )
        for one in after.records
    )
    reproduced = any(one.status == "failed" for one in before.records)
    wrong = [one for one in followers if one.status not in ("identical", "passed")]
    agrees = bool(followers) and not wrong
    if not reproduced:
        reason = "the run without a transplant agrees already: it is not the run that diverged"
    elif agrees:
        reason = f"all {len(followers)} tensors behind it agree once it is the reference's"
    else:
        reason = f"{len(wrong)} of {len(followers)} tensors behind it still differ, first {wrong[0].tensor}"
    return Transplanted(site=site, agrees=agrees, reason=reason, followers=followers, reproduced=reproduced)
