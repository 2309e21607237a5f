"""train: the public call, from texts, a trace, a dictionary or tensors to a directory of SAEs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.backends import Backend, open_backend
from trimtab.errors import InputError, RecipeError
from trimtab.results.sae import SAERun
from trimtab.sae.data import (
    ActivationSource,
    Filters,
    ModelSource,
    Stream,
    StreamConfig,
    SyntheticSource,
    TensorSource,
    TraceSource,
    open_texts,
)
from trimtab.sae.parallel import own_device
from trimtab.sae.synthetic import SparseDictionary
from trimtab.sae.train.config import Plan, SAESettings, TrainConfig
from trimtab.sae.train.sinks import OnLine
from trimtab.sae.train.training import train_stream
from trimtab.trace import Trace

_SYNTHETIC = re.compile(r"synthetic(?::(\d+)x(\d+)(?::([\d.]+))?)?")


class _Sorted(NamedTuple):
    """Settings by what they are settings of."""

    saes: SAESettings
    run: TrainConfig
    stream: StreamConfig


class Opened(NamedTuple):
    """A training before its first step."""

    plans: tuple[Plan, ...]
    stream: Stream
    run: TrainConfig
    device: str


def train(
    data: Any = "testbed",
    *,
    out: str | os.PathLike[str],
    sites: str | Sequence[str] | None = None,
    target: str = "",
    model: Any = "testbed",
    backend: str = "hf",
    model_dtype: str = "float32",
    device: str | torch.device | None = None,
    engine: Mapping[str, Any] | None = None,
    context_size: int = 128,
    model_batch: int = 16,
    column: str = "text",
    on_line: OnLine | None = None,
    **settings: Any,
) -> SAERun:
    """Train sparse autoencoders, or transcoders, on the activations of a model.

    All SAEs of a call learn from one stream: the sites times the widths times the seeds that are given.

    Args:
        data: texts to run through the model (a .txt, .jsonl or .parquet file, a directory that datasets saved,
            `datasets:NAME[:SPLIT]`, `testbed[:N]`, a list), a Trace or its directory, `synthetic[:FxD[:ACTIVE]]` (F
            features in D dimensions), a tensor [rows, d_in], or an `ActivationSource`.
        out: directory of the run. One that was stopped goes on there, one that is finished is read.
        sites: patterns of the inputs, such as `layers.4.mlp_out`; tensors and dictionaries need none.
        target: site that is reconstructed instead of the input, with one input: a transcoder.
        model: a directory, a hub id, "testbed", a module, or an open backend.
        backend: "hf", "mock" or "vllm".
        model_dtype: the model's dtype.
        device: where model and SAEs live; None: cuda where there is one, else the CPU.
        engine: settings of the vLLM engine.
        context_size: tokens of a context of the model.
        model_batch: contexts that run together.
        column: of the texts, in files and data sets.
        on_line: called with the line of every SAE at every logged step; of torchrun's processes in the first alone.
        settings: fields of `SAESettings`, `TrainConfig`, `StreamConfig` (its seed is the run's) and `Filters`.

    Returns:
        The run.

    Raises:
        RecipeError: an unknown setting, or values that do not fit each other.
        InputError: data that cannot be read, an empty or constant stream, or `out` holds a run of other settings.
        NonFiniteError: an activation is NaN or infinite; names record and token.
        UnfinishedError: told to stop, or the disk is full; what was saved stays.

    Example:
        >>> train("testbed", sites="layers.4.mlp_out", expansion=8, steps=2000, out="runs/sae")  # doctest: +SKIP
    """
    opened = open_training(
        data,
        sites=sites,
        target=target,
        model=model,
        backend=backend,
        model_dtype=model_dtype,
        device=device,
        engine=engine,
        context_size=context_size,
        model_batch=model_batch,
        column=column,
        settings=settings,
    )
    return train_stream(opened.plans, opened.stream, opened.run, out=out, device=opened.device, on_line=on_line)


def open_training(
    data: Any,
    *,
    sites: str | Sequence[str] | None,
    target: str,
    model: Any,
    backend: str,
    model_dtype: str,
    device: str | torch.device | None,
    engine: Mapping[str, Any] | None,
    context_size: int,
    model_batch: int,
    column: str,
    settings: Mapping[str, Any],
) -> Opened:
    """Return what `train` trains, and on what; the arguments are its own. The caller closes the stream."""
    sorted_settings = _sort(settings)
    where = own_device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    patterns = _patterns(sites)
    if target and len(patterns) != 1:
        raise InputError(f"a target has one input; sites names {len(patterns)}")
    options: dict[str, Any] = {"dtype": model_dtype, "device": where, "engine": engine, "batch_size": model_batch}
    source = _source(data, patterns, target, sorted_settings.run.seed)
    if source is None:
        if not patterns:
            raise InputError("no site was given; name at least one, such as layers.4.mlp_out")
        texts = open_texts(data, column=column)
        wanted = [*patterns, *((target,) if target else ())]
        runner = _runner(model, backend, options, wanted)
        source = ModelSource(runner, texts, wanted, context_size=context_size, batch_size=model_batch)
    known = isinstance(source, ModelSource) or not patterns  # else they are names, which must be there
    names = [name for name in (source.widths if known else patterns) if name != target]
    if not names:
        source.close()
        raise InputError(f"the target {target} is the input too; name another site with sites=")
    try:
        plans = sorted_settings.saes.plans([(name, target) for name in names], source.widths, sorted_settings.run.seed)
        stream = Stream(source, sorted_settings.stream)
    except BaseException:
        source.close()
        raise
    return Opened(plans, stream, sorted_settings.run, where)


def _sort(settings: Mapping[str, Any]) -> _Sorted:
    """Sort settings by their class; every name belongs to one."""
    classes = {cls: {one.name for one in fields(cls)} for cls in (SAESettings, TrainConfig, StreamConfig, Filters)}
    classes[StreamConfig] -= {"seed", "filters"}
    known = sorted(set().union(*classes.values()))
    for name in settings:
        if name not in known:
            raise RecipeError(f"no setting {name!r}; there are {', '.join(known)}")
    given = {cls: {name: settings[name] for name in names if name in settings} for cls, names in classes.items()}
    for name in ("d_sae", "seeds", "widths"):
        if isinstance(given[SAESettings].get(name), int):
            given[SAESettings][name] = (given[SAESettings][name],)
        elif name in given[SAESettings]:
            given[SAESettings][name] = tuple(given[SAESettings][name])
    run = TrainConfig(**given[TrainConfig])
    stream = StreamConfig(**given[StreamConfig], seed=run.seed, filters=Filters(**given[Filters]))
    return _Sorted(SAESettings(**given[SAESettings]), run, stream)


def _patterns(sites: str | Sequence[str] | None) -> tuple[str, ...]:
    if sites is None:
        return ()
    return tuple(sites.split()) if isinstance(sites, str) else tuple(map(str, sites))


def _source(data: Any, patterns: Sequence[str], target: str, seed: int) -> ActivationSource | None:
    """Return the source that needs no model; None: these are texts."""
    wanted = [*patterns, *((target,) if target else ())]
    if hasattr(data, "chunks") and hasattr(data, "widths"):
        found: ActivationSource = data
        return found
    if isinstance(data, Tensor) or (isinstance(data, Mapping) and data):
        return TensorSource(data)
    if isinstance(data, Trace) or _is_trace(data):
        trace = data if isinstance(data, Trace) else Trace.open(data)
        return TraceSource(trace, wanted or trace.sites()[:1])
    synthetic = _SYNTHETIC.fullmatch(data) if isinstance(data, str) else None
    if synthetic is None:
        if isinstance(data, str) and data.startswith("synthetic"):
            raise InputError(f"{data!r}: write synthetic, synthetic:FxD or synthetic:FxD:ACTIVE, such as 256x64:8")
        return None
    features, width, active = synthetic.groups(default="")
    dictionary = SparseDictionary(int(features or 256), int(width or 64), mean_active=float(active or 8), seed=seed)
    return SyntheticSource(dictionary, seed=seed)


def _is_trace(data: Any) -> bool:
    return isinstance(data, (str, os.PathLike)) and (Path(data) / "manifest.json").is_file()


def _runner(model: Any, backend: str, options: Mapping[str, Any], sites: Sequence[str]) -> Backend:
    if hasattr(model, "generate") and hasattr(model, "info"):
        running: Backend = model
        return running
    kept = {name: value for name, value in options.items() if value is not None}
    if backend == "vllm":
        kept["capture_sites"] = tuple(sites)
    return open_backend(backend, model, **kept)
