"""How a server is asked for: the command line, its defaults, and options that are refused before anything starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from trimtab.backends.vllm import server
from trimtab.backends.vllm.config import PluginConfig
from trimtab.backends.vllm.server.launch import ServeConfig, _words
from trimtab.backends.vllm.server.store import Store
from trimtab.cli import main
from trimtab.errors import InputError
from trimtab.steering import Add, CapSubspace, Steering


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, ServeConfig]:
    """Return what a command line asks the server for."""
    calls: list[tuple[str, ServeConfig]] = []
    monkeypatch.setattr(server, "serve", lambda model, config: calls.append((model, config)))
    assert main(["serve", *words]) == 0
    return calls[0]


def test_a_server_listens_on_loopback_and_forbids_changes_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRIMTAB_ADMIN_KEY", raising=False)
    model, config = asked(monkeypatch, "testbed", "--steering", "d")
    assert (model, config) == ("testbed", ServeConfig(steering=Path("d")))
    assert (config.host, config.admin_key) == ("127.0.0.1", None)


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "from the environment")
    words = "m --steering d --host 0.0.0.0 --port 81 --dtype float16 --sites embed --sites layers.*.mlp_out"
    words += " --max-steering 3 --ops-per-site 4 --max-strength 2.5 --max-upload-bytes 9 --max-model-len 64"
    words += " --directions-per-op 6 --keys-per-steering 7 --storage bfloat16 --when-full refuse --max-payload-bytes 99"
    words += " --tensor-parallel-size 2 --gpu-memory-utilization 0.5 --engine enforce_eager=true"
    _, config = asked(monkeypatch, *words.split())
    assert config == ServeConfig(
        steering=Path("d"),
        host="0.0.0.0",
        port=81,
        dtype="float16",
        admin_key="from the environment",
        sites=("embed", "layers.*.mlp_out"),
        max_steering=3,
        ops_per_site=4,
        directions_per_op=6,
        keys_per_steering=7,
        storage="bfloat16",
        when_full="refuse",
        max_payload_bytes=99,
        max_strength=2.5,
        max_upload_bytes=9,
        engine={
            "gpu_memory_utilization": 0.5,
            "max_model_len": 64,
            "tensor_parallel_size": 2,
            "enforce_eager": "true",
        },
    )
    _, config = asked(monkeypatch, "m", "--steering", "d", "--admin-key", "given")
    assert config.admin_key == "given"
    assert "given" not in repr(config)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"admin_key": ""}, "admin key is empty"),
        ({"admin_key": "\u00e9"}, "not ASCII"),
        ({"max_strength": float("inf")}, "finite number above 0"),
        ({"max_strength": float("nan")}, "finite number above 0"),
        ({"max_strength": 0.0}, "finite number above 0"),
        ({"max_upload_bytes": 0}, "at least 1"),
        ({"port": 70000}, "0 to 65535"),
        ({"engine": {"host": "0.0.0.0"}}, "give --host instead"),
        ({"engine": {"additional_config": "{}"}}, "--sites, .*--when-full"),
        ({"engine": {"api_server_count": "4"}}, "one process"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ServeConfig(steering=Path("d"), **given)


def test_the_sites_of_the_files_can_be_steered(tmp_path: Path) -> None:
    Steering({"layers.1.mlp_out": [Add([1.0])]}).save(tmp_path / "a.safetensors")
    config = ServeConfig(steering=tmp_path)
    assert config.plugin(Store(tmp_path))["sites"] == ["layers.*.resid_post", "layers.1.mlp_out"]
    assert ServeConfig(steering=tmp_path, sites=("embed",)).plugin(Store(tmp_path))["sites"] == ["embed"]


def test_the_engine_is_made_as_large_as_the_files_need(tmp_path: Path) -> None:
    """Any two of them can be one request's; what was given stands as it is."""
    sizes = ("ops_per_site", "directions_per_op", "keys_per_steering")

    def made(**given: Any) -> tuple[Any, ...]:
        plugin = ServeConfig(steering=tmp_path, **given).plugin(Store(tmp_path))
        PluginConfig.of(plugin)
        return tuple(plugin[name] for name in sizes)

    assert made() == (2, 1, 4)
    many = [Steering({"layers.1.mlp_out": Add([1.0, 2.0])}, positions=f"{n}:{n + 1}") for n in range(5)]
    Steering.of(bound for one in many for bound in one.bound).save(tmp_path / "five.safetensors")
    assert made() == (5, 1, 5)
    Steering({"layers.*.mlp_out": CapSubspace([[1.0, 0.0], [0.0, 1.0]], max=1.0)}).save(tmp_path / "two.safetensors")
    assert made() == (6, 2, 6)
    assert made(ops_per_site=3, directions_per_op=9, keys_per_steering=1) == (3, 9, 1)


def test_settings_of_the_engine_are_those_of_the_options(tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steering": 3, "storage": "bfloat16", "when_full": "refuse", "max_payload_bytes": 99}
    assert ServeConfig(steering=tmp_path, **given).plugin(Store(tmp_path)).items() >= given.items()
    with pytest.raises(InputError, match="expected one of wait, refuse"):
        ServeConfig(steering=tmp_path, when_full="drop").plugin(Store(tmp_path))  # type: ignore[arg-type]


def test_options_of_vllm_are_given_by_their_names() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--block-size", type=int)
    assert _words(parser, "block_size", "32") == ["--block-size", "32"]
    assert _words(parser, "enforce_eager", "True") == ["--enforce-eager"]
    assert _words(parser, "enforce_eager", "false") == ["--no-enforce-eager"]
    for key, value, says in (
        ("blok_size", "32", "nearest: block_size"),
        ("enforce_eager", "maybe", "true or false"),
        ("headless", "false", "true or false"),
    ):
        with pytest.raises(InputError, match=says):
            _words(parser, key, value)


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "testbed", "--steering", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
