"""How the embedded model is made: every number of its architecture, its training and its checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from trimtab.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Architecture, training and checks of the embedded model; the seed is separate."""

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_positions: int = 512
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    steps: int = 1000
    """Optimizer steps."""
    batches: tuple[tuple[int, int], ...] = ((32, 64), (16, 128), (4, 512))
    """Shapes (rows, tokens) of the batches, taken in turn; every row begins a document."""
    learning_rate: float = 3e-3
    """Peak; linear warm-up, then a cosine down to zero."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    log_every: int = 10
    """Steps that one point of the loss curve averages."""
    evaluation_documents: int = 200
    """Fresh documents for the loss and the projection quantiles."""
    evaluation_tokens: int = 256
    """Tokens of each evaluation document, the first excluded from the loss."""
    direction_layer: int = 3
    """Directions are read and applied at `layers.<this>.resid_post`."""
    direction_pairs: int = 256
    """Pairs of each contrast set."""
    direction_sentences: int = 6
    """Sentences of each of its passages."""
    cap_quantile: float = 0.5
    """The suggested cap is this quantile of the projections: it clamps the rows above it."""
    steering_strengths: tuple[float, ...] = (-4.0, -2.0, 0.0, 2.0, 4.0)
    """Multiples of the raw mean difference in the steering check."""
    steering_prompts: int = 50
    steering_tokens: int = 40

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "direction_layer" and value < 1:
                raise RecipeError(f"testbed recipe: {field.name} is {value}; give at least 1")
        if not 0 <= self.direction_layer < self.num_layers - 1:
            raise RecipeError(
                f"testbed recipe: direction_layer is {self.direction_layer}, the model has layers 0 to "
                f"{self.num_layers - 1}; give one before the last"
            )
        if max(tokens for _, tokens in self.batches) > self.max_positions:
            raise RecipeError(
                f"testbed recipe: a batch of {self.batches} is longer than max_positions {self.max_positions}"
            )


RECIPE: Final = Recipe()
"""The recipe of the model that ships."""
