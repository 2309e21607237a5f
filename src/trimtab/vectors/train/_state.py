"""Where a training stands: kept after every step, written so that it goes on with the very next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_bytes
from trimtab.errors import InputError
from trimtab.results import to_dict
from trimtab.results.training import TrainingEvaluation, TrainingStep
from trimtab.sites import Site
from trimtab.vectors.train._maps import SiteMap

FORMAT = "trimtab-training-state"
VERSION = 1  # 1: first version


@dataclass(kw_only=True)
class Progress:
    """Everything that the next step depends on, and what is to be reported in the end."""

    step: int = 0
    """Steps taken."""
    since_best: int = 0
    """Evaluations since the best one."""
    best_step: int = 0
    best_loss: float | None = None
    seconds: float = 0.0
    resumed: int = 0
    unsteered_loss: float | None = None
    stopped: str = ""
    steps: list[TrainingStep] = field(default_factory=list)
    evaluations: list[TrainingEvaluation] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Parameters, their moments and the best parameters, by name."""

    def take(self, maps: Mapping[Site, SiteMap], optimizer: torch.optim.Adam) -> None:
        """Copy the parameters and moments as they stand between two steps."""
        best = {name: one for name, one in self.tensors.items() if name.startswith("best/")}
        found = {f"now/{name}": one.detach().cpu().clone() for name, one in named(maps)}
        for name, one in named(maps):
            for key, value in optimizer.state.get(one, {}).items():
                found[f"{key}/{name}"] = value.detach().cpu().clone()
        self.tensors = {**found, **best}

    def keep_best(self, maps: Mapping[Site, SiteMap]) -> None:
        """Copy the parameters as the best."""
        self.tensors |= {f"best/{name}": one.detach().cpu().clone() for name, one in named(maps)}

    def put(self, maps: Mapping[Site, SiteMap], optimizer: torch.optim.Adam) -> None:
        """Set parameters and moments to what was taken."""
        self.restore(maps, "now")
        for name, one in named(maps):
            keys = [key.split("/")[0] for key in self.tensors if key.split("/", 1)[1] == name]
            moments = {key: self.tensors[f"{key}/{name}"].clone() for key in keys if key not in ("now", "best")}
            if moments:
                optimizer.state[one] = {
                    key: value if key == "step" else value.to(one.device) for key, value in moments.items()
                }

    def restore(self, maps: Mapping[Site, SiteMap], which: str) -> None:
        """Set the parameters to "now" or "best"."""
        for name, one in named(maps):
            one.data.copy_(self.tensors[f"{which}/{name}"])

    def save(self, path: Path, identity: str) -> None:
        """Write a file, whole or not at all."""
        about = {name: getattr(self, name) for name in (*_SCALARS,)}
        about["steps"] = [to_dict(one) for one in self.steps]
        about["evaluations"] = [to_dict(one) for one in self.evaluations]
        metadata = {"format": FORMAT, "version": str(VERSION), "identity": identity, "state": jsonio.dumps(about)}
        atomic_write_bytes(path, safetensors.torch.save(self.tensors, metadata))

    @classmethod
    def load(cls, path: Path, identity: str) -> Progress:
        """Read what `save` wrote.

        Raises:
            InputError: not such a file, or of another model, data or settings.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as stream:
                metadata = dict(stream.metadata() or {})
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is no checkpoint of a training: {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise InputError(f"{path} is no checkpoint of a training that this version reads; remove it to begin anew")
        if metadata.get("identity") != identity:
            raise InputError(
                f"{path} is the checkpoint of another training: model, data or settings differ; give another "
                "directory, or remove it to begin anew"
            )
        about: dict[str, Any] = jsonio.loads(metadata["state"])
        steps = [TrainingStep(**{key: _number(value) for key, value in one.items()}) for one in about.pop("steps")]
        evaluations = [
            TrainingEvaluation(**{key: _number(value) for key, value in one.items()})
            for one in about.pop("evaluations")
        ]
        scalars = {key: value if key == "stopped" else _number(value) for key, value in about.items()}
        return cls(steps=steps, evaluations=evaluations, tensors=tensors, **scalars)


_SCALARS = ("step", "since_best", "best_step", "best_loss", "seconds", "resumed", "unsteered_loss", "stopped")


def named(maps: Mapping[Site, SiteMap]) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters with a name each, in the order of the sites."""
    return [(f"{site}/{name}", one) for site, part in maps.items() for name, one in part.named_parameters()]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
