"""vLLM on this CPU, beside this torch and this transformers: a real engine runs the embedded model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import trimtab as tt
from trimtab import testbed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
]

# A process of its own: the engine changes torch's settings for good, and looks into every module that is loaded.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, tokens = json.loads(sys.argv[1])
engine = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, seed=0)
chosen = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], chosen, use_tqdm=False)
print("RESULT", json.dumps([list(one.outputs[0].token_ids) for one in made]))
"""


def test_a_stock_engine_generates_the_tokens_of_the_hugging_face_reference(tmp_path: Path) -> None:
    texts = list(testbed.prompts(4, seed=3))
    reference = tt.generate("testbed", texts, max_tokens=24, ignore_eos=True)
    tokenizer = AutoTokenizer.from_pretrained(testbed.path())
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [len(one) for one in ids] == [text.prompt_tokens for text in reference.texts]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps([str(testbed.path()), ids, 24])],
        env=os.environ | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    made = json.loads(lines[0].removeprefix("RESULT "))
    assert [tuple(one) for one in made] == [text.token_ids for text in reference.texts]


def test_the_packages_that_break_a_cpu_torch_are_absent() -> None:
    if torch.version.cuda is None:
        for name in ("torchvision", "torchaudio", "torchcodec"):
            assert importlib.util.find_spec(name) is None, f"{name} brings a CUDA build: pip uninstall -y {name}"
