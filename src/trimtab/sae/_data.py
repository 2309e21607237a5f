"""Open what an evaluation or a calibration runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.backends import Backend, open_backend
from trimtab.errors import InputError
from trimtab.sae._sets import TENSOR_ROWS, EvaluationSet, ModelSet, SourceSet, contexts
from trimtab.sae.data import ActivationSource, TensorSource, Texts, TraceSource, open_texts
from trimtab.trace import Trace

UNKNOWN_SITE = "x"
_TESTBED, _TESTBED_START = "testbed:1000000", 4096
"""Documents of the embedded grammar from here on are in no training that uses the default ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which rows are asked for; the fields are arguments of `evaluate`."""

    data: Any
    model: Any
    site: str
    target: str
    tokens: int
    max_length: int
    skip_texts: int
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the backend."""


@contextmanager
def opened(asked: Data) -> Iterator[tuple[EvaluationSet, Backend | None]]:
    """Open the rows, and the model when there are texts to run; a backend that was given stays open.

    Raises:
        InputError: no data, no site, or sizes that make no sense.
    """
    if asked.tokens < 2 or asked.max_length < 2:
        raise InputError(f"tokens is {asked.tokens}, max_length {asked.max_length}; at least 2 were expected")
    data, model = asked.data, asked.model
    if isinstance(data, (Tensor, tuple, Trace)) or hasattr(data, "chunks") or is_trace(data):
        source = _source(data, asked)
        known = source.widths
        alone = asked.site not in known and UNKNOWN_SITE in known
        places = ("x", "y" if "y" in known else "x") if alone else (asked.site, asked.target)
        yield SourceSet(source, *places, asked.tokens), None
        return
    _require_site(asked)
    given = hasattr(model, "generate") and hasattr(model, "info")
    if data is None and (given or model != "testbed"):
        raise InputError("no data was given: give texts, such as a .txt file, for a model other than the embedded one")
    running: Backend = model if given else open_backend(asked.backend, model, **asked.options)
    try:
        yield _texts(running, asked), running
    finally:
        if not given:
            running.close()


def _require_site(asked: Data) -> None:
    if asked.site == UNKNOWN_SITE:
        raise InputError("the autoencoder does not say its site; give site=, such as layers.3.resid_post")


def _source(data: Any, asked: Data) -> ActivationSource:
    if isinstance(data, Tensor):
        return TensorSource({"x": data}, chunk_rows=TENSOR_ROWS, name=f"a tensor of {len(data)} rows")
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(one, Tensor) for one in data):
            raise InputError("data is a tuple: a pair of tensors, inputs and targets [rows, width], was expected")
        pair = {"x": data[0], "y": data[1]}
        return TensorSource(pair, chunk_rows=TENSOR_ROWS, name=f"a pair of tensors of {len(data[0])} rows")
    if hasattr(data, "chunks"):
        source: ActivationSource = data
        return source
    _require_site(asked)
    return TraceSource(data, (asked.site, asked.target))


def _texts(running: Backend, asked: Data) -> ModelSet:
    texts = open_texts(_TESTBED if asked.data is None else asked.data)
    first = asked.skip_texts + (_TESTBED_START if asked.data is None else 0)
    name = "testbed" if asked.data is None else texts.name
    named = Texts(name=f"{name}, from text {first} on" if first else name, start=texts.start)
    listed = contexts(running, named, start=first, tokens=asked.tokens, max_length=asked.max_length)
    batch = int(asked.options.get("batch_size", 8))
    return ModelSet(running, named, listed, asked.site, asked.target, batch=batch)


def is_trace(data: Any) -> bool:
    """Whether a path is the directory of a trace."""
    try:
        return (Path(data) / "manifest.json").is_file()
    except TypeError:
        return False
