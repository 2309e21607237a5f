"""Claims about extracting steering vectors: what one streaming pass costs beside the forward passes alone.

The model is a random Qwen3 of 6 blocks, width 512, on the CPU; 64 texts of 48 to 64 tokens, 8 a batch. The pass keeps
means, covariances over pooled rows (one a text), control directions and quantile sketches of every block's output; the
forward passes alone run the same padded batches, with the same arguments, without hooks. Memory is what the peak of a
process grows by from 64 texts to four times as many (the same token ids again, which cost nothing).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from _claims import Measured, main, overhead, summary

from trimtab.backends import open_backend
from trimtab.vectors.data import Encoded, Encoder
from trimtab.vectors.extract import METHODS, Stream
from trimtab.vectors.extract.controls import weights
from trimtab.vectors.extract.run import Run
from trimtab.vectors.extract.stream import quiet

LAYERS, WIDTH, VOCABULARY, TEXTS, MORE = 6, 512, 512, 64, 4


def make_backend(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=VOCABULARY,
        eos_token_id=None,
        bos_token_id=None,
    )
    return open_backend("hf", transformers.Qwen3ForCausalLM._from_config(config, dtype=dtype).eval())


def texts(count: int) -> list[Encoded]:
    source = torch.Generator().manual_seed(1)
    made = []
    for index in range(TEXTS):
        ids = torch.randint(0, VOCABULARY, (48 + index % 17,), generator=source).tolist()
        made.append(Encoded(ids=tuple(ids), mask=(False, *[True] * (len(ids) - 1))))
    return [made[index % TEXTS] for index in range(count)]


def works(backend: Any, count: int = TEXTS) -> tuple[Callable[[], object], Callable[[], object]]:
    """The pass, and the forward passes alone."""
    stream = Stream(backend, "layers.*.resid_post", batch_size=8)
    encoded, labels = texts(count), torch.arange(count) % 2
    drawn = weights(labels, 20, 0)
    units = [[index] for index in range(count)]

    def extract() -> None:
        run = Run(stream, Encoder(tokenizer=object()), METHODS["lda"])
        with quiet(backend.model):
            run.pass_over(encoded, labels, drawn, units)
            run.norms.flush()

    def forward() -> None:
        with quiet(backend.model):
            for batch in stream.batches(encoded, units):
                stream.forward(batch)

    return extract, forward


def growth() -> float:
    """MB by which the peak grows from TEXTS texts to MORE times as many."""
    backend = make_backend(torch.float32)
    few, many = works(backend)[0], works(backend, MORE * TEXTS)[0]
    few(), few()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure(quick: bool) -> Iterator[Measured]:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        backend = make_backend(dtype)
        found, control = overhead(*works(backend), pairs=8 if quick else 30)
        yield Measured(name=f"extract_all_layers_{name}", samples=found, control=control, notes=summary(found))
    grown = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, __file__, "--growth"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        grown.append(float(done.stdout))
    yield Measured(name="extract_memory_growth", samples=grown)


if __name__ == "__main__":
    if "--growth" in sys.argv:
        print(growth())
    else:
        main(__file__, measure)
