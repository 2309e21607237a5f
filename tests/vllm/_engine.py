"""Engines in processes of their own, and the small models that they run.

A function of a test module is run in a fresh process (`call`): an engine changes the settings of torch for good, and
looks into every module that is loaded. What it returns travels as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.testing import models

MARKS = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
    pytest.mark.filterwarnings("ignore"),
]
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
_RESULT = "RESULT "


def save(family: str, folder: Path, *, layers: int = 3, width: int = 128, head: int = 32) -> str:
    """Write a random model, its heads large enough for vLLM's attention on the CPU, and return its directory."""
    kind = models.tiny(family, layers=layers)
    config: Any = kind.config
    for name, value in {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "head_dim": head,
        "num_attention_heads": width // head,
        "num_key_value_heads": max(width // head // 2, 1),
        "query_pre_attn_scalar": head,
        "n_embd": width,
        "n_inner": 2 * width,
        "n_head": width // head,
    }.items():
        if name in config.__dict__:
            setattr(config, name, value)
    if family == "gemma2":  # vLLM's class has no head of its own
        config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = type(kind)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                models._randomise(name, parameter)
    model.tie_weights()
    config.architectures = [type(kind).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def call(function: Callable[..., Any], *arguments: Any, cwd: Path, **settings: str) -> Any:
    """Run a module-level function of a test module in a process of its own, and return what it returns.

    Args:
        function: its arguments and result are JSON.
        arguments: for it.
        cwd: where it runs; vLLM's caches are kept there.
        settings: more environment variables.
    """
    environment = os.environ | SETTINGS | {"VLLM_CACHE_ROOT": str(cwd / "cache")} | settings
    command = [sys.executable, __file__, function.__code__.co_filename, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    assert lines, done.stdout[-1000:] + done.stderr[-6000:]
    return json.loads(lines[-1].removeprefix(_RESULT))


def start(model: str, settings: dict[str, Any] | None = None, **engine: Any) -> Any:
    """Start an engine in this process; `settings` are the plugin's, None: not asked to steer."""
    from vllm import LLM

    asked = {} if settings is None else {"additional_config": {"trimtab": settings}}
    chosen = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "seed": 0,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "max_logprobs": 64,
    }
    return LLM(model, **(chosen | asked | engine))


def stop() -> None:
    """Let go of the engine of this process; the caller has let go of its own references."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 120, (length,), generator=made).tolist() for _ in range(count)]


def generate(llm: Any, listed: Sequence[Sequence[int]], params: Any) -> list[Any]:
    """Run prompts of token ids."""
    found: list[Any] = llm.generate([{"prompt_token_ids": list(one)} for one in listed], params, use_tqdm=False)
    return found


def tokens(outputs: Iterable[Any]) -> list[list[int]]:
    """Return the generated tokens of each request."""
    return [list(one.outputs[0].token_ids) for one in outputs]


def logprobs_digest(output: Any) -> str:
    """Return a digest of tokens and of the bits of every reported logprob."""
    made = output.outputs[0]
    steps = [sorted((token, one.logprob.hex()) for token, one in step.items()) for step in made.logprobs]
    return hashlib.sha256(json.dumps([list(made.token_ids), steps]).encode()).hexdigest()


class Extension:
    """What a program of vLLM's may add to its workers."""

    def from_elsewhere(self) -> str:
        return "here"


def sampling(**settings: Any) -> Any:
    """Return parameters of a request that is none of ours."""
    from vllm import SamplingParams

    return SamplingParams(**settings)


def attached(llm: Any) -> Any:
    """Return the client of an engine."""
    return tt.vllm.attach(llm)


def _main() -> None:
    path, name, arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    spec = importlib.util.spec_from_file_location("scenario", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenario"] = module
    spec.loader.exec_module(module)
    sys.stdout.write(_RESULT + json.dumps(getattr(module, name)(*json.loads(arguments))) + "\n")


if __name__ == "__main__":
    _main()
