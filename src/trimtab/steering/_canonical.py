"""The canonical form of a Steering: one text for one meaning, and the digest of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.sites import SitePattern
from trimtab.steering.gains import Gain
from trimtab.steering.ops import Op

if TYPE_CHECKING:
    from trimtab.steering.spec import BoundOp

FORMAT = "trimtab-steering"
VERSION = 1  # 1: first version


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the little-endian bytes of a float32 or int64 tensor."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def tensor_digest(tensor: Tensor) -> str:
    """Return the BLAKE2b-256 of `tensor_bytes`, in hex."""
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=32).hexdigest()


def encode(value: Any) -> Any:
    """Return a field of an op as JSON: floats as float64 hex, tensors by their digest."""
    if isinstance(value, Tensor):
        return {
            "blake2b": tensor_digest(value),
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [*value.shape],
        }
    if isinstance(value, (float, np.floating)):
        return float(value).hex()
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def op_json(op: Op) -> dict[str, Any]:
    """Return the canonical JSON of an op."""
    if not op.serialisable:
        raise SteeringError(
            f"{op.kind} is Python code: it has no digest and cannot be saved or sent; use it in its process"
        )
    return {"kind": op.kind, **{one.name: encode(getattr(op, one.name)) for one in fields(op) if one.init}}


def gain_json(gain: Gain) -> dict[str, Any]:
    """Return the canonical JSON of a gain."""
    return {"kind": type(gain).__name__, **{one.name: encode(getattr(gain, one.name)) for one in fields(gain)}}


def bound_json(bound: BoundOp) -> dict[str, Any]:
    """Return the canonical JSON of one bound op."""
    return {
        "site": str(bound.pattern),
        "positions": bound.positions.canonical(),
        "gain": gain_json(bound.gain),
        "op": op_json(bound.op),
    }


def identity(bound: BoundOp) -> tuple[str, str, str]:
    """Return what names one bound op apart from its rows: a digest of op and site, its positions, its gain as JSON."""
    what = json.dumps({"site": str(bound.pattern), "op": op_json(bound.op)}, sort_keys=True, separators=(",", ":"))
    gain = json.dumps(gain_json(bound.gain), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(what.encode(), digest_size=32).hexdigest(), bound.positions.canonical(), gain


def text(bound: Sequence[BoundOp]) -> str:
    """Return the canonical form of ops in canonical order."""
    document = {"format": FORMAT, "version": VERSION, "ops": [bound_json(one) for one in bound]}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(bound: Sequence[BoundOp]) -> str:
    """Return the BLAKE2b-256 of the canonical form, in hex."""
    return hashlib.blake2b(text(bound).encode(), digest_size=32).hexdigest()


def order(bound: Sequence[BoundOp]) -> tuple[BoundOp, ...]:
    """Return the ops in canonical order: by site, while ops that can meet at a site keep their order.

    Ops at sites that never coincide commute, so several orders mean the same. The order taken is the lexicographic
    normal form: again and again the op of the smallest site text that no earlier op it could meet still precedes.
    """
    left = list(bound)
    done: list[BoundOp] = []
    while left:
        free = [i for i, one in enumerate(left) if not any(meets(one.pattern, before.pattern) for before in left[:i])]
        first = min(free, key=lambda i: (str(left[i].pattern), i))
        done.append(left.pop(first))
    return tuple(done)


def meets(a: SitePattern, b: SitePattern) -> bool:
    """Whether two patterns can select the same site."""
    if (a.point, a.module) != (b.point, b.module):
        return False
    if not a.ranges or not b.ranges or (0, -1) in (*a.ranges, *b.ranges):
        return True
    return any(x <= v and u <= y for x, y in a.ranges for u, v in b.ranges)
