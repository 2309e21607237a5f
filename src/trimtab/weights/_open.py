"""From what a user gives to a measured run: models, directions, controls, layers, and who measures them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from trimtab._base.progress import Progress
from trimtab._base.progress import progress as shown
from trimtab.errors import InputError, VectorError
from trimtab.results.weights import AnalysisName
from trimtab.weights._rows import LayerPart
from trimtab.weights._run import Context, Settings, measure_here, measure_in_processes, read_layers
from trimtab.weights._sources import read_directions
from trimtab.weights._store import Store
from trimtab.weights._summary import summarise
from trimtab.weights.directions import ControlKind, join, make_controls
from trimtab.weights.pair import Pair, pair
from trimtab.weights.run import WeightsRun

Measured = Callable[[Settings, Sequence[int], Pair], Iterator[LayerPart]]
"""Measures layers somewhere; what it yields comes in any order."""


class Options(TypedDict, total=False):
    """What the three analyses have in common.

    Args:
        layers: 0-based layers, as a list or as text such as "0,4-8,-1"; None: all.
        controls: control directions of each kind (64). A z-score's own error falls with their number.
        control_kinds: "isotropic", "covariance", "shuffled"; z-scores are against the first.
        states: [n, d] activations at the site of the directions, or a .npy or .pt file of them: what "covariance" and
            "shuffled" controls are made of.
        labels: [n] of 0 and 1, or a file: the labels to shuffle; None takes halves.
        vector_layer: block to take from files that hold a vector for each.
        dtype: of the arithmetic, "float32" or "float64".
        device: where it runs ("cpu").
        out: directory of the run; the same call goes on where it stopped. None keeps everything in memory.
        jobs: processes (1).
        seed: of controls and randomised decompositions (0).
        pairs: interactions kept at either end of every layer (200); None keeps all.
        average_layers: also give the mean over the layers, with z-scores of its own.
        progress: told of each finished layer; None shows a bar on a terminal.
        measured: who measures the layers, instead of this process; `jobs` is then not used.
    """

    layers: Sequence[int] | str | int | None
    controls: int
    control_kinds: Sequence[ControlKind] | ControlKind
    states: Tensor | str | Path | None
    labels: Tensor | str | Path | None
    vector_layer: int | None
    dtype: Literal["float32", "float64"]
    device: str
    out: str | Path | None
    jobs: int
    seed: int
    pairs: int | None
    average_layers: bool
    progress: Progress | None
    measured: Measured | None


def analyse(
    analysis: AnalysisName,
    measure: Callable[[Context], LayerPart],
    base: str | Path,
    tuned: str | Path,
    directions: Any,
    *,
    rank: int = 32,
    offset: int = 0,
    **options: Unpack[Options],
) -> WeightsRun:
    """Measure every layer that is not measured yet, and summarise."""
    jobs = options.get("jobs", 1)
    if jobs < 1 or offset < 0 or (options.get("pairs", 200) or 1) < 1:
        raise InputError(f"jobs={jobs}, offset={offset}, pairs={options.get('pairs', 200)}: at least 1, 0 and 1")
    with pair(base, tuned) as opened:
        settings = _settings(analysis, measure, opened, directions, rank, offset, options)
        store = Store.open(settings, options.get("out"), opened)
        with store:
            missing = [layer for layer in settings.layers if not store.has(layer)]
            elsewhere = options.get("measured")
            told = options.get("progress")
            with shown(f"weights {analysis}", len(missing), show=None if told is None else False) as bar:
                for part in _parts(settings, missing, opened, jobs, elsewhere):
                    store.put(part)
                    (told or bar).advance()
            if options.get("average_layers", False):
                store.average()
            report = summarise(settings, store, opened)
            store.finish(report)
    return WeightsRun(report=report, store=store)


def _parts(
    settings: Settings, layers: Sequence[int], opened: Pair, jobs: int, elsewhere: Measured | None
) -> Iterator[LayerPart]:
    if not layers:
        return iter(())
    if elsewhere is not None:
        return elsewhere(settings, layers, opened)
    if jobs == 1 or len(layers) == 1:
        return measure_here(settings, layers, opened)
    return measure_in_processes(settings, layers, jobs)


def _settings(
    analysis: AnalysisName,
    measure: Callable[[Context], LayerPart],
    opened: Pair,
    directions: Any,
    rank: int,
    offset: int,
    options: Options,
) -> Settings:
    width, seed = opened.hidden_size, options.get("seed", 0)
    own = read_directions(directions, hidden_size=width, layer=options.get("vector_layer"))
    if own.places(kind="control"):
        raise InputError("a control was given as a direction; controls are drawn here, by number (controls)")
    if own.layer is not None and own.layer >= opened.num_layers:
        raise VectorError(
            f"{own.about[0].source} was made at layer {own.layer} and {opened.base.name} has layers 0 to "
            f"{opened.num_layers - 1}; use directions made for this model"
        )
    given = options.get("control_kinds", ("isotropic",))
    kinds: list[Any] = [given] if isinstance(given, str) else list(given)
    controls = make_controls(
        options.get("controls", 64),
        width,
        seed=seed,
        kinds=kinds,
        states=_tensor(options.get("states"), "states"),
        labels=_tensor(options.get("labels"), "labels"),
    )
    return Settings(
        analysis=analysis,
        measure=measure,
        base=str(opened.base.path),
        tuned=str(opened.tuned.path),
        directions=join([own, controls]),
        compared_with=kinds[0],
        layers=read_layers(options.get("layers"), opened.num_layers),
        dtype=_dtype(options.get("dtype", "float32")),
        device=options.get("device", "cpu"),
        offset=offset,
        rank=rank,
        pairs=options.get("pairs", 200),
        seed=seed,
    )


def _dtype(name: str) -> str:
    if name not in ("float32", "float64"):
        raise InputError(f"dtype {name!r}; the formulas are computed in float32 or float64")
    return name


def _tensor(given: Tensor | str | Path | None, what: str) -> Tensor | None:
    """Return a tensor, or the one in a .npy or .pt file."""
    if given is None or isinstance(given, Tensor):
        return given
    path = Path(os.fspath(given))
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r}: no such file; a .npy or .pt file of one tensor was expected")
    if path.suffix == ".npy":
        import numpy as np

        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise InputError(f"{what} {str(path)!r} is not an array of numbers: {error}") from error
    from trimtab.directions._archive import load

    found = load(path)
    if not isinstance(found, Tensor):
        raise InputError(f"{what} {str(path)!r} holds a {type(found).__name__}; one tensor was expected")
    return found
