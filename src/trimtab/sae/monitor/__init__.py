"""The monitor: rules, a file per architecture, that a training must keep; each broken one is told once."""

from __future__ import annotations

from trimtab.sae.monitor.rules import PRESETS, Rule, RuleSet, read_rules, rules_for
from trimtab.sae.monitor.watch import Monitor

__all__ = ["PRESETS", "Monitor", "Rule", "RuleSet", "read_rules", "rules_for"]
