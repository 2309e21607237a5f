"""Cause by substitution: the candidate runs again with the suspect's tensor replaced by the reference's."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
    model: nn.Module,
    run: Callable[[], object],
    *,
    reference: Trace | str | Path,
    key: RecordKey | str,
    module_path: str = "",
) -> Transplanted:
    """Replace one tensor of the candidate by the reference's and see whether what follows agrees.

    The candidate runs twice from the same parameters and buffers: as it is, and with the replacement. Both are
    compared with what the reference recorded behind the tensor in the same micro step. When something still differs and
    modules behind share the suspect's class, and so its code, a third run replaces the same tensor of these as well.

    Args:
        model: the candidate's model.
        run: runs the model once as it was recorded; everything random must be seeded by it.
        reference: the run that is trusted; a trace or its path.
        key: which tensor: a record's key, or a site of which the first record is taken.
        module_path: the suspect, when others of its class may be replaced with it.

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
    watched, behind = _behind(trace, row, model)
    if not watched:
        why = "the reference recorded nothing behind it that this model has"
        return Transplanted(site=site, agrees=False, reproduced=False, reason=why)
    given = {site: {row["call_index"]: trace.tensor(row["record_id"])}}
    kept = [(one, one.detach().to("cpu", copy=True)) for one in (*model.parameters(), *model.buffers())]
    before = _judge(trace, watched, _observe(model, run, watched, {}), model)
    _put_back(kept)
    after = _judge(trace, watched, _observe(model, run, watched, given), model)
    first = _result(site, before, after, left_out=behind - len(after.records))
    alike = _alike(watched, site, module_path, model) if first.reproduced and not first.agrees else []
    if not alike:
        return first
    for record in alike:
        other = watched[record][0]
        given.setdefault(other["site"], {})[other["call_index"]] = trace.tensor(record)
    rest = {record: place for record, place in watched.items() if record not in alike}
    if not rest:
        return first
    _put_back(kept)
    after = _judge(trace, rest, _observe(model, run, rest, given), model)
    name = type(model.get_submodule(module_path)).__name__
    left_out = behind - len(alike) - len(after.records)
    every = _result(site, before, after, tuple(one for one in given if one != site), name, left_out=left_out)
    return every if every.agrees else first


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


def _behind(
    trace: Trace, row: Mapping[str, Any], model: nn.Module
) -> tuple[dict[int, tuple[dict[str, Any], HookPoint]], int]:
    """Records after the replaced one in its micro step, with their places in this model; of one pass. And their count.

    The first are looked at; what this model has no place for, and what lies far behind, is counted only.
    """
    same = pl.col("order") > row["order"]
    for name in ("phase", "step", "micro_step", "rank", "recompute"):
        same &= pl.col(name) == row[name]
    same &= pl.col("site").is_not_null() & pl.col("shard").is_not_null() & pl.col("kind").is_in([row["kind"], "value"])
    found: dict[int, tuple[dict[str, Any], HookPoint]] = {}
    behind = trace.index.filter(same).sort("order")
    for one in behind.head(_MOST).iter_rows(named=True):
        try:
            found[one["record_id"]] = (one, _handle(model, one["site"]))
        except SiteError:
            continue
    return found, len(behind)


def _alike(
    watched: Mapping[int, tuple[dict[str, Any], HookPoint]], site: str, path: str, model: nn.Module
) -> list[int]:
    """Records behind of the same tensor of other modules of the suspect's class; of torch's own classes none."""
    modules = dict(model.named_modules())
    tail = site.removeprefix(f"module:{path}.")
    if path not in modules or tail == site or type(modules[path]).__module__.partition(".")[0] == "torch":
        return []
    same = {f"module:{name}.{tail}" for name, one in modules.items() if type(one) is type(modules[path])}
    return [record for record, (row, _) in watched.items() if row["site"] in same - {site}]


def _handle(model: nn.Module, site: str) -> HookPoint:
    return module_handle(model, site) if site.startswith("module:") else describe(model).handle(site)


def _observe(
    model: nn.Module, run: Callable[[], object], watched: Mapping[int, tuple[dict[str, Any], HookPoint]],
    given: Mapping[str, Mapping[int, torch.Tensor]],
) -> Values:  # fmt: skip
    """Run once, keep what passes the watched places, put `given` (by site and call) in its place."""
    seen: Values = {}
    hooks: list[HookSet] = []
    calls: dict[str, int] = {}

    def keep(name: str, ids: Mapping[int, int]) -> Visitor:
        def visit(x: torch.Tensor) -> None:
            number = calls[name] = calls.get(name, -1) + 1
            if number in ids:
                seen[ids[number]] = x.detach().clone()

        return visit

    def put(site: str) -> Visitor:
        def replace(x: torch.Tensor) -> torch.Tensor | None:
            value = given[site].get(hooks[0].call_index(_handle(model, site).site))
            if value is not None and value.shape != x.shape:
                raise InputError(
                    f"{site}: the reference holds {list(value.shape)}, this run {list(x.shape)}; run the same batch"
                )
            return None if value is None else value.to(x.dtype).to(x.device)

        return replace

    places: dict[str, dict[int, int]] = {}
    handles: dict[str, HookPoint] = {}
    for record, (row, handle) in watched.items():
        places.setdefault(row["site"], {})[row["call_index"]] = record
        handles[row["site"]] = handle
    visitors: list[tuple[HookPoint, Visitor]] = [(_handle(model, site), put(site)) for site in given]
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


def _result(
    site: str, before: Comparison, after: Comparison, alike: tuple[str, ...] = (), name: str = "", *, left_out: int
) -> Transplanted:
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
        what = f"it and those of {len(alike)} more {name} modules are" if alike else "it is"
        reason = f"all {len(followers)} tensors behind it agree once {what} the reference's"
    else:
        reason = f"{len(wrong)} of {len(followers)} tensors behind it still differ, first {wrong[0].tensor}"
    if left_out:
        reason += f"; {left_out} more that the reference recorded there were not looked at"
    return Transplanted(
        site=site,
        agrees=agrees,
        reason=reason,
        followers=followers,
        left_out=left_out,
        reproduced=reproduced,
        alike=alike,
    )
