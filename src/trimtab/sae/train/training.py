"""train_stream: SAEs on a stream, from plans to a directory that a later call goes on with."""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from trimtab._base import jsonio, provenance
from trimtab._base import progress as bars
from trimtab._base.files import FileLock, atomic_write_text
from trimtab._base.log import get_logger
from trimtab.errors import InputError, NonFiniteError, RecipeError
from trimtab.results import from_json, to_dict, to_json
from trimtab.results.sae import SAECheck, SAERun, SAEStepLine, SAEWarning, TrainedSAE
from trimtab.sae import files
from trimtab.sae.data.stream import Stream
from trimtab.sae.learner import Learner
from trimtab.sae.model import SAE
from trimtab.sae.monitor import Monitor, rules_for
from trimtab.sae.parallel import Parallel, own_device
from trimtab.sae.scaling import Scales
from trimtab.sae.train.checkpoint import Checkpoint, Checkpoints, check_identity
from trimtab.sae.train.config import Plan, TrainConfig, plain
from trimtab.sae.train.looks import finite
from trimtab.sae.train.loop import Course, Loop, Trainee, course_state
from trimtab.sae.train.sinks import LinesSink, OnLine, Sink, TensorBoardSink, WandbSink
from trimtab.sites import Site

RESULT = "run.json"
_LOG = get_logger(__name__)


def train_stream(
    plans: Plan | Sequence[Plan],
    stream: Stream,
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    on_line: OnLine | None = None,
) -> SAERun:
    """Train SAEs on one stream.

    `out` holds a directory per SAE (`cfg.json` and `sae_weights.safetensors`, which SAELens reads, and `steps.jsonl`),
    checkpoints, and `run.json`, which is written last. A run that was stopped there goes on with the very next step;
    one that is finished is read, not repeated. SIGTERM and Ctrl-C finish the step that runs, save, and raise.

    Args:
        plans: what is trained.
        stream: activations of all their sites; closed at the end.
        config: length of the run, and what it writes.
        out: the directory.
        device: where the SAEs live.
        on_line: called with the line of every SAE at every logged step; of torchrun's processes in the first alone.

    Returns:
        The run.

    Raises:
        InputError: widths that do not fit, an empty or constant stream, or `out` holds a run of other settings; names
            what differs.
        NonFiniteError: an activation, or in the end a parameter, is NaN or infinite.
        UnfinishedError: told to stop, or a checkpoint could not be written; what was saved before stays.

    Example:
        >>> source = SyntheticSource(SparseDictionary())
        >>> plan = Plan(name="sae", config=SAEConfig(d_in=64, d_sae=256))
        >>> train_stream(plan, Stream(source), TrainConfig(steps=1000), out="runs/sae")  # doctest: +SKIP
    """
    listed = (plans,) if isinstance(plans, Plan) else tuple(plans)
    settings = config or TrainConfig()
    folder, device = Path(out), own_device(device)
    with stream:
        _check(listed, stream)
        parallel = Parallel.current(settings.shard_latents, device=device, shard_parameters=settings.shard_parameters)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror or error}") from error
        with parallel.alone(FileLock(folder / ".lock")), _deterministic(settings.deterministic, device):
            run = _Run(listed, stream, settings, folder, device, parallel)
            return run.finished() or run.train(on_line)


class _Run:
    def __init__(
        self,
        plans: Sequence[Plan],
        stream: Stream,
        config: TrainConfig,
        folder: Path,
        device: str | torch.device,
        parallel: Parallel,
    ) -> None:
        self._plans, self._stream, self._config, self._folder = plans, stream, config, folder
        self._device, self._parallel = device, parallel
        self._identity = {
            "saes": {plan.name: plan.to_dict() for plan in plans},
            "run": plain(config),
            "stream": {"source": stream.source.about(), "config": to_dict(stream.config)},
        }
        self._checkpoints = Checkpoints(folder, keep=config.keep_last)
        self._course = Course()
        self._trainees: list[Trainee] = []
        self._notes: list[str] = []
        if config.shard_parameters and parallel.shared is None:
            self._notes.append("shard_parameters changed nothing: one process sees all tokens")

    def finished(self) -> SAERun | None:
        """Return the run that `out` holds, where nothing is left to be done."""
        path = self._folder / RESULT
        if not path.is_file():
            return None
        found = from_json(SAERun, path.read_text())
        check_identity(dict(found.provenance.get("identity", {})), self._identity, str(path))
        if found.steps < self._config.last and found.stopped != "flag":
            return None
        _LOG.info("%s: finished before, nothing is repeated", self._folder)
        return found

    def train(self, on_line: OnLine | None) -> SAERun:
        """Train from the newest checkpoint, or from the beginning."""
        found = self._checkpoints.load(self._identity)
        if found is not None:
            self._load_stream(found)
        self._trainees = [self._trainee(plan) for plan in self._plans]
        if found is not None:
            self._load(found)
        if self._parallel.writes:
            for trainee in self._trainees:
                trainee.sinks = self._sinks(trainee.plan)
        loop = Loop(
            self._trainees,
            self._stream,
            self._config,
            self._course,
            parallel=self._parallel,
            save=self._save,
            on_line=on_line,
        )
        try:
            title = f"train {len(self._plans)} SAEs" if len(self._plans) > 1 else f"train {self._plans[0].name}"
            with bars.progress(title, self._config.last, show=None if self._parallel.writes else False) as bar:
                bar.advance(self._course.step)
                loop.run(self._shown(bar))
        finally:
            for trainee in self._trainees:
                for sink in trainee.sinks:
                    sink.close()
        return self._result()

    def _shown(self, bar: bars.Progress) -> Callable[[], None]:
        def advance() -> None:
            bar.advance()
            course, last = self._course, self._trainees[0].last
            rate = course.step * self._stream.config.batch_size / max(course.stepping, 1e-9)
            if last is not None:
                bar.describe(f"loss {last.loss:.4g}  L0 {last.l0:.4g}  {rate:,.0f} tok/s")

        return advance

    def _trainee(self, plan: Plan) -> Trainee:
        norm = self._stream.measured[plan.site].norm
        scales = Scales(norm=norm)
        if plan.adam_trick:
            measured = {"batch_size": self._stream.config.batch_size, "norm": norm}
            scales = Scales.choose(plan.config, measured, plan.precision)
            if scales == Scales(norm=norm):
                self._notes.append(f"{plan.name}: {plan.precision} needs no scales; adam_trick changed nothing")
        learner = Learner(
            plan.config,
            optim=plan.optim,
            precision=plan.precision,
            scales=scales,
            total_steps=self._config.steps,
            seed=plan.seed,
            device=self._device,
            compile=self._config.compile,
            split=self._parallel.split,
            shared=self._parallel.shared,
        )
        monitor = Monitor(
            plan.name,
            rules_for(plan.config.architecture, self._config.monitor),
            total_steps=self._config.steps,
            expansion=plan.config.d_sae / plan.config.d_in,
            site=plan.target or plan.site,
            forced=self._config.monitor not in ("auto", "off"),
        )
        self._notes += [f"{plan.name}: not watched: {text}" for text in monitor.skipped]
        return Trainee(plan=plan, learner=learner, monitor=monitor)

    def _sinks(self, plan: Plan) -> list[Sink]:
        folder, step = self._folder / plan.name, self._course.step
        folder.mkdir(exist_ok=True)
        found: list[Sink] = [LinesSink(folder, step)] if self._config.log_every else []
        if self._config.tensorboard:
            found.append(TensorBoardSink(folder, step))
        if self._config.wandb is not None:
            found.append(WandbSink(folder, self._config.wandb, plan.name, plan.to_dict()))
        return found

    def _save(self) -> None:
        tensors, stream = self._stream.state()
        kept = {f"stream/{name}": one for name, one in tensors.items()}
        for trainee in self._trainees:
            state = self._parallel.state(trainee.learner)
            kept |= {f"sae/{trainee.plan.name}/{name}": one for name, one in state.items()}
        if self._parallel.writes:
            self._checkpoints.save(
                Checkpoint(
                    step=self._course.step,
                    tensors={name: one.detach().cpu().contiguous() for name, one in kept.items()},
                    state={"stream": stream, **course_state(self._course, self._trainees)},
                    identity=self._identity,
                )
            )
        self._parallel.wait()

    def _load_stream(self, found: Checkpoint) -> None:
        tensors = {
            name.removeprefix("stream/"): one for name, one in found.tensors.items() if name.startswith("stream/")
        }
        self._stream.load_state(tensors, found.state["stream"])

    def _load(self, found: Checkpoint) -> None:
        state, course = found.state, self._course
        course.step, course.resumed = found.step, state["resumed"] + 1
        course.seconds, course.stepping = state["seconds"], state["stepping"]
        course.warnings = [_revive(SAEWarning, one) for one in state["warnings"]]
        for trainee in self._trainees:
            prefix = f"sae/{trainee.plan.name}/"
            own = {name.removeprefix(prefix): one for name, one in found.tensors.items() if name.startswith(prefix)}
            self._parallel.load_state(trainee.learner, own)
            about = state["saes"][trainee.plan.name]
            trainee.monitor.load_state(about["monitor"])
            trainee.last = None if about["last"] is None else _revive(SAEStepLine, about["last"])
            trainee.checks = [_revive(SAECheck, one) for one in about["checks"]]

    def _result(self) -> SAERun:
        course, config = self._course, self._config
        batch = self._stream.config.batch_size
        flags = [one for one in course.warnings if one.level == "flag"]
        stopped = course.stopped == "flag"
        reason = {
            "finished": f"{course.step} steps",
            "early_exit": f"left after {course.step} of {config.steps} steps",
            "flag": f"stopped at step {course.step}: {flags[0].text}" if flags else "",
        }[course.stopped]
        run = SAERun(
            path=str(self._folder),
            passed=not stopped,
            reason=reason + (f"; {len(course.warnings)} warnings" if course.warnings and not stopped else ""),
            steps=course.step,
            total_steps=config.steps,
            stopped=course.stopped,
            tokens=course.step * batch,
            batch_size=batch,
            saes=tuple(self._export(trainee) for trainee in self._trainees),
            warnings=tuple(course.warnings),
            data=self._stream.about(),
            seconds=course.seconds,
            tokens_per_second=course.step * batch / course.stepping,
            peak_memory=_peak_memory(torch.device(self._device)),
            deterministic=config.deterministic,
            processes=self._parallel.size,
            resumed=course.resumed,
            notes=tuple(self._notes),
            provenance=provenance.collect(identity=jsonio.loads(jsonio.dumps(self._identity)), seed=config.seed),
        )
        if self._parallel.writes:
            atomic_write_text(self._folder / RESULT, to_json(run) + "\n")
        return run

    def _export(self, trainee: Trainee) -> TrainedSAE:
        """Write the SAE in hidden units, and say what it is."""
        plan, path = trainee.plan, self._folder / trainee.plan.name
        whole = _Whole(plan.config, self._parallel.parameters(trainee.learner))
        bad = finite(whole.parameters_unscaled())
        if bad and self._course.stopped != "flag":
            raise NonFiniteError(
                f"{plan.name}: {', '.join(bad)} hold NaN or Inf after {self._course.step} steps at {plan.precision}; "
                "lower the learning rate, compute in bf16, or add --adam-trick for fp16"
            )
        if not bad and self._parallel.writes:
            files.save(self._sae(plan, whole), path)
        elif bad:
            self._notes.append(f"{plan.name}: not exported, {', '.join(bad)} hold NaN or Inf")
        config = plan.config
        return TrainedSAE(
            name=plan.name,
            architecture=config.architecture,
            d_in=config.d_in,
            d_sae=config.d_sae,
            d_out=config.output,
            site=plan.site,
            target=plan.target,
            dtype=str(plan.precision).partition("/")[0],
            compute=str(plan.precision).partition("/")[2],
            config=jsonio.loads(jsonio.dumps(plan.to_dict())),
            last=trainee.last,
            checks=tuple(trainee.checks),
            path="" if bad else str(path),
            monitor=trainee.monitor.rules,
        )

    def _sae(self, plan: Plan, whole: _Whole) -> SAE:
        measured = self._stream.measured
        about = self._stream.source.about()
        made = SAE.of(
            whole,
            norm=measured[plan.site].norm,
            site=_site(plan.site),
            target_site=_site(plan.target),
            about={
                "steps": self._course.step,
                "precision": str(plan.precision),
                **({"model": about["model"]} if "model" in about else {}),
            },
        )
        if not plan.target:
            return made
        ratio = measured[plan.target].norm / measured[plan.site].norm  # targets have a norm of their own
        return replace(made, W_dec=made.W_dec * ratio, b_dec=made.b_dec * ratio)


@dataclass(slots=True, eq=False)
class _Whole:
    """The parameters of all processes, as an SAE is made of them."""

    config: Any
    _parameters: Mapping[str, Tensor]

    def parameters_unscaled(self) -> Mapping[str, Tensor]:
        """Return them."""
        return self._parameters


def _check(plans: Sequence[Plan], stream: Stream) -> None:
    if not plans:
        raise InputError("no SAE is to be trained; give at least one plan")
    names = [plan.name for plan in plans]
    if len({*names}) < len(names):
        raise RecipeError(f"the SAEs' names are {', '.join(names)}; every one needs a name of its own")
    for plan in plans:
        plan.check(stream.widths)


def _site(name: str) -> str:
    """Return a name if it is a site's; records of a dump and tensors in memory have others."""
    try:
        return str(Site.parse(name))
    except InputError:
        return ""


def _revive(cls: type[Any], value: dict[str, Any]) -> Any:
    return TypeAdapter(cls).validate_python(value)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _deterministic(wanted: bool, device: str | torch.device) -> Iterator[None]:
    """Run with deterministic algorithms alone, then put the setting back."""
    if not wanted:
        yield
        return
    if torch.device(device).type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise RecipeError("deterministic on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
