"""Putting tensors together that a parallel run shared out: which records, in which order, and who held what."""

from __future__ import annotations

from trimtab.compare.layout._types import Layout, Piece, spelled
from trimtab.compare.layout.arrange import Arranged, Problem, arrange_group, collapse
from trimtab.compare.layout.assemble import Assembled
from trimtab.compare.layout.axes import needs_tokens
from trimtab.compare.layout.parts import part_differences
from trimtab.compare.layout.replicas import Difference, differences
from trimtab.compare.layout.views import TokenMatch, View, view_pair
from trimtab.compare.layout.world import RANKED, World, lists_ranks, silent_ranks

__all__ = [
    "RANKED",
    "Arranged",
    "Assembled",
    "Difference",
    "Layout",
    "Piece",
    "Problem",
    "TokenMatch",
    "View",
    "World",
    "arrange_group",
    "collapse",
    "differences",
    "lists_ranks",
    "needs_tokens",
    "part_differences",
    "silent_ranks",
    "spelled",
    "view_pair",
]
