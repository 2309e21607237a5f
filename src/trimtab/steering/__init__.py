"""Ops on hidden states, the sites and rows they act at, and the arithmetic that applies them."""

from __future__ import annotations

from trimtab.steering.dose import OpDose
from trimtab.steering.gains import Constant, Decay, Gain, Ramp
from trimtab.steering.maps import Edit, LowRank, Patch
from trimtab.steering.ops import Ablate, Add, Cap, Op, SetProjection
from trimtab.steering.positions import Positions
from trimtab.steering.program import Applied, Program, SiteProgram
from trimtab.steering.rows import Rows
from trimtab.steering.spec import BoundOp, Steering
from trimtab.steering.subspace import AblateSubspace, CapSubspace
from trimtab.steering.vector import SteeringVector

__all__ = [
    "Ablate",
    "AblateSubspace",
    "Add",
    "Applied",
    "BoundOp",
    "Cap",
    "CapSubspace",
    "Constant",
    "Decay",
    "Edit",
    "Gain",
    "LowRank",
    "Op",
    "OpDose",
    "Patch",
    "Positions",
    "Program",
    "Ramp",
    "Rows",
    "SetProjection",
    "SiteProgram",
    "Steering",
    "SteeringVector",
]
