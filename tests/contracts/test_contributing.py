"""The table of requirements in CONTRIBUTING.md names tests that exist, and every test file is in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())))


def test_every_named_test_exists() -> None:
    assert NAMED
    for name in NAMED:
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which does not exist"


def test_every_test_file_is_named() -> None:
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        path = file.relative_to(ROOT).as_posix()
        covered = any(path == name or path.startswith(f"{name}/") for name in NAMED)
        assert covered or path.startswith(("tests/unit/base/", "tests/unit/results/")), f"{path} is in no row"
