"""Predicates over the metrics of one pair, such as `rel_l2 <= 1e-3 and worst_row < 0.05`.

The grammar is a small part of Python's, read with `ast` and never evaluated as code: numbers, the names in
`VARIABLES`, comparisons (chained ones too), `and`, `or`, `not` and parentheses. A comparison with NaN is false and
makes the whole predicate false, under `not` as well.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimtab.errors import InputError

VARIABLES = {
    "rel_l2": "|a - r| / |r|",
    "rel_diff": "|a - r|^2 / (|a|^2 + |r|^2)",
    "mae": "mean |a - r|",
    "rmse": "sqrt(mean (a - r)^2)",
    "max_abs": "max |a - r|",
    "cosine": "mean cosine over rows",
    "cosine_min": "smallest cosine of a row",
    "slope": "least squares candidate ~ slope * reference",
    "worst_row": "largest |a - r| / max(|r|, 0.01 rms row norm) of a row",
    "worst_channel": "largest rms error of a channel of the last dimension",
    "noise_ratio": "median over rows of row error over expected rounding",
    "worst_noise_ratio": "largest such ratio of a row",
    "ulp": "largest distance in representable steps of the coarser dtype",
    "p50": "median of |a - r|",
    "p90": "0.9 quantile of |a - r|",
    "p99": "0.99 quantile of |a - r|",
    "p999": "0.999 quantile of |a - r|",
    "nan_reference": "NaN elements of the reference",
    "nan_candidate": "NaN elements of the candidate",
    "inf_reference": "infinite elements of the reference",
    "inf_candidate": "infinite elements of the candidate",
    "numel": "number of elements",
    "layer": "layer index (NaN where there is none)",
}

Lookup = Callable[[str], float]
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MAX_LENGTH = 2000


class _NotANumber(Exception):
    """A variable of the predicate is NaN."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed predicate; `text` is what was written."""

    text: str
    tree: ast.expr = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Predicate:
        """Read a predicate.

        Raises:
            InputError: not the grammar, or an unknown name (the nearest is given).
        """
        if len(text) > _MAX_LENGTH:
            raise InputError(f"a predicate of {len(text)} characters; at most {_MAX_LENGTH} are read")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            _check(tree, text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{text!r} is not a predicate; write for example 'rel_l2 <= 1e-3 and ulp < 16'") from error
        return cls(text.strip(), tree)

    def holds(self, lookup: Lookup) -> bool:
        """Evaluate; `lookup` gives the value of a name, and is asked only for the names that are needed."""
        try:
            return _holds(self.tree, lookup)
        except _NotANumber:
            return False

    def explain(self, lookup: Lookup) -> str:
        """The predicate with the values of the names in it, for messages."""
        names = sorted({node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)})
        return f"{self.text} (" + ", ".join(f"{name} = {lookup(name):.6g}" for name in names) + ")"


@dataclass(frozen=True, slots=True)
class Rule:
    """A regular expression on the tensor's name (whole name) and the predicate for tensors that match it."""

    pattern: str
    predicate: Predicate

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `regex: predicate`.

        Raises:
            InputError: no colon, or a regular expression or predicate that cannot be read.
        """
        pattern, colon, predicate = text.rpartition(":")
        if not colon or not pattern.strip():
            raise InputError(f"{text!r} is not a rule; write 'regex: predicate', such as '.*mlp.*: rel_l2 <= 1e-2'")
        try:
            re.compile(pattern.strip())
        except re.error as error:
            raise InputError(f"{pattern.strip()!r} is not a regular expression: {error}") from error
        return cls(pattern.strip(), Predicate.parse(predicate))

    def matches(self, tensor: str) -> bool:
        """Whether this rule judges the tensor of that name."""
        return re.fullmatch(self.pattern, tensor) is not None

    def __str__(self) -> str:
        return f"{self.pattern}: {self.predicate.text}"


def parse_rules(rules: Sequence[str | Rule]) -> tuple[Rule, ...]:
    """Read rules in order; the first that matches a tensor judges it."""
    if isinstance(rules, str):
        rules = [rules]
    return tuple(rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in rules)


def first_match(rules: Sequence[Rule], tensor: str) -> Rule | None:
    """Return the first rule that matches the tensor."""
    return next((rule for rule in rules if rule.matches(tensor)), None)


def _check(node: ast.expr, text: str) -> None:
    """Accept the whitelisted nodes only; the root must be a truth value."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text)
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        for value in (node.left, *node.comparators):
            _check_number(value, text)
    else:
        raise InputError(f"{text!r}: expected comparisons joined by and, or, not; got {type(node).__name__}")


def _check_number(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        _check_number(node.operand, text)
    elif isinstance(node, ast.Name):
        if node.id not in VARIABLES:
            near = difflib.get_close_matches(node.id, VARIABLES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"{text!r}: no variable {node.id!r}; {hint}there are {', '.join(VARIABLES)}")
    elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        raise InputError(f"{text!r}: expected a number or a name; got {type(node).__name__}")


def _holds(node: ast.expr, lookup: Lookup) -> bool:
    if isinstance(node, ast.BoolOp):
        decide = any if isinstance(node.op, ast.Or) else all
        return decide(_holds(value, lookup) for value in node.values)
    if isinstance(node, ast.UnaryOp):
        return not _holds(node.operand, lookup)
    assert isinstance(node, ast.Compare)
    left = _number(node.left, lookup)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        right = _number(right_node, lookup)
        if not _COMPARE[type(op)](left, right):
            return False
        left = right
    return True


def _number(node: ast.expr, lookup: Lookup) -> float:
    if isinstance(node, ast.UnaryOp):
        value = _number(node.operand, lookup)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Name):
        value = lookup(node.id)
        if math.isnan(value):
            raise _NotANumber
        return value
    assert isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    return node.value
