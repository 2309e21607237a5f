"""One request while it runs: what it has generated, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trimtab.backends._sampling import Sampler
from trimtab.backends.base import EncodedPrompt, Generation, Request, Stop, num_rows
from trimtab.errors import InputError, NonFiniteError
from trimtab.results.runs import DoseSummary
from trimtab.steering import Program


@dataclass(slots=True)
class Item:
    """One request and what it has generated."""

    name: str
    request: Request
    prompt: EncodedPrompt
    program: Program | None
    eos: frozenset[int]
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    stop: Stop | None = None

    def __post_init__(self) -> None:
        if self.request.budget == 0:
            self.stop = "length" if self.request.forced_tokens is None else "forced"

    @property
    def length(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt.ids)

    @property
    def rows(self) -> int:
        """Rows that this request has run."""
        return num_rows(self.length, len(self.tokens))

    @property
    def greedy(self) -> bool:
        """Whether the next token is the most likely one."""
        return self.request.forced_tokens is None and self.request.sampling.temperature == 0

    def choose(self, logits: Tensor) -> int:
        """Return the next token when it is not the most likely one: forced, or drawn from float32 logits [vocab]."""
        if self.request.forced_tokens is not None:
            return self.request.forced_tokens[len(self.tokens)]
        return self.sampler.draw(logits)

    def accept(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        """Take the next token and find out whether it is the last.

        Raises:
            NonFiniteError: the model gave no probability.
        """
        if math.isnan(logprob):
            raise NonFiniteError(
                f"request {self.name!r}: the logits at position {self.length + len(self.tokens) - 1} are not finite; "
                "the model left the range of its dtype: use bfloat16 or float32, or lower the steering"
            )
        self.tokens.append(token)
        if self.request.logprobs is not None:
            self.logprobs.append(logprob)
        if self.request.logprobs:
            self.top.append(top[: self.request.logprobs])
        last = len(self.tokens) == self.request.budget
        if self.request.forced_tokens is not None:
            self.stop = "forced" if last else None
        elif token in self.eos and not self.request.ignore_eos:
            self.stop = "eos"
        elif last:
            self.stop = "length"

    def generation(self, text: str, doses: tuple[DoseSummary, ...]) -> Generation:
        """Return the result, when it is finished."""
        assert self.stop is not None
        return Generation(
            id=self.name,
            prompt_index=self.request.prompt_index,
            prompt_ids=self.prompt.ids,
            token_ids=tuple(self.tokens),
            text=text,
            logprobs=tuple(self.logprobs),
            top=tuple(self.top),
            stop=self.stop,
            doses=doses,
        )


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InputError: an id outside the vocabulary.
    """
    outside = [one for one in ids if not 0 <= one < vocabulary]
    if outside:
        raise InputError(f"{what} holds the token id {outside[0]}; the vocabulary has ids 0 to {vocabulary - 1}")


def check_request(name: str, request: Request, length: int, vocabulary: int, max_positions: int | None) -> None:
    """Refuse a request that the model has no room for.

    Raises:
        InputError: token ids or log-probabilities beyond the vocabulary, or more rows than positions.
    """
    if request.forced_tokens is not None:
        check_ids(request.forced_tokens, vocabulary, f"forced_tokens of request {name!r}")
    if (request.logprobs or 0) > vocabulary:
        raise InputError(f"request {name!r}: logprobs is {request.logprobs}; the vocabulary has {vocabulary} tokens")
    rows = num_rows(length, request.budget)
    if max_positions is not None and rows > max_positions:
        raise InputError(
            f"request {name!r} needs {rows} positions ({length} of the prompt) and the model has {max_positions}; "
            "shorten the prompt or lower max_new_tokens"
        )
