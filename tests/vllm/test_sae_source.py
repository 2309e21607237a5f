"""Activations of a model in vLLM, for the training of autoencoders: the rows that the Hugging Face backend gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm import _engine as engine
from trimtab.sae.data import Chunk, ModelSource, open_texts

pytestmark = [*engine.MARKS, pytest.mark.full]
SITES = ("layers.2.resid_post", "layers.2.mlp_out")
ENGINE = {"enforce_eager": True, "max_model_len": 256}
TOLERANCE = 2e-6 * 5**0.5
"""Between engines in float32, at layer 2: see docs/numerics.md."""


def chunks(backend: str) -> list[Chunk]:
    from trimtab.backends import open_backend

    options = {"capture_sites": SITES, "engine": ENGINE} if backend == "vllm" else {}
    running = open_backend(backend, "testbed", dtype="float32", **options)
    source = ModelSource(running, open_texts("testbed:5"), SITES, context_size=32, batch_size=2)
    found = list(source.chunks())
    source.close()
    return found


def run_on_vllm(file: str) -> int:
    """Write the rows of the engine."""
    found = chunks("vllm")
    torch.save([[one.tokens, *one.values.values()] for one in found], file)
    return len(found)


def test_the_engine_gives_the_rows_of_the_reference(tmp_path: Path) -> None:
    engine.call(run_on_vllm, str(tmp_path / "rows.pt"), cwd=tmp_path)
    found, expected = torch.load(tmp_path / "rows.pt", weights_only=True), chunks("hf")
    assert len(found) == len(expected) > 3
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one[0], wanted.tokens)
        for rows, values in zip(one[1:], wanted.values.values(), strict=True):
            error = (rows - values).norm(dim=1) / values.norm(dim=1)
            assert float(error.max()) < TOLERANCE
