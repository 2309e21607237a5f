"""Rules of the monitor, read from YAML: one file per architecture in this package, or your own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from trimtab.errors import RecipeError

Level = Literal["flag", "warn"]
RULES_VERSION = 1  # 1: first version
PRESETS = ("jumprelu", "topk", "gated")
"""Rule files of this package, by the name that chooses them."""
_EVERYWHERE = "any"


@dataclass(frozen=True, kw_only=True, slots=True)
class After:
    """From when on a rule is asked: the first step at which the metric was below `below`, or `or_step`."""

    below: float
    or_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class When:
    """What a file's figures were made for; empty fields ask nothing."""

    expansion: int | None = None
    """d_sae / d_in."""
    site: str = "*"
    """Glob on the input site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Something that must hold of a metric; the first step at which it does not is told, once."""

    name: str
    metric: str
    """Glob on the names of metrics."""
    level: Level
    """"flag" stops a strict run; "warn" is told."""
    text: str
    """What it means when the rule is broken."""
    always: bool = False
    """Asked whether or not the file's `when` fits."""
    finite: bool = False
    """No NaN, no infinity."""
    min: float | None = None
    max: float | None = None
    at: Literal["any", "first", "late"] = "any"
    """Where `min` and `max` hold: at every step, the first that is seen, or for the mean of the last fifth."""
    after: After | None = None
    """With `at: any`: not before this."""
    reach: float | None = None
    """The metric must have been above this once `within` steps are done."""
    within: int | None = None
    share_of_peak: float | None = None
    """With `at: late`: the mean of the last fifth must be below this share of the highest value."""
    least_steps: int = 0
    """Asked of runs that are at least so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSet:
    """One file."""

    format_version: int = RULES_VERSION
    architectures: tuple[str, ...] = ()
    """That it is chosen for when none is named."""
    when: When = field(default_factory=When)
    rules: tuple[Rule, ...] = ()
    name: str = ""

    def fits(self, *, expansion: float, site: str) -> bool:
        """Whether the figures were made for such an SAE."""
        from fnmatch import fnmatchcase

        return fnmatchcase(site, self.when.site) and self.when.expansion in (None, expansion)


def read_rules(path: str | os.PathLike[str]) -> RuleSet:
    """Read a rule file.

    Raises:
        RecipeError: unreadable, not YAML, an unknown field, a rule that asks nothing; says where.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"rule file {path} cannot be read: {error}") from error
    return _parse(text, str(path))


def rules_for(architecture: str, chosen: str = "auto") -> tuple[RuleSet, ...]:
    """Return the rule sets of an architecture, what holds everywhere first.

    Args:
        architecture: of the SAE.
        chosen: "auto" takes the architecture's file, "off" only what holds everywhere; else a name of `PRESETS`, or a
            file.

    Raises:
        RecipeError: no such preset or file.
    """
    everywhere = _shipped(_EVERYWHERE)
    if chosen == "off":
        return (everywhere,)
    if chosen == "auto":
        own = [one for name in PRESETS if architecture in (one := _shipped(name)).architectures]
        return (everywhere, *own)
    if chosen in PRESETS:
        return (everywhere, _shipped(chosen))
    if not Path(chosen).is_file():
        raise RecipeError(f"monitor {chosen!r} is neither auto, off, one of {', '.join(PRESETS)} nor a file of rules")
    return (everywhere, read_rules(chosen))


@cache
def _shipped(name: str) -> RuleSet:
    return _parse((files("trimtab.sae.monitor") / f"{name}.yaml").read_text(encoding="utf-8"), name)


_ADAPTER = TypeAdapter(RuleSet)


def _parse(text: str, name: str) -> RuleSet:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"rule file {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"rule file {name} must be a mapping with `rules`")
    version = document.get("format_version", RULES_VERSION)
    if isinstance(version, int) and version > RULES_VERSION:
        raise RecipeError(f"rule file {name} has format version {version}; this trimtab reads up to {RULES_VERSION}")
    _check_fields(document, RuleSet, name)
    for number, one in enumerate(document.get("rules") or ()):
        if isinstance(one, dict):
            _check_fields(one, Rule, f"{name}: rules[{number}]")
    try:
        found = _ADAPTER.validate_python({**document, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"rule file {name}: {where}: {first['msg']}, got {first['input']!r:.60}") from error
    for rule in found.rules:
        _check_rule(rule, name)
    return found


def _check_rule(rule: Rule, name: str) -> None:
    bounds = rule.min is not None or rule.max is not None
    if not (rule.finite or bounds or rule.reach is not None or rule.share_of_peak):
        raise RecipeError(
            f"rule file {name}: {rule.name!r} asks nothing; give finite, min, max, reach or share_of_peak"
        )
    if (rule.reach is None) != (rule.within is None):
        raise RecipeError(f"rule file {name}: {rule.name!r}: reach and within go together")
    if rule.share_of_peak and rule.at != "late":
        raise RecipeError(f"rule file {name}: {rule.name!r}: share_of_peak needs `at: late`")


def _check_fields(document: Mapping[Any, Any], cls: type[Any], where: str) -> None:
    known = [one.name for one in fields(cls)]
    for key in document:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"rule file {where}: unknown field {key!r}{hint} (fields: {', '.join(known)})")
