"""The ops that a file may name."""

from __future__ import annotations

from trimtab.steering.maps import LowRank, Patch
from trimtab.steering.ops import Ablate, Add, Cap, Op, SetProjection
from trimtab.steering.subspace import AblateSubspace, CapSubspace

KINDS: dict[str, type[Op]] = {
    one.__name__: one for one in (Add, Cap, Ablate, SetProjection, AblateSubspace, CapSubspace, Patch, LowRank)
}
