"""`WeightsRun`: what an analysis returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from trimtab.errors import InputError
from trimtab.results.weights import WeightsAnalysis
from trimtab.weights._store import REPORT, Store


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightsRun:
    """The rows and the report of one analysis."""

    report: WeightsAnalysis
    store: Store = field(repr=False)

    @property
    def directory(self) -> Path | None:
        """Where the run is kept; None when it is in memory."""
        return self.store.directory

    @property
    def file(self) -> Path | None:
        """The report's JSON file."""
        return None if self.directory is None else self.directory / REPORT

    def frame(self, *, controls: bool = False) -> pl.DataFrame:
        """Return one row a measurement: of a direction, a head, a pair of directions.

        Columns: layer (null: the mean over layers), part, head (null: all together), measure, sign, direction, kind,
        other, other_kind (null: no second direction), base, tuned (null: a measure of the change alone), delta, z_base,
        z_tuned, z (of delta), z_error.

        Args:
            controls: also those of the controls.
        """
        rows = self.store.scan()
        return (rows if controls else rows.filter(pl.col("kind") != "control")).collect()

    def interactions(self, part: str, layer: int | None) -> pl.DataFrame:
        """Return the interactions that were kept at one layer (None: in the mean over layers), the largest z first.

        Raises:
            InputError: the layer or part was not measured.
        """
        where = pl.col("layer").is_null() if layer is None else pl.col("layer") == layer
        found = self.store.scan().filter(where & (pl.col("part") == part) & pl.col("other").is_not_null()).collect()
        if not len(found):
            raise InputError(
                f"no interactions of {part!r} at layer {layer}: measured were layers "
                f"{', '.join(map(str, self.report.layers))}; the mean needs average_layers"
            )
        return found.sort("z", descending=True)

    def matrices(self) -> pl.DataFrame:
        """Return one row a matrix and layer: norms, cosine, leading singular values of the change, effective rank."""
        return pl.DataFrame(
            [row for layer in self.report.layers for row in self.store.matrices(layer)[0]], infer_schema_length=None
        )

    def norms(self) -> pl.DataFrame:
        """Return one row a norm and layer: relative change, best factor, angle."""
        return pl.DataFrame(
            [row for layer in self.report.layers for row in self.store.matrices(layer)[1]], infer_schema_length=None
        )

    def _repr_html_(self) -> str:
        """Return the rankings as a table, for a notebook."""
        best = pl.DataFrame(
            [(one.rank, one.part, one.measure, one.layer, one.head, one.direction, one.kind, one.delta, one.z)
             for one in self.report.rankings[:20]],
            schema=["rank", "part", "measure", "layer", "head", "direction", "kind", "delta", "z"],
            orient="row",
        )  # fmt: skip
        return str(best._repr_html_())
