from __future__ import annotations

import math
import subprocess
import sys

import pytest

from trimtab.backends import BACKENDS, Capture, Request, Score, num_rows, open_backend, perplexity
from trimtab.errors import InputError, PrerequisiteError


def test_rows_law() -> None:
    assert [num_rows(5, generated) for generated in (0, 1, 2, 33)] == [5, 5, 6, 37]


def test_perplexity_is_taken_over_all_predicted_tokens() -> None:
    scores = [
        Score(ids=(1, 2, 3), logprobs=(-1.0, -2.0)),
        Score(ids=(4,), logprobs=()),
        Score(ids=(5, 6), logprobs=(-6.0,)),
    ]
    assert perplexity(scores) == pytest.approx(math.exp(3.0))
    with pytest.raises(InputError, match="no predicted token"):
        perplexity(scores[1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "logits"}, "a tuple of patterns"),
        ({"sites": ()}, "sites is empty"),
        ({"sites": ("logits",), "edit": ()}, "edit is"),
        ({"sites": ("logits",), "edit": ("none",)}, "edit is"),
    ],
)
def test_captures_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Capture(**options)  # type: ignore[arg-type]


def test_a_list_is_no_prompt() -> None:
    with pytest.raises(InputError, match="the prompt is a list"):
        Request(prompt=[1, 2])  # type: ignore[arg-type]


def test_unknown_backends_models_and_options_are_refused() -> None:
    with pytest.raises(InputError, match="no backend 'onnx'; there are hf, mock, vllm"):
        open_backend("onnx", "m")
    with pytest.raises(InputError, match="backend 'mock' has no option 'speed'; it has dtype, layers"):
        open_backend("mock", "m", speed=3)
    with pytest.raises(InputError, match="a name was expected"):
        open_backend("mock", 3)


def test_a_backend_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "later", ("trimtab.backends.later", "Later"))
    with pytest.raises(PrerequisiteError, match="'later' is not part of this installation"):
        open_backend("later", "m")


def test_importing_the_package_does_not_load_transformers() -> None:
    code = "import sys, trimtab.backends; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
