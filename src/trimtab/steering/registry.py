"""The ops that a file may name."""

from __future__ import annotations

from trimtab.steering.ops import Ablate, Add, Cap, Op, SetProjection

KINDS: dict[str, type[Op]] = {one.__name__: one for one in (Add, Cap, Ablate, SetProjection)}
