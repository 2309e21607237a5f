"""The plan of a comparison: what will be compared with what, by which rule. Frozen and printable; reads no tensor."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.compare._arrange import arrange
from trimtab.compare._short import Short
from trimtab.compare._sides import Side, choose_configs, make_side, open_trace
from trimtab.compare.dims import DimsRule
from trimtab.compare.dims import parse_rules as parse_dims_rules
from trimtab.compare.expect import Expectation, Met, check, parse_expectation, read_expectation
from trimtab.compare.match import Matched, Pair, match, token_group
from trimtab.compare.rules import Rule, first_match, parse_rules
from trimtab.compare.verdict import Calibrated, Rules, Verdict, parse_verdict
from trimtab.compare.waivers import check_waivers, nearest_tensors
from trimtab.errors import ComparisonError, InputError
from trimtab.numerics.dtypes import coarser, resolve_dtype
from trimtab.results.comparison import RecordKey
from trimtab.trace import Trace

Source = Trace | str | Path


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Two runs of the reference that differ by noise only, matched like any two traces."""

    reference: Side
    candidate: Side
    pairs: dict[RecordKey, Pair]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparisonPlan:
    """Everything `execute` needs; `describe()` prints it."""

    reference: Side
    candidate: Side
    matched: Matched
    verdict: Verdict
    rules: tuple[Rule, ...]
    noise: Noise | None
    waive: tuple[str, ...]
    expectations: tuple[Expectation | None, Expectation | None]
    met: tuple[Met | None, Met | None]
    compute_dtype: torch.dtype | None
    """The coarser dtype the models computed in, where the traces say so."""
    num_layers: int | None
    verify: bool
    keep_rows: bool
    worst: int
    tolerances: bool

    @property
    def to_judge(self) -> Sequence[Pair]:
        """The pairs about which something is left to find out; all of them where bytes are hashed again."""
        return self.matched.pairs if self.verify else self.matched.pairs.single

    def rule_for(self, key: RecordKey) -> Rule | None:
        """The per-tensor rule that judges a record, if any."""
        return first_match(self.rules, key.tensor)

    def lines(self) -> tuple[str, ...]:
        """The plan in lines, without the single pairs."""
        matched = self.matched
        looked = matched.pairs.single
        by_row = sum(pair.positions is not None for pair in looked)
        same = sum(pair.same_digest for pair in looked) + matched.pairs.rows
        expected = [one.source if one is not None else "nothing" for one in self.expectations]
        lines = [
            f"reference: {self.reference.path} ({self.reference.units.height} units)",
            f"candidate: {self.candidate.path} ({self.candidate.units.height} units)",
            f"verdict: {self.verdict}",
            *(f"rule: {rule}" for rule in self.rules),
            f"expected: {expected[0]} (reference), {expected[1]} (candidate)",
            f"pairs: {len(matched.pairs)} ({by_row} by row and position, {len(matched.pairs) - by_row} whole; "
            f"{same} identical by digest{', verified' if self.verify else ', not read'})",
        ]
        copies = sum(len(one.copies) for side in (self.reference, self.candidate) for one in side.layouts)
        pieces = sum(pair.layouts is not None for pair in looked)
        if copies or pieces:
            lines.append(f"layouts: {pieces} pairs are put together or reordered; copies of {copies} pieces to verify")
        if self.noise is not None:
            lines.append(f"noise: {self.noise.reference.path} against {self.noise.candidate.path}")
        lines += [
            f"tokens diverge: prompt {one.prompt} request {one.request} at position {one.position}"
            for one in matched.tokens
        ]
        short = sum(one.count for one in matched.short)
        missing = sum(one.count for met in self.met if met is not None for one in met.missing)
        return (*lines, f"not comparable: {short} items unmatched or skipped, {missing} missing")

    def describe(self, limit: int = 50) -> str:
        """Print the plan with its pairs.

        Args:
            limit: how many pairs and unmatched items are listed; the rest is counted.
        """
        pairs = (f"  {pair.key.text}: {_how(pair)}" for pair in self.matched.pairs)
        short = (f"  {one.kind} ({one.side}) {one.key.text}: {one.reason}" for one in self.matched.short)
        lines = [*self.lines()]
        for listed, count in ((pairs, len(self.matched.pairs)), (short, len(self.matched.short))):
            lines += [*itertools.islice(listed, limit), *([f"  ... and {count - limit} more"] if count > limit else [])]
        return "\n".join(lines)


def plan_comparison(
    reference: Source,
    candidate: Source,
    *,
    verdict: str | Verdict = "calibrated",
    rules: Sequence[str | Rule] | None = None,
    noise: Source | Sequence[Source] | None = None,
    waive: Sequence[str] = (),
    expect: str | Path | None = None,
    verify: bool = False,
    config: str | None = None,
    reference_config: str | None = None,
    keep_rows: bool = False,
    dims: Sequence[str] = (),
    reference_dims: Sequence[str] = (),
    worst: int = 3,
    tolerances: bool = False,
) -> ComparisonPlan:
    """Plan a comparison without reading a tensor; the arguments are those of `compare`.

    Raises:
        InputError: a verdict, rule, waiver, configuration or expectation that cannot be used.
        ComparisonError: the two runs cannot be compared: other prompts, no rule to pair configurations.
    """
    chosen = parse_verdict(verdict)
    traces = (open_trace(reference), open_trace(candidate))
    sides = _sides(traces, config, reference_config)
    per_tensor = parse_rules(rules or ()) + (chosen.parsed() if isinstance(chosen, Rules) else ())
    _check_rules(per_tensor, sides)
    given = read_expectation(expect) if expect is not None else None
    expectations = tuple(given or _own_expectation(side) for side in sides)
    met = tuple(check(one, side) if one is not None else None for one, side in zip(expectations, sides, strict=True))
    if isinstance(waive, str):
        raise InputError(f"waive={waive!r} is one text; give a sequence of names, such as waive=({waive!r},)")
    if worst < 0:
        raise InputError(f"worst={worst}: a number of elements and rows, 0 for none")
    shared = parse_dims_rules(dims)
    spoken = ((*parse_dims_rules(reference_dims), *shared), shared)
    sides, matched = _matched(sides, spoken)
    _check_waivers(tuple(waive), sides, matched, met)
    return ComparisonPlan(
        reference=sides[0],
        candidate=sides[1],
        matched=matched,
        verdict=chosen,
        rules=per_tensor,
        noise=_plan_noise(noise, traces[0], chosen, reference_config or config, spoken[0]),
        waive=tuple(waive),
        expectations=(expectations[0], expectations[1]),
        met=(met[0], met[1]),
        compute_dtype=_compute_dtype(sides),
        num_layers=_num_layers(sides),
        verify=verify,
        keep_rows=keep_rows,
        worst=worst,
        tolerances=tolerances,
    )


def _how(pair: Pair) -> str:
    if pair.positions is None:
        made = "" if pair.layouts is None else f" of {pair.counts[0]} against {pair.counts[1]} records"
        tokens = ", tokens by ids" if pair.tokens is not None else ""
        return "identical by digest" if pair.same_digest else f"whole{made}{tokens}"
    spans = f"positions {pair.positions[0]} to {pair.positions[-1]}"
    same = ", identical by digest" if pair.same_digest else ""
    return f"{len(pair.positions)} rows in {len(pair.segments)} pieces, {spans}{same}"


def _sides(traces: tuple[Trace, Trace], config: str | None, reference_config: str | None) -> tuple[Side, Side]:
    ours, theirs = choose_configs(*traces, config, reference_config)
    keep = ours is None and theirs is None and len({name for name in traces[0].configs() if name}) > 1
    return (
        make_side("reference", traces[0], ours, keep_config=keep),
        make_side("candidate", traces[1], theirs, keep_config=keep),
    )


def _matched(
    sides: tuple[Side, Side], spoken: tuple[Sequence[DimsRule], Sequence[DimsRule]]
) -> tuple[tuple[Side, Side], Matched]:
    """Arrange both sides and pair them up."""
    arranged = arrange(sides, spoken)
    matched = match(*arranged.sides)
    return arranged.sides, dataclasses.replace(matched, short=(*arranged.short, *matched.short))


def _plan_noise(
    noise: Source | Sequence[Source] | None,
    reference: Trace,
    verdict: Verdict,
    config: str | None,
    spoken: Sequence[DimsRule],
) -> Noise | None:
    """Match the noise runs.

    Raises:
        InputError: a noise run beside a verdict that does not use it.
        ComparisonError: the two runs are bit-identical, which shows no noise.
    """
    if noise is None:
        return None
    if not isinstance(verdict, Calibrated | Rules):
        raise InputError(f"a noise run calibrates; the verdict {verdict} does not use it: leave one of the two out")
    if isinstance(noise, (list, tuple)) and len(noise) != 2:
        raise InputError(f"noise={noise!r}: one run, or two that differ by noise only")
    first, second = noise if isinstance(noise, (list, tuple)) else (reference, noise)
    traces = (open_trace(first), open_trace(second))
    configs = [[name for name in trace.configs() if name] for trace in traces]
    picked = [config if config in have else None for have in configs]
    known = _sides(traces, picked[1], picked[0])
    names = _tensors(known)
    mine = [rule for rule in spoken if any(rule.matches(name) for name in names)]
    sides, matched = _matched(known, (mine, mine))
    pairs = matched.pairs
    if pairs and all(pair.same_digest for pair in pairs):
        raise noise_is_identical(sides[0].path, sides[1].path)
    if not pairs:
        raise ComparisonError(f"the noise runs {sides[0].path} and {sides[1].path} have no record in common")
    found = {pair.key: pair for pair in pairs}
    for pair in pairs:  # a run on one rank is noise for the same tensor put together from several
        found.setdefault(dataclasses.replace(pair.key, rank=None), pair)
    return Noise(sides[0], sides[1], found)


def noise_is_identical(reference: str, candidate: str) -> ComparisonError:
    """The error for a repeat that shows no noise."""
    return ComparisonError(
        f"the noise runs {reference} and {candidate} are bit-identical, so they show no noise; repeat the run with "
        "another batch composition, or with one-ulp noise on its input"
    )


def _check_rules(rules: tuple[Rule, ...], sides: tuple[Side, Side]) -> None:
    tensors = _tensors(sides)
    for number, rule in enumerate(rules):
        if any(first_match(rules[: number + 1], tensor) is rule for tensor in tensors):
            continue
        matched = [tensor for tensor in tensors if rule.matches(tensor)]
        why = f"an earlier rule takes all {len(matched)} that it matches" if matched else "it matches no tensor"
        raise InputError(f"rule {rule.pattern!r}: {why}; {nearest_tensors(rule.pattern, tensors)}")


def _check_waivers(
    waive: tuple[str, ...], sides: tuple[Side, Side], matched: Matched, met: tuple[Met | None, ...]
) -> None:
    missing = [one for side in met if side is not None for one in side.missing]
    tensors = _tensors(sides) | {one.key.tensor for one in missing}
    check_waivers(waive, tensors, _entry_names(sides, matched, missing))


def _entry_names(sides: tuple[Side, Side], matched: Matched, missing: Sequence[Short]) -> Iterator[str]:
    """Every name that an entry of the ledger or a pair can have."""
    yield from (side.path for side in sides)
    for pair in matched.pairs:
        yield pair.key.text
        if pair.positions is not None:
            yield token_group(pair.key)
    for one in (*matched.short, *missing):
        yield from (one.key.text, one.group)


def _tensors(sides: tuple[Side, Side]) -> set[str]:
    return {one for side in sides for column in ("site", "name") for one in side.units[column].unique() if one}


def _own_expectation(side: Side) -> Expectation | None:
    plan = side.manifest.get("plan")
    return parse_expectation(plan, f"the plan of {side.path}") if isinstance(plan, dict) else None


def _compute_dtype(sides: tuple[Side, Side]) -> torch.dtype | None:
    """The coarser dtype that the manifests name for their models."""
    found: torch.dtype | None = None
    for side in sides:
        for part in ("provenance", "plan"):
            section = side.manifest.get(part)
            name: Any = section.get("dtype") if isinstance(section, dict) else None
            if isinstance(name, str):
                try:
                    dtype = resolve_dtype(name)
                except InputError:
                    continue
                found = dtype if found is None else coarser(found, dtype)
    return found


def _num_layers(sides: tuple[Side, Side]) -> int | None:
    layers = [int(one) for side in sides for one in side.units["layer_recorded"].drop_nulls()]
    said = [
        section["num_layers"]
        for side in sides
        for part in ("provenance", "plan")
        if isinstance(section := side.manifest.get(part), dict) and isinstance(section.get("num_layers"), int)
    ]
    return max([*said, *(layer + 1 for layer in layers)], default=None)
