"""Steering vectors: from contrast data to a vector file with its evidence.

Names are imported when they are used: reading vectors loads no training code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab._base.lazy import lazy

if TYPE_CHECKING:
    from trimtab.vectors.clean import clean as clean
    from trimtab.vectors.clean import to_steering as to_steering
    from trimtab.vectors.comparing import compare as compare
    from trimtab.vectors.data import ContrastData as ContrastData
    from trimtab.vectors.data import Encoder as Encoder
    from trimtab.vectors.data import Example as Example
    from trimtab.vectors.data import load as load
    from trimtab.vectors.data import split_fractions as split_fractions
    from trimtab.vectors.data import split_tokens as split_tokens
    from trimtab.vectors.extract import Extraction as Extraction
    from trimtab.vectors.extract import extract as extract
    from trimtab.vectors.files import convert as convert
    from trimtab.vectors.files import random as random
    from trimtab.vectors.files import show as show
    from trimtab.vectors.train import TrainingConfig as TrainingConfig
    from trimtab.vectors.train import load_trained as load_trained
    from trimtab.vectors.train import sweep_lr as sweep_lr
    from trimtab.vectors.train import train as train

_WHERE = {
    "ContrastData": "data",
    "Encoder": "data",
    "Example": "data",
    "Extraction": "extract",
    "TrainingConfig": "train",
    "clean": "clean",
    "compare": "comparing",
    "convert": "files",
    "extract": "extract",
    "load": "data",
    "split_fractions": "data",
    "split_tokens": "data",
    "load_trained": "train",
    "random": "files",
    "show": "files",
    "sweep_lr": "train",
    "to_steering": "clean",
    "train": "train",
}

__all__ = [
    "ContrastData",
    "Encoder",
    "Example",
    "Extraction",
    "TrainingConfig",
    "clean",
    "compare",
    "convert",
    "extract",
    "load",
    "load_trained",
    "random",
    "show",
    "split_fractions",
    "split_tokens",
    "sweep_lr",
    "to_steering",
    "train",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
