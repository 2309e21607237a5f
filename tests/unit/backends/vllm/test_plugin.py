"""The gates that the plugin leaves in vLLM: in a vLLM that is not the tested one too, and where messages go."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.backends.vllm import core, plugin, worker
from trimtab.errors import BackendError, PrerequisiteError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
    pytest.mark.filterwarnings("ignore"),
]


def asking(given: Any) -> Any:
    """A worker of an engine with this setting."""
    return SimpleNamespace(vllm_config=SimpleNamespace(additional_config=given))


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The gates that are put up, by the method they are put at."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        plugin, "_wrap", lambda cls, name, **what: found.update({f"{cls.__name__}.{name}": what.get("after")})
    )
    monkeypatch.delenv("TRIMTAB_VLLM", raising=False)
    return found


@pytest.mark.parametrize(
    "lacking", ["EngineCore._initialize_effective_attention_block_size", "WorkerWrapperBase.init_worker"]
)
def test_a_vllm_without_what_is_relied_on_starts_engines_that_do_not_ask(
    lacking: str, gates: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    name, method = lacking.split(".")
    monkeypatch.delattr({"EngineCore": EngineCore, "WorkerWrapperBase": WorkerWrapperBase}[name], method)
    plugin.register()
    assert list(gates) == ["WorkerBase.__init__"]
    made = gates["WorkerBase.__init__"]
    for stock in ({}, None, {"trimtab": False}):
        made(asking(stock))
    with pytest.raises(PrerequisiteError, match=rf"has no {lacking}; steering is tested with 0\.32\.x; pip install"):
        made(asking({"trimtab": True}))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(PrerequisiteError, match=r"vLLM 0\.33\.0 is installed and steering is tested with 0\.32\.x"):
        made(asking({"trimtab": True}))


def test_a_vllm_whose_parts_are_elsewhere_is_left_alone(
    gates: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", None)
    plugin.register()
    assert not gates
    assert "this vLLM cannot steer" in caplog.text


@pytest.mark.parametrize("told", [False, True])
def test_messages_appear_where_those_of_vllm_do(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, root = (logging.getLogger(name) for name in ("trimtab", "vllm", None))
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(io.StringIO())] if told else [])
    monkeypatch.setattr(ours, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    monkeypatch.setattr(theirs, "level", logging.INFO)
    stream = io.StringIO()
    monkeypatch.setattr(theirs, "handlers", [logging.StreamHandler(stream)])
    for _ in range(2):
        plugin.log_as_vllm_does()
    logging.getLogger("trimtab.backends.vllm.worker").info("steering: 6 sites")
    ours.manager._clear_cache()  # type: ignore[attr-defined]  # of what is logged at which level
    assert stream.getvalue() == ("" if told else "steering: 6 sites\n")


def engine(**changed: Any) -> Any:
    """The settings of an engine that can steer, but for what is changed."""
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(enable_dbo=False, num_ubatches=1),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        scheduler_config=SimpleNamespace(policy="fcfs"),
        model_config=SimpleNamespace(runner_type="generate"),
        kv_transfer_config=None,
    )
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(config, part), field, value)
        else:
            setattr(config, part, value)
    return config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"speculative_config": object()}, "without speculative_config"),
        ({"parallel_config__enable_dbo": True}, "microbatches"),
        ({"parallel_config__num_ubatches": 2}, "microbatches"),
        ({"compilation_config__pass_config": SimpleNamespace(enable_sp=True)}, "enable_sp"),
        ({"scheduler_config__policy": "priority"}, "scheduling_policy='fcfs'"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
    ],
)
def test_settings_under_which_rows_cannot_be_followed_are_refused(changed: dict[str, Any], said: str) -> None:
    worker._refuse(engine())
    with pytest.raises(BackendError, match=said) as refused:
        worker._refuse(engine(**changed))
    assert "\n" not in str(refused.value)


def connector(name: str, *inner: str) -> Any:
    """The setting of a KV connector, and of those inside of it."""
    return SimpleNamespace(
        kv_connector=name, kv_connector_extra_config={"connectors": [{"kv_connector": one} for one in inner]}
    )


@pytest.mark.parametrize(
    ("transfer", "refused"),
    [
        (None, ""),
        (connector("OffloadingConnector"), ""),
        (connector("NixlConnector"), ""),
        (connector("MultiConnector", "NixlConnector", "OffloadingConnector"), ""),
        (connector("LMCacheConnectorV1"), "LMCacheConnectorV1"),
        (connector("ExampleConnector"), "ExampleConnector"),
        (connector("somebody.else.Connector"), "somebody.else.Connector"),
        (connector("MultiConnector", "NixlConnector", "LMCacheMPConnector"), "LMCacheMPConnector"),
    ],
)
def test_connectors_that_may_mix_steered_blocks_with_others_are_refused(transfer: Any, refused: str) -> None:
    if not refused:
        core._refuse(engine(kv_transfer_config=transfer))
        return
    with pytest.raises(BackendError, match=f"the KV connector {refused} "):
        core._refuse(engine(kv_transfer_config=transfer))


def test_names_of_connectors_are_those_of_vllm() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert core._BY_HASH | core._BY_REQUEST | {"MultiConnector"} <= set(KVConnectorFactory._registry)
