"""Training of sparse autoencoders on a stream: plans, the loop, checkpoints, figures, and the public calls."""

from __future__ import annotations

from trimtab.sae.train.config import Plan, SAESettings, TrainConfig
from trimtab.sae.train.opening import train
from trimtab.sae.train.training import train_stream

__all__ = ["Plan", "SAESettings", "TrainConfig", "train", "train_stream"]
