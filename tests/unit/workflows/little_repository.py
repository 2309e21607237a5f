"""Little git repositories whose script prints JSON lines: no torch, a few milliseconds a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import json, sys
SCALE = 1.0
steps, seed = int(sys.argv[1]), int(sys.argv[2])
for step in range(steps):
    loss = SCALE * (3.0 / (1 + step) + 0.01 * seed)
    print(json.dumps({"step": step, "loss": loss, "grad_norm": loss / 3}))
"""
RUN = (sys.executable, "train.py", "{steps}", "{seed}")


@pytest.fixture(autouse=True)
def own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` is the one that runs the tests, as in an activated environment."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


class LittleRepository:
    """A repository with one script; every method makes one commit."""

    def __init__(self, path: Path, script: str = SCRIPT) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "Ada")
        self.git("config", "user.email", "ada@example.org")
        self.base = self.commit("Train", **{"train.py": script})

    def git(self, *words: str) -> str:
        done = subprocess.run(("git", *words), cwd=self.path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, subject: str, **files: str) -> str:
        """Write files whose names have their dots and slashes, and commit them; return the id."""
        for name, text in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", subject)
        return self.git("rev-parse", "HEAD")

    def edit(self, subject: str, old: str, new: str, name: str = "train.py") -> str:
        """Replace a text in a file and commit it."""
        text = (self.path / name).read_text()
        assert old in text
        return self.commit(subject, **{name: text.replace(old, new)})

    def state(self) -> tuple[str, str, str]:
        """What must not change: status, HEAD, worktrees."""
        return self.git("status", "--porcelain"), self.git("rev-parse", "HEAD"), self.git("worktree", "list")
