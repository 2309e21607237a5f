"""Side effects: what steering does to a text besides what it is for.

Perplexities are of the continuation alone, given the unsteered prompt, under the unsteered model. Loops lower the
perplexity, so they are counted by themselves and are never coherent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.backends import Backend, Capture, Prompt, Request, perplexity
from trimtab.errors import InputError
from trimtab.results.evaluation import AutoCoefficient, AutoPoint
from trimtab.steering import BoundOp, Constant, Positions, Steering

MAX_RATIO, MAX_REPETITION, MIN_TOKENS = 1.5, 0.3, 10
_LOOP_TOKENS, _LOOP_ROUNDS = 8, 3
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['\u2019]?m|i am) (?:very |really |so )?sorry\b.{0,40}\b(?:can(?:no|['\u2019])?t|unable|not able)"
    r"|sorry, (?:but )?i (?:can(?:no|['\u2019])?t|won['\u2019]?t)"
    r"|i (?:can(?:no|['\u2019])?t|cannot|won['\u2019]?t|must decline to|am unable to|am not able to) "
    r"(?:help|assist|comply|provide|do that|answer|fulfil|discuss|create|write|continue|engage)"
    r"|as an ai\b.{0,60}\b(?:can(?:no|['\u2019])?t|unable|not able))",
    re.IGNORECASE | re.DOTALL,
)


def distinct(ids: Sequence[int], n: int) -> float:
    """Return different n-grams over all n-grams, 1 when nothing repeats; 0 when there is no n-gram."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that stood before in the text; 0 when nothing repeats or there is no n-gram."""
    return 1.0 - distinct(ids, n) if len(ids) >= n else 0.0


def is_loop(ids: Sequence[int]) -> bool:
    """Whether the text ends by repeating one piece at least three times, over at least eight tokens."""
    for period in range(1, len(ids) // _LOOP_ROUNDS + 1):
        length = period
        while length < len(ids) and ids[-1 - length] == ids[-1 - length + period]:
            length += 1
        if length >= max(_LOOP_ROUNDS * period, _LOOP_TOKENS):
            return True
    return False


def is_refusal(text: str) -> bool:
    """Whether the text opens by declining to answer, in the usual English phrases."""
    return bool(_REFUSAL.match(text))


def is_coherent(ids: Sequence[int], perplexity: float, reference: float) -> bool:
    """Whether an output is long enough, not repetitive, not a loop, and not improbable.

    Args:
        ids: the continuation.
        perplexity: of it, under the unsteered model.
        reference: median perplexity of the unsteered outputs to the same prompts and seeds.
    """
    varied = repetition(ids) <= MAX_REPETITION and not is_loop(ids)
    return len(ids) >= MIN_TOKENS and varied and perplexity <= MAX_RATIO * reference


def continuation_perplexities(
    backend: Backend, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Return the perplexity of each continuation after its prompt, unsteered; NaN for an empty one.

    Args:
        backend: the model.
        prompts: token ids.
        continuations: token ids; equal pairs are scored once.
    """
    pairs = [(tuple(prompt), tuple(more)) for prompt, more in zip(prompts, continuations, strict=True)]
    todo = sorted({pair for pair in pairs if pair[1]}, key=lambda pair: len(pair[0]) + len(pair[1]))
    scored = backend.score([prompt + more for prompt, more in todo]) if todo else []
    found = {}
    for pair, score in zip(todo, scored, strict=True):
        after = score.logprobs[len(pair[0]) - 1 :]
        found[pair] = math.exp(-math.fsum(after) / len(after))
    return [found.get(pair, math.nan) for pair in pairs]


def retention(backend: Backend, steering: Steering | None, texts: Sequence[Prompt]) -> float:
    """Return the perplexity of texts under the steered model over that under the unsteered one; 1 is no damage.

    The first token of a text counts as its prompt, the rest as generated.

    Raises:
        InputError: no text of at least two tokens.
    """
    plain = perplexity(backend.score(texts))
    return 1.0 if steering is None else perplexity(backend.score(texts, steering=_fixed(steering, 1))) / plain


class Drift(NamedTuple):
    """What steerings do to the next token along fixed texts; each [steering, text]."""

    kl: np.ndarray[Any, np.dtype[np.float64]]
    """Mean over positions of KL(steered || unsteered), in nats."""
    ratio: np.ndarray[Any, np.dtype[np.float64]]
    """Log of the perplexity ratio of the text: steered over unsteered."""


def drift(
    backend: Backend,
    steerings: Sequence[Steering | None],
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> Drift:
    """Measure how far steerings move the next-token distribution along texts that are already there.

    Each text runs once for the unsteered model and every steering, as rows of one forward pass.

    Args:
        backend: the model.
        steerings: what to measure; None is the unsteered model itself.
        prompts: token ids; positions such as "generated" count from their ends.
        continuations: token ids, at least one each.

    Raises:
        InputError: an empty continuation.
    """
    kl = np.zeros((len(steerings), len(prompts)))
    ratio = np.zeros_like(kl)
    capture = Capture(sites=("logits",), prompt_logits=True)
    for column, (prompt, more) in enumerate(zip(prompts, continuations, strict=True)):
        if not more:
            raise InputError(f"continuation {column} is empty; at least one token was expected")
        ids, length = (*prompt, *more), len(prompt)
        rows = _Rows()
        listed = [
            Request(prompt=ids, id=str(number), steering=_fixed(one, length), max_new_tokens=0)
            for number, one in enumerate((None, *steerings))
        ]
        backend.generate(listed, capture=capture, writer=rows, allow_unfired=True)
        target = torch.tensor(more)[:, None]
        plain = rows.logprobs("0", length, len(more))
        for row in range(len(steerings)):
            steered = rows.logprobs(str(row + 1), length, len(more))
            kl[row, column] = float((steered.exp() * (steered - plain)).nan_to_num(0.0).sum(dim=1).mean())
            ratio[row, column] = float((plain.gather(1, target) - steered.gather(1, target)).mean())
    return Drift(np.maximum(kl, 0.0), ratio)


def auto_coefficient(
    backend: Backend,
    make: Callable[[float], Steering],
    prompts: Sequence[Prompt],
    scales: Iterable[float],
    *,
    budget: float,
    metric: str = "perplexity",
    max_tokens: int = 32,
) -> AutoCoefficient:
    """Return the largest strength whose damage, and that of every smaller one, stays within a budget.

    Args:
        backend: the model.
        make: strength -> steering.
        prompts: what the unsteered model continues greedily; damage is measured along those texts.
        scales: strengths to try, all of one sign.
        budget: most damage: a perplexity ratio (1.1 is 10 % worse), or nats of KL.
        metric: "perplexity" or "kl".
        max_tokens: length of the continuations.

    Raises:
        InputError: an unknown metric, a budget that nothing can keep, or strengths of both signs.
    """
    tried = sorted(set(scales), key=abs)
    if metric not in ("perplexity", "kl"):
        raise InputError(f"metric is {metric!r}; expected 'perplexity' or 'kl'")
    if budget < (1.0 if metric == "perplexity" else 0.0) or not math.isfinite(budget):
        raise InputError(f"budget is {budget}; a ratio of at least 1, or at least 0 nats, was expected")
    if not tried or 0.0 in tried or len({scale > 0 for scale in tried}) > 1:
        raise InputError(f"scales {tried}: one or more of one sign were expected, none of them 0")
    plain = backend.generate(
        [Request(prompt=one, id=str(number), max_new_tokens=max_tokens) for number, one in enumerate(prompts)]
    )
    found = drift(
        backend, [make(scale) for scale in tried], [one.prompt_ids for one in plain], [one.token_ids for one in plain]
    )
    kls, ratios = found.kl.mean(axis=1).tolist(), np.exp(found.ratio.mean(axis=1)).tolist()
    within = [(ratio if metric == "perplexity" else kl) <= budget for kl, ratio in zip(kls, ratios, strict=True)]
    kept = within.index(False) if False in within else len(within)
    reason = (
        f"{tried[kept]:g} is the first to break the budget"
        if kept < len(tried)
        else "every strength keeps within the budget: a larger one may, too"
    )
    return AutoCoefficient(
        metric=metric,
        budget=budget,
        scale=tried[kept - 1] if kept else 0.0,
        reason=reason,
        points=tuple(
            AutoPoint(scale=scale, kl=kl, perplexity_ratio=ratio, within=one)
            for scale, kl, ratio, one in zip(tried, kls, ratios, within, strict=True)
        ),
    )


def _fixed(steering: Steering | None, length: int) -> Steering | None:
    """Return the steering with positions that count from the prompt's end written as absolute ones.

    A text that was generated is run as one prompt, whose end is another.
    """
    if steering is None:
        return None
    moving = [one.gain for one in steering.bound if not isinstance(one.gain, Constant)]
    if moving:
        raise InputError(f"the gain {moving[0]} counts decode steps, and a finished text has none; use a constant gain")

    def spans(ranges: Sequence[Any]) -> tuple[Any, ...]:
        def edge(one: Any) -> Any:
            return None if one is None else (False, max(one[1] + (length if one[0] else 0), 0))

        return tuple((edge(start), edge(stop)) for start, stop in ranges)

    def bound(one: BoundOp) -> BoundOp:
        where = one.positions
        fixed = Positions(spans(where.ranges), where.token_ids, spans(where.not_ranges), where.not_token_ids)
        return BoundOp(one.pattern, one.op, fixed, one.gain)

    return Steering.of([bound(one) for one in steering.bound])


@dataclass(slots=True)
class _Rows:
    """A writer that keeps the logits of one call in memory."""

    parts: dict[str, list[tuple[list[int], Tensor]]]

    def __init__(self) -> None:
        self.parts = {}

    def write(self, name: str, tensor: Tensor, **fields: Any) -> int:
        positions = [int(one) for one in fields["positions"]]
        self.parts.setdefault(str(fields["request"]), []).append((positions, tensor.detach().cpu()))
        return 0

    def write_tokens(self, rows: Iterable[Any]) -> None:
        """Tokens are known already."""

    def write_dose(self, rows: Iterable[Any]) -> None:
        """Doses are not asked for."""

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""

    def logprobs(self, request: str, length: int, count: int) -> Tensor:
        """Return log-probabilities of the tokens after a prompt, float64 [count, vocabulary]."""
        pieces = self.parts[request]
        positions = torch.tensor([one for part, _ in pieces for one in part])
        values = torch.cat([part for _, part in pieces])[positions.argsort()]
        return torch.log_softmax(values[length - 1 : length - 1 + count].double(), dim=-1)
