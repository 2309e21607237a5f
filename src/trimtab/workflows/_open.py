"""Opening a backend for one job: an engine with fixed buffers is told beforehand what the job needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.backends import Backend, open_backend
from trimtab.steering import Steering
from trimtab.workflows._steer import SteeringInput
from trimtab.workflows.config import Steer


def open_for(
    name: str,
    model: Any,
    options: Mapping[str, Any],
    *,
    steering: SteeringInput = None,
    sites: Sequence[str] = (),
) -> Backend:
    """Open a model.

    Args:
        name: of the backend.
        model: as `open_backend` takes it.
        options: of the backend; None stands for its default.
        steering: what will steer it.
        sites: patterns that will be captured.

    Raises:
        as `open_backend`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name == "vllm":
        given |= _buffers(steering) | {"capture_sites": tuple(sites)}
    return open_backend(name, model, **given)


def _buffers(steering: SteeringInput) -> dict[str, Any]:
    """Return the buffers that a steering needs in an engine."""
    if isinstance(steering, (str, Path)):
        steering = Steering.load(steering)
    if isinstance(steering, Steer):
        return {"sites": (f"layers.*.{steering.point}",)} if steering.op else {}
    if steering is None:
        return {}
    from trimtab.backends.vllm.sizes import Sizes

    return {"sites": steering.sites, **Sizes.of([steering])._asdict()}
