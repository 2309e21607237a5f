"""What may judge a pair: the calibrated verdict with its limits, fixed thresholds, rules, published scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from trimtab.compare.rules import Rule, parse_rules
from trimtab.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """Differences as multiples of what rounding explains (`rounding.expected_error`, or a noise run).

    With nu the row error |a - r| / max(|r|, 0.01 rms row norm) over the expected error e, n rows of d channels:
    passed when median nu <= `median`, the worst row's nu <= `worst` sqrt(2 ln n), the worst element is within
    `element` sqrt(2 ln (n d)) of max(|r|, rms of its row, rms of its channel) e, and nothing is systematic; failed
    when one is exceeded `fail` times or the error is systematic; inconclusive between. Where few channels hold the norm
    (massive activations), every channel's error over its own rms is held to `worst` sqrt(2 ln d) e as well.

    Systematic: |slope - 1| or |mean error| / rms(r) above e (2 e for gradients, which share the loss's error) and above
    `systematic` nu e / sqrt(min(n, d, 1024)), and shared by the channels: the median of what their centred columns show
    deviates from 0 by more than `shared` of its standard errors. An error of one row, of one rounded weight or of a
    massive channel is common to many elements; it is no bias.
    """

    median: float = 4.0
    worst: float = 4.0
    element: float = 8.0
    systematic: float = 5.0
    shared: float = 6.0
    fail: float = 2.0

    def __str__(self) -> str:
        return f"calibrated (median noise ratio {self.median:g}, worst row {self.worst:g} sqrt(2 ln n))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Upper bounds, all of which must hold (`cosine_min` is a lower bound)."""

    rel_l2: float | None = None
    rel_diff: float | None = None
    mae: float | None = None
    rmse: float | None = None
    max_abs: float | None = None
    worst_row: float | None = None
    ulp: float | None = None
    cosine_min: float | None = None

    def __post_init__(self) -> None:
        if not self.bounds():
            raise InputError(f"Fixed() without a bound accepts anything; give one of {', '.join(_names(Fixed))}")
        wrong = [name for name, bound in self.bounds().items() if not bound >= 0 and name != "cosine_min"]
        if wrong:
            raise InputError(f"Fixed({wrong[0]}={getattr(self, wrong[0])!r}): a bound must be a number >= 0")

    def bounds(self) -> dict[str, float]:
        """The bounds that were given."""
        given = {name: getattr(self, name) for name in _names(Fixed)}
        return {name: bound for name, bound in given.items() if bound is not None}

    def __str__(self) -> str:
        return "fixed thresholds: " + ", ".join(f"{name} {bound:g}" for name, bound in self.bounds().items())


@dataclass(frozen=True, slots=True)
class Rules:
    """`regex: predicate` per tensor, first match wins; a tensor that no rule matches fails."""

    rules: tuple[str | Rule, ...]

    def __init__(self, rules: Sequence[str | Rule]) -> None:
        object.__setattr__(self, "rules", parse_rules(rules))
        if not self.rules:
            raise InputError(
                "Rules(()) judges nothing; give at least one 'regex: predicate', such as '.*: rel_l2 < 1e-2'"
            )

    def parsed(self) -> tuple[Rule, ...]:
        """The rules as parsed."""
        return parse_rules(self.rules)

    def __str__(self) -> str:
        return "rules: " + "; ".join(str(rule) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Scale:
    """A published scale, by name; its constants are those of the source and know nothing of dtypes."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}: {SCALES[self.name]}"


SCALES = {
    "sglang": "rel_diff <= 1e-3, the default of sglang's comparator (accepts 4.5 % relative L2 error)",
    "rel_diff_bands": "rel_diff < 1e-7 identical, < 1e-5 equivalent, < 1e-3 minor; < 1e-1 significant, else severe "
    "(the last two fail; rounding to bfloat16 alone gives 1.4e-6)",
    "msprobe": "cosine > 0.99 and max_abs < 1e-3, the rule of thumb of msprobe's compare",
}

Verdict = Calibrated | Fixed | Rules | Scale


def parse_verdict(verdict: str | Verdict) -> Verdict:
    """Return the rule object for a name.

    Raises:
        InputError: no such name; the message lists them.
    """
    if not isinstance(verdict, str):
        return verdict
    if verdict == "calibrated":
        return Calibrated()
    if verdict in SCALES:
        return Scale(verdict)
    raise InputError(f"no verdict {verdict!r}; there are calibrated, {', '.join(SCALES)}, Fixed(...) and Rules(...)")


def _names(cls: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(cls))
