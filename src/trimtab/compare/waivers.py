"""Waivers: what a comparison may lack, by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from trimtab.errors import InputError

KINDS = ("missing", "unmatched", "skipped", "incomplete", "inconclusive", "failed", "replica")


def waived_by(waivers: Sequence[str], kind: str, *names: str) -> str | None:
    """Return the waiver that excuses an entry.

    A waiver is a glob on the entry's name or tensor, alone or as `kind:name`; a bare kind waives all of it. `failed`
    is waived with its kind only, and `corrupt` never.
    """
    if kind == "corrupt":
        return None
    for waiver in waivers:
        patterns = (waiver,) if kind != "failed" else ()
        head, colon, tail = waiver.partition(":")
        if head == kind:
            patterns = (*patterns, tail if colon else "*")
        if any(_selects(pattern, name) for name in names for pattern in patterns):
            return waiver
    return None


def check_waivers(waivers: Sequence[str], tensors: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a waiver that can excuse nothing, whatever the comparison finds.

    Args:
        waivers: as given.
        tensors: names of tensors that either side has or should have.
        names: longer names of entries, tried when no tensor fits (made only then).

    Raises:
        InputError: naming what is nearest.
    """
    known = sorted(set(tensors))
    every: list[str] = []
    for waiver in waivers:
        head, colon, tail = waiver.partition(":")
        of_kind = head in KINDS or head == "corrupt"
        if of_kind and not colon:
            continue
        patterns = (waiver, tail) if of_kind else (waiver,)
        if any(_selects(pattern, name) for pattern in patterns for name in known):
            continue
        every = every or sorted(set(names))
        if any(_selects(pattern, name) for pattern in patterns for name in every):
            continue
        raise InputError(
            f"the waiver {waiver!r} names nothing in the two runs; {_hint(waiver, of_kind, known)}; a waiver is a name "
            f"or glob, alone or as kind:name with one of {', '.join(KINDS)}"
        )


def nearest_tensors(name: str, tensors: Iterable[str]) -> str:
    """Name the existing tensors nearest to one that does not exist."""
    listed = sorted(set(tensors))
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.3) or listed[:3]
    more = len(listed) - len(near)
    return f"nearest of {len(listed)}: {', '.join(near)}" if more else f"there are {', '.join(near) or 'none'}"


def _hint(waiver: str, of_kind: bool, known: Sequence[str]) -> str:
    head, colon, tail = waiver.partition(":")
    kind = difflib.get_close_matches(head, KINDS, n=1) if not of_kind else []
    if kind and (not colon or any(_selects(tail, name) for name in known)):
        return f"did you mean {kind[0] + colon + tail!r}?"
    return nearest_tensors(tail if of_kind else waiver, known)


def _selects(pattern: str, name: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
