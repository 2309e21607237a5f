"""Sparse autoencoders: mixed-precision training that is exactly the float32 run, and what they are worth.

Names are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab._base.lazy import lazy

if TYPE_CHECKING:
    from trimtab.sae.checking import check_precision as check_precision
    from trimtab.sae.config import OptimConfig as OptimConfig
    from trimtab.sae.config import SAEConfig as SAEConfig
    from trimtab.sae.data import Stream as Stream
    from trimtab.sae.data import StreamConfig as StreamConfig
    from trimtab.sae.evaluation import evaluate as evaluate
    from trimtab.sae.files import load as load
    from trimtab.sae.files import save as save
    from trimtab.sae.latents import LatentVector as LatentVector
    from trimtab.sae.latents import export as export
    from trimtab.sae.latents import latent_vector as latent_vector
    from trimtab.sae.learner import Learner as Learner
    from trimtab.sae.learner import SelfTest as SelfTest
    from trimtab.sae.learner import StepLosses as StepLosses
    from trimtab.sae.model import SAE as SAE
    from trimtab.sae.precision import Precision as Precision
    from trimtab.sae.ranges import precision_report as precision_report
    from trimtab.sae.scaling import Scales as Scales
    from trimtab.sae.synthetic import SparseDictionary as SparseDictionary
    from trimtab.sae.synthetic import recovery as recovery
    from trimtab.sae.train import Plan as Plan
    from trimtab.sae.train import SAESettings as SAESettings
    from trimtab.sae.train import TrainConfig as TrainConfig
    from trimtab.sae.train import train as train
    from trimtab.sae.train import train_stream as train_stream

_WHERE = {
    "LatentVector": "latents",
    "Learner": "learner",
    "OptimConfig": "config",
    "Plan": "train",
    "Precision": "precision",
    "SAE": "model",
    "SAEConfig": "config",
    "SAESettings": "train",
    "Scales": "scaling",
    "SelfTest": "learner",
    "SparseDictionary": "synthetic",
    "StepLosses": "learner",
    "Stream": "data",
    "StreamConfig": "data",
    "TrainConfig": "train",
    "check_precision": "checking",
    "evaluate": "evaluation",
    "export": "latents",
    "latent_vector": "latents",
    "load": "files",
    "precision_report": "ranges",
    "recovery": "synthetic",
    "save": "files",
    "train": "train",
    "train_stream": "train",
}

__all__ = [
    "SAE",
    "LatentVector",
    "Learner",
    "OptimConfig",
    "Plan",
    "Precision",
    "SAEConfig",
    "SAESettings",
    "Scales",
    "SelfTest",
    "SparseDictionary",
    "StepLosses",
    "Stream",
    "StreamConfig",
    "TrainConfig",
    "check_precision",
    "evaluate",
    "export",
    "latent_vector",
    "load",
    "precision_report",
    "recovery",
    "save",
    "train",
    "train_stream",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
