"""What every backend takes and gives: requests, captures, generations, and the Protocol that joins them.

Laws that hold in every backend, and that `trimtab.testing.conformance` checks:

- positions are absolute: the index of a token in its own unpadded sequence;
- a request of P prompt tokens and g generated ones runs P + max(g - 1, 0) rows, because the last token is never fed;
  the site `logits` has g rows, at positions P - 1 and on, unless prompt logits are asked for;
- row P - 1 + k predicts generated token k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trimtab.errors import InputError
from trimtab.results.runs import DoseSummary
from trimtab.sites import Site

if TYPE_CHECKING:
    from trimtab.steering import Positions, Steering
    from trimtab.trace import Writer

Edit = Literal["before", "after"]
Stop = Literal["eos", "length", "forced"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn. The default is greedy."""

    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    seed: int = 0
    """Seed of this request's own generator: a row draws the same numbers alone and in any batch."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"temperature is {self.temperature}; a finite number of at least 0 was expected (0: greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; a number above 0 and at most 1 was expected (1: keep all)")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; 0 (keep all) or a positive number was expected")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; an integer of 64 bits was expected")


GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to run, with its own steering and its own sampler."""

    prompt: Prompt
    """Text, token ids, or messages for the chat template."""
    id: str = ""
    """Name of the request in traces and results; empty: its index in the call."""
    prompt_index: int = 0
    steering: Steering | None = None
    max_new_tokens: int = 32
    """0 runs the prompt alone. Ignored with `forced_tokens`."""
    sampling: Sampling = GREEDY
    forced_tokens: tuple[int, ...] | None = None
    """Teacher forcing: decode along these tokens, EOS among them or not, and stop after the last."""
    ignore_eos: bool = False
    logprobs: int | None = 0
    """How many of the most likely tokens to report at each step, beside the chosen one (natural log, float32
    log-softmax). None: no log-probability at all, not even the chosen token's, so that an engine need compute none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; 0 or a positive number was expected")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}; None, 0 or a positive number was expected")
        prompt: object = self.prompt
        if not isinstance(prompt, (str, tuple)):
            raise InputError(
                f"the prompt is a {type(prompt).__name__}; text, a tuple of token ids or one of Message was expected"
            )
        if len(self.prompt) == 0:
            raise InputError(f"request {self.id!r} has an empty prompt; at least one token was expected")

    @property
    def budget(self) -> int:
        """Most tokens that this request can generate."""
        return self.max_new_tokens if self.forced_tokens is None else len(self.forced_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """Which rows of which sites go to the writer."""

    sites: tuple[str, ...]
    """Site patterns, such as `layers.*.resid_post`."""
    edit: tuple[Edit, ...] = ("after",)
    """State before the ops of the site, after them, or both. Where no op acts the record says `none`."""
    positions: str | Positions = "all"
    prompt_logits: bool = False
    """Whether the site `logits` also has the rows of the prompt before its last token."""

    def __post_init__(self) -> None:
        sites: object = self.sites
        if isinstance(sites, str):
            raise InputError(f"sites is the text {sites!r}; a tuple of patterns was expected: ({sites!r},)")
        if not self.sites:
            raise InputError("sites is empty; at least one site pattern was expected, such as layers.*.resid_post")
        if not self.edit or not set(self.edit) <= {"before", "after"}:
            raise InputError(f"edit is {self.edit!r}; ('before',), ('after',) or ('before', 'after') was expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSpan:
    """Where the content of one message lies: tokens [start, end), characters [char_start, char_end)."""

    role: str
    message: int
    start: int
    end: int
    char_start: int
    char_end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    ids: tuple[int, ...]
    text: str
    """The rendered text; empty for a prompt given as ids when there is no tokenizer."""
    spans: tuple[RoleSpan, ...] = ()
    unlocated: tuple[int, ...] = ()
    """Messages whose content the template did not keep verbatim, so that they have no span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What came of one request."""

    id: str
    prompt_index: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    """Natural log-probability of each generated token, before temperature and filters; () where none was asked for."""
    top: tuple[tuple[tuple[int, float], ...], ...]
    """Per generated token, the most likely ids with their log-probabilities, best first."""
    stop: Stop
    doses: tuple[DoseSummary, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that ran: prompt + max(generated - 1, 0)."""
        return num_rows(len(self.prompt_ids), len(self.token_ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Log-likelihood of a text, token by token."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """`logprobs[i]` is log p(ids[i + 1] | ids[:i + 1]), natural log; the first token has none."""

    @property
    def total(self) -> float:
        """Log-likelihood of all tokens after the first."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a backend knows of its model."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    device: str
    fallback: bool = False
    """Whether the module tree was found by structure, not by a table of its family."""
    max_positions: int | None = None
    weights_digest: str = ""
    attention: str = ""
    notes: tuple[str, ...] = field(default=())
    """What was found at load that a reader of the results should know."""


class Backend(Protocol):
    """A model that runs requests."""

    name: str
    model_id: str
    info: ModelInfo
    tokenizer: Any
    eos_ids: frozenset[int]
    """Tokens that end a generation."""

    def sites(self) -> tuple[Site, ...]:
        """Return the sites that can be captured and steered."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Turn a prompt into token ids, with the spans of its messages."""

    def generate(
        self,
        requests: Sequence[Request],
        *,
        capture: Capture | None = None,
        writer: Writer | None = None,
        config: str = "",
        progress: OnProgress | None = None,
        allow_unfired: bool = False,
    ) -> list[Generation]:
        """Run the requests and return their generations in order.

        Args:
            requests: prompts; every one may have another steering.
            capture: rows to record; needs `writer`.
            writer: where tensors, tokens and doses go.
            config: name of this configuration in the trace.
            progress: called as (finished requests, all requests).
            allow_unfired: accept ops that selected no row; the reason is in the dose.

        Raises:
            InputError: a request that cannot be run.
            SiteError: a site that this model does not have.
            NotAppliedError: the site of an op never ran.
            UnfiredError: an op selected no row.
            NonFiniteError: a correction made a state non-finite.
        """

    def score(self, texts: Sequence[Prompt], *, steering: Steering | None = None) -> list[Score]:
        """Return the log-likelihood of each text, token by token."""

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest should say of this backend."""

    def close(self) -> None:
        """Let go of the model."""


def num_rows(prompt: int, generated: int) -> int:
    """Return the number of rows that a request runs: `prompt + max(generated - 1, 0)`."""
    return prompt + max(generated - 1, 0)


def perplexity(scores: Sequence[Score]) -> float:
    """Return exp of the mean negative log-likelihood per predicted token, over all texts together.

    Range: 1 (certain) upwards. Formula: `exp(-sum(logprobs) / count)`.

    Raises:
        InputError: no text has a second token, so nothing was predicted.
    """
    count = sum(len(score.logprobs) for score in scores)
    if count == 0:
        raise InputError("perplexity of no predicted token; texts of at least two tokens were expected")
    return math.exp(-math.fsum(score.total for score in scores) / count)


def name_requests(requests: Sequence[Request]) -> list[str]:
    """Return the names of the requests, the index standing in for an empty one.

    Raises:
        InputError: nothing was given, or two requests of one prompt index share a name.
    """
    if not requests:
        raise InputError("no request was given; at least one was expected")
    names = [request.id or str(index) for index, request in enumerate(requests)]
    seen: set[tuple[int, str]] = set()
    for name, request in zip(names, requests, strict=True):
        if (request.prompt_index, name) in seen:
            raise InputError(f"two requests are named {name!r}; their rows would mix: give each its own id")
        seen.add((request.prompt_index, name))
    return names
