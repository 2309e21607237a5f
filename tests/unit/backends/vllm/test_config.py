"""What an engine may be asked to install, and what it is told when it cannot."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.backends.vllm.config import DEFAULT_SITES, REMEDY, PluginConfig, asked, untested
from trimtab.backends.vllm.plugin import check_version
from trimtab.errors import InputError, PrerequisiteError


def test_settings_are_read_and_the_rest_stands_by_itself() -> None:
    found = PluginConfig.of({"sites": ["layers.1.mlp_out"], "max_steering": 3, "when_full": "refuse"})
    assert (found.sites, found.max_steering, found.when_full) == (("layers.1.mlp_out",), 3, "refuse")
    assert (found.ops_per_site, found.storage) == (2, "float32")
    assert PluginConfig.of(True) == PluginConfig.of({}) == PluginConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("layers.1", "a mapping of settings"),
        ([], "a mapping of settings"),
        ({"max_slots": 4}, "no setting max_slots; it has sites"),
        ({"sites": "layers.1.resid_post"}, "list of site patterns"),
        ({"sites": [1]}, "list of site patterns"),
        ({"sites": []}, "at least one site pattern"),
        ({"max_steering": 0}, "whole number of at least 1"),
        ({"max_steering": True}, "whole number of at least 1"),
        ({"ops_per_site": 1.5}, "whole number of at least 1"),
        ({"keys_per_steering": "4"}, "whole number of at least 1"),
        ({"storage": "float16"}, "expected one of float32, bfloat16"),
        ({"when_full": "drop"}, "expected one of wait, refuse"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        PluginConfig.of(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("additional", "variable", "steers"),
    [
        ({}, None, False),
        ({}, "0", False),
        ({}, "1", True),
        ({"trimtab": False}, None, False),
        ({"trimtab": False}, "1", False),
        ({"trimtab": True}, None, True),
        ({"trimtab": {"max_steering": 2}}, "1", True),
        ({"other": {}}, None, False),
        (None, None, False),
    ],
)
def test_only_an_engine_that_was_asked_steers(
    additional: Any, variable: str | None, steers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMTAB_VLLM", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRIMTAB_VLLM", variable)
    found = asked(SimpleNamespace(additional_config=additional))
    assert (found is not None) == steers
    if steers and isinstance(additional.get("trimtab"), dict):
        assert found == PluginConfig(max_steering=2)


def test_the_way_to_start_it_names_settings_that_exist() -> None:
    assert DEFAULT_SITES[0] in REMEDY
    assert "TRIMTAB_VLLM=1" in REMEDY


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.32", True), ("0.31.9", False), ("0.33.0", False), ("0.320.0", False)],
)
def test_a_release_is_told_to_be_untested_as_an_engine_refuses_it(
    version: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    said = None
    try:
        check_version()
    except PrerequisiteError as error:
        said = str(error)
    assert untested(version) == said
    assert (said is None) == tested
