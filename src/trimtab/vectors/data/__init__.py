"""Contrast data: labelled texts and conversations, split by question, with the tokens that count marked.

data = load("rows.jsonl:score>=75")
splits = split_tokens(data, {"train": 100_000, "validation": 10_000}, lambda one: encoder(one).num_targets)
"""

from __future__ import annotations

from trimtab.vectors.data.encoding import Encoded, Encoder, Pool
from trimtab.vectors.data.examples import ContrastData, Example
from trimtab.vectors.data.readers import concept_prompts, from_rows, load
from trimtab.vectors.data.selection import Selection
from trimtab.vectors.data.splits import SplitCount, Splits, split_fractions, split_tokens

__all__ = [
    "ContrastData",
    "Encoded",
    "Encoder",
    "Example",
    "Pool",
    "Selection",
    "SplitCount",
    "Splits",
    "concept_prompts",
    "from_rows",
    "load",
    "split_fractions",
    "split_tokens",
]
