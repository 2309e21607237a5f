"""`/v1/steerings`: list, look at, upload and remove steerings."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from trimtab.backends.vllm.server.http import SLACK, Receive, Scope, Send, answer, header, read_body, too_large
from trimtab.backends.vllm.server.naming import check_name
from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.backends.vllm.server.store import read_upload

if TYPE_CHECKING:
    from trimtab.backends.vllm.server.desk import Desk

PATH = "/v1/steerings"
KEY_HEADER = b"x-trimtab-admin-key"


class Admin:
    """Answers what is asked of `/v1/steerings`.

    Args:
        desk: whose store it is.
        key: who knows it may upload and remove; None: nobody may.
        max_bytes: largest upload.
    """

    def __init__(self, desk: Desk, *, key: str | None, max_bytes: int) -> None:
        self._desk = desk
        self._key = None if key is None else key.encode()
        self._max_bytes = max_bytes
        self._changing = asyncio.Lock()

    async def __call__(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request whose path begins with `PATH`."""
        method, name = scope["method"], path[len(PATH) + 1 :]
        allowed = ("GET", "HEAD", "PUT", "DELETE") if name else ("GET", "HEAD")
        if method not in allowed:
            refused = Refusal(f"{method} {path[:120]}: expected {', '.join(allowed)}", reason="bad_request", status=405)
            self._desk.refuse(refused)
            await answer(send, 405, refused.document(), ((b"allow", ", ".join(allowed).encode()),))
        elif method == "PUT":
            await self._put(name, scope, receive, send)
        elif method == "DELETE":
            await self._delete(name, scope, send)
        elif name:
            await answer(send, 200, self._desk.store.get(name).document())
        else:
            listed = [one.document() for one in self._desk.store.listed()]
            await answer(send, 200, {"object": "list", "data": listed})

    async def _put(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_key(scope)
        check_name(name)
        announced = header(scope, b"content-length")
        if announced is not None and announced.isdigit() and int(announced[:20]) > self._max_bytes + SLACK:
            raise too_large(self._max_bytes)
        data = await read_body(receive, limit=self._max_bytes)
        steering = await asyncio.to_thread(read_upload, data, name)
        async with self._changing:
            await self._desk.admit(name, steering)
            known = any(one.name == name for one in self._desk.store.listed())
            stored = await asyncio.to_thread(self._desk.store.put, name, steering)
        await answer(send, 200 if known else 201, stored.document())

    async def _delete(self, name: str, scope: Scope, send: Send) -> None:
        self._check_key(scope)
        async with self._changing:
            stored = await asyncio.to_thread(self._desk.store.remove, name)
        await answer(send, 200, {"id": stored.name, "object": "steering", "deleted": True})

    def _check_key(self, scope: Scope) -> None:
        if self._key is None:
            raise Refusal(
                "steerings cannot be changed: this server has no admin key; start it with --admin-key or "
                "TRIMTAB_ADMIN_KEY",
                reason="no_key",
                status=403,
            )
        if not hmac.compare_digest(header(scope, KEY_HEADER) or b"", self._key):
            raise Refusal("the header X-Trimtab-Admin-Key is missing or wrong", reason="wrong_key", status=401)
