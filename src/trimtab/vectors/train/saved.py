"""Trained: the result of a training and its steering, as a directory of a few kilobytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab._base.files import atomic_write_text
from trimtab._base.log import get_logger
from trimtab.errors import InputError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.training import Training
from trimtab.steering import Add, Steering, SteeringVector

RESULT, STEERING = "training.json", "steering.safetensors"
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What `train` returns."""

    result: Training
    steering: Steering
    """All maps at their sites, for `generate`, `evaluate` and the backends."""

    @property
    def vectors(self) -> dict[str, SteeringVector]:
        """Site -> vector with its provenance; empty for low-rank maps."""
        return {str(one.pattern): _vector(one, self.result) for one in self.steering.bound if isinstance(one.op, Add)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `steering.safetensors`, one vector file per site, and `training.json` last.

        Raises:
            InputError: the directory cannot be written.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.steering.save(folder / STEERING)
            for site, vector in self.vectors.items():
                vector.save(folder / f"{site}.safetensors")
            atomic_write_text(folder / RESULT, to_json(self.result) + "\n")
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error


def load_trained(path: str | os.PathLike[str], *, model: Any = None) -> Trained:
    """Read what `Trained.save` wrote.

    Args:
        path: the directory.
        model: an engine or a backend that it must fit; None checks the files alone.

    Raises:
        InputError: no such directory, or a file is missing.
        VectorError: the steering is not the one that was trained, or was trained on another model.
    """
    folder = Path(path)
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no finished training: {RESULT} is missing")
    result = from_json(Training, (folder / RESULT).read_text())
    steering = Steering.load(folder / STEERING)
    if steering.digest != result.steering_digest:
        raise VectorError(
            f"{folder / STEERING} is not the steering that {RESULT} speaks of: digest {steering.digest[:16]}, "
            f"{result.steering_digest[:16]} was expected; copy both files from the training's directory"
        )
    if model is not None:
        _check(result, model.info, folder)
    return Trained(result=result, steering=steering)


def _check(result: Training, info: Any, folder: Path) -> None:
    if info.hidden_size != result.hidden_size:
        raise VectorError(
            f"{folder} was trained on {result.model}, width {result.hidden_size}; this model has width "
            f"{info.hidden_size}"
        )
    kinds = [digest.rpartition(":")[0] for digest in (result.model_digest, info.weights_digest)]
    if kinds[0] != kinds[1] or not kinds[0]:
        _LOG.warning(
            "%s: whether this is the model that it was trained on cannot be told: digests %r and %r are of two kinds",
            folder,
            result.model_digest,
            info.weights_digest,
        )
    elif result.model_digest != info.weights_digest:
        raise VectorError(
            f"{folder} was trained on {result.model} with the weights {result.model_digest}; this model has "
            f"{info.weights_digest}: train it again, or load that model"
        )


def _vector(one: Any, result: Training) -> SteeringVector:
    evidence = {
        "method": f"trained:{result.config['loss']}",
        "data": result.name,
        "positions": result.config["positions"],
        "best_step": result.best_step,
        "validation_loss": result.best_loss,
        "unsteered_loss": result.unsteered_loss,
    }
    return SteeringVector.of(
        one.op.vector,
        site=str(one.pattern),
        recipe=evidence,
        model_digest=result.model_digest,
        data_hash=str(result.provenance.get("data_digest", "")),
        provenance={"config": dict(result.config), **result.provenance},
    )
