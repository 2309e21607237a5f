"""Every command line in the documents is one that the program takes."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from trimtab.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "skills").rglob("*.md"))]
EXEMPT = ("serve", "doctor", "testbed", "--version")
"""Without --print-python; that they parse is tested with what they do."""


def commands(path: Path) -> list[str]:
    """Return the command lines in the code blocks of a document, continued lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [
            line.strip().removeprefix("$ ") for line in lines if line.strip().startswith(("trimtab ", "$ trimtab "))
        ]
    return found


CASES = [(path.relative_to(ROOT).as_posix(), line) for path in DOCUMENTS for line in commands(path)]


def test_documents_show_commands() -> None:
    assert len({path for path, _ in CASES}) > 5


@pytest.mark.parametrize(("path", "line"), CASES)
def test_a_documented_command_is_taken(
    path: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in (">", "|", "&&")), len(words))]
    if words[0] in EXEMPT:
        return
    for option, value in pairwise(words):
        if option == "--prompt-file":  # is read before the call is made
            Path(value).write_text("a question\n")
    end = words.index("--") if "--" in words else len(words)
    code = main([*words[:end], "--print-python", *words[end:]])
    assert code == 0, f"{path}: {line}: {capsys.readouterr().err}"
