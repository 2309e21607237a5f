"""TrainingConfig: every setting of one training, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from trimtab._base import jsonio
from trimtab.errors import RecipeError
from trimtab.results import to_dict

Kind = Literal["vector", "low_rank"]
Loss = Literal["lm", "bipo"]
Rows = Literal["all", "prompt", "generated", "response"]
Schedule = Literal["cosine", "linear", "constant"]
_COUNTS = (
    "rank",
    "epochs",
    "batch_size",
    "accumulate",
    "max_steps",
    "train_tokens",
    "validation_tokens",
    "test_tokens",
)


@Parameter(name="*", group="Training")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What is trained, where, and how."""

    sites: Annotated[tuple[str, ...], Parameter(alias="-s", negative="")]
    """Site patterns, such as `layers.3.resid_post`; every site gets a vector (or map) of its own."""
    kind: Kind = "vector"
    """A vector added to the state, or a low-rank map `h + B (A h + b)`."""
    rank: int = 4
    """Rank of a low-rank map."""
    loss: Loss = "lm"
    """Likelihood of the target tokens, or BiPO on preference pairs."""
    beta: float = 0.1
    """BiPO: how steeply the loss answers the change of the log-ratio."""
    positions: Rows = "all"
    """Rows that are steered, in training and in the steering that is saved."""
    learning_rate: float = 0.1
    """Peak rate of Adam, in hidden units per step: after n steps an element has moved by at most about n rates."""
    schedule: Schedule = "cosine"
    """What the rate does after the warm-up: falls to 0 along a half cosine or a line, or stays."""
    warmup: float = 0.05
    """Fraction of the steps in which the rate rises from 0."""
    epochs: int = 5
    """Passes over the training sequences."""
    max_steps: int | None = None
    """Optimiser steps at most; the schedule ends there."""
    batch_size: int = 8
    """Sequences (BiPO: pairs) per forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step; the loss is the mean over all their target tokens."""
    train_tokens: int | None = None
    """Target tokens for training, taken in whole questions; None: four questions in five, or what is left."""
    validation_tokens: int | None = None
    """Target tokens for validation; None: one question in five when `train_tokens` is None too, else none."""
    test_tokens: int | None = None
    """Target tokens for a test after training; None: no test."""
    prompt: str = ""
    """What the prompted model is told: a system message, or the beginning of a plain text. "": the data's own system
    messages, which the trained model never sees."""
    max_length: int = 2048
    """Longer sequences are cut here, for the counts as for the passes, and the cuts are counted."""
    packing: bool = True
    """Put several sequences into one row instead of padding; a sequence never sees another one."""
    checkpointing: Annotated[bool, Parameter(negative="")] = False
    """Keep only the inputs of the blocks above the lowest site, and run them again in the backward pass."""
    max_grad_norm: float | None = None
    """Scale a larger gradient down to this norm; how often that happened is reported."""
    max_norm: float | None = None
    """Scale a larger vector down to this norm after every step; how often that happened is reported."""
    init_scale: float = 0.0
    """Standard deviation of the vector's first elements; 0 begins with the unsteered model."""
    patience: int = 2
    """Stop after so many evaluations in a row without improvement; 0 never. The best is restored in either case."""
    min_delta: float = 0.0
    """An evaluation improves when its loss is lower by more than this."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: one per epoch. There is always one at the end."""
    cache_mib: int = 1024
    """Memory for the states below the lowest site, which never change; 0 runs them anew each time."""
    seed: int = 0
    """Of the initial values, the order of batches, and BiPO's signs."""

    def __post_init__(self) -> None:
        sites: object = self.sites
        if isinstance(sites, str) or not self.sites:
            raise RecipeError(f"sites is {sites!r}; a tuple of site patterns was expected: ('layers.3.resid_post',)")
        object.__setattr__(self, "sites", tuple(map(str, self.sites)))
        for name, choices in (("kind", Kind), ("loss", Loss), ("positions", Rows), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}; one of {', '.join(get_args(choices))} was expected"
                )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; at least 1 was expected")
        for name in ("patience", "evaluate_every", "cache_mib", "init_scale", "min_delta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise RecipeError(f"{name} is {getattr(self, name)}; 0 or a positive number was expected")
        for name in ("learning_rate", "beta", "max_grad_norm", "max_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{name} is {value}; a finite number above 0 was expected")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"warmup is {self.warmup}; a fraction of the steps, at least 0 and below 1, was expected")
        if self.max_length < 2:
            raise RecipeError(
                f"max_length is {self.max_length}; at least 2 was expected: the first token is never predicted"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainingConfig:
        """Make one of a mapping, such as a file's.

        Raises:
            RecipeError: an unknown setting, or an impossible value.
        """
        unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
        if unknown:
            raise RecipeError(f"no setting {unknown[0]!r}; there are {', '.join(cls.__dataclass_fields__)}")
        if "sites" not in settings:
            raise RecipeError("no site was given; name at least one, such as layers.3.resid_post")
        return cls(**{**settings, "sites": tuple(settings["sites"])})

    def given(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    def json(self) -> str:
        """Return the settings as one line of JSON."""
        return jsonio.dumps(to_dict(self))


def rate_factor(schedule: Schedule, step: int, total: int, warmup: float) -> float:
    """Return the part of the peak rate at a step.

    Args:
        schedule: what comes after the warm-up.
        step: 0-based.
        total: all steps.
        warmup: fraction of them in which the rate rises; the first step is never 0.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
