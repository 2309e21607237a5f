"""The ops of a site as one opaque operator, for graphs made by torch.compile.

Inductor keeps float32 between operations that eager mode rounds to bfloat16 or float16, and on some devices contracts a
multiplication and an addition. Behind this operator the compiled graph runs the very kernels of eager mode, so the
corrections are bit-equal in every math dtype.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.steering.rows import Rows

if TYPE_CHECKING:
    from trimtab.steering.program import SiteProgram

_programs: weakref.WeakValueDictionary[str, SiteProgram] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enroll(program: SiteProgram) -> str:
    """Return the name by which a graph finds `program`, for as long as the program lives.

    A text, not a number: Dynamo makes a number that differs between layers symbolic.
    """
    name = f"program{next(_numbers)}"
    _programs[name] = program
    return name


@torch.library.custom_op("trimtab::steer", mutates_args=())
def steer(
    h: Tensor, positions: Tensor, prompt_length: Tensor, token_ids: Tensor | None, padded: bool | None, program: str
) -> tuple[Tensor, Tensor]:
    """Apply the ops of a program; returns new rows and the number of rows that each op selected."""
    lengths = prompt_length if prompt_length.ndim else int(prompt_length)
    applied = _programs[program].apply(h, Rows(positions, lengths, token_ids, padded=padded))
    counts = [torch.as_tensor(dose.rows, device=h.device) for dose in applied.dose]
    return applied.h.clone() if applied.h is h else applied.h, torch.stack(counts)


@steer.register_fake
def _(
    h: Tensor, positions: Tensor, prompt_length: Tensor, token_ids: Tensor | None, padded: bool | None, program: str
) -> tuple[Tensor, Tensor]:
    steps = len(_programs[program].steps)
    return torch.empty_like(h), torch.empty(steps, dtype=torch.int64, device=h.device)
