"""The exact scorer of the embedded model: counts the evidence of an attribute in a continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab import testbed
from trimtab.errors import InputError
from trimtab.evaluate.scorers.base import Mark, Output


@dataclass(frozen=True, kw_only=True, slots=True)
class TestbedScorer:
    """Share of an attribute among the evidence words of its kind.

    Args:
        attribute: one of `trimtab.testbed.ATTRIBUTES`.
        contrast: subtract the mean share of the other attributes of its kind: -1 to 1, and 0 where a text has no
            evidence at all. Otherwise the share alone, 0 to 1, and a text without evidence has no value.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    attribute: str
    contrast: bool = True

    def __post_init__(self) -> None:
        if self.attribute not in testbed.ATTRIBUTES:
            raise InputError(f"no attribute {self.attribute!r}; the testbed has {', '.join(testbed.ATTRIBUTES)}")

    @property
    def name(self) -> str:
        """Column of the scores."""
        return f"testbed:{self.attribute}" + ("" if self.contrast else ":share")

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return one mark for each output."""
        return [self._mark(one) for one in outputs]

    def _mark(self, output: Output) -> Mark:
        found = testbed.score(output.text)
        kind = next(names for names in (testbed.CONCEPTS, testbed.TONES, testbed.ROLES) if self.attribute in names)
        share = found.share(self.attribute)
        if self.contrast:
            others = [found.share(name) for name in kind if name != self.attribute]
            return Mark(value=share - sum(others) / len(others))
        if not sum(found.counts[name] for name in kind):
            return Mark(value=None, reason=f"no word of any {' or '.join(kind)}")
        return Mark(value=share)
