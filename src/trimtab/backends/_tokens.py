"""The token table of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trimtab.backends.base import EncodedPrompt, Request
from trimtab.trace import TokenRow


class Finished(Protocol):
    """A request that has run."""

    name: str
    request: Request
    prompt: EncodedPrompt
    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]


def token_rows(tokenizer: Any, done: Finished, config: str) -> list[TokenRow]:
    """Return one row per token of the prompt and of the generation, in order."""
    ids = [*done.prompt.ids, *done.tokens]
    texts = _texts(tokenizer, ids)
    start = len(done.prompt.ids)
    rows = []
    for position, (token, text) in enumerate(zip(ids, texts, strict=True)):
        step = position - start
        top = done.top[step] if 0 <= step < len(done.top) else ()
        rows.append(
            TokenRow(
                config=config,
                prompt=done.request.prompt_index,
                request=done.name,
                position=position,
                token_id=token,
                text=text,
                logprob=done.logprobs[step] if 0 <= step < len(done.logprobs) else None,
                top_ids=tuple(one for one, _ in top),
                top_logprobs=tuple(value for _, value in top),
                generated=step >= 0,
                stage="decode" if step >= 0 else "prefill",
            )
        )
    return rows


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    if tokenizer is None:
        return [""] * len(ids)
    known = {one: tokenizer.decode([one]) for one in set(ids)}
    return [known[one] for one in ids]
