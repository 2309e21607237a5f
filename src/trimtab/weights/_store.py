"""What was measured, layer by layer: in memory, or in a directory that the same call goes on from.

plan.json                       what is measured: models, directions, controls, layers; and where it came from
directions.safetensors          the unit directions, float64, controls among them
layers/layer-0003.parquet       the rows of one layer, written last: a layer with it is finished
crosses/layer-0003.safetensors  effects of every direction on every other one, float32 [n, n]
matrices/layer-0003.json        whole matrices and norms of one layer
average.parquet                 means over the layers
weights.json                    the report
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl
import safetensors.torch
import torch
from torch import Tensor

from trimtab._base import jsonio, provenance
from trimtab._base.files import FileLock, atomic_write_bytes, atomic_write_text
from trimtab.errors import InputError, RecipeError
from trimtab.numerics.dtypes import resolve_dtype
from trimtab.results import to_json
from trimtab.results.weights import WEIGHTS_VERSION, WeightsAnalysis
from trimtab.weights._means import mean_changes, mean_cross
from trimtab.weights._rows import SCHEMA, Cross, LayerPart, direction_rows, pair_rows
from trimtab.weights._run import Settings
from trimtab.weights.load import Checkpoint
from trimtab.weights.pair import Pair

REPORT, PLAN, AVERAGE = "weights.json", "plan.json", "average.parquet"
_FOLDERS = ("layers", "crosses", "matrices")
_SIDES = ("base", "tuned", "delta")


class Store:
    """The parts of one run. Made by `open`; a context manager, which holds the directory's lock."""

    def __init__(self, settings: Settings, directory: Path | None) -> None:
        self.settings = settings
        self.directory = directory
        self._parts: dict[int, LayerPart] = {}
        self._average: pl.DataFrame | None = None
        self._lock: FileLock | None = None

    @classmethod
    def open(cls, settings: Settings, out: str | Path | None, models: Pair) -> Self:
        """Begin in a directory, or go on there.

        Raises:
            RecipeError: it holds a run with other settings; names the first that differs.
        """
        store = cls(settings, None if out is None else Path(out))
        folder = store.directory
        if folder is None:
            return store
        plan = _plan(settings, models)
        file = folder / PLAN
        if file.is_file():
            _same(jsonio.loads(file.read_bytes(), file).get("plan", {}), plan, folder)
        elif folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files and no {PLAN}; give an empty directory, or one of a run")
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            tensors = {"directions": settings.directions.units.contiguous()}
            names = jsonio.dumps([[one.kind, one.name] for one in settings.directions])
            atomic_write_bytes(folder / "directions.safetensors", safetensors.torch.save(tensors, {"names": names}))
            atomic_write_text(file, jsonio.dumps({"plan": plan, "provenance": provenance.collect()}, indent=2))
        return store

    def __enter__(self) -> Self:
        if self.directory is not None:
            self._lock = FileLock(self.directory / ".lock").acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def has(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return layer in self._parts if self.directory is None else self._file("layers", layer, "parquet").is_file()

    def put(self, part: LayerPart) -> None:
        """Keep a finished layer."""
        if self.directory is None:
            self._parts[part.layer] = part
            return
        tensors = {
            f"{cross.part}_{side}": tensor.contiguous()
            for cross in part.crosses
            for side in _SIDES
            if (tensor := getattr(cross, side)) is not None
        }
        if tensors:
            atomic_write_bytes(self._file("crosses", part.layer, "safetensors"), safetensors.torch.save(tensors))
        if part.matrices or part.norms:
            text = jsonio.dumps({"matrices": list(part.matrices), "norms": list(part.norms)})
            atomic_write_text(self._file("matrices", part.layer, "json"), text)
        _write_parquet(self._file("layers", part.layer, "parquet"), part.rows)

    def rows(self, layer: int) -> pl.DataFrame:
        """Return the rows of a finished layer."""
        if self.directory is None:
            return self._parts[layer].rows
        return pl.read_parquet(self._file("layers", layer, "parquet"))

    def scan(self) -> pl.LazyFrame:
        """Return the rows of all layers, and of their mean when it was asked for."""
        frames = [self._lazy(layer) for layer in self.settings.layers]
        if (average := self.averages()) is not None:
            frames.append(average.lazy())
        return pl.concat(frames)

    def crosses(self, layer: int) -> dict[str, Cross]:
        """Return the effects of directions on each other at one layer, by part."""
        if self.directory is None:
            return {cross.part: cross for cross in self._parts[layer].crosses}
        file = self._file("crosses", layer, "safetensors")
        tensors: dict[str, Tensor] = safetensors.torch.load_file(file) if file.is_file() else {}
        parts = dict.fromkeys(name.rpartition("_")[0] for name in tensors)
        return {part: Cross(part=part, **_of_part(tensors, part)) for part in parts}

    def matrices(self, layer: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return what is known of whole matrices and norms at one layer."""
        if self.directory is None:
            part = self._parts[layer]
            return list(part.matrices), list(part.norms)
        file = self._file("matrices", layer, "json")
        found = jsonio.loads(file.read_bytes(), file) if file.is_file() else {}
        return found.get("matrices", []), found.get("norms", [])

    def average(self) -> None:
        """Average every measure over the layers that have it, with z-scores of the averages themselves."""
        settings = self.settings
        unit = float(torch.finfo(resolve_dtype(settings.dtype)).eps) / 2
        changes = mean_changes((rows for _, rows in layers_of(self)), settings.directions)
        lengths = {one.part: one.scale for one in changes if one.measure == "length"}
        frames = [direction_rows(None, changes, settings.directions, settings.reference, unit)]
        for part in dict.fromkeys(name for layer in settings.layers for name in self.crosses(layer)):
            mean = mean_cross(part, (self.crosses(layer).get(part) for layer in settings.layers))
            scale = lengths.get(part)
            frames.append(
                pair_rows(None, mean, settings.directions, settings.reference, unit, settings.pairs, scale=scale)
            )
        found = pl.concat(frames)
        if self.directory is None:
            self._average = found
        else:
            _write_parquet(self.directory / AVERAGE, found)

    def averages(self) -> pl.DataFrame | None:
        """Return the rows of the mean over layers; None when it was not asked for."""
        if self.directory is None:
            return self._average
        file = self.directory / AVERAGE
        return pl.read_parquet(file) if file.is_file() else None

    def finish(self, report: WeightsAnalysis) -> None:
        """Write the report."""
        if self.directory is not None:
            atomic_write_text(self.directory / REPORT, to_json(report))

    def _lazy(self, layer: int) -> pl.LazyFrame:
        if self.directory is None:
            return self._parts[layer].rows.lazy()
        return pl.scan_parquet(self._file("layers", layer, "parquet"))

    def _file(self, folder: str, layer: int, ending: str) -> Path:
        assert self.directory is not None
        return self.directory / folder / f"layer-{layer:04d}.{ending}"


def _of_part(tensors: dict[str, Tensor], part: str) -> dict[str, Any]:
    return {side: tensors[f"{part}_{side}"] for side in _SIDES if f"{part}_{side}" in tensors}


def _write_parquet(path: Path, rows: pl.DataFrame) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        draft = Path(folder) / path.name
        version = {"trimtab_weights_version": str(WEIGHTS_VERSION)}  # beside the Arrow schema in the file's footer
        rows.select(*SCHEMA).write_parquet(draft, compression="zstd", compression_level=1, metadata=version)
        draft.replace(path)


def _plan(settings: Settings, models: Pair) -> dict[str, Any]:
    """Everything that decides the numbers; a run in a directory is gone on with only when all of it is equal."""
    return {
        "format_version": WEIGHTS_VERSION,
        "analysis": settings.analysis,
        "base": _identity(models.base),
        "tuned": _identity(models.tuned),
        "directions": settings.directions.digest,
        "compared_with": settings.compared_with,
        "layers": list(settings.layers),
        "dtype": settings.dtype,
        "offset": settings.offset,
        "rank": settings.rank,
        "pairs": settings.pairs,
        "seed": settings.seed,
    }


def _identity(model: Checkpoint) -> list[Any]:
    """Name, size and time of every file: weights are not hashed, which would cost a pass over all of them."""
    files = sorted({one.file for one in model.stored.values()})
    return [[file.name, (state := file.stat()).st_size, state.st_mtime_ns] for file in files]


def _same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            change = "" if key in ("base", "tuned", "directions") else f": {found.get(key)!r} there, {value!r} now"
            raise RecipeError(
                f"{folder} holds a run with other {key.replace('_', ' ')}{change}; give another directory"
            )


def layers_of(store: Store) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield (layer, rows), one layer in memory at a time."""
    for layer in store.settings.layers:
        yield layer, store.rows(layer)
