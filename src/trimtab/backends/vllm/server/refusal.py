"""What a sender is told when a request is turned down before anything ran."""

from __future__ import annotations

import re
from typing import Literal

from trimtab.backends.vllm.sizes import Sizes

Reason = Literal[
    "unknown_name",
    "bad_strength",
    "bad_request",
    "does_not_fit",
    "outside_prompt",
    "full",
    "no_key",
    "wrong_key",
    "bad_name",
    "bad_file",
    "too_large",
]
_TYPES = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    503: "ServiceUnavailableError",
}
_SETTING = re.compile(rf"\b({'|'.join((*Sizes._fields, 'max_payload_bytes'))})\b(?:=(\d+))?")


class Refusal(Exception):
    """A request turned down.

    Args:
        message: what was given, what was expected, what exists, what to do.
        reason: why, in one word, for the metrics.
        status: HTTP status.
        param: the field of the request that is at fault.
    """

    def __init__(self, message: str, *, reason: Reason, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.status = status
        self.param = param

    def document(self) -> dict[str, object]:
        """Return the body of the answer, in the form of OpenAI's API."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "BadRequestError"),
                "param": self.param,
                "code": self.status,
            }
        }


def with_options(message: str) -> str:
    """Return a message of the engine with its settings called as `trimtab serve` takes them."""
    called = _SETTING.sub(lambda found: f"--{found[1].replace('_', '-')}{f' {found[2]}' if found[2] else ''}", message)
    return called.replace(" started with sites ", " started with --sites ")
