"""Which rows of a sequence: one language for steering and capture.

    positions := term ("," term)*           the union of the terms, less every term that begins with "!"
    term      := ["!"] (name | range | tokens)
    name      := all | prompt | generated | last_prompt | response | each_step_last
    range     := [edge] ":" [edge]          half-open
    edge      := 7 | -4 | P | P+3           from the start of the sequence, or from P, the length of the prompt
    tokens    := "tokens{" id ("," id)* "}" rows whose token is one of these ids
    mask      := "mask{" (0|1)* "}"         one digit per row from the start of the sequence

Positions are absolute in the sequence, so a KV cache, left padding or a chunked prefill do not shift them. `prompt` is
[0, P), `generated` [P, inf), `last_prompt` P-1, `response` [P-1, inf): the rows that predict the generated tokens.
`each_step_last`, the row that predicts the next token at every step, names the same rows as `response`.
A negative edge counts from P wherever it stands: `-4:P` is the end of the prompt, `-4:` goes on through the generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from trimtab.errors import PositionError

Edge: TypeAlias = tuple[bool, int]
"""(counts from P, offset)."""
Range: TypeAlias = tuple[Edge, Edge | None]

_NAMES: dict[str, Range] = {
    "all": ((False, 0), None),
    "prompt": ((False, 0), (True, 0)),
    "generated": ((True, 0), None),
    "last_prompt": ((True, -1), (True, 0)),
    "response": ((True, -1), None),
}
_ALIASES = {"each_step_last": "response"}
_SPELLED = {span: name for name, span in _NAMES.items()}
_FORMS = (
    "all, prompt, generated, last_prompt, response, each_step_last, a range such as 3:7, -4:P or P:P+8, "
    "tokens{5,9}, mask{0110}, or !term to exclude"
)
_COMMA = re.compile(r",(?![^{}]*\})")
_EDGE = re.compile(r"(?P<p>P)?\s*(?P<offset>[+-]?\s*\d+)?")
_MANY = 4  # beyond this many absolute ranges a binary search is cheaper than one comparison each


@dataclass(frozen=True)
class Positions:
    """A selection of rows; make one with `Positions.parse`, `tokens`, `from_mask`, and combine with `|` and `-`.

    Example:
        >>> Positions.parse("prompt, !0:1").canonical()
        'prompt,!0:1'
        >>> (Positions.parse("generated") | Positions.tokens([7])).canonical()
        'generated,tokens{7}'
    """

    ranges: tuple[Range, ...]
    token_ids: tuple[int, ...] = ()
    not_ranges: tuple[Range, ...] = ()
    not_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ranges", "not_ranges"):
            object.__setattr__(self, name, _normal(getattr(self, name)))
        for name in ("token_ids", "not_token_ids"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if _NAMES["all"] in self.ranges:
            object.__setattr__(self, "ranges", (_NAMES["all"],))
            object.__setattr__(self, "token_ids", ())
        if not self.ranges and not self.token_ids:
            excluded = ",".join(_spell(self.not_ranges, self.not_token_ids, "!"))
            right = f"all,{excluded}" if excluded else "all"
            raise PositionError(f"positions {excluded!r} select nothing; write {right!r} to begin with every row")

    @classmethod
    def parse(cls, given: str | Positions | Sequence[int] | Tensor) -> Positions:
        """Read positions from text; a sequence or tensor is a mask when boolean, absolute positions otherwise.

        Raises:
            PositionError: not in the grammar; the message names what would be right.
        """
        if isinstance(given, Positions):
            return given
        if isinstance(given, str):
            return _parse(given)
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            raise PositionError(f"positions {given!r} were given; expected text ({_FORMS}), a mask, or integers")
        if values and all(isinstance(value, bool) for value in values):
            return cls.from_mask(values)
        if any(value < 0 for value in values):
            raise PositionError(
                f"positions {values}: a list holds absolute positions >= 0; write -4:P for the last four"
            )
        return cls(tuple(((False, value), (False, value + 1)) for value in values))

    @classmethod
    def tokens(cls, ids: Iterable[int]) -> Positions:
        """Select the rows whose token id is one of `ids`."""
        return cls((), token_ids=tuple(int(one) for one in ids))

    @classmethod
    def from_mask(cls, mask: Sequence[bool] | Tensor) -> Positions:
        """Select the rows of a mask that starts at position 0; rows past its end are not selected.

        Raises:
            PositionError: the mask selects nothing.
        """
        bits = [bool(bit) for bit in (mask.tolist() if isinstance(mask, Tensor) else mask)]
        if not any(bits):
            raise PositionError(f"a mask of {len(bits)} rows selects nothing; set at least one row")
        return cls(tuple(((False, i), (False, i + 1)) for i, bit in enumerate(bits) if bit))

    def __or__(self, other: Positions) -> Positions:
        return Positions(
            self.ranges + other.ranges,
            self.token_ids + other.token_ids,
            self.not_ranges + other.not_ranges,
            self.not_token_ids + other.not_token_ids,
        )

    def __sub__(self, other: Positions) -> Positions:
        if other.not_ranges or other.not_token_ids:
            raise PositionError(f"{other.canonical()!r} excludes rows itself and cannot be excluded")
        return Positions(
            self.ranges, self.token_ids, self.not_ranges + other.ranges, self.not_token_ids + other.token_ids
        )

    def canonical(self) -> str:
        """Return the one text of this selection: terms sorted, ranges of absolute positions merged; it parses back."""
        return self._text

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        included = _spell(self.ranges, self.token_ids, "")
        return ",".join(included + _spell(self.not_ranges, self.not_token_ids, "!"))

    @cached_property
    def every(self) -> bool:
        """Whether every row is selected, whatever the prompt."""
        return self.ranges == (_NAMES["all"],) and not self.not_ranges and not self.not_token_ids

    @cached_property
    def needs_tokens(self) -> bool:
        """Whether the selection depends on token ids."""
        return bool(self.not_token_ids or self.token_ids)

    def settled(self, prompt_length: int) -> int:
        """Return the position from which every row is selected, or none is, token ids apart."""
        edges = [edge for span in (*self.ranges, *self.not_ranges) for edge in span if edge is not None]
        return max((max(offset + prompt_length * from_prompt, 0) for from_prompt, offset in edges), default=0)

    def check(self, prompt_length: int, length: int | None = None) -> None:
        """Refuse a selection that cannot be met.

        Args:
            prompt_length: P.
            length: rows that the whole sequence will have at most, or None when unknown.

        Raises:
            PositionError: a range begins before the sequence, beyond its end, or is empty for this prompt.
        """
        for start, stop in self.ranges:
            low = start[1] + prompt_length * start[0]
            high = None if stop is None else stop[1] + prompt_length * stop[0]
            text = _spell(((start, stop),), (), "")[0]
            if low < 0 or (high is not None and high < 0):
                raise PositionError(
                    f"positions {text!r} begin {-low} before the prompt, which has {prompt_length} tokens; "
                    f"use an edge of at least -{prompt_length}"
                )
            if high is not None and high <= low:
                raise PositionError(
                    f"positions {text!r} are empty for a prompt of {prompt_length} tokens: [{low}, {high})"
                )
            if length is not None and low >= length:
                raise PositionError(f"positions {text!r} begin at {low}; the sequence has at most {length} rows")

    def unfired_reason(self, prompt_length: int, length: int) -> str:
        """Say why nothing was selected in a sequence of `length` rows: "no such row" or "never matched"."""
        rows = torch.arange(length)
        without = Positions(self.ranges or (_NAMES["all"],), not_ranges=self.not_ranges)
        present = bool(without.mask(rows, prompt_length).any()) and self.needs_tokens
        return "never matched" if present else "no such row"

    def mask(self, positions: Tensor, prompt_length: int | Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Return which rows are selected.

        Args:
            positions: absolute positions, int64 [N]; a negative one is padding and never selected.
            prompt_length: P, one number or int64 [N].
            token_ids: int64 [N]; needed when the selection names token ids.

        Returns:
            bool [N].

        Raises:
            PositionError: token ids are named and were not given.
        """
        if self.needs_tokens and token_ids is None:
            raise PositionError(f"positions {self._text!r} name token ids, and no token ids were given for these rows")
        chosen = _within(self.ranges, self.token_ids, positions, prompt_length, token_ids)
        if self.not_ranges or self.not_token_ids:
            chosen = chosen & ~_within(self.not_ranges, self.not_token_ids, positions, prompt_length, token_ids)
        return chosen & (positions >= 0)


def _within(
    ranges: tuple[Range, ...],
    ids: tuple[int, ...],
    positions: Tensor,
    prompt_length: int | Tensor,
    token_ids: Tensor | None,
) -> Tensor:
    fixed = [span for span in ranges if _is_fixed(span)]
    chosen: Tensor | None = None
    if len(fixed) > _MANY:
        edges = [edge for start, stop in fixed for edge in (start, stop) if edge is not None]
        cuts = torch.tensor([offset for _, offset in edges], device=positions.device)
        chosen = torch.searchsorted(cuts, positions, right=True) % 2 == 1
        ranges = tuple(span for span in ranges if not _is_fixed(span))
    for start, stop in ranges:
        inside = positions >= _place(start, prompt_length)
        if stop is not None:
            inside = inside & (positions < _place(stop, prompt_length))
        chosen = inside if chosen is None else chosen | inside
    if ids and token_ids is not None:
        hit = torch.isin(token_ids, torch.tensor(ids, device=token_ids.device, dtype=token_ids.dtype))
        chosen = hit if chosen is None else chosen | hit
    return torch.zeros_like(positions, dtype=torch.bool) if chosen is None else chosen


def _place(edge: Edge, prompt_length: int | Tensor) -> int | Tensor:
    return prompt_length + edge[1] if edge[0] else edge[1]


def _is_fixed(span: Range) -> bool:
    return not span[0][0] and (span[1] is None or not span[1][0])


def _normal(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sort; merge ranges of absolute positions; refuse a range that can never hold a row."""
    relative, fixed = set(), []
    for start, stop in ranges:
        if stop is not None and start[0] == stop[0] and stop[1] <= start[1]:
            text = _spell(((start, stop),), (), "")[0]
            raise PositionError(f"the range {text!r} is empty: a range is half-open, its end above its start")
        if _is_fixed((start, stop)):
            fixed.append((start[1], None if stop is None else stop[1]))
        else:
            relative.add((start, stop))
    merged: list[tuple[int, int | None]] = []
    for low, high in sorted(fixed, key=lambda pair: pair[0]):
        last = merged[-1][1] if merged else -1
        if merged and (last is None or low <= last):
            merged[-1] = (merged[-1][0], None if last is None or high is None else max(last, high))
        else:
            merged.append((low, high))
    head: list[Range] = [((False, low), None if high is None else (False, high)) for low, high in merged]
    return tuple(head + sorted(relative, key=repr))


def _spell(ranges: tuple[Range, ...], ids: tuple[int, ...], prefix: str) -> list[str]:
    parts = []
    for span in ranges:
        start, stop = span
        parts.append(_SPELLED.get(span) or f"{_edge_text(start)}:{'' if stop is None else _edge_text(stop)}")
    if ids:
        parts.append("tokens{" + ",".join(map(str, ids)) + "}")
    return [prefix + part for part in parts]


def _edge_text(edge: Edge) -> str:
    from_prompt, offset = edge
    if not from_prompt or offset < 0:
        return str(offset)
    return "P" if offset == 0 else f"P+{offset}"


@lru_cache(maxsize=512)
def _parse(text: str) -> Positions:
    kept: tuple[list[Range], list[int]] = ([], [])
    dropped: tuple[list[Range], list[int]] = ([], [])
    for part in _COMMA.split(text):
        mark, term = re.fullmatch(r"\s*(!?)(.*?)\s*", part, re.DOTALL).groups()  # type: ignore[union-attr]
        ranges, ids = dropped if mark else kept
        found, tokens = _term(term.strip(), text)
        ranges.extend(found)
        ids.extend(tokens)
    return Positions(tuple(kept[0]), tuple(kept[1]), tuple(dropped[0]), tuple(dropped[1]))


def _term(term: str, whole: str) -> tuple[list[Range], list[int]]:
    name = _ALIASES.get(term, term)
    if name in _NAMES:
        return [_NAMES[name]], []
    if term.startswith("tokens{"):
        ids = [part.strip() for part in term[7:-1].split(",")]
        if not all(part.isdecimal() for part in ids):
            raise PositionError(f"positions {whole!r}: {term!r} needs token ids, such as tokens{{5,9}}")
        return [], [int(part) for part in ids]
    if term.startswith("mask{"):
        if not re.fullmatch(r"[01]*1[01]*", term[5:-1]):
            raise PositionError(f"positions {whole!r}: {term!r} needs digits 0 and 1, at least one 1: mask{{0110}}")
        return list(Positions.from_mask([digit == "1" for digit in term[5:-1]]).ranges), []
    if term == "last":
        raise PositionError(f"positions {whole!r}: there is no bare 'last'; write last_prompt or each_step_last")
    if re.fullmatch(r"-?\d+", term):
        number = int(term)
        span = "last_prompt" if number == -1 else f"{number}:{number + 1}"
        raise PositionError(
            f"positions {whole!r}: write {span!r} for one row, or 'tokens{{{abs(number)}}}' for a token id"
        )
    first, colon, last = term.partition(":")
    if not colon or ":" in last:
        raise PositionError(f"positions {whole!r}: cannot read {term!r}; write {_FORMS}")
    start = _edge(first, whole) if first.strip() else (False, 0)
    stop = _edge(last, whole) if last.strip() else None
    return [(start, stop)], []


def _edge(text: str, whole: str) -> Edge:
    match = _EDGE.fullmatch(text.strip())
    if match is None or not text.strip():
        raise PositionError(f"positions {whole!r}: {text!r} is not an edge; write a number, P, P+3 or -4")
    offset = int((match["offset"] or "0").replace(" ", ""))
    if match["p"] and match["offset"] and match["offset"][0] not in "+-":
        raise PositionError(f"positions {whole!r}: {text!r} is not an edge; write P+{offset}")
    return (bool(match["p"]) or offset < 0, offset)
