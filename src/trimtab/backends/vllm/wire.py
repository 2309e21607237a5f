"""What travels with a request, and what comes back: plain data, no pickle.

A request carries `SamplingParams.extra_args["trimtab"]`; steerings travel apart from requests, once per content, as the
bytes of a steering file; what requests leave comes back as a parcel, a safetensors file with a document in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, get_args

import msgspec.json
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from trimtab.backends.vllm.config import KEY
from trimtab.backends.vllm.counts import Ints
from trimtab.backends.vllm.reduced import Kind
from trimtab.errors import InputError
from trimtab.steering import Positions

VERSION = 2
_DOCUMENT = "document"
_BFLOAT16 = ":bfloat16"
Dose = Literal["counts", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureSpec:
    """Which rows of a request are recorded."""

    sites: tuple[str, ...]
    """Site names, patterns resolved."""
    edit: tuple[str, ...] = ("after",)
    positions: str = "all"
    """Canonical text of the positions."""
    prompt_logits: bool = False
    """Whether the site `logits` also has the rows of the prompt before its last token."""
    reduce: Kind = ""
    """What travels instead of the rows; "": the rows."""
    directions: str = ""
    """Digest of the directions to project on."""

    def __post_init__(self) -> None:
        if not self.edit or not set(self.edit) <= {"before", "after"}:
            raise InputError(f"edit is {self.edit!r}; ('before',), ('after',) or ('before', 'after') was expected")
        if self.reduce not in get_args(Kind):
            raise InputError(
                f"reduce is {self.reduce!r}; one of {', '.join(filter(None, get_args(Kind)))} was expected"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestData:
    """Our part of one request."""

    label: str
    """Unique name under which doses and rows are kept; the children of n > 1 share it."""
    digest: str | None = None
    """Digest of the steering; None for an unsteered request."""
    ops: str = ""
    """What `ops_text` makes of the steering."""
    capture: CaptureSpec | None = None
    forced: tuple[int, ...] | None = None
    dose: Dose = "counts"
    check_logits: bool = False
    """Whether it is told of when the logits of a token were not finite."""
    salt: str | None = None
    """A cache key for the whole request, when its rows must be computed afresh."""

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise InputError(f"the label of a request is {self.label!r}; a text was expected")
        if self.dose not in get_args(Dose):
            raise InputError(f"dose is {self.dose!r}; {' or '.join(map(repr, get_args(Dose)))} was expected")

    def check(self, prompt_length: int, vocabulary: int) -> None:
        """Refuse what cannot be met, once the prompt is known.

        Args:
            prompt_length: P.
            vocabulary: tokens that the model knows.

        Raises:
            PositionError: a selection that begins before the prompt, or is empty for it.
            InputError: tokens to decode along that the model does not know.
        """
        check_forced(self.forced or (), vocabulary)
        if self.capture is not None:
            Positions.parse(self.capture.positions).check(prompt_length)

    def to_wire(self) -> Entry:
        """Return the entry of `extra_args`."""
        wire = Entry(v=VERSION, id=self.label, dose=self.dose)
        wire.data = self
        if self.digest is not None:
            wire["steering"] = {"digest": self.digest, "ops": self.ops}
        if self.capture is not None:
            wire["capture"] = {
                "sites": list(self.capture.sites),
                "edit": list(self.capture.edit),
                "positions": self.capture.positions,
                "prompt_logits": self.capture.prompt_logits,
                "reduce": self.capture.reduce,
                "directions": self.capture.directions,
            }
        if self.forced is not None:
            wire["forced"] = list(self.forced)
        if self.check_logits:
            wire["check_logits"] = True
        if self.salt is not None:
            wire["salt"] = self.salt
        return wire

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestData | None:
        """Read our part of a request; None when there is none.

        Raises:
            InputError: another version, or not our form.
        """
        wire = (extra_args or {}).get(KEY)
        if wire is None:
            return None
        if isinstance(wire, Entry) and wire.data is not None:
            return wire.data
        if not isinstance(wire, dict) or wire.get("v") != VERSION or "id" not in wire:
            raise InputError(
                f"extra_args[{KEY!r}] is not what trimtab.vllm.attach(llm).params(...) makes; build the request with it"
            )
        steering, capture = wire.get("steering"), wire.get("capture")
        return cls(
            label=wire["id"],
            digest=steering["digest"] if steering else None,
            ops=steering["ops"] if steering else "",
            capture=CaptureSpec(
                sites=tuple(capture["sites"]),
                edit=tuple(capture["edit"]),
                positions=capture["positions"],
                prompt_logits=bool(capture.get("prompt_logits")),
                reduce=capture.get("reduce", ""),
                directions=capture.get("directions", ""),
            )
            if capture
            else None,
            forced=tuple(wire["forced"]) if wire.get("forced") is not None else None,
            dose=wire.get("dose", "counts"),
            check_logits=bool(wire.get("check_logits")),
            salt=wire.get("salt"),
        )


class Entry(dict[str, Any]):
    """Our entry of `extra_args`. It is never changed, so vLLM's deep copies of a request share it."""

    data: RequestData | None = None
    """What it says, in the process that made it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return self

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class Result(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one request left in one worker, as it travels: places are numbers in lists of the document around it."""

    label: str
    req_id: str
    digest: str | None
    prompt_length: int
    rows: int
    cached: int
    problems: tuple[str, ...]
    nonfinite_logits: bool
    reduce: Kind
    ops: int
    """Sites and names of its ops."""
    captured: list[dict[str, Any]]
    full: list[dict[str, Any]]


def check_forced(tokens: Iterable[Any], vocabulary: int) -> None:
    """Refuse tokens that a model of so many tokens does not know; raises InputError."""
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise InputError(f"forced token {token!r}: ids from 0 to {vocabulary - 1} were expected")


def ops_text(ops: Iterable[tuple[str, str, str]]) -> str:
    """Return the ops of a steering as a request carries them: [[digest, positions, gain], ...] as JSON.

    One text for all, because vLLM walks through every list and mapping of a request's `extra_args`.

    Args:
        ops: per op, the digest of op and site, its canonical positions, its canonical gain as JSON.
    """
    return json.dumps([[op, positions, json.loads(gain)] for op, positions, gain in ops], separators=(",", ":"))


def to_bytes(document: Any) -> bytes:
    """Return a JSON document as bytes."""
    return msgspec.json.encode(document)


def from_bytes(data: bytes) -> Any:
    """Read what `to_bytes` made."""
    return msgspec.json.decode(data)


def to_parcel(document: Any, tensors: dict[str, Tensor]) -> bytes:
    """Return a JSON document and tensors as bytes: a safetensors file, in which the document is a tensor of bytes.

    Without tensors it is the document alone, which takes less time to make and to read.
    Through numpy: `safetensors.torch.save` has ctypes make a type for every new number of bytes, and ctypes keeps it.
    Numpy has no bfloat16; such a tensor travels as int16, and its name says so.
    """
    if not tensors:
        return to_bytes(document)
    arrays = {_DOCUMENT: np.frombuffer(to_bytes(document), dtype=np.uint8)}
    for name, tensor in tensors.items():
        narrow = tensor.dtype is torch.bfloat16
        arrays[name + _BFLOAT16 * narrow] = (tensor.view(torch.int16) if narrow else tensor).numpy()
    return safetensors.numpy.save(arrays)


def from_parcel(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """Read what `to_parcel` made; a document alone comes without tensors."""
    if data[:1] == b"{":  # a parcel begins with a size that is a multiple of 8
        return from_bytes(data), {}
    read = safetensors.torch.load(data)
    document = from_bytes(read.pop(_DOCUMENT).numpy().tobytes())
    narrow = [name for name in read if name.endswith(_BFLOAT16)]
    return document, read | {name.removesuffix(_BFLOAT16): read.pop(name).view(torch.bfloat16) for name in narrow}


def results_of(document: dict[str, Any]) -> list[Result]:
    """Return what the requests of a parcel left, from its document."""
    return msgspec.convert(document["results"], list[Result])


def counts_text(counts: Ints) -> str:
    """Return int64 [n, 4] as a text in a document: what the ops of all its results did; see counts.py."""
    return counts.astype("<i8", copy=False).tobytes().hex()


def counts_of(text: str) -> Ints:
    """Read what `counts_text` made; not to be written to."""
    return np.frombuffer(bytes.fromhex(text), dtype="<i8").reshape(-1, 4)


def runs(positions: Sequence[int] | Ints) -> list[tuple[int, int]]:
    """Return positions as runs [first, last + 1) of consecutive ones, in their order."""
    array = np.asarray(positions, dtype=np.int64)
    ends = [*(np.flatnonzero(np.diff(array) != 1) + 1).tolist(), len(array)] if len(array) else []
    return [(int(array[first]), int(array[last - 1]) + 1) for first, last in pairwise((0, *ends))]


def positions_of(given: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Return the positions of runs."""
    return tuple(chain.from_iterable(range(first, end) for first, end in given))
