"""Which adapter a model runner gets, and what is said when it gets none."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from typing import Any

import pytest

from trimtab.backends.vllm.runners import UNTESTED, adapter
from trimtab.errors import BackendError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
]


def bare(module: str) -> Any:
    """A runner of vLLM's own class that was never made ready."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls: Any = importlib.import_module(module).GPUModelRunner
    return cls.__new__(cls)


def test_each_runner_gets_its_own_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNTESTED, "1")
    assert type(adapter(bare("vllm.v1.worker.gpu_model_runner"))).__name__ == "RunnerV1"
    assert type(adapter(bare("vllm.v1.worker.gpu.model_runner"))).__name__ == "RunnerV2"


@pytest.mark.parametrize("given", [None, "0", "yes"])
def test_the_second_runner_is_refused_until_it_is_allowed(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(UNTESTED, raising=False)
    if given is not None:
        monkeypatch.setenv(UNTESTED, given)
    with pytest.raises(BackendError) as refused:
        adapter(bare("vllm.v1.worker.gpu.model_runner"))
    message = str(refused.value)
    assert "\n" not in message
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in message
    assert f"{UNTESTED}=1" in message


def test_an_unknown_runner_is_refused_with_the_setting_that_selects_the_first() -> None:
    class Third:
        pass

    with pytest.raises(BackendError, match=r"Third.*VLLM_USE_V2_MODEL_RUNNER=0"):
        adapter(Third())


def test_the_setting_that_is_named_selects_the_first_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.config import VllmConfig

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert envs.VLLM_USE_V2_MODEL_RUNNER is False
    decides = VllmConfig.use_v2_model_runner
    assert isinstance(decides, property)
    config = VllmConfig.__new__(VllmConfig)
    config.attention_config = type("Attention", (), {"hisparse_config": None})()
    config.watermark_config = None
    assert decides.fget is not None
    assert decides.fget(config) is False
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert decides.fget(config) is True
    assert "use_v2_model_runner" in inspect.getsource(importlib.import_module("vllm.v1.worker.gpu_worker"))
