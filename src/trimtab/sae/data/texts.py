"""Texts to run through a model: files, data sets, the embedded model's own grammar."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import testbed
from trimtab._base import jsonio
from trimtab._base.optional import require
from trimtab.errors import InputError

_KINDS = (
    "a .txt file (one text a line), a .jsonl or .parquet file with a column `text`, a directory that datasets saved, "
    "datasets:NAME[:SPLIT], or testbed[:N]"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Texts in a fixed order, which can be begun anywhere."""

    name: str
    start: Callable[[int], Iterator[str]]
    """Returns the texts from a number on."""


def open_texts(source: Any, *, column: str = "text") -> Texts:
    """Open texts.

    Args:
        source: a file, `datasets:NAME[:SPLIT]` (streamed), `testbed[:N]` (N documents of the embedded grammar, 4096
            unless given), a data set object, or a list of texts.
        column: of files and data sets.

    Raises:
        InputError: no such file, or not of these kinds; no such column.
        PrerequisiteError: `datasets` is not installed.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), column)
    if hasattr(source, "column_names"):
        return _data_set(source, f"datasets ({len(source)} rows)" if hasattr(source, "__len__") else "datasets", column)
    if isinstance(source, Sequence) and source and all(isinstance(one, str) for one in source):
        return Texts(name=f"{len(source)} texts", start=lambda n: iter(source[n:]))
    raise InputError(f"texts are {type(source).__name__}; expected {_KINDS}, or a list of texts that is not empty")


def _named(name: str, column: str) -> Texts:
    kind, _, rest = name.partition(":")
    if kind == "testbed" and not Path(name).exists():
        count = int(rest) if rest.isdecimal() else (4096 if not rest else 0)
        if not count:
            raise InputError(f"{name!r}: write testbed or testbed:N, with the number of documents")
        return Texts(name=f"testbed:{count}", start=lambda n: (_document(index) for index in range(n, count)))
    if kind == "datasets" and rest:
        datasets: Any = require("datasets", extra="data", feature=f"reading {name}")
        path, _, split = rest.partition(":")
        return _data_set(datasets.load_dataset(path, split=split or "train", streaming=True), name, column)
    file = Path(name)
    if file.is_dir():
        datasets = require("datasets", extra="data", feature=f"reading the directory {file}")
        found = datasets.load_from_disk(name)
        if hasattr(found, "keys"):
            raise InputError(f"{name} holds the splits {', '.join(found)}; give the directory of one of them")
        return _data_set(found, name, column)
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".txt": _lines,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".parquet": _parquet,
    }
    reader = readers.get(file.suffix)
    if reader is None:
        raise InputError(f"{name!r} holds no texts that can be read; expected {_KINDS}")
    if not file.is_file():
        raise InputError(f"{name}: no such file")
    return Texts(name=name, start=lambda n: itertools.islice(reader(file, column), n, None))


def _document(index: int) -> str:
    """Document `index` of the grammar: its own seed, so that none before it is needed."""
    import random

    tokens = testbed.document(random.Random(f"sae/{index}"), max_tokens=128).tokens
    return " ".join(tokens[1:])


def _data_set(found: Any, name: str, column: str) -> Texts:
    columns = found.column_names
    if columns is not None and column not in columns:
        raise InputError(f"{name} has no column {column!r}; it has {', '.join(columns)}: say which with column=")

    def start(n: int) -> Iterator[str]:
        rows: Iterable[Any] = found.skip(n)
        return (_text(row.get(column), f"{name} row {n + number}") for number, row in enumerate(rows))

    return Texts(name=name, start=start)


def _lines(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, column), start=1):
        row = jsonio.loads(line, f"{path}:{number}")
        if not isinstance(row, dict) or column not in row:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{path}:{number}: no column {column!r}; it has {has}")
        yield _text(row[column], f"{path}:{number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import polars

    try:
        frame = polars.scan_parquet(path)
        names = frame.collect_schema().names()
        if column not in names:
            raise InputError(f"{path} has no column {column!r}; it has {', '.join(names)}")
        values = frame.select(column).collect()[column]
    except polars.exceptions.PolarsError as error:
        raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error
    yield from (_text(value, f"{path} row {number}") for number, value in enumerate(values))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: its text is {value!r:.60}; a text that is not empty was expected")
    return value
