"""The plan of a walk: what is run at each commit, for how long, and what must hold. A YAML file to edit."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from trimtab._base.files import safe_name
from trimtab.errors import RecipeError
from trimtab.results.commits import Risk
from trimtab.workflows.commits._git import Commit, Repository

Pattern = Literal["rise-then-fall", "fall-then-rise", "rising", "spike", "flat"]
PLAN_VERSION = 1  # 1: first version
STEPS: Mapping[Risk, int] = {"LOW": 2, "MEDIUM": 10, "HIGH": 50}
PLACEHOLDERS = ("steps", "seed", "out", "worktree")
_BRACES = re.compile(r"(?<!\$)\{([A-Za-z_]+)\}")
_MERGE = "previous", "base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of a plan."""

    run: str | tuple[str, ...]
    """A line for the shell, or a list of words; `{steps} {seed} {out} {worktree}` are filled in."""
    name: str = "run"
    """Names its directory, and what other checks refer to."""
    metrics: str = "**/*.jsonl"
    """Glob of files with JSON lines below `{out}`; what is printed and TensorBoard events are read as well."""
    time_limit: float | None = None
    """Seconds; None takes the plan's."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables beside the caller's own."""

    def fill(self, values: Mapping[str, str | int]) -> tuple[str, ...]:
        """Return the words to run, placeholders filled in (quoted where a shell reads them)."""
        if isinstance(self.run, str):
            quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
            return ("/bin/sh", "-c", _filled(self.run, quoted))
        return tuple(_filled(word, values) for word in self.run)

    @property
    def text(self) -> str:
        """The command as it was written, on one line."""
        return self.run if isinstance(self.run, str) else shlex.join(self.run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that must hold; what does not is a red flag. As a rule of the plan it is asked of every commit."""

    metric: str = ""
    """Glob on the names of metrics."""
    trace: bool = False
    """About the trace of the command instead of a metric."""
    command: str = "*"
    """Glob on the names of commands."""
    finite: bool = False
    """No NaN and no infinity."""
    min: float | None = None
    max: float | None = None
    at: Literal["any", "first", "last", "late"] | int = "any"
    """Where `min` and `max` hold: at any step, the first, the last, the last fifth, or from this step on."""
    pattern: Pattern | None = None
    """A course over the steps that must not be seen."""
    factor: float | None = None
    """Within the base's range, widened by this factor both ways."""
    equal: str = ""
    """To "base", "previous" or another command of this commit: the same to the bit, on the steps that both have."""
    like: str = ""
    """To the same: within `within`; without it, within the noise of the base, or the calibrated verdict for traces."""
    within: float | None = None
    """Largest relative difference from `like`."""

    @property
    def text(self) -> str:
        """The check in words."""
        what = "trace" if self.trace else self.metric
        if self.finite:
            what += " is finite"
        where = "" if self.at == "any" else f" ({f'from step {self.at}' if isinstance(self.at, int) else self.at})"
        what += f" >= {self.min:g}{where}" if self.min is not None else ""
        what += f" <= {self.max:g}{where}" if self.max is not None else ""
        what += f" shows no {self.pattern}" if self.pattern else ""
        what += f" within {self.factor:g}x of the base's range" if self.factor is not None else ""
        what += f" equals {self.equal}" if self.equal else ""
        if self.like:
            what += f" is like {self.like}" + (f" within {self.within:g}" if self.within is not None else "")
        return what + (f" [{self.command}]" if self.command != "*" else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitPlan:
    """What is special about one commit; what is left out is the plan's."""

    commit: str
    subject: str = ""
    """Of the commit, for the reader; not used."""
    intention: str = ""
    risk: Risk | None = None
    steps: int | None = None
    commands: tuple[Command, ...] = ()
    """Instead of the plan's commands."""
    checks: tuple[Check, ...] = ()
    expect: tuple[str, ...] = ()
    """Kinds of red flags that this commit is to raise ("diverged", "changed", "error: REGEX", ...)."""
    notes: str = ""


DEFAULT_RULES = (
    Check(metric="*", finite=True),
    Check(metric="*grad*norm*", factor=10.0),
    Check(metric="*loss*", factor=10.0),
    Check(metric="*loss*", pattern="rise-then-fall"),
    Check(trace=True, like="previous"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that a walk runs and asks."""

    format_version: int = PLAN_VERSION
    revisions: str = ""
    """BASE..HEAD that the plan was made for; not used."""
    setup: str = ""
    """A line for the shell that installs a worktree, run once in each."""
    seed: int = 0
    time_limit: float = 3600.0
    """Seconds for one command or setup."""
    steps: dict[Risk, int] = field(default_factory=lambda: dict(STEPS))
    """Test length by risk."""
    commands: tuple[Command, ...] = ()
    noise: tuple[Command, ...] | None = None
    """What shows the noise of the base, by the commands' names: the same with another batch order, say. None repeats
    each command as it is."""
    rules: tuple[Check, ...] = DEFAULT_RULES
    commits: tuple[CommitPlan, ...] = ()

    def entry(self, sha: str) -> CommitPlan | None:
        """Return what the plan says about a commit; its ids may be shortened."""
        return next((one for one in self.commits if sha.startswith(one.commit)), None)


_ADAPTER = TypeAdapter(Plan)
_CLASSES: Mapping[str, type[Any]] = {"commands": Command, "noise": Command, "rules": Check, "checks": Check}


def read_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        RecipeError: unreadable, not YAML, an unknown field, or a value of the wrong kind; the message says where.
    """
    source = Path(path)
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"plan {source} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"plan {source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"plan {source} must be a mapping of options, such as 'commands: [...]'")
    version = document.get("format_version", PLAN_VERSION)
    if isinstance(version, int) and version > PLAN_VERSION:
        raise RecipeError(
            f"plan {source} has format version {version}; this trimtab reads up to {PLAN_VERSION}: upgrade"
        )
    _check_fields(source, "", document, Plan)
    try:
        plan = _ADAPTER.validate_python({key: _tidy(key, value) for key, value in document.items()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("tuple", "str")))
        raise RecipeError(f"plan {source}: {where}: {first['msg']}, got {first['input']!r:.60}") from error
    check_plan(plan, f"plan {source}")
    return plan


def check_plan(plan: Plan, source: str) -> None:
    """Refuse what can be seen to be wrong before anything runs.

    Raises:
        RecipeError: repeated or unusable names, a misspelt placeholder, a check without a subject or demand.
    """
    for where, commands in (("commands", plan.commands), ("noise", plan.noise or ())):
        _check_commands(f"{source}: {where}", commands)
    known = {one.name for one in plan.commands}
    for check in plan.rules:
        _check_check(f"{source}: rules", check, known)
    for one in plan.noise or ():
        if one.name not in known:
            raise RecipeError(f"{source}: noise {one.name!r} names no command; commands: {', '.join(sorted(known))}")
    for entry in plan.commits:
        where = f"{source}: commit {entry.commit}"
        _check_commands(where, entry.commands)
        for check in entry.checks:
            _check_check(where, check, {one.name for one in entry.commands or plan.commands})
        if entry.steps is not None and entry.steps < 1:
            raise RecipeError(f"{where}: steps is {entry.steps}; at least 1 was expected")
        for text in entry.expect:
            _check_expected(where, text)
    if any(number < 1 for number in plan.steps.values()):
        raise RecipeError(f"{source}: steps {plan.steps}: at least 1 step for every risk was expected")
    if plan.time_limit <= 0:
        raise RecipeError(f"{source}: time_limit is {plan.time_limit:g}; a positive number of seconds was expected")


def placed(plan: Plan, repository: Repository, commits: Sequence[Commit], source: str) -> Plan:
    """Return the plan with full commit ids.

    Raises:
        RecipeError: a commit that is not in the range, or is there twice.
    """
    known = {one.sha for one in commits}
    done: dict[str, str] = {}
    entries = []
    for entry in plan.commits:
        sha = repository.resolve(entry.commit)
        if sha not in known:
            raise RecipeError(
                f"{source}: commit {entry.commit} is not in the range {plan.revisions or 'given'}; remove it"
            )
        if sha in done:
            raise RecipeError(f"{source}: commits {done[sha]} and {entry.commit} are the same; keep one of them")
        done[sha] = entry.commit
        entries.append(replace(entry, commit=sha))
    return replace(plan, commits=tuple(entries))


def write_plan(plan: Plan, comments: Mapping[str, Sequence[str]]) -> str:
    """Return a plan as YAML to edit.

    Args:
        plan: the plan.
        comments: lines to put above each commit, by its id.
    """
    head = {one.name: _plain(getattr(plan, one.name)) for one in fields(plan) if one.name != "commits"}
    lines = [_HEAD, _yaml({key: value for key, value in head.items() if value not in (None, "", [])})]
    lines.append("commits:")
    for entry in plan.commits:
        lines += [f"# {' '.join(text.split())}" for text in comments.get(entry.commit, ())]
        lines.append(_yaml([_plain(entry)]).rstrip())
    return "\n".join(lines) + "\n"


_HEAD = """\
# A plan of `trimtab commits`. Edit it and give it back with --plan; docs/commits.md lists every field.
# {steps} {seed} {out} {worktree} are filled in. Rules are asked of every commit, checks of one.
# A commit may have: intention, risk, steps, commands, checks, expect, notes.
"""


def _plain(value: Any) -> Any:
    """Plain containers without what is at its default."""
    if isinstance(value, (Command, Check, CommitPlan)):
        given = {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
        default = {"name": "run", "command": "*", "metrics": "**/*.jsonl", "at": "any"}
        return {k: v for k, v in given.items() if v not in (None, "", [], {}, False) and default.get(k) != v}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)


def _tidy(key: str, value: Any) -> Any:
    """A single command or line of text where a list may stand; commit ids that YAML read as numbers."""
    if key in ("commands", "noise"):
        given = value if isinstance(value, list) else [value]
        return [{"run": one} if isinstance(one, str) else one for one in given]
    if key in ("expect", "checks", "rules"):
        return value if isinstance(value, list) else [value]
    if key == "commits" and isinstance(value, list):
        return [
            {name: _tidy(name, item) for name, item in one.items()} if isinstance(one, dict) else one for one in value
        ]
    if key == "commit":
        return str(value)
    return value


def _check_fields(source: Path, where: str, document: Mapping[Any, Any], cls: type[Any]) -> None:
    known = [one.name for one in fields(cls)]
    for name, value in document.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"plan {source}: {where}unknown field {name!r}{hint} (fields: {', '.join(known)})")
        inner = CommitPlan if name == "commits" else _CLASSES.get(name)
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if inner is not None and isinstance(one, dict):
                _check_fields(source, f"{where}{name}[{number}]: ", one, inner)


def _check_commands(where: str, commands: Iterable[Command]) -> None:
    seen: set[str] = set()
    for one in commands:
        safe_name(one.name, f"{where}: command name")
        if one.name in seen or one.name in ("base", "previous"):
            why = "is there twice" if one.name in seen else "has a meaning of its own"
            raise RecipeError(f"{where}: the command name {one.name!r} {why}; give each command another `name`")
        seen.add(one.name)
        if not one.text.strip():
            raise RecipeError(f"{where}: command {one.name!r} has nothing to run")
        for word in _BRACES.findall(one.text):
            close = difflib.get_close_matches(word, PLACEHOLDERS, 1, cutoff=0.7)
            if word not in PLACEHOLDERS and close:
                raise RecipeError(f"{where}: command {one.name!r} holds {{{word}}}; did you mean {{{close[0]}}}?")


def _check_check(where: str, check: Check, commands: set[str]) -> None:
    if bool(check.metric) == check.trace:
        raise RecipeError(f"{where}: a check is about a `metric` or the `trace: true`, one of them; got {check}")
    numbers = check.finite or check.pattern or any(x is not None for x in (check.min, check.max, check.factor))
    if check.trace and (numbers or check.within is not None):
        raise RecipeError(f"{where}: a check of a trace takes `equal` or `like`; got {check.text!r}")
    if not (numbers or check.equal or check.like):
        raise RecipeError(
            f"{where}: the check of {check.metric or 'trace'!r} asks nothing; give finite, min, max, factor, pattern, "
            "equal or like"
        )
    if check.factor is not None and check.factor < 1:
        raise RecipeError(f"{where}: factor is {check.factor:g}; at least 1 was expected")
    for name in (check.equal, check.like):
        if name and name not in {*_MERGE, *commands}:
            raise RecipeError(f"{where}: {name!r} is not base, previous or a command ({', '.join(sorted(commands))})")


def _check_expected(where: str, text: str) -> None:
    kind, colon, pattern = text.partition(":")
    kinds = ("error", "nonfinite", "bound", "range", "pattern", "check", "diverged", "changed", "missing")
    if kind not in kinds:
        raise RecipeError(f"{where}: expect {text!r}: no such red flag; kinds: {', '.join(kinds)}")
    if colon:
        try:
            re.compile(pattern.strip())
        except re.error as error:
            raise RecipeError(f"{where}: expect {text!r}: not a regular expression: {error}") from error


def _filled(text: str, values: Mapping[str, str | int]) -> str:
    return _BRACES.sub(lambda found: str(values.get(found[1], found[0])), text)
