"""The directory of a walk: worktrees, and every run by commit, command and length; what is there is not run again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab._base import jsonio
from trimtab._base.files import FileLock, atomic_write_text
from trimtab.errors import InputError, RecipeError
from trimtab.results.commits import CommandRun, MetricTrack, RunStatus
from trimtab.workflows.commits._git import Commit, Repository, clean_environment
from trimtab.workflows.commits._metrics import Metrics, read_metrics, thinned
from trimtab.workflows.commits._process import end_leftovers, run_command
from trimtab.workflows.commits.plan import Command, Plan

WALK_VERSION = 1  # 1: first version
_STARTUP = Path(str(resources.files("trimtab"))) / "dump" / "_startup"
_WALK, _RUN, PLAN_FILE = "walk.json", "run.json", "plan.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """One run with everything that was read from it."""

    run: CommandRun
    metrics: Metrics
    trace: Path | None

    @property
    def ok(self) -> bool:
        """Whether it ended well, so that others may be compared with it."""
        return self.run.status == "ok"


class Place:
    """The directory of a walk.

    Args:
        path: made when it is not there; a `.gitignore` in it hides it from a repository around it.
        repository: whose commits are walked.

    Raises:
        InputError: the directory holds something else, or the walk of another repository.
    """

    def __init__(self, path: str | Path, repository: Repository) -> None:
        self.path = Path(path).resolve()
        self._repository = repository
        self._note: dict[str, Any] = {"format_version": WALK_VERSION, "repository": str(repository.root)}
        note = self.path / _WALK
        if note.is_file():
            said = jsonio.loads(note.read_bytes(), note)
            if said.get("format_version", 0) > WALK_VERSION:
                raise InputError(f"{self.path} was written by a newer trimtab: upgrade, or give another --out")
            if said.get("repository") != str(repository.root):
                raise InputError(f"{self.path} holds a walk of {said.get('repository')}; give another --out")
            self._note = said
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and holds no walk; give another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path / ".gitignore", "*\n")
        self._save()

    def lock(self) -> FileLock:
        """Return the lock that one walk holds at a time."""
        return FileLock(self.path / "lock")

    def propose(self, text: str) -> Path:
        """Write the proposed plan, unless the one that is there was edited.

        Raises:
            RecipeError: it was edited.
        """
        target = self.path / PLAN_FILE
        if target.exists() and _digest(target.read_text(encoding="utf-8")) != self._note.get("proposed"):
            raise RecipeError(f"{target} was edited since it was proposed: use it with --plan {target}, or remove it")
        atomic_write_text(target, text)
        self._note["proposed"] = _digest(text)
        self._save()
        return target

    def forget(self, commit: Commit) -> None:
        """Remove what was run at a commit."""
        shutil.rmtree(self._home(commit), ignore_errors=True)

    def keep(self, name: str, text: str) -> None:
        """Write a file of the walk, whole."""
        atomic_write_text(self.path / name, text)

    @contextmanager
    def visit(self, commit: Commit, plan: Plan) -> Iterator[Visit]:
        """Return what runs commands at a commit; its worktree is there while it is needed."""
        visit = Visit(self, commit, plan, self._repository)
        try:
            yield visit
        finally:
            visit.leave()

    def _home(self, commit: Commit) -> Path:
        return self.path / "runs" / commit.short

    def _save(self) -> None:
        atomic_write_text(self.path / _WALK, jsonio.dumps(self._note, indent=2))


class Visit:
    """One commit being tested."""

    def __init__(self, place: Place, commit: Commit, plan: Plan, repository: Repository) -> None:
        self._place, self._commit, self._plan, self._repository = place, commit, plan, repository
        self._home = place._home(commit)
        self._tree = place.path / "worktrees" / commit.short
        self._ready: str | None = None
        """None before the worktree is there; then what went wrong in setting it up, empty when nothing did."""

    def run(self, command: Command, steps: int, role: str = "") -> Ran:
        """Run a command, or take what an earlier walk has kept.

        Args:
            command: what to run.
            steps: test length.
            role: "noise" for the second run of the base; part of the directory's name.
        """
        folder = self._home / f"{command.name}-{steps}{role and '-'}{role}"
        out = folder / "out"
        values = self._values(out) | {"steps": steps}
        limit = command.time_limit or self._plan.time_limit
        key = _digest(jsonio.dumps([self._commit.sha, command.fill(values), command.env, self._plan.setup, steps]))
        kept = _read(folder / _RUN, key, limit)
        if kept is not None:
            return self._collect(replace(kept, kept=True), command, out, folder)
        if folder.exists():
            end_leftovers(folder, str(out / "trace"))
            shutil.rmtree(folder)
        out.mkdir(parents=True)
        run = self._run(command, values, limit, folder, steps)
        document = {"key": key, "time_limit": limit, "run": {name: getattr(run, name) for name in _STORED}}
        atomic_write_text(folder / _RUN, jsonio.dumps(document, indent=2))
        return self._collect(run, command, out, folder)

    def leave(self) -> None:
        """Remove the worktree."""
        if self._tree.exists():
            self._repository.remove_worktree(self._tree)
        with suppress(OSError):
            self._tree.parent.rmdir()

    def _run(
        self, command: Command, values: Mapping[str, str | int], limit: float, folder: Path, steps: int
    ) -> CommandRun:
        wrong = self._prepare(limit)
        made = CommandRun(
            command=command.name,
            argv=_shown(command, values),
            steps=steps,
            seed=self._plan.seed,
            status="setup",
            exit_code=None,
            seconds=0.0,
            detail=wrong,
            directory=str(folder.relative_to(self._place.path)),
            trace="",
            kept=False,
        )
        if wrong:
            return made
        recorded = command.env.get("TRIMTAB_DUMP") != ""
        dump = {"TRIMTAB_DUMP": str(folder / "out" / "trace")} if recorded else {}
        ended = run_command(
            command.fill(values),
            cwd=self._tree,
            environment=self._environment() | command.env | dump,
            logs=folder,
            name="command",
            time_limit=limit,
        )
        status: RunStatus = "timeout" if ended.timed_out else "ok" if ended.exit_code == 0 else "failed"
        return replace(
            made, status=status, exit_code=ended.exit_code, seconds=round(ended.seconds, 3), detail=ended.detail
        )

    def _prepare(self, limit: float) -> str:
        """Make the worktree and install it, once; return what went wrong in one line."""
        if self._ready is None:
            self._home.mkdir(parents=True, exist_ok=True)
            end_leftovers(self._home, str(self._tree))
            self._repository.add_worktree(self._tree, self._commit.sha)
            self._ready = ""
            if self._plan.setup:
                ended = run_command(
                    Command(run=self._plan.setup).fill(self._values(self._home)),
                    cwd=self._tree,
                    environment=self._environment(),
                    logs=self._home,
                    name="setup",
                    time_limit=limit,
                )
                self._ready = ended.detail and f"setup: {ended.detail}"
        return self._ready

    def _values(self, out: Path) -> dict[str, str | int]:
        return {"seed": self._plan.seed, "out": str(out), "worktree": str(self._tree)}

    def _environment(self) -> dict[str, str]:
        """The caller's, with the worktree early on Python's path: an editable install elsewhere must not win.

        In front of it is what turns dumping on in a process that has TRIMTAB_DUMP and imports torch.
        """
        environment = clean_environment()
        paths = [str(one) for one in (_STARTUP, self._tree / "src", self._tree) if one.is_dir()]
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*paths, before] if before else paths)
        return environment | {"PYTHONHASHSEED": str(self._plan.seed % 2**32), "TRIMTAB_WORKTREE": str(self._tree)}

    def _collect(self, run: CommandRun, command: Command, out: Path, folder: Path) -> Ran:
        metrics = read_metrics(folder / "command.stdout", out, command.metrics) if run.status != "setup" else {}
        trace = out / "trace" if (out / "trace" / "manifest.json").is_file() else None
        tracks = []
        for name, points in metrics.items():
            few = thinned(points)
            steps, values = tuple(step for step, _ in few), tuple(value for _, value in few)
            tracks.append(MetricTrack(metric=name, steps=steps, values=values, count=len(points)))
        where = "" if trace is None else str(trace.relative_to(self._place.path))
        return Ran(run=replace(run, metrics=tuple(tracks), trace=where), metrics=metrics, trace=trace)


_STORED = ("command", "argv", "steps", "seed", "status", "exit_code", "seconds", "detail", "directory")


def _read(path: Path, key: str, limit: float) -> CommandRun | None:
    """What was kept, when it is of the same command; a run that ran out of time is kept for the same limit only."""
    try:
        document = jsonio.loads(path.read_bytes(), path)
        if document["key"] != key or (document["run"]["status"] == "timeout" and document["time_limit"] != limit):
            return None
        return CommandRun(**document["run"], trace="", kept=True)
    except (OSError, InputError, KeyError, TypeError):
        return None


def _shown(command: Command, values: Mapping[str, str | int]) -> str:
    words = command.fill(values)
    return words[-1] if isinstance(command.run, str) else " ".join(words)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
