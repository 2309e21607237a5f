"""Tiny models of every family, saved once in each form that files have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from trimtab.testing.models import tiny

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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Module, Path]]:
    """`saved(family, original=True)`: a tiny model and the directory where it was saved.

    `original=False` keeps the names of the modules instead of those of published files.
    """

    @functools.cache
    def build(family: str) -> nn.Module:
        return tiny(family)

    @functools.cache
    def save(family: str, original: bool = True) -> tuple[nn.Module, Path]:
        folder = tmp_path_factory.mktemp(f"{family}_{original}")
        build(family).save_pretrained(folder, save_original_format=original)
        return build(family), folder

    return save


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs for every known family."""
    marked = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not marked:
        metafunc.parametrize("family", FAMILIES)
