"""Loading a model and its tokenizer, in the dtype asked for, and refusing what would compute something else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from trimtab._base.log import get_logger
from trimtab.backends import _digest
from trimtab.backends._memory import out_of_memory
from trimtab.backends._place import VOCABULARIES, has_vocabulary, locate
from trimtab.errors import BackendError, InputError
from trimtab.numerics.dtypes import dtype_name, resolve_dtype

_LOG = get_logger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Loaded(NamedTuple):
    """A model ready to run."""

    model: nn.Module
    tokenizer: Any
    """None: prompts are token ids."""
    model_id: str
    digest: str
    notes: tuple[str, ...] = ()
    missing: str = ""
    """Why there is no tokenizer, where a directory should have one."""


def load(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a model by name, or take a module as it is.

    Raises:
        InputError: no such model, or an argument that a module cannot follow.
        BackendError: compiled, spread over devices, or too large.
    """
    if isinstance(model, nn.Module):
        return _take_module(model, tokenizer, dtype, device, attention)
    given: object = model
    if not isinstance(given, (str, Path)):
        raise InputError(f"model is {given!r:.80}; a directory, a hub id or a torch module was expected")
    name = str(model)
    place = locate(name)
    target = resolve_dtype("float32" if dtype is None else dtype)
    if target not in _DTYPES:
        known = ", ".join(dtype_name(one) for one in _DTYPES)
        raise InputError(f"model {name!r} cannot be run in {dtype_name(target)}; use one of {known}")
    try:
        with out_of_memory(f"loading {name!r} as {dtype_name(target)}", "load it in a smaller dtype"):
            return _from_pretrained(place, name, target, tokenizer, device, attention, revision)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error


def _from_pretrained(
    place: str,
    name: str,
    target: torch.dtype,
    tokenizer: Any,
    device: str | None,
    attention: str | None,
    revision: str | None,
) -> Loaded:
    config = transformers.AutoConfig.from_pretrained(place, revision=revision)
    implementation, notes = _attention(config, attention)
    with _progress_where_someone_looks():
        module = _model_class(config).from_pretrained(
            place, dtype=target, attn_implementation=implementation, revision=revision
        )
    words = tokenizer or _tokenizer(place, revision)
    if target is torch.float64 and hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # grouped_mm refuses float64
    module.to(device or default_device())
    module.eval()
    check_module(module)
    folder = Path(place)
    digest = _digest.of_directory(folder) if folder.is_dir() else ""
    missing = "" if words is not None else f"{name} has none of {', '.join(VOCABULARIES)}; copy its tokenizer there"
    return Loaded(module, words, name, digest or _digest.of_module(module), notes, missing)


def _tokenizer(place: str, revision: str | None) -> Any:
    """Return the tokenizer saved with a model, or None where only the weights were saved.

    Without files transformers either fails or makes a tokenizer that knows no word.
    """
    folder = Path(place)
    bare = folder.is_dir() and not has_vocabulary(folder)
    try:
        words = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError, ImportError):
        if bare:
            return None
        raise
    return words if len(words) > len(set(words.all_special_ids)) else None


@contextmanager
def _progress_where_someone_looks() -> Iterator[None]:
    """Keep transformers' own progress bar off a standard error that is no terminal."""
    bars: Any = transformers.utils.logging
    silence = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            bars.enable_progress_bar()


def default_device() -> str:
    """Return "cuda" or "mps" where there is one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def module_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's floating-point parameters, that of the largest number of elements."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    if not sizes:
        raise BackendError("the model has no floating-point parameters; a language model was expected")
    return max(sizes, key=lambda dtype: sizes[dtype])


def module_device(model: nn.Module) -> torch.device:
    """Return the one device of the model.

    Raises:
        BackendError: it is spread over several.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise BackendError(f"the model lies on {', '.join(devices)}; load it on one device")
    return torch.device(devices[0])


def check_module(model: nn.Module) -> None:
    """Refuse a model that runs compiled code.

    Raises:
        BackendError: hooks that are set now would be ignored.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its module {name!r} is" if name else "it is"
            raise BackendError(
                f"the model cannot be hooked: {where} compiled by torch.compile, and hooks that are added afterwards "
                "are ignored without a word; give the model as it was before compiling"
            )


def _take_module(
    model: nn.Module, tokenizer: Any, dtype: str | torch.dtype | None, device: str | None, attention: str | None
) -> Loaded:
    if not hasattr(model, "config"):
        raise InputError(f"{type(model).__name__} has no config; a Hugging Face causal language model was expected")
    check_module(model)
    own = module_dtype(model)
    if dtype is not None and resolve_dtype(dtype) is not own:
        raise InputError(
            f"the model is {dtype_name(own)} and dtype={dtype_name(dtype)} was asked for: a loaded model is "
            "never cast, because that rounds its rotary tables; load it with from_pretrained(..., dtype=...)"
        )
    if device is not None and torch.device(device).type != module_device(model).type:
        raise InputError(f"the model lies on {module_device(model)} and device={device!r} was asked for; move it first")
    current = getattr(model.config, "_attn_implementation", "") or ""
    if attention is not None and attention != current:
        raise InputError(
            f"the model runs {current!r} attention and attention={attention!r} was asked for; call "
            f"model.set_attn_implementation({attention!r}) first"
        )
    model_id = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Loaded(model, tokenizer, model_id, _digest.of_module(model))


def _model_class(config: Any) -> Any:
    causal = transformers.AutoModelForCausalLM
    return causal if type(config) in causal._model_mapping else transformers.AutoModelForImageTextToText


def _softcap(config: Any) -> float | None:
    value = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return None if value is None else float(value)


def _attention(config: Any, asked: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Choose the attention implementation: what was asked for, or eager where sdpa drops a softcap."""
    if asked is not None or _softcap(config) is None:
        return asked, ()
    note = "eager attention was chosen: sdpa drops this model's attention softcap"
    _LOG.info(note)
    return "eager", (note,)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
