"""Options that several workflows and commands share; read by the command line, so no heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.errors import InputError, RecipeError

DTYPES = ("float32", "bfloat16", "float16", "float64")
Math = Literal["float32", "bfloat16", "float16", "model"]
PRESETS = {
    "bf16": "hf:bfloat16:model",
    "bf16_cap_fp32": "hf:bfloat16:float32",
    "float16": "hf:float16:model",
    "float32": "hf:float32:float32",
    "float64": "hf:float64:float32",
}


@Parameter(name="*", group="Steering")
@dataclass(frozen=True, kw_only=True, slots=True)
class Steer:
    """A steering of one op at one site, in words that fit on a command line.

    Exactly one of `cap` (with or without `cap_min`), `add`, `keep` says what is done along the vector.

    Example:
        >>> Steer(vector="random:0", layer=2, cap=5.0).op
        'cap'
    """

    vector: str = ""
    """Vector file, "testbed:NAME" or "random:SEED"."""
    layer: int | None = None
    """0-based layer; negative counts from the end. Default: the layer stored with the vector."""
    cap: float | None = None
    """Upper bound of the projection, in hidden units."""
    cap_min: float | None = None
    """Lower bound of the projection, in hidden units."""
    add: float | None = None
    """Multiple of the vector to add."""
    keep: float | None = None
    """Share of the component to keep: 0 removes it."""
    point: str = "resid_post"
    """Point of the layer: resid_post, resid_pre, attn_out, mlp_out, ..."""
    where: str = "all"
    """Positions that are steered: all, prompt, generated, last_prompt, response, or ranges such as 3:7."""
    op_math: Annotated[Math, Parameter(name="--op-math")] = "float32"
    """Arithmetic of the op; "model" uses the model's dtype."""

    @property
    def op(self) -> str:
        """What is done: "cap", "add", "keep", or "" for no steering.

        Raises:
            InputError: an op without a vector, a vector without an op, or several ops.
        """
        given = [
            name
            for name, there in (
                ("cap", self.cap is not None or self.cap_min is not None),
                ("add", self.add is not None),
                ("keep", self.keep is not None),
            )
            if there
        ]
        if len(given) > 1:
            raise InputError(f"one op at a time here, got {' and '.join(given)}; put several into a steering file")
        if bool(given) != bool(self.vector):
            have, want = ("a vector", "cap, cap_min, add or keep") if self.vector else (given[0], "a vector")
            raise InputError(f"{have} was given without {want}")
        return given[0] if given else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """One configuration of a sweep: a backend, the model's dtype, the ops' arithmetic."""

    label: str
    backend: str
    dtype: str
    op_math: str

    @classmethod
    def parse(cls, text: str, backend: str = "hf") -> SweepConfig:
        """Read a preset's name or `[LABEL=]BACKEND:DTYPE[:OP_MATH]`.

        Raises:
            RecipeError: neither; the message lists the presets.
        """
        label, equals, rest = text.rpartition("=")
        spec = PRESETS.get(rest, rest)
        parts = spec.split(":")
        if len(parts) == 2:
            parts.append("model")
        if len(parts) != 3 or parts[1] not in DTYPES or parts[2] not in ("model", "float32", "bfloat16", "float16"):
            raise RecipeError(
                f"configuration {text!r}: use one of {', '.join(PRESETS)}, or [LABEL=]BACKEND:DTYPE[:OP_MATH] "
                f"such as mine=hf:bfloat16:float32, with DTYPE one of {', '.join(DTYPES)}"
            )
        if rest in PRESETS:
            parts[0] = backend
        name = label if equals else (rest if rest in PRESETS else "_".join(parts))
        if rest in PRESETS and not equals and backend != "hf":
            name = f"{backend}_{rest}"
        return cls(label=name, backend=parts[0], dtype=parts[1], op_math=parts[2])


@Parameter(name="*", group="Sweep")
@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """What a sweep can be told, as arguments, on the command line and in a YAML file alike; None was not said."""

    model: Annotated[str | None, Parameter(alias="-m")] = None
    """A directory, a hub id, or "testbed" for the embedded model (default: testbed)."""
    configs: Annotated[tuple[str, ...] | None, Parameter(name="--config", alias="-c", negative="")] = None
    """bf16, bf16_cap_fp32, float16, float32, float64, or [LABEL=]BACKEND:DTYPE[:OP_MATH]; repeat for several."""
    reference: str | None = None
    """Label of the configuration that the others are compared with (default: float32)."""
    backend: str | None = None
    """Backend of the named configurations: hf, vllm, or "hf,vllm" for both (default: hf)."""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu."""
    max_tokens: int | None = None
    """Tokens to generate for each prompt (default: 32)."""
    logprobs: int | None = None
    """How many most probable tokens are kept at each step (default: 5)."""
    seed: int | None = None
    """Seed of everything random (default: 0)."""
    batch_size: int | None = None
    """Prompts per batch, the same for every configuration (default: 8)."""
    allow_unfired: Annotated[bool | None, Parameter(negative="")] = None
    """An op that selects no row is reported instead of refused."""
    allow_fallback: Annotated[bool | None, Parameter(negative="")] = None
    """Steer a model whose family is unknown, at sites found by its structure."""
    sites: str | None = None
    """What the forced pass captures; drift is read from resid_post among it (default: layers.*.resid_post)."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in values if value is not None}


SWEEP_DEFAULTS = SweepOptions(
    model="testbed",
    configs=("bf16", "bf16_cap_fp32", "float16", "float32"),
    reference="float32",
    backend="hf",
    max_tokens=32,
    logprobs=5,
    seed=0,
    batch_size=8,
    allow_unfired=False,
    allow_fallback=False,
    sites="layers.*.resid_post",
)
