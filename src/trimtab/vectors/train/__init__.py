"""Training of steering vectors and low-rank maps at sites of a frozen model.

Names are imported when they are used: the settings alone load no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab._base.lazy import lazy

if TYPE_CHECKING:
    from trimtab.vectors.train.config import TrainingConfig as TrainingConfig
    from trimtab.vectors.train.engine import Engine as Engine
    from trimtab.vectors.train.preparing import prepare as prepare
    from trimtab.vectors.train.rates import sweep_lr as sweep_lr
    from trimtab.vectors.train.saved import Trained as Trained
    from trimtab.vectors.train.saved import load_trained as load_trained
    from trimtab.vectors.train.sequences import Preference as Preference
    from trimtab.vectors.train.sequences import TokenSequence as TokenSequence
    from trimtab.vectors.train.sequences import TrainingData as TrainingData
    from trimtab.vectors.train.training import train as train

_WHERE = {
    "Engine": "engine",
    "Preference": "sequences",
    "TokenSequence": "sequences",
    "Trained": "saved",
    "TrainingConfig": "config",
    "TrainingData": "sequences",
    "load_trained": "saved",
    "prepare": "preparing",
    "sweep_lr": "rates",
    "train": "training",
}

__all__ = [
    "Engine",
    "Preference",
    "TokenSequence",
    "Trained",
    "TrainingConfig",
    "TrainingData",
    "load_trained",
    "prepare",
    "sweep_lr",
    "train",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
