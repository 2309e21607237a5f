"""Claims about reading weights through directions: time against reading the weights once, and memory.

Two random models of Qwen3-0.6B's shape in bfloat16, on disk in temporary files; 515 directions, 64 of them controls,
in float32. The plain pass reads each matrix once and multiplies the directions' rows by it (random rows of the width
that the matrix takes). The analyses are the MLP's and the attention's, with z-scores, interactions and files, without
the report. Memory is what a process grows by at its peak, pages of mapped files included, without the directions, as a
multiple of what one layer of both models takes as stored. Fewer layers in the quick form.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _claims import Measured, main, summary
from safetensors.torch import save_file

from trimtab.weights import DirectionSet, isotropic, pair
from trimtab.weights import measure_attention as measure_small
from trimtab.weights._open import _settings
from trimtab.weights._run import Worker
from trimtab.weights.attention_change import measure_layer as measure_attention
from trimtab.weights.mlp_change import measure_layer as measure_mlp

WIDTH, INNER, HEADS, KV, DIM, VOCABULARY, LAYERS = 1024, 3072, 16, 8, 128, 151936, 28
DIRECTIONS, CONTROLS = 515, 64
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": DIM, "vocab_size": 1024,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path, layers: int, seed: int) -> Path:
    """A random model of the shape; the embedding, which no analysis reads, is small."""
    source = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=base) / columns**0.5
        if seed:
            drawn += 0.02 * torch.randn(rows, columns, generator=source) / columns**0.5
        return drawn.bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(1024, WIDTH), "model.norm.weight": torch.ones(WIDTH).bfloat16()}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}{name}.weight"] = torch.ones(WIDTH).bfloat16()
        for name in ("q_norm", "k_norm"):
            tensors[f"{start}self_attn.{name}.weight"] = torch.ones(DIM).bfloat16()
        for name, rows in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM)):
            tensors[f"{start}self_attn.{name}_proj.weight"] = matrix(rows, WIDTH)
        tensors[f"{start}self_attn.o_proj.weight"] = matrix(WIDTH, HEADS * DIM)
        for name in ("gate", "up"):
            tensors[f"{start}mlp.{name}_proj.weight"] = matrix(INNER, WIDTH)
        tensors[f"{start}mlp.down_proj.weight"] = matrix(WIDTH, INNER)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return folder


def directions() -> DirectionSet:
    rows = isotropic(DIRECTIONS - CONTROLS, WIDTH, seed=7).units
    return DirectionSet.of([(str(place), row) for place, row in enumerate(rows)], kind="role")


def works(folder: Path, layers: int, out: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Both analyses of all layers with their files, and the plain pass."""
    opened = pair(folder / "base", folder / "tuned")
    given = directions()
    plans = [
        _settings(name, measure, opened, given, 32, 0, {"controls": CONTROLS})
        for name, measure in (("mlp", measure_mlp), ("attention", measure_attention))
    ]
    from trimtab.weights._store import Store

    def analyse() -> None:
        for plan in plans:
            store = Store.open(plan, Path(tempfile.mkdtemp(dir=out)), opened)
            worker = Worker(plan, opened)
            for layer in range(layers):
                store.put(worker.measure(layer))

    rows = {
        width: torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(width))
        for width in (WIDTH, HEADS * DIM, INNER)
    }

    def plain() -> None:
        for layer in range(layers):
            for side in opened.layer(layer):
                for name in side.names:
                    matrix = side.matrix(name, torch.float32)
                    rows[matrix.shape[1]] @ matrix.T

    return analyse, plain


def ratios(folder: Path, layers: int, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of the analyses over those of the plain pass, and the wall-clock ratio beside it."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        analyse, plain = works(folder, min(2, layers), Path(out))
        analyse(), plain()
        analyse, plain = works(folder, layers, Path(out))
        found, wall = [], []
        for _ in range(rounds):
            took = []
            for work in (plain, analyse, plain):
                began = time.process_time(), time.perf_counter()
                work()
                took.append((time.process_time() - began[0], time.perf_counter() - began[1]))
            found.append(2 * took[1][0] / (took[0][0] + took[2][0]))
            wall.append(2 * took[1][1] / (took[0][1] + took[2][1]))
    return found, wall


def peak_share(folder: Path, layers: int) -> float:
    """Peak growth of resident memory, mapped weights included, over what one layer of both models takes as stored."""
    opened = pair(folder / "base", folder / "tuned")
    layer = sum(side.nbytes for side in opened.layer(0))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        analyse, _ = works(folder, layers, Path(out))
        measure_small("testbed", "testbed", {"a": torch.ones(128)}, out=Path(out) / "small")  # libraries' own memory
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        analyse()
        highest = status("VmHWM")
    own = DIRECTIONS * WIDTH * (8 + 4)  # the directions: float64, and in the dtype of the arithmetic
    return (highest - before - own) / layer


def status(name: str) -> int:
    """Return a size of this process in bytes, as the kernel counts it: resident now, or at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def in_process(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(quick: bool) -> Iterator[Measured]:
    layers = 3 if quick else LAYERS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, side in enumerate(("base", "tuned")):
            write_model(folder / side, layers, seed)
        found, wall = in_process("--ratios", name, str(layers), "1" if quick else "3")
        yield Measured(
            name="weights_time_over_reading_once",
            samples=found,
            notes={"layers": layers, "wall": summary(wall), "directions": DIRECTIONS, "controls": CONTROLS},
        )
        yield Measured(
            name="weights_peak_memory_in_layers",
            samples=[in_process("--memory", name, str(min(layers, 6)))],
            notes={"layers": min(layers, 6)},
        )


if __name__ == "__main__":
    if "--ratios" in sys.argv:
        print(json.dumps(ratios(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    elif "--memory" in sys.argv:
        print(json.dumps(peak_share(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main(__file__, measure)
