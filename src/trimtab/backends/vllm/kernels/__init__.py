"""The kernel that applies steering programs to rows: C++ on the CPU, torch operations elsewhere."""

from trimtab.backends.vllm.kernels._build import Native, native
from trimtab.backends.vllm.kernels._form import BOUNDS, LINEAR, NORM, STATIC, Tables, steer, update

__all__ = ["BOUNDS", "LINEAR", "NORM", "STATIC", "Native", "Tables", "native", "steer", "update"]
