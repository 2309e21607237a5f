"""Pieces of HTTP: bodies read under a limit, answers that carry the doses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from trimtab.backends.vllm.server.refusal import Refusal

if TYPE_CHECKING:
    from trimtab.backends.vllm.server.desk import Turn

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SLACK = 1 << 20
"""Bytes beyond the limit of an upload that are still read."""
FIELD = "trimtab"
"""Name of the field that answers carry."""


class Disconnected(Exception):
    """The sender went away while its body was read."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of a name, in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def read_body(receive: Receive, *, limit: int | None = None) -> bytes:
    """Read a body; never holds more than `limit` bytes and one piece.

    A little beyond the limit is read and thrown away: a sender that is still writing when the connection closes may
    never see the answer.

    Raises:
        Refusal: 413, it is larger.
        Disconnected: it broke off.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if limit is None or size <= limit:
            pieces.append(piece)
            continue
        pieces.clear()
        if not more or size > limit + SLACK:
            raise too_large(limit)
    return b"".join(pieces)


def too_large(limit: int) -> Refusal:
    """Return the refusal of a body over the limit."""
    return Refusal(
        f"the body is larger than the {limit} bytes that this server takes (--max-upload-bytes)",
        reason="too_large",
        status=413,
    )


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives a body that was read already, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(send: Send, status: int, document: object, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Send a JSON document."""
    body = json.dumps(document).encode()
    length = (b"content-length", str(len(body)).encode())
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json"), length, *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


class JsonEdit:
    """A send that lets a JSON answer of status 200 be changed before it leaves.

    Args:
        send: where the answer goes.
        edit: changes the document in place.
    """

    def __init__(self, send: Send, edit: Callable[[dict[str, Any]], None]) -> None:
        self._send, self._edit = send, edit
        self._start: Message | None = None
        self._pieces: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Take one message of the answer."""
        if message["type"] == "http.response.start" and self._concerns(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish(self._start)

    @staticmethod
    def _concerns(message: Message) -> bool:
        return message["status"] == 200 and _content_type(message).startswith(b"application/json")

    async def _finish(self, start: Message) -> None:
        body = b"".join(self._pieces)
        document = json.loads(body)
        if isinstance(document, dict):
            self._edit(document)
            body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
        await self._send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


class Reporting:
    """A send that adds the doses of a request to its answer: to the document, or to the last chunk of a stream.

    A stream is passed on as it comes. Only a chunk that ends a choice, or has none, is kept until the next one comes,
    as it may be the last: the one before `data: [DONE]`.
    """

    def __init__(self, send: Send, turn: Turn) -> None:
        self._turn = turn
        self._plain = send
        self._json = JsonEdit(send, self._add)
        self._stream = False
        self._rest = b""
        self._held: bytes | None = None

    async def __call__(self, message: Message) -> None:
        """Take one message of the answer."""
        if message["type"] == "http.response.start":
            self._stream = _content_type(message).startswith(b"text/event-stream")
        if not self._stream or message["type"] != "http.response.body":
            await self._json(message)
            return
        more = message.get("more_body", False)
        out = self._feed(message.get("body", b""), last=not more)
        if out or not more:
            await self._plain({"type": "http.response.body", "body": out, "more_body": more})

    def _feed(self, data: bytes, *, last: bool) -> bytes:
        out = []
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if self._held is not None:
                held, self._held = self._held, None
                out.append((self._with_doses(held) if event.startswith(b"data: [DONE]") else held) + b"\n\n")
            if event.startswith(b"data: {") and (b'"finish_reason":"' in event or b'"choices":[]' in event):
                self._held = event
            else:
                out.append(event + b"\n\n")
        if last:
            out += [self._held + b"\n\n"] if self._held is not None else []
            out.append(self._rest)
            self._held, self._rest = None, b""
        return b"".join(out)

    def _with_doses(self, event: bytes) -> bytes:
        document = json.loads(event.removeprefix(b"data: "))
        self._add(document)
        return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    def _add(self, document: dict[str, Any]) -> None:
        ledger = self._turn.ledger
        if ledger.sequences or ledger.lost:  # a route that only counts tokens, say, has generated nothing
            document[FIELD] = ledger.document(self._turn.text, self._turn.plan.digest)


def _content_type(message: Message) -> bytes:
    return next((value for key, value in message.get("headers", ()) if key.lower() == b"content-type"), b"")
