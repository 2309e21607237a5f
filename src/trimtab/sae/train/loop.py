"""The training loop: batches in, SAEs out; it can stop between any two steps and go on with the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError, UnfinishedError
from trimtab.results import to_dict
from trimtab.results.sae import SAECheck, SAEStepLine, SAEWarning
from trimtab.sae.data.stream import Stream
from trimtab.sae.learner import Learner, StepLosses
from trimtab.sae.monitor import Monitor
from trimtab.sae.parallel import Parallel
from trimtab.sae.train.config import Plan, TrainConfig
from trimtab.sae.train.looks import Look, look
from trimtab.sae.train.signals import StopSignal
from trimtab.sae.train.sinks import OnLine, Sink


@dataclass(kw_only=True, eq=False)
class Trainee:
    """One SAE in training, with everything that follows it."""

    plan: Plan
    learner: Learner
    monitor: Monitor
    sinks: Sequence[Sink] = ()
    last: SAEStepLine | None = None
    checks: list[SAECheck] = field(default_factory=list)

    def pick(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return its input and target out of a batch."""
        return batch[self.plan.site], batch[self.plan.target] if self.plan.target else None


@dataclass(kw_only=True, slots=True)
class Course:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    stepping: float = 0.0
    """Seconds within steps and their data."""
    resumed: int = 0
    stopped: str = ""
    warnings: list[SAEWarning] = field(default_factory=list)


class Loop:
    """One run.

    Args:
        trainees: the SAEs.
        stream: what they learn from.
        config: the settings.
        course: where it stands; changed in place.
        parallel: the processes that share the work.
        save: writes a checkpoint.
        on_line: called with the line of every SAE at every logged step, in the process that writes.
    """

    def __init__(
        self,
        trainees: Sequence[Trainee],
        stream: Stream,
        config: TrainConfig,
        course: Course,
        *,
        parallel: Parallel,
        save: Callable[[], None],
        on_line: OnLine | None = None,
    ) -> None:
        self._trainees, self._stream, self._config, self.course = trainees, stream, config, course
        self._parallel, self._save, self._on_line = parallel, save, on_line
        self._began = 0.0
        self._timing: dict[str, float] = {}

    def run(self, advance: Callable[[], None]) -> None:
        """Train to the end of the run.

        Args:
            advance: called after every step.

        Raises:
            UnfinishedError: told to stop; the step that ran was finished and saved.
            NonFiniteError: an activation is NaN or infinite; what was trained before it was saved.
        """
        course, config = self.course, self._config
        self._began = time.perf_counter()
        with StopSignal() as asked:
            if not course.step and not config.skip_initial_eval:
                self._look({})
            while course.step < config.last and not course.stopped:
                self._one()
                advance()
                told = self._parallel.any(bool(asked.name))
                done = course.step >= config.last or bool(course.stopped)
                if done or told or (config.save_every and course.step % config.save_every == 0):
                    self._keep()
                if told and not done:
                    raise UnfinishedError(
                        f"{asked.name or 'another process was'} received after {course.step} of {config.last} steps; "
                        "the state is saved, and the same call goes on from there"
                    )
        if not course.stopped:
            course.stopped = "finished" if course.step >= config.steps else "early_exit"
            self._tell([one for trainee in self._trainees for one in trainee.monitor.finish(course.step)])
        self._clock()

    def _one(self) -> None:
        """One step of every SAE, with what is logged of it."""
        course, config = self.course, self._config
        self._timing = {}
        start = time.perf_counter()
        with self._timed("data"):
            batch = self._batch()
        if not course.step:
            self._self_tests(batch)
        losses: list[StepLosses] = []
        with self._timed("step"):
            for trainee in self._trainees:
                losses.append(self._parallel.step(trainee.learner, *trainee.pick(batch)))
        course.step += 1
        course.stepping += time.perf_counter() - start
        looks: dict[str, Look] = {}
        if (config.eval_every and course.step % config.eval_every == 0) or course.step >= config.last:
            with self._timed("eval"):
                looks = self._looks()
        logged = bool(config.log_every) and (course.step % config.log_every == 0 or course.step >= config.last)
        self._watch(losses, looks)
        if logged or looks:
            with self._timed("log"):
                self._log(losses, looks, logged)

    def _batch(self) -> dict[str, Tensor]:
        try:
            return next(self._stream)
        except TrimtabError:
            if self.course.step:
                self._keep()  # the stream stands before what could not be read
            raise

    def _self_tests(self, batch: Mapping[str, Tensor]) -> None:
        """Every parameter must have a gradient before anything moves."""
        for trainee in self._trainees:
            found = self._parallel.self_test(trainee.learner, *trainee.pick(batch))
            if not found.passed:
                self._tell(
                    [
                        SAEWarning(
                            sae=trainee.plan.name,
                            step=0,
                            rule="gradient self-test",
                            level="flag",
                            metric="gradient",
                            value=float(len(found.problems)),
                            text="; ".join(found.problems),
                        )
                    ]
                )

    def _watch(self, losses: Sequence[StepLosses], looks: Mapping[str, Look]) -> None:
        for trainee, one in zip(self._trainees, losses, strict=True):
            seen = {
                "loss": one.loss,
                "recon": one.recon,
                "l0": one.l0,
                "l0_share": one.l0 / trainee.plan.config.d_sae,
                "grad_norm": one.grad_norm,
            }
            if trainee.plan.name in looks:
                seen |= looks[trainee.plan.name].statistics
            self._tell(trainee.monitor.see(self.course.step, seen))

    def _tell(self, warnings: Sequence[SAEWarning]) -> None:
        self.course.warnings += warnings
        if self._config.strict and any(one.level == "flag" for one in warnings):
            self.course.stopped = "flag"

    def _looks(self) -> dict[str, Look]:
        held = self._stream.held_out
        if not len(next(iter(held.values()))):
            return {}
        found = {}
        for trainee in self._trainees:
            x, target = trainee.pick(held)
            seen = look(
                trainee.plan.name,
                trainee.learner,
                x,
                target,
                step=self.course.step,
                batch=min(len(x), self._stream.config.batch_size),
                histograms=self._config.tensorboard or self._config.wandb is not None,
                parallel=self._parallel,
            )
            trainee.checks.append(seen.check)
            found[trainee.plan.name] = seen
        return found

    def _look(self, looks: dict[str, Look]) -> None:
        """Look before the first step, and show the histograms."""
        for name, seen in self._looks().items():
            looks[name] = seen
        self._histograms(looks)

    def _histograms(self, looks: Mapping[str, Look]) -> None:
        for trainee in self._trainees:
            if trainee.plan.name in looks and looks[trainee.plan.name].histograms:
                for sink in trainee.sinks:
                    sink.histograms(self.course.step, looks[trainee.plan.name].histograms)

    def _log(self, losses: Sequence[StepLosses], looks: Mapping[str, Look], logged: bool) -> None:
        self._histograms(looks)
        for trainee, one in zip(self._trainees, losses, strict=True):
            trainee.last = self._line(trainee, one, looks.get(trainee.plan.name))
            for sink in trainee.sinks if logged else ():
                sink.write(trainee.last)
            if logged and self._on_line is not None and self._parallel.writes:
                self._on_line(trainee.last)

    def _line(self, trainee: Trainee, one: StepLosses, seen: Look | None) -> SAEStepLine:
        plan = trainee.plan
        return SAEStepLine(
            sae=plan.name,
            step=self.course.step,
            tokens=self.course.step * self._stream.config.batch_size,
            loss=one.loss,
            recon=one.recon,
            l0=one.l0,
            l0_share=one.l0 / plan.config.d_sae,
            sparsity=one.sparsity,
            aux=one.aux,
            grad_norm=one.grad_norm,
            lr=one.lr,
            coefficient=one.coefficient,
            dead=float(self._parallel.gather(trainee.learner.dead().double()).mean()),
            statistics={} if seen is None else {**seen.statistics, "fvu": seen.check.fvu},
            seconds=dict(self._timing) if self._config.log_timing else {},
        )

    def _keep(self) -> None:
        self._clock()
        self._save()

    def _clock(self) -> None:
        now = time.perf_counter()
        self.course.seconds += now - self._began
        self._began = now

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._timing[name] = time.perf_counter() - start


def course_state(course: Course, trainees: Sequence[Trainee]) -> dict[str, Any]:
    """Return where a run stands, as plain JSON."""
    return {
        "seconds": course.seconds,
        "stepping": course.stepping,
        "resumed": course.resumed,
        "warnings": [to_dict(one) for one in course.warnings],
        "saes": {
            one.plan.name: {
                "monitor": one.monitor.state(),
                "last": None if one.last is None else to_dict(one.last),
                "checks": [to_dict(check) for check in one.checks],
            }
            for one in trainees
        },
    }
