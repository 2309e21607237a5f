"""What dims say of the records of two sides: those that were recorded, and those given for the comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence

import polars as pl

from trimtab.compare._sides import KEY, Side
from trimtab.compare.dims import BATCH, Dims, DimsRule, parse_dims
from trimtab.errors import ComparisonError, InputError

LOGICAL = tuple(name for name in KEY if name not in ("rank", "coordinates"))
_BATCH_AXIS = re.compile(rf"(?<![\w*(]){BATCH}(?![\w*)])(\[)?")


class Spoken:
    """Everything that dims say, parsed once; what cannot be parsed is kept as its error."""

    def __init__(self) -> None:
        self._parsed: dict[str, Dims | InputError] = {}
        self.used: set[DimsRule] = set()

    def read(self, side: Side, rules: Sequence[DimsRule]) -> pl.DataFrame:
        """Return the side's units with the dims that hold for them."""
        tensor = pl.when(pl.col("site") == "").then(pl.col("name")).otherwise(pl.col("site"))
        units = side.units.with_columns(micro="micro_step", recomputed="recompute")
        if rules:
            units = units.with_columns(tensor=tensor, ndim=pl.col("shape").list.len())
            known = units.select("tensor", "name_recorded", "ndim").unique(maintain_order=True)
            counts = dict(known.group_by("tensor").agg("ndim").iter_rows())
            given = [
                self._rule_for((name, recorded), ndim, counts[name], rules)
                for name, recorded, ndim in known.iter_rows()
            ]
            units = (
                units.join(
                    known.with_columns(given=pl.Series(given, dtype=pl.String)),
                    on=known.columns,
                    how="left",
                    nulls_equal=True,
                    maintain_order="left",
                )
                .with_columns(dims=pl.coalesce("given", "dims"))
                .drop("tensor", "ndim", "given")
            )
        for text in units["dims"].unique().drop_nulls():
            self._learn(text)
        return self._unfold(units)

    def _rule_for(
        self, names: tuple[str, str], ndim: int | None, among: Sequence[int], rules: Sequence[DimsRule]
    ) -> str | None:
        """The first rule of that name, or of the name as it was recorded, with as many axes.

        Where the module has tensors with other numbers of axes (`among`), of which a rule speaks, it does not speak of
        this one; else the first rule of that name holds, and will be refused.
        """
        named = [rule for rule in rules if any(rule.matches(name) for name in names)]
        fitting = [rule for rule in named if len(rule.dims.axes) in among]
        rule = next((rule for rule in fitting or named if not fitting or len(rule.dims.axes) == ndim), None)
        if rule is None:
            return None
        self.used.add(rule)
        return rule.dims.text

    def __getitem__(self, text: str | None) -> Dims | None:
        """What a text says.

        Raises:
            ComparisonError: it cannot be read.
        """
        if text is None:
            return None
        found = self._parsed[text]
        if isinstance(found, InputError):
            raise ComparisonError(str(found))
        return found

    def parallel(self) -> list[str]:
        """Texts that speak of parallel axes, or cannot be read."""
        return [text for text, found in self._parsed.items() if isinstance(found, InputError) or found.parallel]

    def join_micro_steps(self, frames: tuple[pl.DataFrame, ...]) -> tuple[pl.DataFrame, ...]:
        """Join the micro steps of a batch along `b` where the two sides have different ones."""
        same = [name for name in LOGICAL if name != "micro_step"]
        found = [
            frame.filter(~pl.col("by_row")).group_by(same).agg(pl.col("micro_step").unique().sort()) for frame in frames
        ]
        both = found[0].join(found[1], on=same, how="inner", nulls_equal=True, suffix="_c")
        other = both.filter(pl.col("micro_step") != pl.col("micro_step_c")).select(same).with_columns(joined=True)
        if other.is_empty():
            return frames
        told = {text: new for text in list(self._parsed) if (new := self._with_micro(text)) is not None}
        if not told:
            return frames
        return tuple(
            self._unfold(
                frame.join(other, on=same, how="left", nulls_equal=True, maintain_order="left")
                .with_columns(dims=pl.when("joined").then(pl.col("dims").replace(told)).otherwise("dims"))
                .drop("joined")
            )
            for frame in frames
        )

    def _with_micro(self, text: str) -> str | None:
        dims = self._parsed[text]
        if isinstance(dims, InputError) or dims.split_of("micro") is not None:
            return None
        if not any(axis.names == (BATCH,) for axis in dims.axes):
            return None
        shape, mark, rest = text.partition("#")
        new = _BATCH_AXIS.sub(lambda found: f"{BATCH}[micro{',' if found[1] else ']'}", shape, count=1) + mark + rest
        self._learn(new)
        return new

    def _learn(self, text: str) -> None:
        if text in self._parsed:
            return
        try:
            self._parsed[text] = parse_dims(text)
        except InputError as error:
            self._parsed[text] = error

    def _unfold(self, units: pl.DataFrame) -> pl.DataFrame:
        """Leave what the dims join out of the identity: micro steps, the recomputed pass."""
        for axis, column, value in (("micro", "micro_step", pl.lit(0)), ("recompute", "recompute", pl.lit(False))):
            texts = [
                text
                for text, dims in self._parsed.items()
                if isinstance(dims, Dims) and dims.split_of(axis) is not None
            ]
            if texts:
                units = units.with_columns(
                    pl.when(pl.col("dims").is_in(texts) & ~pl.col("by_row")).then(value).otherwise(column).alias(column)
                )
        return units
