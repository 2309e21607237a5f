"""The schemas in docs/schemas are those of the code, and results fit them."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from trimtab import results

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
DOCUMENTS = sorted(
    name
    for name in results.__all__
    if is_dataclass(getattr(results, name)) and hasattr(getattr(results, name), "format_version")
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_written_schema_is_the_code_s(name: str) -> None:
    """Write them again with: python scripts/write_schemas.py"""
    written = json.loads((FOLDER / f"{name}.json").read_text())
    assert written == results.schema(getattr(results, name))


def test_no_schema_is_left_over() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == DOCUMENTS
