"""Steer, capture and compare the activations of large language models, with numerics that can be trusted.

Names are imported when they are used: `import trimtab` loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from trimtab._base.lazy import lazy
from trimtab._version import __version__

if TYPE_CHECKING:
    from trimtab.backends import open_backend as open_backend
    from trimtab.compare import compare as compare
    from trimtab.directions import load_direction as load_direction
    from trimtab.errors import TrimtabError as TrimtabError
    from trimtab.report import report as report
    from trimtab.results import Comparison as Comparison
    from trimtab.sites import Site as Site
    from trimtab.steering import Ablate as Ablate
    from trimtab.steering import AblateSubspace as AblateSubspace
    from trimtab.steering import Add as Add
    from trimtab.steering import Cap as Cap
    from trimtab.steering import CapSubspace as CapSubspace
    from trimtab.steering import Edit as Edit
    from trimtab.steering import LowRank as LowRank
    from trimtab.steering import Patch as Patch
    from trimtab.steering import SetProjection as SetProjection
    from trimtab.steering import Steering as Steering
    from trimtab.steering import SteeringVector as SteeringVector
    from trimtab.trace import Trace as Trace
    from trimtab.trace import TraceWriter as TraceWriter
    from trimtab.workflows.analyze import analyze as analyze
    from trimtab.workflows.cluster import compare_on_ray as compare_on_ray
    from trimtab.workflows.commits import commits as commits
    from trimtab.workflows.config import Steer as Steer
    from trimtab.workflows.debug_decode import debug_decode as debug_decode
    from trimtab.workflows.demo import demo as demo
    from trimtab.workflows.doctor import doctor as doctor
    from trimtab.workflows.rerun import rerun as rerun
    from trimtab.workflows.run import capture as capture
    from trimtab.workflows.run import generate as generate
    from trimtab.workflows.stress import stress as stress
    from trimtab.workflows.sweep import sweep as sweep
    from trimtab.workflows.testbed import build as testbed_build
    from trimtab.workflows.training_queue import train_all as train_all
    from trimtab.workflows.triage import triage as triage
    from trimtab.workflows.weights_cluster import weights_on_ray as weights_on_ray

_WHERE = {
    "Ablate": "steering",
    "AblateSubspace": "steering",
    "Add": "steering",
    "Cap": "steering",
    "CapSubspace": "steering",
    "Comparison": "results",
    "Edit": "steering",
    "LowRank": "steering",
    "Patch": "steering",
    "SetProjection": "steering",
    "Site": "sites",
    "Steer": "workflows.config",
    "Steering": "steering",
    "SteeringVector": "steering",
    "Trace": "trace",
    "TraceWriter": "trace",
    "TrimtabError": "errors",
    "analyze": "workflows.analyze",
    "capture": "workflows.run",
    "commits": "workflows.commits",
    "compare": "compare",
    "compare_on_ray": "workflows.cluster",
    "debug_decode": "workflows.debug_decode",
    "demo": "workflows.demo",
    "doctor": "workflows.doctor",
    "dump": "dump:",
    "evaluate": "evaluate:",
    "generate": "workflows.run",
    "load_direction": "directions",
    "open_backend": "backends",
    "report": "report",
    "rerun": "workflows.rerun",
    "sae": "sae:",
    "stress": "workflows.stress",
    "sweep": "workflows.sweep",
    "testbed_build": "workflows.testbed:build",
    "train_all": "workflows.training_queue",
    "triage": "workflows.triage",
    "vectors": "vectors:",
    "vllm": "backends.vllm:",
    "weights": "weights:",
    "weights_on_ray": "workflows.weights_cluster",
}

__all__ = [
    "Ablate",
    "AblateSubspace",
    "Add",
    "Cap",
    "CapSubspace",
    "Comparison",
    "Edit",
    "LowRank",
    "Patch",
    "SetProjection",
    "Site",
    "Steer",
    "Steering",
    "SteeringVector",
    "Trace",
    "TraceWriter",
    "TrimtabError",
    "__version__",
    "analyze",
    "capture",
    "commits",
    "compare",
    "compare_on_ray",
    "debug_decode",
    "demo",
    "doctor",
    "dump",
    "evaluate",
    "generate",
    "load_direction",
    "open_backend",
    "report",
    "rerun",
    "sae",
    "stress",
    "sweep",
    "testbed_build",
    "train_all",
    "triage",
    "vectors",
    "vllm",
    "weights",
    "weights_on_ray",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
if os.environ.get("TRIMTAB_DUMP"):
    importlib.import_module("trimtab.dump.environment").start()
