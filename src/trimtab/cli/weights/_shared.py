"""What the three verbs share: their options, and the call that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given
from trimtab.errors import InputError

_DEFAULTS: dict[str, Any] = {
    "controls": 64, "seed": 0, "dtype": "float32", "device": "cpu", "jobs": 1, "pairs": "200",
    "control_kinds": ("isotropic",),
}  # fmt: skip


@Parameter(name="*", group="Directions and layers")
@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What is read through which directions, and how."""

    directions: Annotated[list[str], Parameter(alias="-d", negative="", consume_multiple=True)] = field(
        default_factory=list
    )
    """Persona folders, PCA files (PCA.pt#PC1-PC8), autoencoders (SAE#3,17), vector files, testbed:NAME; several."""
    vector_layer: int | None = None
    """Layer to take from files that hold a vector for each."""
    layers: Annotated[str | None, Parameter(alias="-l", allow_leading_hyphen=True)] = None
    """Layers to measure, such as 0,4-8 or -1. Default: all."""
    controls: int = 64
    """Control directions of each kind; a z-score's own error falls with their number."""
    control_kinds: Annotated[
        tuple[Literal["isotropic", "covariance", "shuffled"], ...], Parameter(negative="", consume_multiple=True)
    ] = ("isotropic",)
    """Kinds of controls; z-scores are against the first."""
    states: Path | None = None
    """.npy or .pt file of activations [n, d], for covariance-matched and shuffled controls."""
    labels: Path | None = None
    """.npy or .pt file of 0 and 1, the labels to shuffle. Default: halves."""
    seed: int = 0
    """Of the controls."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the arithmetic."""
    device: str = "cpu"
    """Where it runs."""
    out: Path | None = None
    """Directory for the rows and the report; the same command goes on where it stopped."""
    jobs: int = 1
    """Processes that measure layers."""
    ray: str | None = None
    """Measure on this Ray cluster instead: auto, HOST:PORT, ray://HOST:PORT, or local."""
    average_layers: Annotated[bool, Parameter(negative="")] = False
    """Also give the mean over the layers."""
    pairs: str = "200"
    """Interactions kept at either end of every layer, or all."""
    html: Path | None = None
    """Also write the page."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from the defaults."""
        names = ("vector_layer", "layers", "states", "labels", "out", "average_layers")
        found = given(**{name: getattr(self, name) for name in names})
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                found[name] = _pairs(value) if name == "pairs" else list(value) if name == "control_kinds" else value
        return found


def analyse(analysis: str, function: str, base: str, tuned: str, reading: Reading, output: Output, **more: Any) -> int:
    """Make the call of one verb, here or on a cluster."""
    if not reading.directions:
        raise InputError("no directions: give --directions with persona folders, PCA files, vectors or testbed:NAME")
    kwargs = {**reading.kwargs(), **given(**more)}
    directions = list(reading.directions)
    if reading.ray is None:
        call = Call(function=f"trimtab.weights.{function}", args=(base, tuned, directions), kwargs=kwargs)
    else:
        if reading.jobs != 1:
            raise InputError("--jobs are processes of this machine and --ray is a cluster; give one of them")
        kwargs = {"address": reading.ray, **kwargs}
        call = Call(function="trimtab.weights_on_ray", args=(analysis, base, tuned, directions), kwargs=kwargs)
    return run(call, output, summarise=lambda made: getattr(made, "report", made), html=reading.html)


def _pairs(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise InputError(f"--pairs {text!r}: a number, or all")
    return int(text)
