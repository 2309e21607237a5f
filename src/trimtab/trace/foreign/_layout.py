"""Which layout a directory has, read from the names in it: sglang's dumps, Miles' tree of them, or plain files."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import InputError, TraceError
from trimtab.trace.foreign._pattern import Pattern, guess
from trimtab.trace.foreign._payload import SUFFIXES
from trimtab.trace.foreign._sglang import STEM

Layout = Literal["sglang", "miles", "sglang hooks", "files"]

_MAX_FILES = 5_000_000
_OURS = re.compile(r"(?:^|/)rank-\d{5,}/tensors/part-\d+")
_HOOKS = re.compile(
    r"(?:(?P<prefix>.*)/)?TP(?P<tp_rank>\d{1,9})_PP(?P<pp_rank>\d{1,9})_Rank(?P<rank>\d{1,6})_pid\d+/"
    r"Pass(?P<step>\d{1,18})\.pt"
)
_PHASES = {"engines": "inference", "inference": "inference", "fwd_only": "fwd_only", "fwd_bwd": "fwd_bwd"}
_ENGINE = re.compile(r"engine_(\d{1,5})")
_ROLLOUT = re.compile(r"(?:(.*?)_?)rollout_(\d{1,18})")


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file, with what its path says about it."""

    path: str
    """Relative to the root, with forward slashes."""
    stem: str = ""
    """Of sglang's files: the tags in the name, directories made by a `/` in it included."""
    phase: str = ""
    engine: int | None = None
    rollout: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    """Of plain files: placeholders and what they stand for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A directory that is not ours and can be read."""

    layout: Layout
    files: tuple[File, ...]
    ignored: tuple[str, ...] = ()


def detect(root: str, pattern: str | None = None) -> Found | None:
    """Find out what a directory holds; None when it holds no file that could be read, or a trace of ours.

    Raises:
        TraceError: several dumps, or files that no rule tells apart.
        InputError: a pattern that cannot be used, or fits no file.
    """
    paths = sorted(_files(root))
    if not paths or any(_OURS.search(path) for path in paths):
        return None
    if pattern is not None:
        return _by_pattern(root, paths, Pattern(pattern, SUFFIXES))
    stems = {path: match for path in paths if (match := STEM.search(path)) is not None}
    if stems:
        dumps: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for path, match in stems.items():
            dumps[path[: match.start(1)].rstrip("/")].append((path, match[1]))
        ignored = []
        for path in paths:
            home = _home(path, dumps) if path not in stems else None
            if home is not None:
                dumps[home].append((path, path.removeprefix(f"{home}/").removesuffix(".pt")))
            elif path not in stems:
                ignored.append(path)
        return _sglang(root, dumps, tuple(ignored))
    hooks = {path: match for path in paths if (match := _HOOKS.fullmatch(path)) is not None}
    if hooks:
        _one_of(root, {match["prefix"] or "." for match in hooks.values()})
        files = [
            File(path=path, fields={key: value for key, value in match.groupdict().items() if key != "prefix"})
            for path, match in hooks.items()
        ]
        return Found(
            layout="sglang hooks", files=tuple(files), ignored=tuple(path for path in paths if path not in hooks)
        )
    return Found(layout="files", files=tuple(File(path=path, fields=guess(path)) for path in paths))


def _files(root: str) -> Iterator[str]:
    """Yield every file of a kind that is read; links to directories are not followed."""
    folders, count = [""], 0
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))  # noqa: PTH118 - a hundred thousand Path objects
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise TraceError(f"{root}/{folder} cannot be listed: {error}; give a directory that can be read") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    folders.append(name)
            elif entry.name.endswith(SUFFIXES):
                count += 1
                if count > _MAX_FILES:
                    raise TraceError(f"{root} holds more than {_MAX_FILES} files; give the directory of one dump")
                yield name


def _by_pattern(root: str, paths: list[str], pattern: Pattern) -> Found:
    fields = {path: pattern.fields(path) for path in paths}
    files = tuple(File(path=path, fields=found) for path, found in fields.items() if found is not None)
    if not files:
        raise InputError(
            f"the pattern {pattern.text!r} fits none of {len(paths)} files in {root}; the first is {paths[0]!r}: write "
            "how such a path is made, such as 'step_{step}/rank{rank}/{name}'"
        )
    return Found(layout="files", files=files, ignored=tuple(path for path, found in fields.items() if found is None))


def _sglang(root: str, dumps: dict[str, list[tuple[str, str]]], ignored: tuple[str, ...]) -> Found:
    places = {prefix: _place(prefix) for prefix in dumps}
    if len(dumps) > 1 and (
        not all(phase for phase, _, _ in places.values()) or len(set(places.values())) < len(places)
    ):
        _one_of(root, set(dumps))
    files = [
        File(path=path, stem=stem, phase=places[prefix][0], engine=places[prefix][1], rollout=places[prefix][2])
        for prefix, members in dumps.items()
        for path, stem in members
    ]
    miles = any(phase for phase, _, _ in places.values())
    return Found(layout="miles" if miles else "sglang", files=tuple(files), ignored=ignored)


def _home(path: str, dumps: Iterable[str]) -> str | None:
    """Return the dump of a file that a name with `/../` in it has moved; its metadata say what it is."""
    if "___" not in path.rpartition("/")[2] or not path.endswith(".pt"):
        return None
    return max((prefix for prefix in dumps if not prefix or path.startswith(f"{prefix}/")), key=len, default=None)


def _place(prefix: str) -> tuple[str, int | None, int | None]:
    """Return phase, engine and rollout of a dump from the folders it lies in."""
    phase, engine, rollout = "", None, None
    for part in prefix.split("/"):
        phase = phase or _PHASES.get(part, "")
        if match := _ENGINE.fullmatch(part):
            engine = int(match[1])
            phase = phase or "inference"
        elif match := _ROLLOUT.fullmatch(part):
            rollout = int(match[2])
            phase = f"{phase}:{match[1]}" if phase and match[1] else phase
    return phase, engine, rollout


def _one_of(root: str, prefixes: set[str]) -> None:
    """Refuse several dumps in one directory."""
    if len(prefixes) > 1:
        names = sorted(prefixes)
        listed = ", ".join(name or "." for name in names[:6]) + (", ..." if len(names) > 6 else "")
        raise TraceError(
            f"{root} holds {len(names)} dumps ({listed}) and nothing says how they belong together; give one of them, "
            f"such as {root}/{names[-1]}, or index one with: trimtab trace import {root}/{names[-1]} --out INDEX"
        )
