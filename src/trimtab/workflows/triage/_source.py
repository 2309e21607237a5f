"""From the suspect to its code: the file, the class in it, how it changed, which change fits the fingerprint."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import yaml

from trimtab.errors import InputError
from trimtab.results.comparison import Fingerprint
from trimtab.results.triage import Blame, Fix, Hunk, SourceReference
from trimtab.workflows.triage._git import RawHunk, Repository
from trimtab.workflows.triage._locate import Found
from trimtab.workflows.triage._suspicions import FITTING, find_suspicions
from trimtab.workflows.triage._tensors import Tensor

_MOST = 8
_BLAMED = 400
Kind = Literal["record", "dump call", "source map"]


class Where(NamedTuple):
    """A place in the source."""

    file: str
    line: int | None
    name: str
    found_by: Kind


class SourceMap(NamedTuple):
    """Rules of a source map: patterns of phase and tensor, and where such tensors are made."""

    rules: tuple[tuple[re.Pattern[str], re.Pattern[str], Where], ...]

    @classmethod
    def read(cls, path: str | Path) -> SourceMap:
        """Read a YAML or JSON list of `{phase, tensor, file, line, name}`; only `tensor` and `file` must be given.

        Raises:
            InputError: the file cannot be read or is no such list.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"source map {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
        rows = document if isinstance(document, list) else []
        if not rows or not all(isinstance(row, dict) and {"tensor", "file"} <= set(row) for row in rows):
            raise InputError(f"source map {str(path)!r}: expected a list of entries with at least tensor: and file:")
        return cls(tuple(_rule(path, row) for row in rows))

    def find(self, tensor: Tensor) -> Where | None:
        """Return the place of the first rule that fits."""
        key = tensor.record.key
        names = (key.tensor, tensor.path or "")
        return next(
            (
                where
                for phase, name, where in self.rules
                if phase.fullmatch(key.phase) and any(name.fullmatch(one) for one in names)
            ),
            None,
        )


def _rule(path: str | Path, row: dict[str, Any]) -> tuple[re.Pattern[str], re.Pattern[str], Where]:
    try:
        patterns = re.compile(str(row.get("phase", ".*"))), re.compile(str(row["tensor"]))
    except re.error as error:
        raise InputError(f"source map {str(path)!r}: {row['tensor']!r} is no regular expression: {error}") from error
    line = row.get("line")
    where = Where(str(row["file"]), line if isinstance(line, int) else None, str(row.get("name", "")), "source map")
    return (*patterns, where)


def place(found: Found, tensors: Sequence[Tensor], source_map: SourceMap | None) -> Where | None:
    """Return where the suspect's code is, by the source map first and then by what the records say."""
    if source_map is not None and (mapped := source_map.find(found.tensor)) is not None:
        return mapped
    same = [one for one in tensors if one.path == found.path and one.path is not None and one.source_file]
    own = [found.tensor] if found.tensor.source_file and found.origin != "between" else []
    one = next(iter([*same, *own] or ([found.tensor] if found.tensor.source_file else [])), None)
    if one is None or one.source_file is None:
        return None
    kind: Kind = "record" if one.module_class else "dump call"
    return Where(one.source_file, one.source_line, one.module_class, kind)


def look_up(
    where: Where, prints: Sequence[Fingerprint], *, repo: Path | None, base: str, head: str
) -> tuple[SourceReference, list[str]]:
    """Return what is known of a place, and one line for everything that could not be looked at.

    Args:
        where: file, line and name.
        prints: of the divergence; changes that can make them come first.
        repo: a folder of the repository; None takes the file's own.
        base: the older revision; empty when none is known.
        head: the newer one; empty is the working tree.
    """
    notes: list[str] = []
    file = Path(where.file)
    bare = SourceReference(
        file=where.file, line=where.line, end=None, name=where.name, found_by=where.found_by, revision=""
    )
    try:
        repository = Repository(repo if repo is not None else file.parent)
    except InputError as error:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        span = _span(text, where)
        return SourceReference(**_as_dict(bare, line=span[0], end=span[1], name=span[2])), [f"source: {error}"]
    inside = _inside(repository, file)
    if inside is None:
        return bare, [f"source: {where.file} is not in {repository.root}: no difference, no blame"]
    tracked = repository.tracks(inside)
    if not tracked:
        notes.append(f"source: git does not track {inside} in {repository.root}: no blame, and only changes elsewhere")
    elif repository.dirty(inside):
        notes.append(f"source: {inside} has uncommitted changes" + (f"; {head} does not hold them" if head else ""))
    if base:
        try:
            base, head = repository.commit(base), repository.commit(head) if head else ""
        except InputError as error:
            notes.append(f"source: {error}")
            base = head = ""
    line, end, name = _span(repository.text(head if tracked else "", inside) or "", where)
    hunks, elsewhere = _changes(repository, inside, (line, end), prints, base, head) if base else ((), ())
    if not base:
        notes.append("source: no older revision is known; give BASE..HEAD to see what changed")
    elif not hunks and tracked:
        notes.append(f"source: {inside} did not change in {_range(base, head)}")
    blame: tuple[Blame, ...] = ()
    if tracked and line is not None and end is not None:
        try:
            blame = repository.blame(head, inside, line, min(end, line + _BLAMED))
        except InputError as error:
            notes.append(f"source: {error}")
    found = _as_dict(bare, file=inside, line=line, end=end, name=name, revision=_range(base, head))
    return SourceReference(**found | {"hunks": hunks, "elsewhere": elsewhere, "blame": blame}), notes


def suspect_hunk(source: SourceReference, prints: Sequence[Fingerprint]) -> Hunk | None:
    """Return the change that fits best: in the suspect's own code, then by kind, then the nearest."""
    candidates = [one for one in (*source.hunks, *source.elsewhere)]
    if not candidates:
        return None
    own = {id(one) for one in source.hunks}

    def fit(hunk: Hunk) -> tuple[bool, int, bool, int]:
        inside = id(hunk) in own and hunk.distance == 0
        return inside, _fits(hunk, prints), id(hunk) in own, -hunk.distance

    best = max(candidates, key=fit)
    return best if fit(best)[0] or best.suspicions else None


def make_fix(hunk: Hunk, *, proved: bool, why: str) -> Fix:
    """Return the patch that takes a hunk back."""
    values = {name: getattr(hunk, name) for name in RawHunk.__slots__}
    return Fix(file=hunk.file, patch=RawHunk(**values).reversed(), proved=proved, why=why)


def fitting(hunk: Hunk, prints: Sequence[Fingerprint]) -> tuple[str, ...]:
    """Return the kinds of change in a hunk that can make one of the fingerprints."""
    wanted = {kind for one in prints for kind in FITTING.get(one.kind, ())}
    return tuple(dict.fromkeys(one.kind for one in hunk.suspicions if one.kind in wanted))


def _fits(hunk: Hunk, prints: Sequence[Fingerprint]) -> int:
    return len(fitting(hunk, prints[:1])) * 4 + len(fitting(hunk, prints)) * 2 + bool(hunk.suspicions)


def _changes(
    repository: Repository, file: str, span: tuple[int | None, int | None], prints: Sequence[Fingerprint],
    base: str, head: str,
) -> tuple[tuple[Hunk, ...], tuple[Hunk, ...]]:  # fmt: skip
    @functools.cache
    def text(revision: str, name: str) -> str:
        return repository.text(revision, name) or ""

    def read(hunk: RawHunk) -> Hunk:
        old, new = text(base, hunk.file), text(head, hunk.file)
        distance = _distance(hunk, span) if hunk.file == file else 1 << 20
        wide = hunk.widened(new)
        values = {name: getattr(wide, name) for name in RawHunk.__slots__}
        return Hunk(**values, distance=distance, suspicions=find_suspicions(hunk, old, new))

    own = sorted(map(read, repository.diff(base, head, [file])), key=lambda one: one.distance)
    others = [one for one in repository.diff(base, head, ["*.py"]) if one.file != file]
    rest = sorted(map(read, others[:200]), key=lambda one: -_fits(one, prints))
    return tuple(own[:_MOST]), tuple(one for one in rest[:_MOST] if one.suspicions)


def _distance(hunk: RawHunk, span: tuple[int | None, int | None]) -> int:
    if span[0] is None:
        return 0
    removed, added = hunk.changed()
    shift = hunk.old_start - hunk.new_start
    lines = added | {one - shift for one in removed}
    end = span[1] if span[1] is not None else span[0]
    return min((max(span[0] - one, one - end, 0) for one in lines), default=0)


def _span(text: str, where: Where) -> tuple[int | None, int | None, str]:
    """First and last line of the class of that name, or of the innermost definition around the line."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return where.line, where.line, where.name
    known = [one for one in ast.walk(tree) if isinstance(one, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    named = [one for one in known if one.name == where.name.rpartition(".")[2] and where.name]
    if where.line is not None:
        around = [one for one in known if one.lineno <= where.line <= (one.end_lineno or one.lineno)]
        named = named or sorted(around, key=lambda one: -one.lineno)[:1]
    if not named:
        return where.line, where.line, where.name
    return named[0].lineno, named[0].end_lineno, named[0].name


def _inside(repository: Repository, file: Path) -> str | None:
    """Path relative to the repository; a file of another machine is found by the longest end of its path."""
    try:
        return file.resolve().relative_to(repository.root.resolve()).as_posix()
    except ValueError:
        parts = PurePath(file).parts
    for start in range(len(parts)):
        tail = PurePath(*parts[start:])
        if not tail.is_absolute() and (repository.root / tail).is_file():
            return tail.as_posix()
    return None


def _range(base: str, head: str) -> str:
    return f"{base[:12]}..{head[:12] or 'working tree'}" if base else ""


def _as_dict(source: SourceReference, **changes: Any) -> dict[str, Any]:
    return {name: getattr(source, name) for name in SourceReference.__slots__} | changes
