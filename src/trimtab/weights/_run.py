"""One analysis over the layers of two models: what is to be done, doing it, and keeping what was done.

A layer is measured alone and kept as soon as it is: a run in a directory goes on where it stopped. Layers may be
measured by several processes, or on a cluster, because each needs the two files and the directions only.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import InputError, UnfinishedError
from trimtab.numerics.dtypes import resolve_dtype
from trimtab.results.weights import AnalysisName
from trimtab.weights._memory import return_memory
from trimtab.weights._rows import LayerPart
from trimtab.weights.directions import ControlKind, DirectionSet
from trimtab.weights.layer import LayerMath
from trimtab.weights.pair import Pair, pair


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """One layer of both models and what to send through them."""

    layer: int
    base: LayerMath
    tuned: LayerMath
    units: Tensor
    """[n, d] unit directions, controls among them, in the dtype of the arithmetic."""
    settings: Settings

    @property
    def unit(self) -> float:
        """Unit roundoff of the arithmetic."""
        return float(torch.finfo(self.units.dtype).eps) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """Everything that measuring a layer needs; it can be sent to another process or machine.

    Args:
        analysis: which of the three.
        measure: measures one layer; a function of a module.
        base: directory of the base model.
        tuned: directory of the tuned model.
        directions: unit directions, controls among them.
        compared_with: kind of the controls that z-scores are against.
        layers: 0-based, in order.
        dtype: of the arithmetic.
        device: where it runs.
        offset: positions that queries stand after keys.
        rank: singular values of a matrix's change.
        pairs: interactions to keep at either end; None keeps all.
        seed: of the controls and of randomised decompositions.
    """

    analysis: AnalysisName
    measure: Callable[[Context], LayerPart]
    base: str
    tuned: str
    directions: DirectionSet
    compared_with: ControlKind
    layers: tuple[int, ...]
    dtype: str
    device: str
    offset: int
    rank: int
    pairs: int | None
    seed: int

    @property
    def reference(self) -> list[int]:
        """Rows of the controls that z-scores are against."""
        return self.directions.places(control=self.compared_with)


class Worker:
    """The two models opened once; layers measured one after the other."""

    def __init__(self, settings: Settings, opened: Pair | None = None) -> None:
        self._settings = settings
        self._pair = pair(settings.base, settings.tuned) if opened is None else opened
        self._units = settings.directions.units.to(settings.device, resolve_dtype(settings.dtype))

    def measure(self, layer: int) -> LayerPart:
        """Measure one layer."""
        settings = self._settings
        base, tuned = self._pair.layer(layer)
        with torch.inference_mode():
            part = settings.measure(
                Context(
                    layer=layer,
                    base=LayerMath(base, settings.dtype, settings.device),
                    tuned=LayerMath(tuned, settings.dtype, settings.device),
                    units=self._units,
                    settings=settings,
                )
            )
        return_memory()
        return part

    def close(self) -> None:
        """Close both models."""
        self._pair.close()


def measure_here(settings: Settings, layers: Sequence[int], opened: Pair) -> Iterator[LayerPart]:
    """Measure layers in this process."""
    worker = Worker(settings, opened)
    for layer in layers:
        yield worker.measure(layer)


_workers: list[Worker] = []  # of this process, when it is one of several


def measure_in_processes(settings: Settings, layers: Sequence[int], jobs: int) -> Iterator[LayerPart]:
    """Measure layers in several processes, which are spawned: a program needs `if __name__ == "__main__":`.

    Raises:
        UnfinishedError: a process died.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        min(jobs, len(layers)),
        multiprocessing.get_context("spawn"),
        initializer=_open,
        initargs=(settings, threads),
    )
    waiting: deque[Future[LayerPart]] = deque()
    try:
        for layer in layers:
            waiting.append(pool.submit(_measure, layer))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UnfinishedError(
            f"a process that measured layers died ({error}); repeat with jobs=1 to see why"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _open(settings: Settings, threads: int) -> None:
    torch.set_num_threads(threads)
    _workers.append(Worker(settings))


def _measure(layer: int) -> LayerPart:
    return _workers[0].measure(layer)


def read_layers(layers: Any, num_layers: int) -> tuple[int, ...]:
    """Return 0-based layers of `None` (all), a number, a list, or text such as "0,4-8,-1".

    Raises:
        InputError: not such a list, or a layer outside the model.
    """
    if layers is None or layers == "*":
        return tuple(range(num_layers))
    listed = _expand(layers, num_layers) if isinstance(layers, str) else [layers] if isinstance(layers, int) else layers
    found = []
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int):
            raise InputError(f"layers {layers!r}: {one!r} is no layer; give numbers, or text such as 0,4-8")
        if not -num_layers <= one < num_layers:
            raise InputError(f"layer {one} was asked for; the model has layers 0 to {num_layers - 1}")
        found.append(one % num_layers)
    if not found:
        raise InputError(f"layers {layers!r} name no layer; the model has layers 0 to {num_layers - 1}")
    return tuple(sorted(set(found)))


def _expand(text: str, num_layers: int) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        piece = part.strip()
        low, dash, high = piece.removeprefix("-").partition("-")
        if not low.isdecimal() or (dash and (piece.startswith("-") or not high.isdecimal())):
            raise InputError(f"layers {text!r}: {piece!r} is no layer or range; write 0,4-8 or -1")
        first = -int(low) if piece.startswith("-") else int(low)
        last = int(high) if dash else first
        if last < first or last >= num_layers:
            raise InputError(f"layers {text!r}: {piece!r} is outside the model, which has layers 0 to {num_layers - 1}")
        found += range(first, last + 1)
    return found
