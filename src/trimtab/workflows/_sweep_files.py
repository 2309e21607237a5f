"""A sweep on disk: its plan, and two traces for each configuration.

sweep.json                plan: settings, prompts, configurations, steering digest, provenance; written first
steering.safetensors      the one steering that every configuration uses (absent: unsteered)
<label>/free/             trace of the free-running pass: tokens with top-k log-probabilities, doses
<label>/forced/           trace of the pass along the reference's tokens: the same, and resid_post of every layer
<label>/*/progress.json   written after each batch: what is committed; a resumed pass goes on behind it
<label>/*/done.json       written instead when the pass is complete
sweep.lock                held by the process that runs the sweep
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab._base import jsonio
from trimtab._base.files import FileLock, atomic_write_text
from trimtab.backends import Prompt
from trimtab.errors import ComparisonError, InputError, RecipeError, UnfinishedError
from trimtab.results import SweepConfigState, SweepRun
from trimtab.trace import Trace
from trimtab.workflows.config import SweepConfig
from trimtab.workflows.run import as_prompt

SWEEP_VERSION = 1  # 1: first version
Pass = Literal["free", "forced"]
PASSES: tuple[Pass, ...] = ("free", "forced")
PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """What a sweep is to do; frozen when its directory is made."""

    model: str
    prompts: tuple[Prompt, ...]
    configs: tuple[SweepConfig, ...]
    reference: str
    max_tokens: int
    logprobs: int
    seed: int
    batch_size: int
    sites: str
    steering: str = ""
    """In words."""
    steering_digest: str = ""
    """Empty: unsteered."""
    num_layers: int = 0
    model_digest: str = ""
    allow_unfired: bool = False
    allow_fallback: bool = False
    device: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)

    def config(self, label: str) -> SweepConfig:
        """Return a configuration by its label.

        Raises:
            InputError: there is none; the message lists those that exist.
        """
        for config in self.configs:
            if config.label == label:
                return config
        raise InputError(
            f"no configuration {label!r} in this run; it has {', '.join(one.label for one in self.configs)}"
        )

    def differences(self, other: SweepPlan) -> tuple[str, ...]:
        """Return the names of the settings that differ."""
        mine, theirs = jsonio.plain(asdict(self)), jsonio.plain(asdict(other))
        return tuple(key for key in mine if mine[key] != theirs[key])


@dataclass(frozen=True, kw_only=True, slots=True)
class PassProgress:
    """What of a pass is committed, and what it took."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def after(self, prompts: int, tokens: int, seconds: float) -> PassProgress:
        """Return the progress after one more batch."""
        return PassProgress(prompts=self.prompts + prompts, tokens=self.tokens + tokens, seconds=self.seconds + seconds)


@dataclass(frozen=True, slots=True)
class SweepFiles:
    """One run directory."""

    path: Path
    plan: SweepPlan
    provenance: dict[str, Any]

    @property
    def steering_path(self) -> Path:
        return self.path / "steering.safetensors"

    def trace_path(self, label: str, which: Pass) -> Path:
        return self.path / label / which

    def done(self, label: str, which: Pass) -> dict[str, Any] | None:
        """Return what the finished pass measured of itself, or None."""
        marker = self.trace_path(label, which) / "done.json"
        return jsonio.loads(marker.read_text()) if marker.is_file() else None

    def commit(self, label: str, which: Pass, progress: PassProgress) -> None:
        """Note which files of a pass hold its batches so far; every writer must have been flushed."""
        path = self.trace_path(label, which)
        held = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        text = jsonio.dumps({**asdict(progress), "files": [name for name in held if name != PROGRESS]})
        atomic_write_text(path / PROGRESS, text)

    def committed(self, label: str, which: Pass) -> PassProgress:
        """Remove what an interrupted pass left after its last whole batch, and return what is there.

        The caller holds `lock`.
        """
        path = self.trace_path(label, which)
        try:
            noted = dict(jsonio.loads((path / PROGRESS).read_text()))
            kept = {PROGRESS, *noted.pop("files")}
            progress = PassProgress(**noted)
        except (OSError, InputError, KeyError, TypeError, ValueError):
            kept, progress = set(), PassProgress()
        found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        if not kept or kept - found:
            shutil.rmtree(path, ignore_errors=True)
            return PassProgress()
        for name in found - kept:
            (path / name).unlink()
        return progress

    def finish(self, label: str, which: Pass, progress: PassProgress) -> None:
        """Mark a pass as complete."""
        path = self.trace_path(label, which)
        measured = {"tokens": progress.tokens, "seconds": progress.seconds}
        atomic_write_text(path / "done.json", jsonio.dumps(measured))
        (path / PROGRESS).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for the process that runs the sweep.

        Raises:
            TraceLockedError: another process runs it.
            RecipeError: the directory cannot be written.
        """
        lock = FileLock(self.path / "sweep.lock")
        try:
            lock.acquire()
        except PermissionError as error:
            raise RecipeError(f"{self.path} cannot be written: {error.strerror}; copy the run elsewhere") from error
        try:
            yield
        finally:
            lock.release()

    def trace(self, label: str, which: Pass) -> Trace:
        """Open the trace of a finished pass.

        Raises:
            UnfinishedError: the pass is not complete; the message holds the command that goes on with it.
        """
        if self.done(label, which) is None:
            raise UnfinishedError(
                f"{self.path}: the {which} pass of {label} is not finished; go on with: "
                f"trimtab rerun {self.path} --out {self.path}"
            )
        return Trace.open(self.trace_path(label, which))

    def state(self, next_command: str = "") -> SweepRun:
        """Return what the directory holds now."""
        configs = tuple(
            SweepConfigState(
                label=one.label,
                backend=one.backend,
                model_dtype=one.dtype,
                op_math=one.op_math,
                free=self._progress(one.label, "free"),
                forced=self._progress(one.label, "forced"),
            )
            for one in self.plan.configs
        )
        return SweepRun(
            path=str(self.path),
            model=self.plan.model,
            reference=self.plan.reference,
            steering=self.plan.steering,
            steering_digest=self.plan.steering_digest,
            num_prompts=len(self.plan.prompts),
            max_tokens=self.plan.max_tokens,
            configs=configs,
            finished=all(one.free == one.forced == "done" for one in configs),
            next_command=next_command,
        )

    def _progress(self, label: str, which: Pass) -> str:
        if self.done(label, which) is not None:
            return "done"
        return "partial" if self.trace_path(label, which).exists() else "absent"


def create(path: Path, plan: SweepPlan, provenance: dict[str, Any], *, resume: bool) -> SweepFiles:
    """Make the directory of a sweep, or take up one with the same plan.

    Raises:
        RecipeError: the directory holds a sweep with another plan, `resume` is False and it exists, or it cannot be
            made.
    """
    if (path / "sweep.json").exists():
        files = load(path)
        changed = files.plan.differences(plan)
        if changed:
            raise RecipeError(
                f"{path} holds a sweep with other settings ({', '.join(changed)} differ); "
                "use another run id, or delete it"
            )
        if not resume:
            raise RecipeError(f"{path} already holds this sweep; use another run id, or leave resume on")
        return files
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{path} cannot be made: {error.strerror}; give another directory or run id") from error
    if any(path.iterdir()):
        raise RecipeError(f"{path} exists and is not a sweep; use another run id")
    document = {"format_version": SWEEP_VERSION, "kind": "sweep", "plan": asdict(plan), "provenance": provenance}
    atomic_write_text(path / "sweep.json", jsonio.dumps(document, indent=2))
    return SweepFiles(path, plan, provenance)


def load(path: str | Path) -> SweepFiles:
    """Open the directory of a sweep.

    Raises:
        InputError: it holds no sweep, or one of a newer version.
    """
    run = Path(path)
    try:
        text = (run / "sweep.json").read_text()
    except OSError as error:
        raise InputError(f"{run} is not the directory of a sweep: it has no readable sweep.json") from error
    try:
        document = dict(jsonio.loads(text))
        version = document.get("format_version")
        if version == SWEEP_VERSION:
            return SweepFiles(run, _read_plan(document["plan"]), dict(document["provenance"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run}/sweep.json is damaged: {error}; run the sweep again elsewhere") from error
    raise InputError(
        f"{run}/sweep.json has format version {version}; this trimtab reads {SWEEP_VERSION}: update trimtab"
    )


def _read_plan(document: Mapping[str, Any]) -> SweepPlan:
    configs = tuple(SweepConfig(**one) for one in document["configs"])
    prompts = tuple(as_prompt(one) for one in document["prompts"])
    return SweepPlan(**{**document, "configs": configs, "prompts": prompts})


def check_same_prompts(reference: SweepFiles, candidate: SweepFiles) -> None:
    """Refuse to compare runs of different prompts.

    Raises:
        ComparisonError: the message names the first prompt that differs.
    """
    mine, theirs = reference.plan.prompts, candidate.plan.prompts
    if mine == theirs:
        return
    index = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    what = (
        f"{len(mine)} and {len(theirs)} prompts"
        if index is None
        else f"prompt {index} is {mine[index]!r} and {theirs[index]!r}"
    )
    raise ComparisonError(
        f"{reference.path} and {candidate.path} ran different prompts: {what}; sweep the same prompts again"
    )
