"""How a request names its steering: `name`, `name:strength`, `sha:<digest>[:strength]`, several with commas between.

The strength s of a steering multiplies what it adds: each Add(v, scale=c) becomes Add(v, scale=s*c). It has no meaning
for the other ops. A bound, a factor kept or a value set is where the projection ends up, not how far it is moved; half
of a cap would be a cap that does not hold. So a steering with such an op has strength 1, and any other is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from trimtab.backends.vllm.server.refusal import Refusal
from trimtab.steering import Add, Steering

PARAM = "vllm_xargs.trimtab"
MAX_TERMS = 16
"""Steerings that one request may name."""
MIN_DIGEST = 16
"""Hex digits of a digest that must be given."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(rf"[0-9a-f]{{{MIN_DIGEST},64}}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SHA = "sha"


@dataclass(frozen=True, slots=True)
class Term:
    """One steering as a request names it."""

    key: str
    """Its name, or the first digits of its digest."""
    by_digest: bool
    strength: float

    def __str__(self) -> str:
        return f"{_SHA}:{self.key}" if self.by_digest else self.key


def check_name(name: str, *, param: str | None = None) -> str:
    """Return a name that is one file's name and cannot be taken for anything else.

    Args:
        name: what was given.
        param: the field of a request that gave it.

    Raises:
        Refusal: any other.
    """
    if not _NAME.fullmatch(name) or name == _SHA:
        raise Refusal(
            f"the name {name[:80]!r} cannot be used: 1 to 64 of A-Z a-z 0-9 _ . - were expected, without a leading "
            f"dot, and not {_SHA!r}",
            reason="bad_name",
            param=param,
        )
    return name


def read(text: object, *, max_strength: float) -> tuple[Term, ...]:
    """Read what stands under "trimtab" in vllm_xargs, or after the + of a model alias.

    Args:
        text: such as "calm:1.5,formal:-2".
        max_strength: largest magnitude of a strength.

    Raises:
        Refusal: it cannot be read; says what was expected.
    """
    if not isinstance(text, str) or not text:
        raise Refusal(
            f"{PARAM} is {text!r}; text such as 'name:1.5' or 'a:1.5,b:-2' was expected",
            reason="bad_request",
            param=PARAM,
        )
    listed = text.split(",")
    if len(listed) > MAX_TERMS:
        raise Refusal(
            f"{len(listed)} steerings were named in one request; at most {MAX_TERMS} are taken",
            reason="bad_request",
            param=PARAM,
        )
    terms = tuple(_term(one.strip(), max_strength) for one in listed)
    keys = [one.key for one in terms]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise Refusal(f"{twice!r} is named twice; name it once, with the sum", reason="bad_request", param=PARAM)
    return terms


def _term(text: str, max_strength: float) -> Term:
    head, *rest = text.split(":")
    by_digest = head == _SHA
    if by_digest:
        head, *rest = rest or [""]
    if len(rest) > 1:
        raise Refusal(
            f"{text[:120]!r} has too many colons; name:strength or {_SHA}:digest:strength was expected",
            reason="bad_request",
            param=PARAM,
        )
    if by_digest and not _DIGEST.fullmatch(head):
        raise Refusal(
            f"{text[:120]!r}: after {_SHA}: {MIN_DIGEST} to 64 digits of a digest in lower-case hex were expected",
            reason="bad_request",
            param=PARAM,
        )
    if not by_digest:
        check_name(head, param=PARAM)
    return Term(head, by_digest, _strength(rest[0], text, max_strength) if rest else 1.0)


def _strength(text: str, whole: str, limit: float) -> float:
    if not _NUMBER.fullmatch(text):
        raise Refusal(
            f"{whole[:120]!r}: the strength {text[:40]!r} is not a finite decimal number, such as 1.5 or -2",
            reason="bad_strength",
            param=PARAM,
        )
    value = float(text)
    if not math.isfinite(value) or abs(value) > limit:
        raise Refusal(
            f"{whole[:120]!r}: the strength is beyond the limit of {limit:g} in magnitude that this server was started "
            "with (--max-strength)",
            reason="bad_strength",
            param=PARAM,
        )
    return value


def strengthen(steering: Steering, strength: float, name: str) -> Steering:
    """Return a steering whose effect is multiplied: the scale of every Add, times the strength.

    Args:
        steering: what is multiplied.
        strength: finite; 1 returns the steering as it is, 0 makes one that changes nothing.
        name: how it is called in messages.

    Raises:
        Refusal: it has an op that no factor can be given.
    """
    if strength == 1.0:
        return steering
    other = next((one for one in steering.bound if not isinstance(one.op, Add)), None)
    if other is not None:
        raise Refusal(
            f"{name} cannot be given the strength {strength:g}: it has {other.op.describe()} at {other.pattern}, which "
            "says where a projection ends up and not how far it is moved; only Add can be multiplied. Use strength 1, "
            "or another bound in the file",
            reason="bad_strength",
            param=PARAM,
        )
    scaled = []
    for one in steering.bound:
        assert isinstance(one.op, Add)
        scale = one.op.scale * strength
        if not math.isfinite(scale):
            raise Refusal(
                f"{name} at strength {strength:g}: its scale {one.op.scale:g} times that is not finite",
                reason="bad_strength",
                param=PARAM,
            )
        scaled.append(replace(one, op=replace(one.op, scale=scale)))
    return Steering.of(scaled)
