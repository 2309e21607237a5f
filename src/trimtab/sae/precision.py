"""Which dtype parameters are stored in and which one matrix products run in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from trimtab.errors import RecipeError
from trimtab.numerics import dtype_name, resolve_dtype

PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
"""What a training may be asked for: storage, compute."""
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True, slots=True)
class Precision:
    """Storage and compute; thresholds, losses and the sums of biases are float32 whatever they are.

    float64 for both exists for proofs: every reduction is then float64 too.
    """

    dtype: torch.dtype = torch.float32
    """Of the parameters and the optimizer's moments."""
    compute: torch.dtype = torch.float32
    """Of the operands of matrix products."""

    def __post_init__(self) -> None:
        if (self.dtype, self.compute) not in (*PAIRS, (torch.float64, torch.float64)):
            valid = ", ".join(f"{_SHORT[a]}/{_SHORT[b]}" for a, b in PAIRS)
            given = f"{dtype_name(self.dtype)}/{dtype_name(self.compute)}"
            raise RecipeError(f"storage/compute is {given}; one of {valid} was expected")

    @classmethod
    def parse(cls, dtype: str | torch.dtype = "fp32", lower_dtype: str | torch.dtype | None = None) -> Self:
        """Read a pair of names, such as "fp32" and "bf16"; None computes in the storage dtype.

        Raises:
            RecipeError: for a pair that is not valid; names those that are.
            InputError: for a name that is no dtype.
        """
        storage = resolve_dtype(dtype)
        compute = storage if lower_dtype is None else resolve_dtype(lower_dtype)
        if torch.float64 in (storage, compute):
            valid = ", ".join(f"{_SHORT[a]}/{_SHORT[b]}" for a, b in PAIRS)
            raise RecipeError(
                f"storage/compute is {dtype_name(storage)}/{dtype_name(compute)}; one of {valid} was expected"
            )
        return cls(storage, compute)

    @property
    def wide(self) -> torch.dtype:
        """Dtype of thresholds, losses and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def narrow(self) -> bool:
        """Whether something is in float16, whose exponents need scales."""
        return torch.float16 in (self.dtype, self.compute)

    def __str__(self) -> str:
        return f"{_SHORT[self.dtype]}/{_SHORT[self.compute]}"
