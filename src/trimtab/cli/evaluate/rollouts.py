"""`trimtab evaluate rollouts`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Engine, Model, given, read_prompts
from trimtab.errors import InputError


@Parameter(name="*", group="Variants")
@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    """What is compared, beside the unsteered model."""

    vector: Annotated[list[str], Parameter(negative="")] = field(default_factory=list)
    """NAME=FILE, or a file, testbed:NAME or random:SEED under its own name; repeat for several."""
    scale: Annotated[list[float], Parameter(negative="")] = field(default_factory=list)
    """Strength of every vector; repeat for several (--scale=-0.1)."""
    unit: Literal["absolute", "token_norm", "matched_norm"] = "token_norm"
    """Of the scales: hidden units, parts of each token's norm, or multiples of the norm of --learned."""
    learned: str = ""
    """Name of the vector whose norm the others are also run at, with both signs."""
    prompted: str = ""
    """A system prompt, for the variant "prompted"."""
    controls: int = 0
    """Random directions to run beside the vectors."""
    layer: int | None = None
    """0-based layer for vectors that do not say theirs."""
    positions: str = "all"
    """Positions that are steered."""
    no_system: Annotated[bool, Parameter(negative="")] = False
    """Drop the system messages of the prompts, except for the variant "prompted"."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from the defaults."""
        defaults = Variants()
        names = [one.name for one in fields(self) if one.name not in ("vector", "scale")]
        found = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}
        vectors = dict(named_vector(text) for text in self.vector)
        if len(vectors) < len(self.vector):
            raise InputError("two vectors have one name; write --vector NAME=FILE")
        return {**({"vectors": vectors} if vectors else {}), **({"scales": self.scale} if self.scale else {}), **found}


def named_vector(text: str) -> tuple[str, str]:
    """Return name and file; a vector without a name takes that of its file.

    Raises:
        InputError: an empty name or file.
    """
    name, equals, file = text.partition("=")
    if not equals:
        name, file = Path(text.rpartition(":")[2]).stem if text.startswith("testbed:") else Path(text).stem, text
    if not name or not file:
        raise InputError(f"--vector {text!r}: write NAME=FILE, such as --vector trained=kind.safetensors")
    return name, file


def rollouts(
    *prompt: str,
    out: Path,
    prompt_file: Path | None = None,
    variants: Variants = Variants(),
    samples: int = 1,
    max_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    resume: bool = True,
    model: Model = Model(),
    engine: Engine = Engine(),
    output: Output = Output(),
) -> int:
    """Let every variant continue every prompt, some samples each; one directory, resumable.

    Args:
        prompt: what the model continues.
        out: directory of this run.
        prompt_file: a file with one prompt a line.
        samples: outputs per prompt; more than one needs a temperature.
        max_tokens: most tokens of an output.
        temperature: 0 takes the most probable token; above 0 samples.
        top_p: nucleus of the sampling.
        seed: seed of all samplers and controls; output (prompt, sample) has one seed in every variant.
        batch_size: outputs that run together.
        resume: go on with a run of the same plan where it stopped.
    """
    settings = {"samples": (samples, 1), "max_tokens": (max_tokens, 50), "top_p": (top_p, 1.0), "seed": (seed, 0)}
    settings["temperature"] = (temperature, 0.0)
    kwargs = {"out": out, **variants.kwargs(), **{name: one for name, (one, usual) in settings.items() if one != usual}}
    kwargs |= given(batch_size=batch_size) | model.kwargs() | engine.kwargs()
    if not resume:
        kwargs["resume"] = False
    args = (model.model, read_prompts(prompt, prompt_file))
    return run(Call(function="trimtab.evaluate.rollouts", args=args, kwargs=kwargs), output)
