"""The families that the package knows by name; a test that takes `family` runs for each of them."""

from __future__ import annotations

import pytest

FAMILIES = (
    "llama",
    "llama4",
    "llama4_multimodal",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_multimodal",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every family to a test that takes `family` and names none itself."""
    marked = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not marked:
        metafunc.parametrize("family", FAMILIES)
