"""The engine of a server: its `generate` made to steer."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from trimtab.backends.vllm.config import KEY
from trimtab.backends.vllm.server.naming import PARAM
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.backends.vllm.wire import RequestData

if TYPE_CHECKING:
    from trimtab.backends.vllm.server.desk import Desk, Turn

CURRENT: ContextVar[Turn | None] = ContextVar("trimtab_turn", default=None)
"""The steering of the HTTP request that is being answered."""
_ENDED_EARLY = {"abort", "error"}


def install(engine: Any, desk: Desk) -> None:
    """Have the `generate` of one engine steer what is generated while a steering is current."""
    stock = engine.generate

    def generate(prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncGenerator[Any, None]:
        turn = CURRENT.get()
        given = (getattr(sampling_params, "extra_args", None) or {}).get(KEY)
        if turn is None and given is None:
            stream: AsyncGenerator[Any, None] = stock(prompt, sampling_params, request_id, **more)
            return stream
        if turn is not None:  # now: when the stream is read, an answer may have begun
            _check_prompt(desk, turn, prompt)
        return _steered(stock, desk, turn, given, prompt, sampling_params, request_id, more)

    engine.generate = generate


async def _steered(
    stock: Callable[..., AsyncGenerator[Any, None]],
    desk: Desk,
    turn: Turn | None,
    given: Any,
    prompt: Any,
    sampling_params: Any,
    request_id: str,
    more: Mapping[str, Any],
) -> AsyncGenerator[Any, None]:
    turn = desk.again(turn) if turn is not None else await _prepare(desk, given, prompt)
    try:
        data = RequestData(label=uuid.uuid4().hex, digest=turn.plan.digest, ops=turn.plan.ops)
        params = sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), KEY: data.to_wire()}
        collected = False
        try:
            async with contextlib.aclosing(stock(prompt, params, request_id, **more)) as stream:
                async for out in stream:
                    if out.finished and not collected:
                        collected = True
                        ended = any(one.finish_reason in _ENDED_EARLY for one in out.outputs)
                        if ended:
                            desk.abandon(data.label)
                            _tell_refused(desk, out)
                        else:
                            await desk.collect(turn, data.label, out.prompt_token_ids or ())
                    yield out
        finally:
            if not collected:
                desk.abandon(data.label)
    finally:
        desk.release(turn)


async def _prepare(desk: Desk, given: Any, prompt: Any) -> Turn:
    """Read the steering of a request that came by a route whose bodies are not read (audio, say)."""
    try:
        turn = await desk.prepare(given)
    except Refusal as error:
        raise _invalid(desk, error, given) from error
    try:
        _check_prompt(desk, turn, prompt)
    except BaseException:
        desk.release(turn)
        raise
    return turn


def _check_prompt(desk: Desk, turn: Turn, prompt: Any) -> None:
    """Refuse rows outside the prompt, where its tokens are known."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if ids is None:
        return
    try:
        desk.check_prompt(turn, len(ids))
    except Refusal as error:
        raise _invalid(desk, error, turn.text) from error


def _invalid(desk: Desk, refusal: Refusal, given: Any) -> Exception:
    """Count a refusal, and return it as vLLM's routes answer it: with 503 where it may pass, with 400 otherwise."""
    from vllm.exceptions import RetryableRequestError, VLLMValidationError

    desk.refuse(refusal)
    if refusal.status == 503:
        return RetryableRequestError(str(refusal))
    return VLLMValidationError(str(refusal), parameter=PARAM, value=repr(given)[:80])


def _tell_refused(desk: Desk, out: Any) -> None:
    """Say why the engine turned a request down, which vLLM's routes call an internal error."""
    if desk.when_full == "refuse" and all(one.finish_reason == "error" and not one.token_ids for one in out.outputs):
        from vllm.exceptions import RetryableRequestError

        refusal = desk.full()
        desk.refuse(refusal)
        raise RetryableRequestError(str(refusal))
