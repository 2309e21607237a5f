"""The layer before vLLM's routes: it reads a request's steering, and turns down what cannot be before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trimtab._base.log import get_logger
from trimtab.backends.vllm.config import KEY
from trimtab.backends.vllm.server.admin import PATH, Admin
from trimtab.backends.vllm.server.engine import CURRENT
from trimtab.backends.vllm.server.http import (
    App,
    Disconnected,
    JsonEdit,
    Receive,
    Reporting,
    Scope,
    Send,
    answer,
    header,
    read_body,
    replay,
)
from trimtab.backends.vllm.server.naming import PARAM
from trimtab.backends.vllm.server.refusal import Refusal

if TYPE_CHECKING:
    from trimtab.backends.vllm.server.desk import Desk

_log = get_logger(__name__)
_MODELS = "/v1/models"


class SteeringMiddleware:
    """ASGI middleware, inside vLLM's own: authentication and CORS come first.

    Args:
        app: what follows.
        desk: prepares steerings.
        admin: answers `/v1/steerings`.
        models: names of the models that are served now, adapters included.
    """

    def __init__(self, app: App, desk: Desk, admin: Admin, models: Callable[[], Sequence[str]]) -> None:
        self._app, self._desk, self._admin, self._models = app, desk, admin, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if path == PATH or path.startswith(f"{PATH}/"):
                await self._admin(path, scope, receive, send)
            elif path == _MODELS and scope["method"] == "GET":
                await self._app(scope, receive, JsonEdit(send, self._list_aliases))
            elif scope["method"] == "POST" and (header(scope, b"content-type") or b"").lower().startswith(
                b"application/json"
            ):
                await self._generate(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Refusal as error:
            self._desk.refuse(error)
            # what is left of its body is not waited for
            await answer(send, error.status, error.document(), ((b"connection", b"close"),))
        except Disconnected:
            _log.debug("a request broke off before its body had come")

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        asked, changed = self._read(body)
        if changed is not None:
            body = changed
            kept = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
            scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        if asked is None:
            await self._app(scope, replay(body, receive), send)
            return
        turn = await self._desk.prepare(asked)
        token = CURRENT.set(turn)
        try:
            await self._app(scope, replay(body, receive), Reporting(send, turn))
        finally:
            CURRENT.reset(token)
            self._desk.release(turn)

    def _read(self, body: bytes) -> tuple[str | None, bytes | None]:
        """Return the steering that a body asks for, and the body without its alias where it has one.

        Raises:
            Refusal: what stands for a steering is no text, or the request cannot be steered.
        """
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return None, None  # vLLM says what is wrong with it
        if not isinstance(document, dict):
            return None, None
        asked: list[str] = []
        changed = None
        base, alias = self._alias(document.get("model"))
        if alias is not None:
            asked.append(alias)
            changed = json.dumps({**document, "model": base}).encode()
        xargs = document.get("vllm_xargs")
        if isinstance(xargs, dict) and KEY in xargs:
            asked += _texts(xargs[KEY])
        if asked and document.get("use_beam_search"):
            raise Refusal(
                "use_beam_search cannot be steered: each of its steps is an engine request of its own, whose prompt "
                "holds what was generated before; use n and temperature, or leave the steering out",
                reason="bad_request",
                param="use_beam_search",
            )
        return (",".join(asked) if asked else None), changed

    def _alias(self, model: Any) -> tuple[str, str | None]:
        """Return a model's own name, and the steering after its +."""
        served = self._models()
        if not isinstance(model, str) or model in served or "+" not in model:
            return str(model), None
        bases = [name for name in served if model.startswith(f"{name}+")]
        base = max(bases, key=len) if bases else model.partition("+")[0]
        return base, model[len(base) + 1 :]

    def _list_aliases(self, document: dict[str, Any]) -> None:
        listed = document.get("data")
        if isinstance(listed, list):
            document["data"] = listed + [
                {**card, "id": f"{card['id']}+{one.name}", "parent": card["id"]}
                for card in listed
                for one in self._desk.store.listed()
            ]


def _texts(given: Any) -> list[str]:
    listed = given if isinstance(given, list) else [given]
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise Refusal(
            f"{PARAM} is {json.dumps(given)[:80]}; text such as 'name:1.5' or 'a:1.5,b:-2' was expected",
            reason="bad_request",
            param=PARAM,
        )
    return listed
