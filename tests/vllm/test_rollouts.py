"""The same vectors and prompts on both backends: every variant in one batch of the engine, token for token as on HF."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import _engine as engine
from trimtab import testbed
from trimtab.backends import Request
from trimtab.directions import load_direction
from trimtab.errors import NonFiniteError
from trimtab.evaluate import Variant, load, make_variants, rollouts, score
from trimtab.steering import Cap, Steering

pytestmark = engine.MARKS
PROMPTS = testbed.prompts(6)
OPTIONS: dict[str, Any] = {"max_tokens": 24, "dtype": "float32"}
ENGINE = {"enforce_eager": True, "max_model_len": 256}


def variants(info: Any) -> tuple[Variant, ...]:
    """Return eight conditions: two vectors, both signs, generated tokens only, controls, and a cap."""
    cap = testbed.direction("gloomy")
    made = make_variants({"animal": "testbed:animal"}, info, scales=[-0.5, 0.5], controls=1, prompted=PROMPTS[0])
    later = make_variants({"later": "testbed:cheerful"}, info, scales=[0.5], positions="generated")[1:]
    capped = Variant(name="capped", steering=Steering({cap.site: Cap(cap.vector, max=cap.cap)}))
    return (*made, *later, capped)


def run_on_vllm(out: str) -> tuple[list[list[Any]], list[str]]:
    """Run all variants in the engine, and score side effects there."""
    from trimtab.backends import open_backend

    sites = [str(load_direction(f"testbed:{name}").site) for name in ("animal", "cheerful", "gloomy")]
    options = {"sites": list(dict.fromkeys(sites)), "capture_sites": ["logits"], "engine": ENGINE}
    backend = open_backend("vllm", "testbed", dtype="float32", **options)
    run = rollouts(backend, PROMPTS, variants(backend.info), out=out, **OPTIONS)
    assert run.finished and run.backend == "vllm"
    result = score(out, ["testbed:animal", "vector:testbed:animal"], model=backend, retention=PROMPTS[:2])
    said = refusals(backend)
    backend.close()
    return [[one.variant, one.perplexity, one.kl, one.retention] for one in result.effects], said


def break_logits(model: Any) -> None:
    """Make all logits NaN."""
    model.model.norm.weight.data[0] = math.nan


def refusals(backend: Any) -> list[str]:
    """Have logits be NaN from here on, and return what is said of it, without log-probabilities and with."""
    backend._llm.apply_model(break_logits)
    said = []
    for logprobs in (None, 0):
        request = Request(prompt=(5, 6, 7), id="broken", max_new_tokens=3, logprobs=logprobs)
        try:
            backend.generate([request])
        except NonFiniteError as error:
            said.append(str(error))
    return said


def test_rollouts_agree_token_for_token(tmp_path: Path) -> None:
    from trimtab.backends import open_backend

    effects, said = engine.call(run_on_vllm, str(tmp_path / "vllm"), cwd=tmp_path)
    assert "'broken': the logits of one of its 3 tokens are not finite" in said[0]
    assert "'broken': the logits at position 2 are not finite" in said[1]
    backend = open_backend("hf", "testbed", dtype="float32")
    made = variants(backend.info)
    assert len(made) == 8
    rollouts(backend, PROMPTS, made, out=tmp_path / "hf", **OPTIONS)
    mine, theirs = ({row.key: row for row in load(tmp_path / name).rows()} for name in ("hf", "vllm"))
    assert set(mine) == set(theirs) and len(mine) == 48
    for key, row in mine.items():
        assert (row.token_ids, row.prompt_ids, row.text) == (
            theirs[key].token_ids,
            theirs[key].prompt_ids,
            theirs[key].text,
        ), key
    for name in ("animal@-0.5", "animal@+0.5", "later@+0.5", "prompted"):  # the conditions are not all one
        assert any(mine[name, prompt, 0].text != mine["unsteered", prompt, 0].text for prompt in range(6)), name
    result = score(tmp_path / "hf", ["testbed:animal", "vector:testbed:animal"], model=backend, retention=PROMPTS[:2])
    for one, other in zip(result.effects, effects, strict=True):
        assert one.variant == other[0]
        for mine_value, other_value in zip((one.perplexity, one.kl, one.retention), other[1:], strict=True):
            assert mine_value == pytest.approx(other_value, rel=1e-3, abs=1e-5, nan_ok=True)  # float32 log-softmax
    backend.close()
