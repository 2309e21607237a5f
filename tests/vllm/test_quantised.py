"""A quantised checkpoint: the weights have 8 bits, the stream has 16, and steering acts on the stream."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from trimtab.backends import Capture, Request, open_backend
from trimtab.steering import Add, Cap, Steering
from trimtab.testing.memory import MemoryWriter
from trimtab.testing.models import tiny, tiny_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.filterwarnings("ignore")]
SITE = "layers.0.resid_post"
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
            },
        }
    },
}  # fmt: skip


def save(place: Path) -> None:
    """Write a tiny model whose projections are int8 with one scale per output channel."""
    model: Any = tiny("qwen3", dtype=torch.bfloat16)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    packed: dict[str, Tensor] = {}
    for name, weight in safetensors.torch.load_file(place / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        packed[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        packed[f"{name}_scale"] = scale.to(torch.bfloat16)
    safetensors.torch.save_file(packed, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))


def test_a_correction_reaches_the_stream_of_a_quantised_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = open_backend("vllm", tmp_path, dtype="bfloat16", engine={"enforce_eager": True, "max_model_len": 128})
    try:
        u = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
        ops = [Add(u, scale=4.0), Cap(u, max=1.0)]
        prompt = tuple(range(20, 29))
        requests = [
            Request(prompt=prompt, id="steered", steering=Steering({SITE: ops}), max_new_tokens=8, ignore_eos=True),
            Request(prompt=prompt, id="plain", max_new_tokens=8, ignore_eos=True),
        ]
        writer = MemoryWriter()
        done = backend.generate(requests, capture=Capture(sites=(SITE,), edit=("before", "after")), writer=writer)
    finally:
        backend.close()
    before, after = (writer.rows(SITE, "steered", edit)[1].double() for edit in ("before", "after"))
    moved = before + 4.0 * u.double()
    projection = moved @ u.double()
    expected = moved + (projection.clamp(max=1.0) - projection)[:, None] * u.double()
    ulp = torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    assert float((after - expected).abs().max()) <= 2 * ulp  # the branch is rounded, and then the sum
    assert [dose.rows for dose in done[0].doses] == [16, 16]
    assert done[0].doses[1].clamped == int((projection > 1.0).sum())
    assert torch.equal(writer.rows(SITE, "plain")[1][:9].double(), before[:9])  # the prompt's own rows, unsteered
