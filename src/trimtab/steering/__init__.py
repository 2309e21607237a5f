"""Ops on hidden states, the sites and rows they act at, and the arithmetic that applies them."""

from __future__ import annotations

from trimtab.steering.dose import OpDose
from trimtab.steering.gains import Constant, Decay, Gain, Ramp
from trimtab.steering.ops import Ablate, Add, Cap, Op, SetProjection
from trimtab.steering.positions import Positions
from trimtab.steering.program import Applied, Program, SiteProgram
from trimtab.steering.rows import Rows
from trimtab.steering.spec import BoundOp, Steering

__all__ = [
    "Ablate",
    "Add",
    "Applied",
    "BoundOp",
    "Cap",
    "Constant",
    "Decay",
    "Gain",
    "Op",
    "OpDose",
    "Positions",
    "Program",
    "Ramp",
    "Rows",
    "SetProjection",
    "SiteProgram",
    "Steering",
]
