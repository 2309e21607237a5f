"""What a walk reads from a repository, and the worktrees that it makes; the user's own tree is never written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import InputError, PrerequisiteError

_FIELDS = "%H%x1f%P%x1f%an%x1f%aI%x1f%s"
_PLAIN = ("-c", "core.quotePath=false", "-c", "log.showSignature=false", "-c", "color.ui=false")
"""The user's settings that would change what git prints."""
_NO_HOOKS = ("-c", "core.hooksPath=/dev/null")
"""The user's hooks would run in our worktrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One commit as git describes it."""

    sha: str
    parents: tuple[str, ...]
    author: str
    date: str
    subject: str

    @property
    def short(self) -> str:
        """Twelve digits: enough to be alone in any repository."""
        return self.sha[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One file of a commit: its paths and contents before and after; None where it does not exist or is not text."""

    path: str
    old_path: str
    old: str | None
    new: str | None


class Repository:
    """A git repository.

    Args:
        path: any directory inside it.

    Raises:
        PrerequisiteError: git is not installed.
        InputError: no repository there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if shutil.which("git") is None:
            raise PrerequisiteError("commits needs git, which is not on PATH: install git")
        if not self.path.is_dir():
            raise InputError(f"no directory {str(path)!r}; give --repo the directory of a git repository")
        try:
            self.root = Path(self._git("rev-parse", "--path-format=absolute", "--show-toplevel").strip())
        except _GitError as error:
            raise InputError(
                f"{str(path)!r} is not inside a git repository ({error}); run there, or give --repo DIRECTORY"
            ) from error

    def resolve(self, revision: str) -> str:
        """Return the full id of a commit.

        Raises:
            InputError: no such commit.
        """
        try:
            return self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
        except _GitError:
            raise InputError(
                f"unknown revision {revision!r} in {self.root}; give a branch, a tag or a commit id that git log shows"
            ) from None

    def commit(self, sha: str) -> Commit:
        """Describe one commit."""
        return _parse(self._git("log", "-1", f"--format={_FIELDS}", sha).strip("\n"))

    def range(self, base: str, head: str, *, first_parent: bool) -> tuple[Commit, ...]:
        """Return the commits after `base` up to `head`, oldest first.

        Raises:
            InputError: no commit between them, `base` is not an ancestor, or a merge commit among them.
        """
        if not self._is_ancestor(base, head):
            if self._is_ancestor(head, base):
                raise InputError(
                    f"{base[:12]} is not an ancestor of {head[:12]} but comes after it: use {head[:12]}..{base[:12]}"
                )
            common = self._try("merge-base", base, head)
            hint = f"their merge base is {common[:12]}: use {common[:12]}..{head[:12]}" if common else "they share none"
            raise InputError(f"{base[:12]} is not an ancestor of {head[:12]}; {hint}")
        how = ("--first-parent",) if first_parent else ()
        text = self._git("log", "--reverse", "--topo-order", *how, f"--format={_FIELDS}", f"{base}..{head}")
        commits = tuple(_parse(line) for line in text.splitlines() if line)
        if not commits:
            raise InputError(f"{base[:12]}..{head[:12]} holds no commit; give BASE..HEAD with BASE before HEAD")
        merges = [one for one in commits if len(one.parents) > 1]
        if merges and not first_parent:
            raise InputError(
                f"{merges[0].short} ({merges[0].subject:.60}) is a merge commit, one of {len(merges)} in the range; "
                "add --first-parent to test each merge as one change, or walk its branches one by one"
            )
        return commits

    def changes(self, commit: Commit) -> tuple[Change, ...]:
        """Return what a commit changed against its first parent."""
        parent = commit.parents[0]
        listed = self._git("diff", "--name-status", "-z", "-M", "--no-ext-diff", parent, commit.sha).split("\0")
        found, at = [], 0
        while at < len(listed) and listed[at]:
            status = listed[at][0]
            both = status in "RC"
            old_path, path = listed[at + 1], listed[at + (2 if both else 1)]
            at += 3 if both else 2
            old = None if status == "A" else self._show(parent, old_path)
            new = None if status == "D" else self._show(commit.sha, path)
            found.append(Change(path=path, old_path=old_path, old=old, new=new))
        return tuple(found)

    def add_worktree(self, place: Path, sha: str) -> None:
        """Check a commit out in a directory of its own; what an interrupted walk left there is removed first.

        Raises:
            InputError: git cannot.
        """
        self.remove_worktree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._git(*_NO_HOOKS, "worktree", "add", "--quiet", "--detach", "--force", str(place.resolve()), sha)
        except _GitError as error:
            raise InputError(f"git cannot make a worktree of {sha[:12]} at {place}: {error}") from error

    def remove_worktree(self, place: Path) -> None:
        """Remove a worktree and git's note of it; one that is not there is no mistake."""
        if place.exists():
            self._try("worktree", "remove", "--force", "--force", str(place.resolve()))
            shutil.rmtree(place, ignore_errors=True)
            self._try("worktree", "prune", "--expire=now")

    def _is_ancestor(self, base: str, head: str) -> bool:
        return self._run("merge-base", "--is-ancestor", base, head).returncode == 0

    def _show(self, sha: str, path: str) -> str | None:
        done = self._run("cat-file", "blob", f"{sha}:{path}")
        try:
            return done.stdout.decode() if done.returncode == 0 else None
        except UnicodeDecodeError:
            return None

    def _try(self, *words: str) -> str:
        return self._run(*words).stdout.decode(errors="replace").strip()

    def _git(self, *words: str) -> str:
        done = self._run(*words)
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise _GitError(lines[-1] if lines else f"git {words[0]} exits {done.returncode}")
        return done.stdout.decode(errors="replace")

    def _run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ("git", *_PLAIN, *words),
            cwd=self.path,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


class _GitError(Exception):
    """git said no; the text is its last line."""


def clean_environment() -> dict[str, str]:
    """Return the environment without what points git at another repository, such as in a hook."""
    drop: Sequence[str] = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
    return {key: value for key, value in os.environ.items() if key not in drop}


def _parse(line: str) -> Commit:
    sha, parents, author, date, subject = line.split("\x1f", 4)
    return Commit(sha=sha, parents=tuple(parents.split()), author=author, date=date, subject=subject)
