"""estimate: what a training would cost, from one timed step."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from trimtab.vectors.train._batched import Batched
from trimtab.vectors.train._loop import Loop, peak_memory
from trimtab.vectors.train._maps import make_map
from trimtab.vectors.train._model import SteeredModel
from trimtab.vectors.train._state import Progress
from trimtab.vectors.train.config import TrainingConfig
from trimtab.vectors.train.engine import Engine
from trimtab.vectors.train.sequences import TrainingData


class Cost(NamedTuple):
    """What a training would take."""

    sequences: int
    tokens: int
    """Of one epoch."""
    steps: int
    seconds: float
    seconds_per_token: float
    memory: int
    """Bytes at the peak, loading included."""


def estimate(engine: Engine, data: TrainingData, config: TrainingConfig, *, per_token: float | None = None) -> Cost:
    """Return the cost of a training that does not stop early.

    Args:
        engine: the model.
        data: the training data.
        config: the settings.
        per_token: seconds per token of an earlier estimate with the same model and settings; None times two steps.
    """
    batched = Batched.of(engine, data, config)
    steps = math.ceil(len(batched.train) / config.accumulate) * config.epochs
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    counts = batched.counts
    if per_token is None:
        per_token = _timed(engine, batched, config)
    validations = math.ceil(steps / (config.evaluate_every or max(1, steps // config.epochs)))
    trained = counts.tokens * steps * config.accumulate / len(batched.train)
    validated = validations * counts.validation_targets / 3  # a forward pass alone is a third of both
    return Cost(
        sequences=counts.sequences,
        tokens=counts.tokens,
        steps=steps,
        seconds=per_token * (trained + validated),
        seconds_per_token=per_token,
        memory=peak_memory(engine.device),
    )


def _timed(engine: Engine, batched: Batched, config: TrainingConfig) -> float:
    """Seconds per token of a step, states below kept as they would be: the second of two equal ones."""
    maps = {
        site: make_map(engine.map.handle(site).width, config, 0).to(engine.device)
        for site in engine.sites(config.sites)
    }
    model = SteeredModel(
        engine, maps, positions=config.positions, cache=batched.cache, checkpointing=config.checkpointing
    )
    with model.attached():
        loop = Loop(model, maps, batched, config, Progress())
        loop.one_step()
        began = time.perf_counter()
        loop.one_step()
        took = time.perf_counter() - began
    return took / (batched.counts.tokens / len(batched.train) * config.accumulate)
