"""What every scorer takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One output as scorers see it: blind, without the variant that made it."""

    question: str
    """What was asked, without any system prompt."""
    text: str
    """The continuation alone."""
    prompt_ids: tuple[int, ...] = ()
    """The prompt without any condition."""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """What a scorer says of one output."""

    value: float | None
    """None: there is none, and `refusal` or `reason` says why."""
    refusal: bool = False
    reason: str = ""
    retry: bool = False
    """Whether scoring again may find a value: whoever was asked did not answer."""


class Scorer(Protocol):
    """Turns outputs into numbers."""

    @property
    def name(self) -> str:
        """Column of the scores."""

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output, in order."""
