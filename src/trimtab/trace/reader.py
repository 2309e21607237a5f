"""Reading a trace: the index is a polars frame scanned lazily, tensors are mapped from their shards."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import torch

from trimtab._base.log import get_logger
from trimtab.errors import InputError, TraceCorruptError, TraceError, UnfinishedError
from trimtab.sites import Site
from trimtab.trace._format import DOSE, MANIFEST, RECORDS, TABLES, TOKENS, nearest_name, read_manifest
from trimtab.trace._rows import Rows, gather
from trimtab.trace._scan import Problem, scan_run, source
from trimtab.trace._store import Store, open_store
from trimtab.trace._values import Values
from trimtab.trace.foreign import ForeignValues, open_foreign, values_of

_log = get_logger(__name__)


class RequestKey(NamedTuple):
    """What tells one generation from another."""

    config: str
    prompt: int | None
    request: str | None


class Trace:
    """A run on disk, or the part of it that `filter` selected.

    Example:
        >>> trace = Trace.open("runs/mine")  # doctest: +SKIP
        >>> trace.filter(step=3, phase="fwd_bwd").index  # doctest: +SKIP
    """

    def __init__(self, run: _Run, tables: Mapping[str, pl.LazyFrame]) -> None:
        self._run = run
        self._tables = tables

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, incomplete_ok: bool = True) -> Self:
        """Open a run; all ranks are merged lazily. Dumps of others are read in place; see `docs/foreign.md`.

        Args:
            path: directory of the run, or an fsspec URL; or the directory of a dump of sglang or Miles, or of .pt,
                .npy or .safetensors files.
            incomplete_ok: False refuses a run that is not whole; True lists in `problems` what is not.

        Raises:
            TraceError: there is no trace, or several dumps of others and nothing says how they belong together.
            TraceVersionError: a newer version wrote it.
            TraceCorruptError: committed data is damaged, and `incomplete_ok` is False.
            UnfinishedError: the run ended early or is still being written, and `incomplete_ok` is False.
        """
        store = open_store(path)
        run = _Run(store)
        if run.problems:
            text = "; ".join(problem.text for problem in run.problems[:3])
            more = f" (and {len(run.problems) - 3} more)" if len(run.problems) > 3 else ""
            message = f"{store.root} is not whole: {text}{more}"
            if not incomplete_ok:
                damaged = any(problem.damaged for problem in run.problems)
                raise TraceCorruptError(message) if damaged else UnfinishedError(message)
            _log.warning("%s", message)
        return cls(run, run.tables)

    @property
    def path(self) -> str:
        """Directory or URL of the run."""
        return self._run.store.root

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run is: format_version, kind, level, created, plan, provenance."""
        return self._run.manifest

    @property
    def problems(self) -> tuple[str, ...]:
        """What was not committed, is missing or is corrupt, in words."""
        return tuple(problem.text for problem in self._run.problems)

    @property
    def damaged(self) -> bool:
        """Whether something that was committed is missing or corrupt."""
        return any(problem.damaged for problem in self._run.problems)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that wrote to the run."""
        return tuple(self._run.ranks)

    @property
    def scan(self) -> pl.LazyFrame:
        """The index, not yet read; select columns before collecting a large one."""
        return self._tables["records"]

    @functools.cached_property
    def index(self) -> pl.DataFrame:
        """One row per record, in the order of rank and writing."""
        return self._collect("records")

    @functools.cached_property
    def tokens(self) -> pl.DataFrame:
        """One row per token."""
        return self._collect("tokens")

    @functools.cached_property
    def dose(self) -> pl.DataFrame:
        """One row per op and row that it touched."""
        return self._collect("dose")

    def filter(self, **columns: Any) -> Trace:
        """Return the records whose columns have the given values.

        Args:
            columns: column=value; a list, tuple, set or range means any of them, None means null. Index, tokens and
                doses are each filtered by those of the columns that they have.

        Raises:
            InputError: no such column.
        """
        conditions = dict(zip(columns, predicates(columns, (*RECORDS, *TOKENS, *DOSE)), strict=True))
        return Trace(
            self._run,
            {
                table: frame.filter(pl.lit(True), *(one for name, one in conditions.items() if name in TABLES[table]))
                for table, frame in self._tables.items()
            },
        )

    def tensor(self, record_id: int) -> torch.Tensor:
        """Return the values of a record, mapped from the file on a local disk.

        Raises:
            TraceError: no such record, or its values were not kept.
            TraceCorruptError: its shard is damaged.
        """
        return self._run.values.tensor(*self._run.place(record_id))

    def rehash(self, record_id: int) -> str:
        """Return the digest of a record's bytes as they are on disk now; `index` holds what it was when written.

        Raises:
            TraceError: no such record, or its values were not kept.
            TraceCorruptError: its shard is damaged.
        """
        return self._run.values.rehash(*self._run.place(record_id))

    def rows(
        self,
        *,
        site: str | Site,
        prompt: int | None = None,
        request: str | None = None,
        config: str | None = None,
        edit: str | None = None,
    ) -> Rows:
        """Gather the records of one request at one site, in position order.

        Args:
            site: where the rows were taken.
            prompt: index of the prompt; may be left out, like the others, when only one fits.
            request: id of the request.
            config: name of the configuration.
            edit: "none", "before" or "after".

        Returns:
            The rows, their positions, and the records they came from. A position that two records hold with the same
            bytes counts once.

        Raises:
            TraceError: nothing fits, several requests fit, or two records disagree about a position.
        """
        wanted = {"site": str(site), "prompt": prompt, "request": request, "config": config, "edit": edit}
        given = {name: value for name, value in wanted.items() if value is not None}
        found = self._placed.filter(predicates(given))
        return gather(found, self._placed, given, self.tensor, self.path)

    def sites(self) -> tuple[str, ...]:
        """Return the sites that were recorded, in the order of a forward pass."""
        names = self._collect_columns("site", "layer").unique().drop_nulls("site")
        return tuple(sorted(names["site"], key=_flow))

    def configs(self) -> tuple[str, ...]:
        """Return the configurations, in the order in which they were written."""
        return tuple(self._collect_columns("config")["config"].unique(maintain_order=True))

    def requests(self) -> tuple[RequestKey, ...]:
        """Return the requests of records and tokens, in the order in which they were written."""
        names = list(RequestKey._fields)
        both = pl.concat([self._collect_columns(*names), self.tokens.select(names)]).unique(maintain_order=True)
        return tuple(RequestKey(*row) for row in both.iter_rows())

    def __repr__(self) -> str:
        return f"Trace({self.path!r}, kind={self.manifest['kind']!r}, problems={len(self.problems)})"

    @functools.cached_property
    def _placed(self) -> pl.DataFrame:
        columns = ("record_id", "site", "config", "prompt", "request", "edit", "positions")
        return self._collect_columns(*columns).filter(pl.col("positions").is_not_null())

    def _collect(self, table: str) -> pl.DataFrame:
        return self._run.collect(self._tables[table])

    def _collect_columns(self, *names: str) -> pl.DataFrame:
        return self._run.collect(self._tables["records"].select(names))


class _Run:
    """What the views of one opened run share."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: list[Problem] = []
        self._parts: dict[str, list[str]] = {table: [] for table in TABLES}
        foreign = open_foreign(store) if store.size(MANIFEST) is None else None
        if foreign is None:
            self._open()
            return
        self.manifest = foreign.manifest
        self.values: Values | ForeignValues = foreign.values
        self.ranks = foreign.records["rank"].unique().sort().to_list()
        self.tables = {table: self._table(table) for table in TABLES} | {"records": foreign.records.lazy()}
        self._note(foreign.problems)

    def _open(self) -> None:
        self.manifest = read_manifest(self.store)
        scan = scan_run(self.store)
        self.ranks = scan.ranks
        self.problems += scan.problems
        self._parts = scan.parts
        self.tables = {table: self._table(table) for table in TABLES}
        self.values = values_of(self.manifest, self.store.root) or Values(self.store)
        self._note((self.manifest.get("imported") or {}).get("problems", ()))

    def _note(self, foreign: Iterable[str]) -> None:
        self.problems += [Problem(trouble="missing", rank=0, name="", text=text) for text in foreign]

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """Collect, naming the damaged part when one cannot be read."""
        try:
            return frame.collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            for table, names in self._parts.items():
                for name in names:
                    self._try(table, name)
            raise TraceCorruptError(f"{self.store.root}: the index cannot be read: {error}") from error

    def place(self, record_id: int) -> tuple[str, str, str, list[int]]:
        """Return shard, key, dtype and shape of a record."""
        ids, frame = self._places
        at = int(np.searchsorted(ids, record_id))
        if at >= len(ids) or ids[at] != record_id:
            raise TraceError(
                f"{self.store.root} has no record {record_id}; it has {len(ids)} records"
                + (f" with ids from {ids[0]} to {ids[-1]}" if len(ids) else "")
            )
        shard, key = frame["shard"][at], frame["key"][at]
        if shard is None:
            raise TraceError(
                f"{self.store.root}: the values of record {record_id} were not kept (level "
                f"{self.manifest['level']!r}, or pruned); its digest and statistics are in the index"
            )
        return shard, key, frame["dtype"][at], frame["shape"][at].to_list()

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], pl.DataFrame]:
        columns = ("record_id", "shard", "key", "dtype", "shape")
        frame = self.collect(self.tables["records"].select(columns)).sort("record_id")
        return frame["record_id"].to_numpy(), frame

    def _table(self, table: str) -> pl.LazyFrame:
        names = self._parts[table]
        if not names:
            return pl.LazyFrame(schema=TABLES[table])
        if self.store.local:
            return pl.scan_parquet([f"{self.store.root}/{name}" for name in names], schema=TABLES[table], glob=False)
        return pl.concat([pl.read_parquet(source(self.store, name)).lazy() for name in names])

    def _try(self, table: str, name: str) -> None:
        try:
            pl.read_parquet(source(self.store, name), schema=TABLES[table])
        except (pl.exceptions.PolarsError, OSError) as error:
            raise TraceCorruptError(
                f"{self.store.root}/{name} is corrupt ({str(error).splitlines()[0]}); run trace repair"
            ) from error


def predicates(columns: Mapping[str, Any], known: Iterable[str] = RECORDS) -> list[pl.Expr]:
    """Return one condition per column.

    Raises:
        InputError: a column that is not `known`.
    """
    known = dict.fromkeys(known)
    for name in columns:
        if name not in known:
            raise InputError(f"no column {name!r}: {nearest_name(name, known)}there are {', '.join(known)}")
    return [_predicate(pl.col(name), value) for name, value in columns.items()]


def _predicate(column: pl.Expr, value: Any) -> pl.Expr:
    if value is None:
        return column.is_null()
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return column.is_in([str(one) if isinstance(one, Site) else one for one in value])
    return column == (str(value) if isinstance(value, Site) else value)


def _flow(name: str) -> tuple[float, int, str]:
    try:
        return Site.parse(name).sort_key
    except InputError:
        return (float("inf"), 1 << 30, name)
