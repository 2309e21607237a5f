"""Starting a stock engine with the plugin."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from trimtab._base.optional import require
from trimtab.backends.vllm.config import KEY
from trimtab.backends.vllm.refused import listening
from trimtab.errors import BackendError, InputError, TrimtabError

_LOG = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
"""Settings of vLLM's log, unless the environment has its own."""
_MEMORY = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
_OURS = ("model", "additional_config", "dtype", "max_num_seqs", "enable_prefix_caching", "skip_tokenizer_init")


def start(
    place: str,
    *,
    dtype: str,
    device: str | None,
    batch_size: int,
    prefix_caching: bool,
    tokenizer: bool,
    settings: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> Any:
    """Start a `vllm.LLM`.

    Args:
        place: directory or hub id.
        dtype: of weights and arithmetic, or "auto".
        device: checked against what vLLM was built for.
        batch_size: sequences at once.
        prefix_caching: reuse the cache of equal prompts.
        tokenizer: whether the model has one.
        settings: of the plugin.
        engine: other arguments of `vllm.LLM`; text is read as a number or a truth value where it is one.

    Raises:
        PrerequisiteError: vLLM is missing.
        InputError: an argument that vLLM does not have, or that belongs to the backend.
        TrimtabError: what the plugin refuses in the processes of the engine.
        BackendError: the engine did not start.
    """
    with _standard_error(), listening() as refusal:
        vllm: Any = require("vllm", extra="vllm", feature="the vllm backend")
        given = {name: _value(value) for name, value in engine.items()}
        clash = sorted(set(given) & set(_OURS))
        if clash:
            raise InputError(f"engine option {clash[0]!r} is set by the backend; give it as an argument of its own")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; at least 1 was expected")
        platforms: Any = importlib.import_module("vllm.platforms")
        kind = platforms.current_platform.device_type
        if device is not None and device.partition(":")[0] != kind:
            raise InputError(f"device {device!r}: the vLLM installed here runs on {kind}")
        arguments = {
            "dtype": dtype,
            "max_num_seqs": batch_size,
            "enable_prefix_caching": prefix_caching,
            "skip_tokenizer_init": not tokenizer,
            "max_logprobs": -1,
            "seed": 0,
            **(_cpu_cache() if kind == "cpu" and not set(given) & set(_MEMORY) else {}),
            # on the CPU a seeded draw after a prompt in several parts ends vLLM: its generator cannot be wound back
            **({"enable_chunked_prefill": False} if kind == "cpu" else {}),
            **given,
            "additional_config": {KEY: dict(settings)},
        }
        try:
            return vllm.LLM(place, **arguments)
        except TrimtabError:
            raise
        except TypeError as error:
            raise InputError(f"vLLM takes no such setting: {_one_line(error)}") from error
        except Exception as error:
            raise refusal() or BackendError(
                f"the engine did not start: {_one_line(_root(error))}; vLLM's log above has the cause. "
                f"{psutil.virtual_memory().available / 2**30:.1f} GiB of memory are free here: if it asked for more, "
                "lower --gpu-memory-utilization, --max-model-len or --batch-size"
            ) from error


@contextmanager
def _standard_error() -> Iterator[None]:
    """Keep vLLM's log off the standard output of this process and of those that it starts, where results go."""
    before = {name: os.environ.get(name) for name in _LOG}
    os.environ.update({name: os.environ.get(name, value) for name, value in _LOG.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _cpu_cache() -> dict[str, int]:
    """Return a KV cache that fits beside other work: vLLM's own default takes nearly all of the machine."""
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"kv_cache_memory_bytes": min(1 << 32, psutil.virtual_memory().available // 4)}


def _value(text: Any) -> Any:
    """Read a setting from the command line: a number, true or false, or the text itself."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
