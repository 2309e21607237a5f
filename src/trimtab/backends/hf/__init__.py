"""Models of the transformers library, run by a generation loop of our own."""

from __future__ import annotations

from trimtab.backends.hf.backend import HFBackend

__all__ = ["HFBackend"]
