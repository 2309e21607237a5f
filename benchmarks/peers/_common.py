"""The random model and the interleaved timing that every peer's script uses; needs torch and transformers alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS, PAIRS, LAYER, SCALE = 64, 20, 3, 2.0
PROMPT = torch.arange(3, 35)[None]


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()


def vector() -> torch.Tensor:
    return torch.randn(256, generator=torch.Generator().manual_seed(1))


def generate(llama: Any) -> None:
    with torch.no_grad():
        llama.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )


def compare(steered: Callable[[], None], bare: Callable[[], None]) -> None:
    """Print the ratios of CPU seconds, pair by pair, the order reversed every round."""
    steered(), bare()
    ratios = []
    for number in range(PAIRS):
        order = [steered, bare] if number % 2 else [bare, steered]
        took = {}
        for work in order:
            began = time.process_time()
            work()
            took[work] = time.process_time() - began
        ratios.append(took[steered] / took[bare])
    print(json.dumps({"ratios": ratios}))
