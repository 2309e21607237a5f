"""One side of a comparison: a trace, the configuration chosen from it, its units and its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from trimtab.compare.layout import RANKED, Layout
from trimtab.errors import ComparisonError, InputError
from trimtab.results.comparison import RecordKey
from trimtab.trace import Trace

Ints = npt.NDArray[np.int64]
TokenKey = tuple[str, int, str]  # config (as it matches), prompt, request

# Columns by which units match. Rows of a generation leave the engine's ones constant.
PLAIN = ("layer", "phase", "step", "micro_step", "rank", "call_index", "occurrence", "coordinates")
KEY = ("by_row", "site", "name", "kind", "edit", "recompute", "config", "prompt", "request", *PLAIN)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one request, in position order."""

    positions: Ints
    ids: Ints
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Side:
    """A trace made ready for matching."""

    label: str
    trace: Trace
    units: pl.DataFrame
    """One row per unit: the key columns, and lists of record ids, digests and positions."""
    tokens: Mapping[TokenKey, Tokens]
    manifest: Mapping[str, Any]
    problems: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()
    """How the units with a number in their column `layout` are made of records."""
    layout_keys: tuple[RecordKey, ...] = ()
    """The identities of those units."""

    @property
    def path(self) -> str:
        """Where the trace lies, for messages."""
        return str(getattr(self.trace, "path", "a trace"))


def open_trace(source: Trace | str | Path) -> Trace:
    """Return a trace for a path; a trace is returned as it is."""
    return source if isinstance(source, Trace) else Trace.open(source)


def choose_configs(
    reference: Trace, candidate: Trace, config: str | None, reference_config: str | None
) -> tuple[str | None, str | None]:
    """Return the configuration to take from each side; None keeps all, which then match by name.

    Raises:
        InputError: a configuration that the trace does not have.
        ComparisonError: several on one side, and no rule to pair them.
    """
    have = (_configs(reference), _configs(candidate))
    if config is not None and reference_config is None and len(have[0]) > 1 and config in have[0]:
        reference_config = config
    for label, asked, names in (("reference", reference_config, have[0]), ("candidate", config, have[1])):
        if asked is not None and asked not in names:
            raise InputError(f"the {label} has no configuration {asked!r}; it has: {', '.join(names) or 'none'}")
    left = [
        1 if asked is not None else len(names) for asked, names in zip((reference_config, config), have, strict=True)
    ]
    if max(left) > 1 and (left[0] != left[1] or set(have[0]) != set(have[1])):
        raise ComparisonError(
            f"configurations do not pair up: the reference has {', '.join(have[0]) or 'none'}, the candidate "
            f"{', '.join(have[1]) or 'none'}; choose one each with config= and reference_config="
        )
    return reference_config, config


def make_side(label: str, trace: Trace, config: str | None, *, keep_config: bool) -> Side:
    """Select a configuration and gather the records into units.

    Args:
        label: "reference" or "candidate".
        trace: the trace.
        config: the configuration to keep; None keeps all.
        keep_config: whether units match by configuration too (several on both sides).
    """
    index, tokens = trace.index, trace.tokens
    if config is not None:
        index = index.filter(pl.col("config") == config)
        tokens = tokens.filter(pl.col("config") == config)
    return Side(
        label=label,
        trace=trace,
        units=_units(index, keep_config),
        tokens=_tokens(tokens, keep_config),
        manifest=trace.manifest,
        problems=tuple(trace.problems),
    )


def _configs(trace: Trace) -> tuple[str, ...]:
    return tuple(sorted(str(name) for name in trace.index["config"].unique().drop_nulls() if name))


def _units(index: pl.DataFrame, keep_config: bool) -> pl.DataFrame:
    """Group records that are cuts of the same rows; every other record is a unit of its own."""
    by_row = pl.col("positions").is_not_null() & pl.col("prompt").is_not_null() & pl.col("request").is_not_null()
    site = pl.col("site").fill_null("")
    frame = index.with_columns(
        by_row=by_row,
        site=site,
        name=pl.when(site == "").then(pl.col("name").fill_null("")).otherwise(pl.lit("")),
        kind=pl.col("kind").fill_null("value"),
        edit=pl.col("edit").fill_null("none"),
        recompute=pl.col("recompute").fill_null(False),
        config=pl.col("config").fill_null("") if keep_config else pl.lit(""),
    )
    frame = frame.with_columns(
        layer_recorded="layer",
        layer=pl.when(pl.col("site") == "").then("layer"),
        coordinates=pl.lit(""),
        name_recorded=index["name"].fill_null(""),
        of_model=(pl.col("site") == "") & (pl.col("module_path") == "") & pl.col("module_class").is_not_null(),
    )
    constants: dict[str, Any] = {
        "layer": pl.lit(None, pl.Int64),
        "phase": pl.lit(""),
        "step": 0,
        "micro_step": 0,
        "rank": pl.lit(None, pl.Int64),
        "call_index": 0,
    }
    frame = frame.with_columns(
        **{name: pl.when("by_row").then(value).otherwise(pl.col(name)) for name, value in constants.items()}
    ).sort("order", maintain_order=True)
    plain = [name for name in KEY if name != "occurrence"]
    occurrence = pl.when("by_row").then(0).otherwise(pl.int_range(pl.len()).over(plain))
    return (
        frame.with_columns(occurrence=occurrence)
        .group_by(KEY, maintain_order=True)
        .agg(
            pl.col("layer_recorded", "name_recorded").first(),
            pl.col("of_model").fill_null(False).first(),
            pl.col("order").min().alias("first_order"),
            pl.col("record_id").alias("ids"),
            pl.col("digest").alias("digests"),
            pl.col("positions").alias("positions"),
            pl.col("shard").is_not_null().all().alias("stored"),
            *(pl.col(name).first() for name in ("dims", "shape", *(f"{axis}_rank" for axis in RANKED))),
            pl.lit(None, pl.Int64).alias("layout"),
            pl.lit(1, pl.Int64).alias("records"),
        )
    )


def _tokens(tokens: pl.DataFrame, keep_config: bool) -> dict[TokenKey, Tokens]:
    if tokens.is_empty():
        return {}
    config = pl.col("config").fill_null("") if keep_config else pl.lit("")
    frame = tokens.with_columns(config=config).sort("position")
    found: dict[TokenKey, Tokens] = {}
    for key, rows in frame.group_by("config", "prompt", "request", maintain_order=True):
        name, prompt, request = key
        assert isinstance(name, str) and isinstance(prompt, int)
        generated = rows["generated"].fill_null(False)
        found[(name, prompt, str(request))] = Tokens(
            rows["position"].to_numpy().astype(np.int64),
            rows["token_id"].to_numpy().astype(np.int64),
            int((~generated).sum()),
        )
    return found
