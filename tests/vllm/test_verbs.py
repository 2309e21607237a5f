"""The verbs that take `--backend vllm` say and write what they do with `--backend hf`, on equal weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from tests.vllm import _engine as engine
from trimtab import testbed
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.sites import Site

pytestmark = engine.MARKS
TOKENS, SITES = 8, "layers.*.resid_post logits"
EAGER = {"enforce_eager": True, "max_model_len": 256}


def steer() -> tt.Steer:
    ready = testbed.direction("animal")
    return tt.Steer(vector="testbed:animal", layer=Site.parse(ready.site).layer, cap=ready.cap)


def texts() -> list[str]:
    return list(testbed.prompts(2, seed=1))


def verbs(backend: str) -> dict[str, Any]:
    """Run the verbs of one model; what they write lies beside each other in the working directory."""
    chosen: dict[str, Any] = {"backend": backend, "steering": steer(), "max_tokens": TOKENS}
    if backend == "vllm":
        chosen["engine"] = EAGER
    said = tt.generate("testbed", texts(), out=f"said-{backend}", **chosen)
    tt.capture("testbed", texts(), sites=SITES, edit="both", out=backend, **chosen)
    decoded = tt.debug_decode("testbed", texts()[0], compare_dtype="float32", **chosen)
    return {
        "backend": said.backend,
        "texts": [one.text for one in said.texts],
        "decoded": [[one.reference_token, one.reference_cap_delta, one.max_abs_before] for one in decoded.steps],
        "decoded text": decoded.reference_text,
    }


def sweep(where: str) -> str:
    """Run two engines side by side; return where."""
    return tt.sweep(
        "testbed", texts(), steering=steer(), backend="hf,vllm", configs=["float32", "bf16"], max_tokens=TOKENS,
        engine=EAGER, out=where, run_id="engines",
    ).path  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verbs")


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, dict[str, Any]]:
    return {backend: engine.call(verbs, backend, cwd=place) for backend in ("hf", "vllm")}


def test_generate_says_the_same_text(said: dict[str, Any], place: Path) -> None:
    assert [one["backend"] for one in said.values()] == ["hf", "vllm"]
    assert said["vllm"]["texts"] == said["hf"]["texts"]
    hf, vllm = (tt.Trace.open(place / f"said-{backend}") for backend in ("hf", "vllm"))
    assert vllm.tokens["token_id"].to_list() == hf.tokens["token_id"].to_list()


def test_capture_writes_the_same_trace(said: dict[str, Any], place: Path) -> None:
    hf, vllm = (tt.Trace.open(place / backend) for backend in ("hf", "vllm"))
    keys = ["site", "edit"]
    assert vllm.index.select(keys).unique().sort(keys).equals(hf.index.select(keys).unique().sort(keys))
    assert set(hf.index["edit"]) == {"before", "after", "none"}  # tokens have none
    result = tt.compare(hf, vllm)
    assert result.passed, result.reason
    assert all(side.found == side.compared > 0 for side in (result.ledger.reference, result.ledger.candidate))


def test_debug_decode_shows_the_same_steps(said: dict[str, Any]) -> None:
    assert said["vllm"]["decoded text"] == said["hf"]["decoded text"]
    assert len(said["vllm"]["decoded"]) == TOKENS
    for (token, moved, off), (wanted, by, apart) in zip(said["vllm"]["decoded"], said["hf"]["decoded"], strict=True):
        assert token == wanted
        assert moved == pytest.approx(by, rel=1e-4, abs=1e-5)
        assert 0 < off < 4 * apart, "bfloat16 is as far from float32 on both engines"
    assert any(step[1] for step in said["hf"]["decoded"]), "the cap acts"


@pytest.mark.full
def test_a_sweep_over_two_engines_compares_every_row_of_every_layer(place: Path) -> None:
    analysis = tt.analyze(engine.call(sweep, str(place), cwd=place))
    assert analysis.passed, analysis.reason
    assert {"vllm_float32", "vllm_bf16"} < {one.label for one in analysis.configs}
    cells = [one for one in analysis.drift if one.config == "vllm_float32"]
    assert sorted((one.prompt, one.layer, one.step) for one in cells) == [
        (prompt, layer, step) for prompt in range(2) for layer in range(analysis.num_layers) for step in range(TOKENS)
    ]
    assert all(one.rel_l2 < engine_row_rel_l2("float32", one.layer) for one in cells)
    assert any(one.rel_l2 > 0 for one in cells), "two engines round apart"
