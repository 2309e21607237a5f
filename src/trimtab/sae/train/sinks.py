"""Where the figures of a run go: JSON lines always, TensorBoard and Weights & Biases when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_bytes
from trimtab._base.optional import require
from trimtab.errors import UnfinishedError
from trimtab.results import to_dict, to_json
from trimtab.results.sae import SAEStepLine

LINES = "steps.jsonl"
OnLine = Callable[[SAEStepLine], None]
_NOT_FIGURES = ("format_version", "kind", "sae", "step", "statistics", "seconds")


class Sink(Protocol):
    """Takes the figures of one SAE."""

    def write(self, line: SAEStepLine) -> None:
        """Take a step."""

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors whose values are to be shown as histograms."""

    def close(self) -> None:
        """Write out what waits."""


class LinesSink:
    """`steps.jsonl`: a document a line.

    Args:
        folder: of the SAE.
        steps: lines of later steps are dropped: they will come again.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        path = folder / LINES
        if path.is_file():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= steps]
            atomic_write_bytes(path, b"".join(kept))
        self._path = path
        self._stream = path.open("a", encoding="utf-8")

    def write(self, line: SAEStepLine) -> None:
        """Append a line; it is on its way to the disk when this returns.

        Raises:
            UnfinishedError: the disk is full.
        """
        try:
            self._stream.write(to_json(line, indent=None) + "\n")
            self._stream.flush()
        except OSError as error:
            raise UnfinishedError(
                f"{self._path} cannot be written: {error.strerror or error}; checkpoints stay, and the same call goes "
                "on from there"
            ) from error

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep nothing: lines hold numbers alone."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class TensorBoardSink:
    """TensorBoard events, in `tensorboard/` of the SAE's directory."""

    def __init__(self, folder: Path, steps: int) -> None:
        module: Any = require("torch.utils.tensorboard", extra="tensorboard", feature="--tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1 if steps else None)

    def write(self, line: SAEStepLine) -> None:
        """Write every figure as a scalar."""
        for name, value in figures(line).items():
            self._writer.add_scalar(name, value, line.step)

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write histograms."""
        for name, one in tensors.items():
            if bool(torch.isfinite(one).all()):  # else told by the figures
                self._writer.add_histogram(name, one, step)

    def close(self) -> None:
        """Write out."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._wandb: Any = require("wandb", extra="wandb", feature="--wandb")
        self._run = self._wandb.init(
            project=project, name=name, id=None, config=dict(config), dir=os.fspath(folder), resume="allow"
        )

    def write(self, line: SAEStepLine) -> None:
        """Log every figure."""
        self._run.log(figures(line), step=line.step)

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Log histograms."""
        shown = {name: self._wandb.Histogram(one.numpy()) for name, one in tensors.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def figures(line: SAEStepLine) -> dict[str, float]:
    """Return the numbers of a step by name; those of `statistics` and `seconds` stand beside the others."""
    plain = to_dict(line)
    found = {name: float(value) for name, value in plain.items() if name not in _NOT_FIGURES}
    found |= dict(line.statistics)
    return found | {f"seconds/{name}": value for name, value in line.seconds.items()}


def _step(line: bytes) -> float:
    try:
        return float(jsonio.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by a crash
        return float("inf")
