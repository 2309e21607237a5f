"""Monitor: asks its rules of every step that it is shown, and remembers what it has told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from trimtab.results.sae import SAEWarning
from trimtab.sae.monitor.rules import Rule, RuleSet

_LATE = 0.8  # of the steps: what comes after is late


@dataclass(slots=True)
class _Seen:
    """What a rule remembers of one metric."""

    told: bool = False
    steps: int = 0
    """Steps at which the metric was seen."""
    begun: bool = False
    """Whether `after` was met."""
    peak: float = -math.inf
    late_sum: float = 0.0
    late_count: int = 0


class Monitor:
    """The rules of one SAE.

    Args:
        sae: its name, for the warnings.
        sets: rule sets; see `rules_for`.
        total_steps: of the whole run.
        expansion: d_sae / d_in.
        site: input site.
        forced: ask every rule, whether or not a file's `when` fits.
    """

    def __init__(
        self,
        sae: str,
        sets: Sequence[RuleSet],
        *,
        total_steps: int,
        expansion: float = 0.0,
        site: str = "",
        forced: bool = False,
    ) -> None:
        self._sae, self._total = sae, total_steps
        self._rules: list[Rule] = []
        self.skipped: list[str] = []
        """Rules that are not asked, and why."""
        for one in sets:
            fits = forced or one.fits(expansion=expansion, site=site)
            self._rules += [rule for rule in one.rules if fits or rule.always]
            left = [rule.name for rule in one.rules if not (fits or rule.always)]
            if left:
                self.skipped.append(
                    f"{', '.join(left)}: figures of {one.name}.yaml are for {one.when.expansion}x SAEs of "
                    f"{one.when.site}; this one is {expansion:g}x of {site or 'an unnamed site'}"
                )
        self._seen: dict[str, _Seen] = {}

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules that are asked."""
        return tuple(rule.name for rule in self._rules)

    def see(self, step: int, values: Mapping[str, float]) -> list[SAEWarning]:
        """Ask the rules of the figures of a step, 1-based.

        Returns:
            What was broken here for the first time.
        """
        found = []
        for number, rule in enumerate(self._rules):
            for metric, value in values.items():
                if fnmatchcase(metric, rule.metric):
                    seen = self._seen.setdefault(f"{number}/{metric}", _Seen())
                    problem = self._step(rule, seen, step, value)
                    if problem and not seen.told:
                        seen.told = True
                        found.append(self._warning(rule, metric, step, value, problem))
        return found

    def finish(self, step: int) -> list[SAEWarning]:
        """Ask what can be asked only at the end; nothing, where the run ended before its last step."""
        if step < self._total:
            return []
        found = []
        for number, rule in enumerate(self._rules):
            if rule.at != "late" or self._total < rule.least_steps:
                continue
            for key, seen in self._seen.items():
                if key.startswith(f"{number}/") and seen.late_count and not seen.told:
                    mean = seen.late_sum / seen.late_count
                    limit = math.inf if rule.share_of_peak is None else rule.share_of_peak * seen.peak
                    high = "" if mean < limit else f"not below {limit:.4g}, {rule.share_of_peak:g} of its peak"
                    problem = _outside(rule, mean) or high
                    if problem:
                        seen.told = True
                        found.append(self._warning(rule, key.partition("/")[2], step, mean, problem))
        return found

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as plain JSON."""
        return {key: asdict(seen) for key, seen in self._seen.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember what `state` returned."""
        self._seen = {key: _Seen(**{**one, "peak": float(one["peak"])}) for key, one in state.items()}

    def _step(self, rule: Rule, seen: _Seen, step: int, value: float) -> str:
        """Return what is wrong at this step, or ""."""
        seen.steps += 1
        if rule.finite:
            return "" if math.isfinite(value) else "not finite"
        if not math.isfinite(value):
            return ""  # told by the rule about that
        seen.peak = max(seen.peak, value)
        if step > _LATE * self._total:
            seen.late_sum, seen.late_count = seen.late_sum + value, seen.late_count + 1
        if rule.reach is not None and rule.within is not None:
            short = step >= rule.within and seen.peak <= rule.reach
            return f"at most {seen.peak:.4g} in {step} steps, over {rule.reach:g} was expected" if short else ""
        if rule.at == "late" or (rule.at == "first" and seen.steps > 1):
            return ""
        if rule.after is not None:
            seen.begun = seen.begun or value < rule.after.below or step >= rule.after.or_step
            if not seen.begun:
                return ""
        return _outside(rule, value)

    def _warning(self, rule: Rule, metric: str, step: int, value: float, problem: str) -> SAEWarning:
        return SAEWarning(
            sae=self._sae,
            step=step,
            rule=rule.name,
            level=rule.level,
            metric=metric,
            value=value,
            text=f"{metric} {value:.4g} is {problem}: {rule.text}",
        )


def _outside(rule: Rule, value: float) -> str:
    if rule.max is not None and value > rule.max:
        return f"over {rule.max:g}"
    if rule.min is not None and value < rule.min:
        return f"under {rule.min:g}"
    return ""
