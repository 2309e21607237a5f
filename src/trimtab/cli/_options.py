"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.errors import InputError
from trimtab.workflows.config import Steer

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@Parameter(name="*", group="Model")
@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Which model, in which precision, run by what."""

    model: Annotated[str, Parameter(alias="-m")] = "testbed"
    """A directory, a hub id, or "testbed" for the embedded model."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    backend: str = "hf"
    """Who runs it: hf, mock or vllm."""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu."""
    allow_fallback: Annotated[bool, Parameter(negative="")] = False
    """Steer a model whose family is unknown, at sites found by its structure."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from the defaults, the model left out."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name != "model" and getattr(self, one.name) != one.default
        }


@Parameter(name="*", group="Model")
@dataclass(frozen=True, kw_only=True, slots=True)
class BatchedModel(Model):
    """A model that runs several prompts together."""

    batch_size: int = 8
    """Prompts per batch."""


@Parameter(name="*", group="Engine (vLLM)")
@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Settings of the vLLM engine; refused by the other backends."""

    gpu_memory_utilization: float | None = None
    """Share of the device's memory that the engine takes."""
    max_model_len: int | None = None
    """Longest sequence in tokens."""
    tensor_parallel_size: int | None = None
    """Processes that share each layer."""
    engine: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """Any other engine argument, as key=value; repeat for several."""

    def kwargs(self) -> dict[str, Any]:
        """Return `{"engine": {...}}`, or nothing when no setting was given.

        Raises:
            InputError: an --engine without "=".
        """
        names = ("gpu_memory_utilization", "max_model_len", "tensor_parallel_size")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for text in self.engine:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise InputError(f"--engine {text!r}: write key=value, such as --engine block_size=32")
            given[key] = value
        return {"engine": given} if given else {}


@Parameter(name="*", group="Sampling")
@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are chosen."""

    max_tokens: int = 32
    """Tokens to generate."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0 samples."""
    seed: int = 0
    """Seed of the sampler; each prompt has its own stream."""
    ignore_eos: Annotated[bool, Parameter(negative="")] = False
    """Go on after an end-of-sequence token."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from the defaults."""
        defaults = Decoding()
        names = ("max_tokens", "temperature", "seed", "ignore_eos")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}


def read_prompts(prompts: tuple[str, ...], prompt_file: Path | None) -> list[str]:
    """Return the prompts given as arguments and those of a file, one a line.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    found = list(prompts)
    if prompt_file is not None:
        try:
            lines = prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompt file {str(prompt_file)!r} cannot be read: {error}") from error
        listed = [line for line in lines if line.strip()]
        if not listed:
            raise InputError(f"prompt file {str(prompt_file)!r} holds no prompt; write one a line")
        found += listed
    return found


def steering_input(file: str | None, steer: Steer) -> str | Steer | None:
    """Return the steering file or the op in words, whichever was given.

    Raises:
        InputError: both, or options of a vector without one.
    """
    if file is not None and steer != Steer():
        raise InputError(f"give --steering {file} or --vector and its options, not both")
    if steer.op:
        return steer
    if steer != Steer():
        raise InputError("options of a steering vector were given without a vector: add --vector and --cap, say")
    return file


def noise_runs(runs: list[Path] | None) -> Path | tuple[Path, ...]:
    """Return what `noise=` takes: one run of the reference repeated, or two; empty when none was given.

    Raises:
        InputError: more than two.
    """
    if runs and len(runs) > 2:
        raise InputError(f"--noise takes one run, or two that differ by noise only; got {len(runs)}")
    return runs[0] if runs and len(runs) == 1 else tuple(runs or ())


def given(**values: Any) -> dict[str, Any]:
    """Return the arguments that are neither None, False nor empty."""
    return {key: value for key, value in values.items() if value is not None and value is not False and value != ()}
