"""train_all: every data set of a folder, on one loaded model or on several workers, resumable.

The folder `out` holds one directory per set. A set is done when its `training.json` is there; one that was interrupted
has its state there and goes on with the next step; each is locked while it is trained, so that several queues may work
in one folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_text, safe_name
from trimtab._base.progress import progress
from trimtab.errors import InputError, TraceLockedError, TrimtabError, UnfinishedError
from trimtab.results import from_json, to_dict, to_json
from trimtab.results.training import QueueEstimate, QueueRun, SetEstimate, Training, TrainingRow, row_of
from trimtab.vectors.train import Engine, TrainingConfig, prepare, train
from trimtab.vectors.train.estimate import estimate
from trimtab.vectors.train.saved import RESULT
from trimtab.vectors.train.training import STATE, as_engine
from trimtab.workflows._ray import cause_of, cluster, reason

_PLAN, _TABLE, _ERROR = "queue.json", "summary.json", "error.json"
_ENDINGS = (".jsonl", ".ndjson", ".parquet", ".json")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One set: where its data are, with what selection, and where it goes."""

    name: str
    source: str
    out: str


def train_all(
    folder: str | os.PathLike[str],
    model: Any = "testbed",
    config: TrainingConfig | None = None,
    *,
    out: str | os.PathLike[str] = "runs/vectors",
    select: str = "",
    dry_run: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    retry: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    allow_fallback: bool = False,
    **settings: Any,
) -> QueueRun | QueueEstimate:
    """Train vectors on every data set of a folder.

    Args:
        folder: directory with one file (`.jsonl`, `.parquet`, `.json`) or `datasets` directory per set.
        model: as in `train`; loaded once per worker.
        config: the settings of all sets; or give them one by one.
        out: directory of the queue; the same one goes on where it stopped.
        select: conditions on the rows of every set, such as "score>=75".
        dry_run: train nothing; time one step and estimate the rest.
        ray: a Ray cluster that sees `folder` and `out` under the same paths: "auto", "HOST:PORT", "ray://HOST:PORT", or
            "local" for one on this machine. The model must be given by name.
        workers: how many of its workers; None: one per accelerator where there are any, else one per core.
        retry: train sets again that failed.
        dtype: the model's dtype.
        device: where it is loaded.
        device_map: spreads it over several devices with accelerate.
        allow_fallback: train at sites of a model whose family is unknown.
        settings: fields of `TrainingConfig`.

    Returns:
        One row per set; or what it would cost.

    Raises:
        InputError: no set in the folder, two of one name, or `out` holds a queue with other settings.
        UnfinishedError: interrupted; the state of the set at hand is kept.
    """
    config = TrainingConfig.of(settings) if config is None else replace(config, **settings)
    options = {"dtype": dtype, "device": device, "device_map": device_map, "allow_fallback": allow_fallback}
    place = Path(out)
    jobs = _jobs(Path(folder), place, select)
    if dry_run:
        return _estimate(Path(folder), jobs, as_engine(model, **options), config)
    place.mkdir(parents=True, exist_ok=True)
    _agree(place, _plan(model, config, select, dtype))
    left = [job for job in jobs if _row(job).state in ("waiting", "running") or (retry and _row(job).state == "failed")]
    began = time.perf_counter()
    used = 1
    try:
        with progress("train", len(jobs)) as bar:
            bar.advance(len(jobs) - len(left))
            if ray is not None and left:
                used = _on_ray(left, model, config, options, ray, workers, bar.advance)
            elif left:
                engine = as_engine(model, **options)
                for job in left:
                    bar.describe(job.name)
                    _train(engine, job, config)
                    bar.advance()
    except KeyboardInterrupt as error:
        raise UnfinishedError(f"{place} was interrupted; go on with the same command") from error
    rows = tuple(_row(job) for job in jobs)
    result = QueueRun(
        path=str(place),
        folder=str(folder),
        model=_name(model),
        rows=rows,
        finished=all(row.state == "done" for row in rows),
        workers=used,
        seconds=time.perf_counter() - began,
        next_command="" if all(row.state == "done" for row in rows) else _next(rows),
    )
    atomic_write_text(place / _TABLE, to_json(result) + "\n")
    return result


def _jobs(folder: Path, out: Path, select: str) -> list[_Job]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory; give one with a data set per file")
    found = sorted(
        one
        for one in folder.iterdir()
        if not one.name.startswith(".")
        and (one.suffix in _ENDINGS if one.is_file() else (one / "dataset_info.json").is_file())
    )
    if not found:
        raise InputError(
            f"{folder} holds no data set; expected {', '.join(_ENDINGS)} files, or directories of datasets"
        )
    names = [safe_name(one.stem if one.is_file() else one.name, "data set") for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{folder} has two data sets named {twice[0]!r}; their vectors would mix: rename one")
    tail = f":{select}" if select else ""
    return [_Job(name=n, source=f"{one}{tail}", out=str(out / n)) for n, one in zip(names, found, strict=True)]


def _plan(model: Any, config: TrainingConfig, select: str, dtype: str | None) -> dict[str, Any]:
    return {"model": _name(model), "dtype": dtype, "select": select, "config": to_dict(config)}


def _name(model: Any) -> str:
    return model.model_id if isinstance(model, Engine) else str(model) if isinstance(model, str | Path) else "module"


def _agree(place: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or refuse a folder whose plan is another one."""
    file = place / _PLAN
    text = jsonio.dumps(plan, indent=2) + "\n"
    if not file.is_file():
        atomic_write_text(file, text)
        return
    before, now = jsonio.loads(file.read_text(), file), jsonio.loads(text)
    if before != now:
        differ = {**now, **now["config"]}
        old = {**before, **before["config"]}
        keys = [key for key in differ if key != "config" and differ[key] != old.get(key)]
        first = keys[0] if keys else "config"
        raise InputError(
            f"{place} holds a queue with {first}={old.get(first)!r}, and {differ.get(first)!r} was given; give another "
            "directory"
        )


def _row(job: _Job) -> TrainingRow:
    """Return what the directory of a set says."""
    place = Path(job.out)
    if (place / RESULT).is_file():
        return replace(row_of(from_json(Training, (place / RESULT).read_text()), job.out), name=job.name)
    if (place / _ERROR).is_file():
        said = jsonio.loads((place / _ERROR).read_bytes(), place / _ERROR)
        return TrainingRow(name=job.name, state="failed", path=job.out, error=said["error"])
    return TrainingRow(name=job.name, state="running" if (place / STATE).is_file() else "waiting", path=job.out)


def _train(engine: Engine, job: _Job, config: TrainingConfig) -> None:
    """Train one set; what is wrong with it is written to its directory, and the queue goes on."""
    place = Path(job.out)
    place.mkdir(parents=True, exist_ok=True)
    try:
        train(engine, job.source, config, out=place)
    except (TraceLockedError, UnfinishedError) as error:
        if isinstance(error, UnfinishedError):
            raise KeyboardInterrupt from error
    except TrimtabError as error:
        atomic_write_text(place / _ERROR, jsonio.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
    else:
        (place / _ERROR).unlink(missing_ok=True)


def _estimate(folder: Path, jobs: Sequence[_Job], engine: Engine, config: TrainingConfig) -> QueueEstimate:
    sets = []
    memory = 0
    per_token: float | None = None
    for job in jobs:
        state = _row(job).state
        try:
            cost = estimate(engine, prepare(engine, job.source, config), config, per_token=per_token)
        except TrimtabError as error:  # the queue would report it and go on
            said = f"{type(error).__name__}: {error}"
            sets.append(
                SetEstimate(name=job.name, state="failed", sequences=0, tokens=0, steps=0, seconds=0.0, error=said)
            )
            continue
        per_token, memory = cost.seconds_per_token, max(memory, cost.memory)
        done = state == "done"
        sets.append(
            SetEstimate(
                name=job.name,
                state=state,
                sequences=cost.sequences,
                tokens=cost.tokens,
                steps=0 if done else cost.steps,
                seconds=0.0 if done else cost.seconds,
            )
        )
    if all(one.error for one in sets):
        raise InputError(f"no set of {folder} can be trained; {sets[0].name}: {sets[0].error}")
    left = [one for one in sets if one.state != "done"]
    return QueueEstimate(
        folder=str(folder),
        model=engine.model_id,
        sets=tuple(sets),
        tokens=sum(one.tokens * config.epochs for one in left),
        seconds=sum(one.seconds for one in left),
        memory=memory,
    )


def _on_ray(
    jobs: Sequence[_Job],
    model: Any,
    config: TrainingConfig,
    options: dict[str, Any],
    address: str,
    workers: int | None,
    done: Callable[[], None],
) -> int:
    """Give every set to exactly one worker, the next to whoever is free; returns the number of workers."""
    if not isinstance(model, str | Path):
        raise InputError("a queue on Ray loads the model on every worker: give it by name, not as an object")
    with cluster(address, "a queue on a cluster") as ray:
        resources = ray.cluster_resources()
        devices = int(resources.get("GPU", 0))
        count = min(len(jobs), workers or devices or int(resources.get("CPU", 1)))
        kind = ray.remote(num_cpus=1, num_gpus=1 if devices else 0)(_Worker)
        actors = [kind.remote(str(model), options, to_dict(config), torch.get_num_threads()) for _ in range(count)]
        try:
            waiting = list(jobs)
            running = {actor.train.remote(waiting.pop(0)): actor for actor in actors}
            while running:
                (ready,), _ = ray.wait(list(running), num_returns=1)
                actor = running.pop(ready)
                ray.get(ready)
                done()
                if waiting:
                    running[actor.train.remote(waiting.pop(0))] = actor
        except ray.exceptions.RayError as error:
            cause = cause_of(error)
            if isinstance(cause, InputError):
                raise cause from error
            raise UnfinishedError(
                f"a worker failed: {reason(error)}; finished sets are kept: go on with the same command"
            ) from error
        finally:
            for actor in actors:
                ray.kill(actor)
    return count


class _Worker:
    """A Ray actor: the model loaded once, sets trained one after the other."""

    def __init__(self, model: str, options: dict[str, Any], config: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)  # as many as a serial queue uses: the same sums in the same order
        self._engine = Engine(model, **options)
        self._config = TrainingConfig.of(config)

    def train(self, job: _Job) -> str:
        """Train one set."""
        _train(self._engine, job, self._config)
        return job.name


def _next(rows: Sequence[TrainingRow]) -> str:
    failed = [row.name for row in rows if row.state == "failed"]
    return f"the same command with --retry ({len(failed)} failed)" if failed else "the same command"
