"""Where the sites of a model are: one table entry per family, and a structural probe for unknown ones.

`describe(model)` returns the `ModelMap`; `check_model(model)` refuses a model in a state that falsifies numbers.
"""

from __future__ import annotations

from trimtab.architectures._check import check_model
from trimtab.architectures._config import SavedConfig, activation, read_config
from trimtab.architectures._describe import describe
from trimtab.architectures._family import BlockPaths, Disk, Family, Numerics, Rope, Router, Sizes, Temperature, Vllm
from trimtab.architectures._handle import Columns, Handle
from trimtab.architectures._map import ModelMap
from trimtab.architectures._probe import probe
from trimtab.architectures._registry import FAMILIES
from trimtab.architectures._rotary import Rotary, rotary

__all__ = [
    "FAMILIES",
    "BlockPaths",
    "Columns",
    "Disk",
    "Family",
    "Handle",
    "ModelMap",
    "Numerics",
    "Rope",
    "Rotary",
    "Router",
    "SavedConfig",
    "Sizes",
    "Temperature",
    "Vllm",
    "activation",
    "check_model",
    "describe",
    "probe",
    "read_config",
    "rotary",
]
