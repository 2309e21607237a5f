"""Arguments of a wrong type: one line, before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.errors import InputError
from trimtab.workflows import _open

SITE = "layers.0.resid_post"


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(_open, "open_backend", refuse)
    monkeypatch.chdir(tmp_path)


WRONG: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (tt.sweep, (), {"max_tokens": "x"}, r"max_tokens is 'x'; an integer or None was expected"),
    (tt.sweep, (), {"prompts": 5}, "prompts is 5; text or a list or None was expected"),
    (tt.sweep, (), {"configs": [1]}, r"configs is \[1\]; text or a list of text or None was expected"),
    (tt.sweep, (), {"out": None}, "out is None; text or a path was expected"),
    (tt.sweep, (), {"resume": "no"}, "resume is 'no'; True or False was expected"),
    (tt.sweep, (), {"device": torch.device("cpu")}, "device is device"),
    (tt.sweep, (["a"],), {}, r"model is \['a'\]; text or a path or None was expected"),
    (tt.generate, ("m", ["a"]), {"temperature": "hot"}, "temperature is 'hot'; a number was expected"),
    (tt.generate, ("m", ["a"]), {"max_tokens": True}, "max_tokens is True; an integer was expected"),
    (tt.generate, ("m", ["a"]), {"max_tokens": 2.5}, "max_tokens is 2.5; an integer was expected"),
    (tt.generate, ("m", ["a"]), {"steering": 3}, "steering is 3; a Steering or a Steer or text or a path or None"),
    (tt.generate, ("m", ["a"]), {"engine": [1]}, r"engine is \[1\]; a mapping or None was expected"),
    (tt.generate, ("m", ["a"]), {"dtype": 16}, "dtype is 16; text or a dtype was expected"),
    (tt.generate, ("m", ["a"]), {"dtype": "float17"}, "float17"),
    (tt.generate, ("m", ["a"]), {"on_generated": 1}, "on_generated is 1; a function or None was expected"),
    (tt.generate, ("m", ["a"]), {"max_tokens": -1}, "max_new_tokens is -1; 0 or a positive number"),
    (tt.generate, ("m", ["a"]), {"temperature": float("nan")}, "temperature is nan"),
    (tt.capture, ("m", ["a"]), {"sites": SITE, "out": "t", "max_bytes": -1}, "max_bytes is -1; a positive number"),
    (tt.capture, ("m", ["a"]), {"sites": 3, "out": "t"}, "sites is 3; text or a list of text was expected"),
    (
        tt.capture,
        ("m", ["a"]),
        {"sites": SITE, "out": "t", "edit": "all"},
        "'after' or 'before' or 'both' was expected",
    ),
    (
        tt.capture,
        ("m", ["a"]),
        {"sites": SITE, "out": "t", "along": 5},
        "along is 5; a Trace or text or a path or None",
    ),
    (tt.capture, ("m", ["a"]), {"sites": SITE, "out": "t", "positions": "9:3"}, "the range '9:3' is empty"),
    (tt.debug_decode, ("m", ["a"]), {"steering": None}, r"prompt is \['a'\]; text was expected"),
    (tt.debug_decode, ("m", "a"), {"steering": None, "logprobs": "5"}, "logprobs is '5'; an integer was expected"),
    (tt.analyze, (None,), {}, "run_a is None; text or a path was expected"),
    (tt.analyze, ("r",), {"prompt_idx": "0"}, "prompt_idx is '0'; an integer or None was expected"),
    (tt.demo, (3,), {}, "out is 3; text or a path was expected"),
    (tt.rerun, (3,), {}, "manifest is 3; text or a path was expected"),
    (tt.doctor, (), {"install": 1}, "install is 1; text or None was expected"),
    (tt.testbed_build, ("t",), {"steps": "3"}, "steps is '3'; an integer or None was expected"),
]


@pytest.mark.usefixtures("_nothing_is_loaded")
@pytest.mark.parametrize(("function", "args", "kwargs", "message"), WRONG)
def test_a_wrong_argument_is_one_line_before_anything_is_loaded(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as found:
        function(*args, **kwargs)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_unknown_arguments_are_still_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        tt.generate("m", ["a"], max_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="sites"):
        tt.capture("m", ["a"], out="t")  # type: ignore[call-arg]


def test_numbers_and_names_of_other_libraries_are_taken_and_recorded(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "backend": "mock",
        "max_tokens": np.int64(2),
        "temperature": np.float32(0.5),
        "seed": np.int32(3),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    trace = tt.capture("any", ("ab", [5, 9]), sites=(SITE,), positions=[0], out=tmp_path / "a", **options)
    call = trace.manifest["provenance"]["call"]
    assert (call["max_tokens"], call["temperature"], call["seed"]) == (2, 0.5, 3)
    assert (call["dtype"], call["device"]) == ("float32", "cpu")
    again = tt.rerun(tmp_path / "a")
    assert isinstance(again, tt.Trace)
    assert again.index["digest"].equals(trace.index["digest"])
    made = tt.sweep(Path("any"), "ab", backend="mock", configs="float32", reference="mock_float32",
                    max_tokens=np.int64(1), out=tmp_path, run_id="r")  # fmt: skip
    assert made.finished and made.model == "any"
