"""One file per architecture: the loss of a batch, in stored units."""

from __future__ import annotations

from trimtab.sae.architectures import jumprelu
from trimtab.sae.architectures.base import Forward, Scene, Terms
from trimtab.sae.config import Architecture

FORWARD: dict[Architecture, Forward] = {"jumprelu": jumprelu.forward}

__all__ = ["FORWARD", "Forward", "Scene", "Terms"]
