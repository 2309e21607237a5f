"""vLLM on this CPU, beside this torch and this transformers: a real engine runs the embedded model's family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import trimtab as tt
from trimtab import testbed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
]


def test_a_stock_engine_generates_the_tokens_of_the_hugging_face_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    prompts = list(testbed.prompts(4, seed=3))
    reference = tt.generate("testbed", prompts, max_tokens=24, ignore_eos=True)
    engine = LLM(str(testbed.path()), dtype="float32", max_model_len=256, enforce_eager=True, seed=0)
    ids = [{"prompt_token_ids": tt_ids(text)} for text in reference.texts]
    made = engine.generate(ids, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    assert [tuple(one.outputs[0].token_ids) for one in made] == [text.token_ids for text in reference.texts]


def tt_ids(text: object) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(testbed.path()))
    return list(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])  # type: ignore[attr-defined]


def test_the_packages_that_break_a_cpu_torch_are_absent() -> None:
    if torch.version.cuda is None:
        for name in ("torchvision", "torchaudio", "torchcodec"):
            assert importlib.util.find_spec(name) is None, f"{name} brings a CUDA build: pip uninstall -y {name}"
