"""Directions: readers for every vector file, GGUF both ways, calibration of strength, and control directions."""

from __future__ import annotations

from trimtab.directions.calibration import QUANTILES, calibrate, convert_strength
from trimtab.directions.capping import CappingFile, load_capping
from trimtab.directions.controls import permuted_control, random_control
from trimtab.directions.direction import Direction
from trimtab.directions.gguf_file import GGUFVectors, read_gguf, steering_to_gguf, write_gguf
from trimtab.directions.origin import check_origin
from trimtab.directions.readers import load_direction

__all__ = [
    "QUANTILES",
    "CappingFile",
    "Direction",
    "GGUFVectors",
    "calibrate",
    "check_origin",
    "convert_strength",
    "load_capping",
    "load_direction",
    "permuted_control",
    "random_control",
    "read_gguf",
    "steering_to_gguf",
    "write_gguf",
]
