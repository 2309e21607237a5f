"""What the backend starts its engine with; what it does then is tested with engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.backends import open_backend
from trimtab.backends.vllm import backend as backends
from trimtab.backends.vllm.config import PluginConfig
from trimtab.cli import main
from trimtab.errors import BackendError
from trimtab.steering import AblateSubspace, Add, Steering


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the settings of the engines that were asked for; none starts."""
    asked: list[dict[str, Any]] = []

    def start(place: str, **given: Any) -> Any:
        asked.append(given["settings"])
        raise BackendError("no engine here")

    monkeypatch.setattr(backends, "start", start)
    return asked


def test_every_size_can_be_given(settings: list[dict[str, Any]]) -> None:
    given: dict[str, Any] = {
        "max_steering": 2,
        "ops_per_site": 3,
        "directions_per_op": 5,
        "keys_per_steering": 7,
        "storage": "bfloat16",
        "max_payload_bytes": 1 << 20,
    }
    with pytest.raises(BackendError, match="no engine here"):
        open_backend("vllm", "testbed", **given)
    assert settings[0].items() >= given.items()
    PluginConfig.of(settings[0])


def test_a_command_makes_room_for_its_steering(
    settings: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("all", "prompt", "generated", "last_prompt", "0:2")
    steering = Steering.of(
        bound
        for layer, positions in enumerate(rows)
        for bound in Steering({f"layers.{layer}.mlp_out": Add([1.0] * 128)}, positions=positions).bound
    )
    steering += Steering({"embed": AblateSubspace([[1.0, *[0.0] * 127], [0.0, 1.0, *[0.0] * 126]], keep=0.0)})
    steering.save(tmp_path / "s.safetensors")
    for command in (["generate", "a"], ["capture", "a", "--out", str(tmp_path / "c")]):
        assert main([*command, "--backend", "vllm", "--steering", str(tmp_path / "s.safetensors")]) != 0
        assert "no engine here" in capsys.readouterr().err
        found = settings.pop()
        assert (found["ops_per_site"], found["directions_per_op"], found["keys_per_steering"]) == (1, 2, 5)
        assert set(steering.sites) <= set(found["sites"])
