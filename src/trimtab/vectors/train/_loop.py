"""The training loop: batches in, parameters out; it can stop between any two steps and go on with the next one."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trimtab.results.training import TrainingEvaluation, TrainingStep
from trimtab.sites import Site
from trimtab.vectors.train._batched import Batched
from trimtab.vectors.train._batches import Batch
from trimtab.vectors.train._loss import bipo, token_losses
from trimtab.vectors.train._maps import SiteMap
from trimtab.vectors.train._model import SteeredModel
from trimtab.vectors.train._state import Progress
from trimtab.vectors.train._validate import Figures, likelihood, preference, references
from trimtab.vectors.train.config import TrainingConfig, rate_factor

_SAVE_SHARE = 0.05  # of the time at most goes into writing the state: a killed process loses that little
OnStep = Callable[[TrainingStep, int], None]


class Loop:
    """One training on a model that is attached.

    Args:
        model: the steered model.
        maps: its maps.
        batched: the data.
        config: the settings.
        progress: where it stands; changed in place.
    """

    def __init__(
        self,
        model: SteeredModel,
        maps: dict[Site, SiteMap],
        batched: Batched,
        config: TrainingConfig,
        progress: Progress,
    ) -> None:
        self._model, self._maps, self._batched, self._config = model, maps, batched, config
        self.progress = progress
        self._parameters = [one for part in maps.values() for one in part.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.learning_rate)
        self._per_epoch = math.ceil(len(batched.train) / config.accumulate)
        every = self._per_epoch * config.epochs
        self.total = every if config.max_steps is None else min(every, config.max_steps)
        self._reference: dict[str, list[Tensor]] = {}
        if progress.tensors:
            progress.put(maps, self._optimizer)
            progress.resumed += 1
        else:
            progress.take(maps, self._optimizer)

    def run(self, *, save: Callable[[], None], on_step: OnStep | None) -> None:
        """Train to the end; afterwards the maps are the best ones.

        Whatever interrupts it, `save` is called with the state after the last whole step.
        """
        progress, began = self.progress, time.perf_counter()

        def clock() -> None:
            nonlocal began
            now = time.perf_counter()
            progress.seconds += now - began
            began = now

        try:
            saved, cost = began, 0.0
            if self._batched.validation and progress.unsteered_loss is None:
                progress.unsteered_loss = self.evaluate("validation", steered=False).loss
            while not progress.stopped:
                self._one(on_step)
                clock()
                start = time.perf_counter()
                if (start - saved) * _SAVE_SHARE >= cost:
                    save()
                    saved = time.perf_counter()
                    cost = saved - start
        except BaseException:
            clock()
            save()
            raise
        which = "best" if progress.best_step else "now"
        if progress.stopped != "non-finite" or which == "best":
            progress.restore(self._maps, which)
        clock()

    def evaluate(self, split: str, *, steered: bool) -> Figures:
        """Return loss and perplexity on a split."""
        batches = getattr(self._batched, split)
        if not self._batched.pairs or split == "prompted":
            return likelihood(self._model, batches, steered=steered)
        return preference(self._model, batches, self._references(split), self._config.beta, steered=steered)

    def one_step(self) -> None:
        """Take the first step and forget it, for timing; it reads back what it computed, so it has ended."""
        self._step(0)

    def _one(self, on_step: OnStep | None) -> None:
        """Take one step, and validate where it is time; all of it or, when interrupted, nothing."""
        progress = self.progress
        found = self._step(progress.step)
        if found is None:
            progress.stopped = "non-finite"
            return
        step = found.step
        evaluation = None
        if self._batched.validation and self._is_time(step):
            evaluation = self._validated(step)
        # From here on nothing is computed, so an interruption finds the state before or after the step.
        progress.take(self._maps, self._optimizer)
        progress.step = step
        progress.steps.append(found)
        if evaluation is not None:
            progress.evaluations.append(evaluation)
            progress.since_best = 0 if evaluation.best else progress.since_best + 1
            if evaluation.best:
                progress.best_step, progress.best_loss = step, evaluation.loss
                progress.keep_best(self._maps)
            if self._config.patience and progress.since_best >= self._config.patience:
                progress.stopped = "early"
        if step >= self.total and not progress.stopped:
            progress.stopped = "finished" if self.total == self._per_epoch * self._config.epochs else "max_steps"
        if on_step is not None:
            on_step(found, self.total)

    def _is_time(self, step: int) -> bool:
        every = self._config.evaluate_every or self._per_epoch
        return step % every == 0 or step >= self.total

    def _validated(self, step: int) -> TrainingEvaluation:
        figures = self.evaluate("validation", steered=True)
        best = self.progress.best_loss
        better = math.isfinite(figures.loss) and (best is None or figures.loss < best - self._config.min_delta)
        return TrainingEvaluation(
            step=step,
            epoch=step / self._per_epoch,
            loss=figures.loss,
            perplexity=figures.perplexity,
            best=better,
        )

    def _step(self, done: int) -> TrainingStep | None:
        config = self._config
        epoch, place = divmod(done, self._per_epoch)
        order = torch.randperm(len(self._batched.train), generator=_generator(config.seed, 1, epoch)).tolist()
        numbers = order[place * config.accumulate : (place + 1) * config.accumulate]
        rate = config.learning_rate * rate_factor(config.schedule, done, self.total, config.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = sum(self._backward(numbers, done))
        gradient = torch.nn.utils.get_total_norm([one.grad for one in self._parameters if one.grad is not None])
        size = float(gradient)
        if not (math.isfinite(loss) and math.isfinite(size)):
            return None
        limited = config.max_grad_norm is not None and size > config.max_grad_norm
        if limited and config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, config.max_grad_norm, gradient)
        self._optimizer.step()
        shortened = False
        if config.max_norm is not None:
            shortened = any([part.limit(config.max_norm) for part in self._maps.values()])
        return TrainingStep(
            step=done + 1,
            epoch=epoch + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=size,
            norm=math.hypot(*(part.norm for part in self._maps.values())),
            grad_limited=limited,
            norm_limited=shortened,
        )

    def _backward(self, numbers: list[int], done: int) -> Iterator[float]:
        """Add up gradients of the micro-batches; yields their parts of the step's mean loss."""
        batches = [self._batched.train[number] for number in numbers]
        if not self._batched.pairs:
            total = sum(batch.num_targets for batch in batches)
            for batch in batches:
                loss = token_losses(self._model.logits(batch), batch).sum() / total
                loss.backward()  # type: ignore[no-untyped-call]
                yield float(loss.detach())
            return
        total = sum(batch.num_sequences for batch in batches) // 2
        signs = _signs(batches, _generator(self._config.seed, 2, done))
        for number, batch, sign in zip(numbers, batches, signs, strict=True):
            reference = self._references("train")[number]
            loss = bipo(self._model, batch, reference, sign.to(reference.device), self._config.beta).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            yield float(loss.detach())

    def _references(self, split: str) -> list[Tensor]:
        if split not in self._reference:
            self._reference[split] = references(self._model, getattr(self._batched, split))
        return self._reference[split]


def cache_is_exact(model: SteeredModel, batch: Batch) -> bool:
    """Whether a batch gives the same bits when the blocks below the lowest site are passed over."""
    with torch.no_grad():
        whole = model.logits(batch, steered=False)
        return torch.equal(whole, model.logits(batch, steered=False))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far, on the accelerator or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _generator(*purpose: int) -> torch.Generator:
    seed = 0
    for one in purpose:
        seed = (seed * 1_000_003 + one + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def _signs(batches: list[Batch], generator: torch.Generator) -> list[Tensor]:
    counts = [batch.num_sequences // 2 for batch in batches]
    drawn = torch.randint(0, 2, (sum(counts),), generator=generator).float() * 2 - 1
    ends = list(itertools.accumulate(counts))
    return [drawn[end - count : end] for end, count in zip(ends, counts, strict=True)]
