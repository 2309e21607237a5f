"""What a trace must hold: from the manifest's plan, or from a file.

An expectation is JSON. For generations:

    {"sites": ["layers.*.resid_post", "logits"], "requests": [[0, "r0"]], "num_layers": 6,
     "positions": "all"}

`prompts: [0, 1]` (or a count) stands for `requests` where ids do not matter; `configs` lists configurations.
`positions: "all"` asks for every row of the rows law: prompt + max(generated - 1, 0), `logits`: one per generated
token.
For dumps:

    {"phases": {"fwd_only": ["input_ids", "layers.*.resid_post"]}, "steps": [0, 1], "ranks": [0]}

`names` without phases is met in any phase. A name is a site pattern, or a glob that must meet at least one tensor.
A manifest's plan may hold other keys; a file may not.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trimtab._base import jsonio
from trimtab.compare._short import Short
from trimtab.compare._sides import Side, TokenKey
from trimtab.errors import InputError, SiteError
from trimtab.results.comparison import RecordKey
from trimtab.sites import SitePattern, resolve_sites

KEYS = ("sites", "requests", "prompts", "configs", "positions", "num_layers", "phases", "names", "steps", "ranks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """A parsed expectation; empty fields ask for nothing."""

    source: str
    sites: tuple[str, ...] = ()
    requests: tuple[tuple[int, str | None], ...] = ()
    configs: tuple[str, ...] = ()
    all_rows: bool = False
    phases: tuple[tuple[str | None, tuple[str, ...]], ...] = ()
    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Met:
    """How one side meets its expectation, in the ledger's unit."""

    expected: int | None
    missing: tuple[Short, ...]


def read_expectation(path: str | Path) -> Expectation:
    """Read an expectation file.

    Raises:
        InputError: no such file, not JSON, or keys that are not known.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the expectation file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the expectation file {path} is not text: {error.reason} at byte {error.start}") from error
    document = jsonio.loads(text, path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: an expectation is a JSON object with some of {', '.join(KEYS)}")
    unknown = sorted(set(document) - set(KEYS))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; an expectation has {', '.join(KEYS)}")
    found = parse_expectation(document, f"file {path}")
    if found is None:
        raise InputError(f"{path} expects nothing: give sites with requests or prompts, or phases or names")
    return found


def parse_expectation(plan: Mapping[str, Any] | None, source: str) -> Expectation | None:
    """Read the keys of a plan that say what must be there; None when it says nothing.

    Raises:
        InputError: a value of the wrong type.
    """
    plan = plan or {}
    try:
        sites = _texts(plan.get("sites"))
        sites = tuple(one for site in sites for one in _resolved(site, plan.get("num_layers")))
        phases = plan.get("phases") or {}
        if not isinstance(phases, Mapping):
            raise TypeError(f"phases is {type(phases).__name__}, expected an object")
        names = _texts(plan.get("names"))
        found = Expectation(
            source=source,
            sites=sites,
            requests=_requests(plan),
            configs=_config_names(plan.get("configs")),
            all_rows=plan.get("positions") == "all",
            phases=tuple((str(phase), _texts(fields)) for phase, fields in phases.items())
            + (((None, names),) if names else ()),
            steps=tuple(int(step) for step in plan.get("steps") or ()),
            ranks=tuple(int(rank) for rank in plan.get("ranks") or ()),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"the expectation in {source} cannot be read: {error}") from error
    return found if found.phases or (found.sites and found.requests) else None


def check(expectation: Expectation, side: Side) -> Met:
    """Look for everything that is expected on one side."""
    units = side.units
    missing: list[Short] = []
    expected = 0
    for site, (prompt, request), config in itertools.product(
        expectation.sites, expectation.requests, expectation.configs or ("",)
    ):
        wanted = pl.col("by_row") & (pl.col("prompt") == prompt)
        wanted &= pl.lit(True) if request is None else pl.col("request") == request
        rows = _named(units.filter(wanted), site)
        if config and rows["config"].n_unique() > 1:
            rows = rows.filter(pl.col("config") == config)
        key = RecordKey(site=site, prompt=prompt, request=request, config=config)
        if rows.is_empty():
            missing.append(Short(side.label, "missing", key, 1, f"{expectation.source} asks for it"))
            expected += 1
        for row in rows.iter_rows(named=True):
            expected += _check_rows(expectation, side, row, missing)
    for (phase, names), step, rank in itertools.product(
        expectation.phases, expectation.steps or (None,), expectation.ranks or (None,)
    ):
        wanted = ~pl.col("by_row")
        for column, value in (("phase", phase), ("step", step), ("rank", rank)):
            wanted &= pl.lit(True) if value is None else pl.col(column) == value
        present = units.filter(wanted)
        for name in names:
            count = _named(present, name).height
            expected += max(count, 1)
            if count == 0:
                key = RecordKey(name=name, phase=phase or "any", step=step or 0, rank=rank)
                missing.append(Short(side.label, "missing", key, 1, f"{expectation.source} asks for it"))
    return Met(expected, tuple(missing))


def _check_rows(expectation: Expectation, side: Side, row: Mapping[str, Any], missing: list[Short]) -> int:
    """Count the rows that the rows law asks for in one unit, and note those that are not there."""
    have = np.concatenate([np.asarray(cut, dtype=np.int64) for cut in row["positions"]])
    token_key: TokenKey = (row["config"], row["prompt"], row["request"])
    tokens = side.tokens.get(token_key)
    if not expectation.all_rows or tokens is None or not len(tokens.positions):
        return int(have.size)
    start, prompt = int(tokens.positions[0]), tokens.prompt_length
    generated = len(tokens.positions) - prompt
    want = np.arange(start, start + prompt + max(generated - 1, 0))
    if row["site"] == "logits" and want.size - have.size == prompt - 1:
        want = want[prompt - 1 :]
    gone = np.setdiff1d(want, have)
    if gone.size:
        key = RecordKey(site=row["site"], name=row["name"], prompt=row["prompt"], request=row["request"])
        reason = f"{gone.size} of {want.size} rows of the rows law are not recorded, first at position {gone[0]}"
        missing.append(Short(side.label, "missing", key, int(gone.size), reason))
    return int(want.size)


def _named(units: pl.DataFrame, name: str) -> pl.DataFrame:
    """The units whose tensor the name, site pattern or glob selects."""
    tensors = pl.when(pl.col("site") == "").then(pl.col("name")).otherwise(pl.col("site"))
    if not any(mark in name for mark in "*?["):
        return units.filter(tensors == name)
    found = [one for one in units.select(tensors.alias("t"))["t"].unique() if fnmatch.fnmatchcase(one, name)]
    return units.filter(tensors.is_in(found))


def _resolved(site: str, num_layers: int | None) -> tuple[str, ...]:
    """Spell a site pattern out, as far as the number of layers allows; other names are returned as they are."""
    try:
        pattern = SitePattern.parse(site)
    except SiteError:
        return (site,)
    last = max((max(pair) for pair in pattern.ranges), default=0)
    open_ended = any(min(pair) < 0 for pair in pattern.ranges)
    if num_layers is None and open_ended:
        return (site,)
    return tuple(str(one) for one in resolve_sites(site, last + 1 if num_layers is None else int(num_layers)))


def _requests(plan: Mapping[str, Any]) -> tuple[tuple[int, str | None], ...]:
    if plan.get("requests"):
        return tuple((int(prompt), str(request)) for prompt, request in plan["requests"])
    prompts = plan.get("prompts")
    if prompts is None:
        return ()
    listed = range(prompts) if isinstance(prompts, int) else prompts
    numbers = [one if isinstance(one, int) else index for index, one in enumerate(listed)]
    return tuple((number, None) for number in numbers)


def _config_names(value: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in value) if value else ()


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(str(one) for one in value)
