"""A server that speaks OpenAI's chat completions over real HTTP, and misbehaves as a script says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | bytes | None
"""A text; a status; raw bytes of a body; None: hang up in the middle of the answer."""


@dataclass
class ScriptedJudge:
    """What it was asked, and how it answers: a function of (question number, request)."""

    answer: Callable[[int, dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    late: threading.Event = field(default_factory=threading.Event)
    """While set, answers wait for `release`."""
    release: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prompts(self) -> list[str]:
        """Return the texts it was asked to judge."""
        return [one["messages"][0]["content"] for one in self.asked]


@contextmanager
def scripted_judge(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with judge._lock:
                judge.asked.append(request)
                number = len(judge.asked) - 1
            if judge.late.is_set():
                judge.release.wait(30)
            reply = judge.answer(number, request)
            if reply is None:
                self.send_response(200)
                self.send_header("content-length", "10000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status = reply if isinstance(reply, int) else 200
            body = reply if isinstance(reply, bytes) else json.dumps(_body(reply)).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            if status == 429:
                self.send_header("retry-after", "0.01")
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] - clients that gave up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        judge.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _body(reply: str | int) -> dict[str, Any]:
    if isinstance(reply, int):
        return {"error": {"message": f"status {reply}", "type": "scripted"}}
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice]}
