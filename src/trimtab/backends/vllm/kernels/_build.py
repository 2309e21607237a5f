"""Compiles steer.cpp on first use and keeps it in the user's cache, under everything that decides what it contains."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
from ctypes import PyDLL, py_object
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab._base.log import get_logger

SOURCE = Path(__file__).with_name("steer.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("numbers.h", "wide.h"))
FLAGS: tuple[str, ...] = (
    *("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # every product and every sum rounds
)
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS += ("-mprefer-vector-width=512",)
_log = get_logger(__name__)


class Native(NamedTuple):
    """What steer.cpp offers: operators, each without the Python call around it."""

    bind: Any
    """(tables, residual, dose) -> handle."""
    release: Any
    """(handle)."""
    apply_: Any
    """(x, handle, n)."""
    update_: Any
    """(r, x, binding, n, add)."""
    enroll: Any
    """(tap, handles of its banks, each without and with full doses, (step, own, binding), stream, (number, first
    column, end, what becomes of the stream: 0 nothing, 1 set, 2 added to)): from then on `trimtab::site_` runs this tap
    without Python, and asks `trimtab::live_` when its `own` says so."""
    leave: Any
    """(tap)."""
    lookup: Any
    """(ids, table) -> handle, of what begins the stream (`Step.embed`)."""
    forget: Any
    """(handle)."""
    site: Any
    """(x, tap): `trimtab::site_` as a plain function; None where Python's headers are missing."""


@cache
def native() -> Native | None:
    """Return the operators of steer.cpp, or None where they cannot be built.

    The reason is logged, once. Processes that build at the same time each build their own and the last one stays.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="trimtab-") as private:
            library = str(_library(Path(private)))
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            plain = _plain(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        _log.warning("steering runs as torch operations on the CPU: steer.cpp was not built: %s", told.strip()[-800:])
        return None
    found = [getattr(torch.ops.trimtab_cpu, name).default for name in Native._fields[:-1]]
    return Native(*[*(getattr(one, "_op", one) for one in found), plain])


def _plain(library: str) -> Any:
    """Return the function of a library that was built with Python's headers, None of another one."""
    try:
        made = PyDLL(library).trimtab_site
    except AttributeError:
        return None
    made.restype = py_object
    return made()


def _headers() -> str:
    """Return the folder of Python's headers, "" where they are not installed."""
    folder = Path(sysconfig.get_path("include"))
    return str(folder) if (folder / "Python.h").is_file() else ""


def _library(private: Path) -> Path:
    """Return the compiled library: from the cache, or built into it, or into `private` where there is no cache."""
    name = f"steer-{digest()}.so"
    folder = cache_folder()
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        draft.touch(exist_ok=False)
    except OSError:
        folder, draft = private, private / f".{name}"
    try:
        _compile(draft)
        return draft.replace(folder / name)
    finally:
        draft.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return the folder of compiled libraries: TRIMTAB_CACHE, or the user's cache folder."""
    given = os.environ.get("TRIMTAB_CACHE")
    if given:
        return Path(given) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "kernels"


def digest() -> str:
    """Return what names a build: sources, flags, compiler, torch, Python and the processor's instructions."""
    parts = [one.read_text() for one in (SOURCE, *HEADERS)]
    parts += [*FLAGS, compiler(), torch.__version__, torch.backends.cpu.get_cpu_capability()]
    parts += [_headers(), sysconfig.get_config_var("SOABI") or ""]
    processor = Path("/proc/cpuinfo")
    if processor.is_file():
        lines = processor.read_text().splitlines()
        parts.append(next((one for one in lines if one.lower().startswith(("flags", "features"))), ""))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def compiler() -> str:
    """Return the C++ compiler: CXX, or c++."""
    return os.environ.get("CXX") or "c++"


def _compile(target: Path) -> None:
    found = shutil.which(compiler())
    if found is None:
        raise OSError(f"no C++ compiler {compiler()!r} was found; install one or set CXX")
    base = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    there = (abi, f"-I{base / 'include'}", f"-L{base / 'lib'}")
    python = ("-DTRIMTAB_PYTHON", f"-I{_headers()}", "-ltorch_python")
    for more in (python, ()) if _headers() else ((),):
        command = [found, *FLAGS, *there, str(SOURCE), "-o", str(target), *more, "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            return
    done.check_returncode()
