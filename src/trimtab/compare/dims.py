"""The dims grammar: what the axes of a tensor are called and how a parallel run shares them out.

    b s[cp:zigzag,sp] (h*d)[tp] 1  # ep:replicated dp:mean  any note

- An axis is a name, `1` (a singleton without a name), a fused group `(a*b)`, or parts one behind the other, each shared
  out on its own: `(q:8+k:2+v:2)[tp]` (the numbers count heads; with fewer heads than ranks several hold the same, which
  is verified), `(gate+up)[tp]` (equal parts), `(g:2*(q:4+k+v))[tp]` (the parts of each of two groups one behind the
  other, as Megatron keeps query, key and value; whole, all of q come first).
- `[...]` lists the parallel axes that share it out, the outermost first: `tp`, or `cp:zigzag`, or `tp:partial`.
  Qualifiers: `sharded` and `natural` (the default, in rank order), `zigzag` (the sequence is cut into 2 n chunks and
  rank r holds chunks r and 2 n - 1 - r), `dispatched` (every rank holds the rows that were routed to it; the record
  `dispatched_ids` of the same layer says which), `partial` (every rank holds a term of a sum), `mean` (a term of a
  mean), `replicated` (every rank holds the same). `+` joins qualifiers; `sharded+mean` says that the loss is the mean
  over the ranks, so that gradients of the shares are n times too large; values are plain shares.
- After `#`, `axis:qualifier` speaks of the whole tensor (`replicated`, `partial`, `mean`), `dp:=group` names the group
  that takes the place of dp; everything else is a note.
- Reserved names: `b` batch, `s` sequence, `t` packed tokens.

Parallel axes are those of the record's columns (tp, pp, cp, ep, dp), `sp` with the ranks of tp, the names that sglang
and Megatron give them (`attn_tp`, `moe_ep`, ...), `micro` (the micro steps of a step) and `recompute_pseudo` (the
original and the recomputed pass). The grammar is a superset of that of sglang's dump comparator.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trimtab.errors import InputError

How = Literal["sharded", "zigzag", "dispatched", "partial", "mean", "replicated"]

COORDINATES = ("tp", "pp", "cp", "ep", "dp", "micro", "recompute")
AXES = {
    **{name: name for name in ("tp", "pp", "cp", "ep", "dp", "micro")},
    **{"sp": "tp", "etp": "tp", "edp": "dp", "attn_tp": "tp", "attn_dp": "dp", "attn_cp": "cp"},
    **{"moe_ep": "ep", "moe_tp": "tp", "moe_dp": "dp", "recompute_pseudo": "recompute"},
}
"""Parallel axis -> the coordinate of a record that tells its ranks apart."""

BATCH, SEQUENCE, TOKENS, SINGLETON = "b", "s", "t", "1"
_QUALIFIERS = ("sharded", "natural", "zigzag", "dispatched", "partial", "mean", "replicated")
_WHOLE = ("partial", "mean", "replicated")
_NAME = r"[A-Za-z_]\w*"
_PART = rf"{_NAME}(?:\s*:\s*\d+)?"
_PARTS = rf"{_PART}(?:\s*\+\s*{_PART})+"
_AXIS = re.compile(
    rf"(?P<name>1|{_NAME}|\(\s*{_NAME}(?:\s*\*\s*{_NAME})+\s*\)"
    rf"|\(\s*(?:(?P<plain>{_PARTS})|{_NAME}\s*:\s*(?P<groups>\d+)\s*\*\s*\(\s*(?P<grouped>{_PARTS})\s*\))\s*\))"
    r"(?:\[(?P<mods>[^\[\]]*)\])?"
)
_DECLARED = re.compile(r"(?P<axis>\w+):(?P<group>=?)(?P<what>[\w+]+)[,;]?")


@dataclass(frozen=True, slots=True)
class Split:
    """How one parallel axis shares a tensor out."""

    axis: str
    """As written, such as "sp"."""
    how: How
    scaled: bool = False
    """The loss is the mean of what the n ranks make of their shares: gradients on them are n times too large."""

    @property
    def coordinate(self) -> str:
        """The coordinate of a record that this axis goes by, such as "tp"."""
        return AXES[self.axis]

    @property
    def cuts(self) -> bool:
        """Whether the ranks hold different elements."""
        return self.how in ("sharded", "zigzag", "dispatched")


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts of an axis that lie one behind the other."""

    name: str
    count: int | None
    """How many units, such as heads, it has: in all, or in each group; None: parts are equal."""


@dataclass(frozen=True, slots=True)
class Dim:
    """One axis of a tensor."""

    names: tuple[str, ...]
    """Several when fused; empty for the nameless singleton; "q+k+v" for one of parts."""
    splits: tuple[Split, ...] = ()
    """The parallel axes that cut it, the outermost first."""
    parts: tuple[Part, ...] = ()
    groups: int = 0
    """How many groups there are in all, where each group has its parts one behind the other."""

    @property
    def text(self) -> str:
        """As it is written, without splits and counts of units."""
        if self.parts:
            return f"(g:{self.groups}*({self.names[0]}))" if self.groups else f"({self.names[0]})"
        return SINGLETON if not self.names else self.names[0] if len(self.names) == 1 else f"({'*'.join(self.names)})"


@dataclass(frozen=True, slots=True)
class Dims:
    """Parsed dims."""

    text: str
    axes: tuple[Dim, ...]
    whole: tuple[Split, ...] = ()
    """Parallel axes over which the tensor as a whole is replicated, or a term of a sum or mean."""
    dp_group: str | None = None
    note: str = ""

    def splits(self) -> Iterator[Split]:
        """Everything that is declared about parallel axes."""
        for axis in self.axes:
            yield from axis.splits
        yield from self.whole

    @property
    def parallel(self) -> bool:
        """Whether anything is declared about parallel axes, or another order than that in which it is compared."""
        return next(self.splits(), None) is not None or any(axis.groups for axis in self.axes)

    @property
    def dispatched(self) -> bool:
        """Whether the ranks hold rows in an order of their own, which ids undo."""
        return any(one.how == "dispatched" for one in self.splits())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all axes, fused ones one by one."""
        return tuple(name for axis in self.axes for name in axis.names)

    def split_of(self, coordinate: str) -> Split | None:
        """What is declared for a coordinate; a cut comes before a replication (`s[sp] h # tp:replicated`)."""
        found = [one for one in self.splits() if one.coordinate == coordinate]
        return min(found, key=lambda one: one.how == "replicated", default=None)

    @property
    def of_values(self) -> Dims:
        """The same without scales, which gradients have."""
        axes = tuple(replace(dim, splits=tuple(replace(one, scaled=False) for one in dim.splits)) for dim in self.axes)
        return replace(self, axes=axes)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class DimsRule:
    """Dims for the tensors whose whole name a regular expression matches."""

    pattern: str
    dims: Dims

    @classmethod
    def parse(cls, text: str) -> DimsRule:
        """Read `regex: dims`.

        Raises:
            InputError: no `: `, or a regular expression or dims that cannot be read.
        """
        pattern, colon, dims = text.partition(": ")
        if not colon and text.endswith(":"):
            pattern, colon = text[:-1], ":"
        if not colon or not pattern.strip():
            raise InputError(f"{text!r} gives no dims; write 'regex: dims', such as '.*qkv.*: b s h[tp]'")
        try:
            re.compile(pattern.strip())
        except re.error as error:
            raise InputError(f"{pattern.strip()!r} is not a regular expression: {error}") from error
        return cls(pattern.strip(), parse_dims(dims))

    def matches(self, tensor: str) -> bool:
        """Whether this rule speaks of the tensor of that name."""
        return re.fullmatch(self.pattern, tensor) is not None


def parse_dims(text: str) -> Dims:
    """Read dims.

    Args:
        text: such as "b s[cp:zigzag] h[tp] # dp:replicated".

    Raises:
        InputError: what is wrong, where, and what would be right.
    """
    if len(text) > 1000:
        raise InputError(f"dims of {len(text)} characters; at most 1000 are read")
    shape, _, rest = text.partition("#")
    axes = tuple(_axes(shape, text))
    whole, group, note = _declarations(rest, text)
    dims = Dims(text.strip(), axes, whole, group, note)
    _check_names(dims)
    _check_splits(dims)
    return dims


def parse_rules(rules: Sequence[str]) -> tuple[DimsRule, ...]:
    """Read `regex: dims` in order; the first that matches a tensor holds."""
    if isinstance(rules, str):
        raise InputError(f"dims={rules!r} is one text; give a sequence, such as dims=({rules!r},)")
    return tuple(DimsRule.parse(rule) for rule in rules)


def _axes(shape: str, text: str) -> Iterator[Dim]:
    at = 0
    while at < len(shape):
        if shape[at].isspace():
            at += 1
            continue
        found = _AXIS.match(shape, at)
        if found is None or (found.end() < len(shape) and not shape[found.end()].isspace()):
            raise InputError(
                f"dims {text!r}: {shape[at:].split()[0]!r} is no axis; write names apart by spaces, each with what "
                "shares it out in brackets, such as 'b s[cp:zigzag] (n*d)[tp] 1'"
            )
        parts = _parts(found["plain"] or found["grouped"] or "", text)
        name = "+".join(part.name for part in parts) or found["name"].strip("() ")
        names = () if name == SINGLETON else tuple(part.strip() for part in name.split("*"))
        mods = found["mods"]
        splits = tuple(_split(mod.strip(), text) for mod in mods.split(",")) if mods is not None else ()
        if not names and splits:
            raise InputError(f"dims {text!r}: the singleton 1 cannot be shared out; name the axis")
        if parts and any(split.how != "sharded" for split in splits):
            raise InputError(f"dims {text!r}: {splits[0].axis} is {splits[0].how}; parts are shared out in rank order")
        yield Dim(names, splits, parts, int(found["groups"] or 0))
        at = found.end()


def _parts(written: str, text: str) -> tuple[Part, ...]:
    """Read `q:8+k:2+v:2`; where one has a count, a part without one has 1."""
    if not written:
        return ()
    pairs = [tuple(piece.strip() for piece in part.partition(":")[::2]) for part in written.split("+")]
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"dims {text!r}: the part {twice!r} is named twice")
    if any(count and int(count) == 0 for _, count in pairs):
        raise InputError(f"dims {text!r}: a part of 0 units")
    counted = any(count for _, count in pairs)
    return tuple(Part(name, int(count or 1) if counted else None) for name, count in pairs)


def _split(mod: str, text: str) -> Split:
    axis, _, qualifiers = mod.partition(":")
    _check_axis(axis, text)
    given = [one.strip() for one in qualifiers.split("+")] if qualifiers else []
    for one in given:
        if one not in _QUALIFIERS:
            raise InputError(f"dims {text!r}: no qualifier {one!r}{_near(one, _QUALIFIERS)}")
    scaled = "mean" in given and len(given) > 1
    kinds = [one for one in given if one not in ("sharded", "natural") and not (scaled and one == "mean")]
    if len(kinds) > 1 or (kinds and kinds[0] not in ("zigzag", "dispatched") and (scaled or "sharded" in given)):
        raise InputError(f"dims {text!r}: {axis} is {' and '.join(given)}; an axis is one of them")
    return Split(axis, kinds[0] if kinds else "sharded", scaled)  # type: ignore[arg-type]


def _declarations(rest: str, text: str) -> tuple[tuple[Split, ...], str | None, str]:
    """Read what follows `#`; words that speak of no parallel axis are the note."""
    whole: list[Split] = []
    group: str | None = None
    note: list[str] = []
    for word in rest.replace("#", " ").split():
        found = _DECLARED.fullmatch(word)
        if found is None or found["axis"] not in AXES:
            if found is not None and found["what"] in _QUALIFIERS:
                _check_axis(found["axis"], text)
            note.append(word)
        elif found["group"]:
            _check_axis(found["what"], text)
            if AXES[found["axis"]] != "dp":
                raise InputError(f"dims {text!r}: only dp takes the place of a group, got {word!r}")
            group = found["what"]
        elif found["what"] not in _WHOLE:
            raise InputError(
                f"dims {text!r}: {word!r} after # must be one of {', '.join(_WHOLE)}; what cuts an axis stands in its "
                "brackets"
            )
        else:
            whole.append(Split(found["axis"], found["what"]))  # type: ignore[arg-type]
    return tuple(whole), group, " ".join(note)


def _check_axis(axis: str, text: str) -> None:
    if axis not in AXES:
        raise InputError(f"dims {text!r}: no parallel axis {axis!r}{_near(axis, tuple(AXES))}")


def _check_names(dims: Dims) -> None:
    twice = sorted({name for name in dims.names if dims.names.count(name) > 1})
    if twice:
        raise InputError(f"dims {dims.text!r}: the axis {twice[0]!r} is named twice")


def _check_splits(dims: Dims) -> None:
    """Refuse two statements about one coordinate, but for an axis that is cut beside its alias that is replicated."""
    seen: dict[str, Split] = {}
    for one in dims.splits():
        other = seen.setdefault(one.coordinate, one)
        if other is one:
            continue
        alias = other.axis != one.axis and "replicated" in (other.how, one.how)
        if not alias:
            shared = f" ({other.axis} and {one.axis} are the same ranks)" if other.axis != one.axis else ""
            raise InputError(
                f"dims {dims.text!r}: {one.axis} is {other.how} and {one.how}{shared}; a parallel axis is declared once"
            )
        seen[one.coordinate] = min(one, other, key=lambda split: split.how == "replicated")


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return "; " + (f"did you mean {near[0]!r}? " if near else "") + f"there are {', '.join(known)}"
