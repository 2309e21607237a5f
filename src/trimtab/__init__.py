"""Steer, capture and compare the activations of large language models, with numerics that can be trusted."""

from __future__ import annotations

from trimtab._version import __version__

__all__ = ["__version__"]
