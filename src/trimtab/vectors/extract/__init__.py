"""Extraction: one streaming pass over the data, then every site's direction by the method asked for."""

from __future__ import annotations

from trimtab.vectors.extract.extraction import Extraction, extract
from trimtab.vectors.extract.methods import METHODS
from trimtab.vectors.extract.stream import Stream

__all__ = ["METHODS", "Extraction", "Stream", "extract"]
