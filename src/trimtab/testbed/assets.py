"""The files of the embedded model: where they are, its ready directions, and the record of its training."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab._base import jsonio
from trimtab.errors import PrerequisiteError
from trimtab.testbed.lexicon import check_attribute

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TestbedDirection:
    """A mean-difference direction of one attribute, measured when the model was built."""

    __test__ = False  # not a test, whatever pytest makes of the name

    attribute: str
    vector: torch.Tensor
    """Unit direction, [hidden_size] float32; it points towards the attribute."""
    norm: float
    """Length of the raw mean difference in hidden units: adding `scale * norm * vector` is strength `scale`."""
    site: str
    """Where it was measured, such as "layers.3.resid_post"."""
    cap: float
    """A maximum, in hidden units, for a Cap that acts on a good share of rows."""
    quantiles: dict[float, float]
    """Projections of the rows of fresh grammar text on the direction, by fraction."""
    median_norm: float
    """Median length of those rows."""
    file: Path
    """The steering vector file that holds all of this."""


def path() -> Path:
    """Return the directory of the embedded model, for `from_pretrained` and for `vllm.LLM`.

    Raises:
        PrerequisiteError: the package was installed without its data files.
    """
    found = Path(str(importlib.resources.files("trimtab.testbed"))) / "files"
    if not (found / "model.safetensors").is_file():
        raise PrerequisiteError(
            f"the embedded model is missing from {found}: install trimtab again, or run `trimtab testbed build "
            "DIR` and use DIR as the model"
        )
    return found


def direction(attribute: str, *, directory: Path | None = None) -> TestbedDirection:
    """Return the ready direction of an attribute.

    Args:
        attribute: one of `ATTRIBUTES`.
        directory: a model that `trimtab testbed build` made; None is the shipped one.

    Raises:
        InputError: there is no such attribute.
        PrerequisiteError: the files are not there.
    """
    from safetensors import safe_open

    check_attribute(attribute)
    file = (path() if directory is None else directory) / direction_file(attribute)
    if not file.is_file():
        raise PrerequisiteError(f"{file} is missing: build the testbed again, or use the shipped one")
    with safe_open(file, framework="pt") as opened:
        vector = opened.get_tensor("direction")
        about = jsonio.loads(opened.metadata()["vector"])
    return TestbedDirection(
        attribute=attribute,
        vector=vector,
        cap=about["recipe"]["cap"],
        quantiles=dict(about["quantiles"]),
        file=file,
        **{name: about[name] for name in ("norm", "site", "median_norm")},
    )


def direction_file(attribute: str) -> str:
    """Return the name of an attribute's direction file.

    They lie in a folder of their own: engines take every safetensors file beside a model's for weights.
    """
    return f"directions/{attribute}.safetensors"


def training(*, directory: Path | None = None) -> dict[str, Any]:
    """Return the record of the training (`training.json`): recipe, losses, entropy, checks, versions."""
    found: dict[str, Any] = jsonio.loads(((directory or path()) / "training.json").read_bytes())
    return found
