"""Tiny models of every family, saved once in each form that files have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from tests.unit.every_family import pytest_generate_tests  # noqa: F401
from trimtab.testing.models import tiny


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
