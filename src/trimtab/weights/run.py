"""`WeightsRun`: what an analysis returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from trimtab.errors import InputError
from trimtab.results.weights import WeightsAnalysis
from trimtab.weights._over_layers import every_pair
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

    def interactions(self, part: str, layer: int | None, *, of: str | None = None) -> pl.DataFrame:
        """Return interactions at one layer (None: in the mean over layers), the largest z first.

        Args:
            part: "qk", "vo" or "mlp".
            layer: 0-based.
            of: name of a direction, or kind and name as "role curious": all pairs that it is in, kept or not, as the
                first and as the second. None: the pairs that were kept.

        Raises:
            InputError: the layer, part or direction was not measured.
        """
        if of is not None:
            return self._of_direction(part, layer, of)
        where = pl.col("layer").is_null() if layer is None else pl.col("layer") == layer
        found = self.store.scan().filter(where & (pl.col("part") == part) & pl.col("other").is_not_null()).collect()
        if not len(found):
            raise InputError(
                f"no interactions of {part!r} at layer {layer}: measured were layers "
                f"{', '.join(map(str, self.report.layers))}; the mean needs average_layers"
            )
        return found.sort("z", descending=True)

    def _of_direction(self, part: str, layer: int | None, of: str) -> pl.DataFrame:
        own = [one for one in self.store.settings.directions if one.kind != "control"]
        named = [one for one in own if of in (one.name, one.label)]
        rows = (
            every_pair(self.store.settings, self.store, part, layer) if layer in (None, *self.report.layers) else None
        )
        if len(named) != 1 or rows is None:
            known = ", ".join(one.label for one in own[:6])
            raise InputError(
                f"no interactions of {part!r} at layer {layer} with {of!r}: {len(named)} directions are called so, of "
                f"{len(own)} ({known}{', ...' if len(own) > 6 else ''}); measured were layers "
                f"{', '.join(map(str, self.report.layers))}"
            )
        ends = (("direction", "kind"), ("other", "other_kind"))
        where = [(pl.col(name) == named[0].name) & (pl.col(kind) == named[0].kind) for name, kind in ends]
        return rows.filter(where[0] | where[1]).sort("z", descending=True)

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
