"""train: the public call, from a model and data to a directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab._base import jsonio, provenance
from trimtab._base import progress as bars
from trimtab._base.files import FileLock
from trimtab._base.log import get_logger
from trimtab.backends._memory import out_of_memory
from trimtab.errors import InputError, NonFiniteError, RecipeError, UnfinishedError
from trimtab.results.training import Perplexities, TrainedMap, Training, TrainingStep
from trimtab.sites import Site
from trimtab.steering import Steering
from trimtab.vectors.train import saved
from trimtab.vectors.train._batched import Batched
from trimtab.vectors.train._loop import Loop, cache_is_exact, peak_memory
from trimtab.vectors.train._maps import SiteMap, make_map
from trimtab.vectors.train._model import SteeredModel
from trimtab.vectors.train._state import Progress
from trimtab.vectors.train.config import TrainingConfig
from trimtab.vectors.train.engine import Engine
from trimtab.vectors.train.preparing import prepare
from trimtab.vectors.train.saved import Trained
from trimtab.vectors.train.sequences import TrainingData

STATE = "state.safetensors"
_LOG = get_logger(__name__)


def train(
    model: Any,
    data: Any,
    config: TrainingConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    allow_fallback: bool = False,
    **settings: Any,
) -> Trained:
    """Train steering vectors (or low-rank maps) at sites of a frozen model.

    The parameters are float32 whatever the model's dtype. The best parameters by validation loss are restored at the
    end, with or without early stopping; without validation data the last ones stay.

    Args:
        model: a directory, a hub id, "testbed", a module, a Hugging Face backend, or an `Engine`.
        data: contrast data, what `trimtab.vectors.load` reads, or `TrainingData` with your own tokens.
        config: the settings; or give them one by one.
        out: directory of the result. A training that was interrupted there goes on with the next step; one that is
            finished is read, not repeated.
        dtype: the model's dtype, when it is loaded here.
        device: where it is loaded.
        device_map: spreads it over several devices with accelerate.
        allow_fallback: train at sites of a model whose family is unknown.
        settings: fields of `TrainingConfig`, such as `sites=("layers.3.resid_post",)`.

    Returns:
        The result with its curves, and the steering.

    Raises:
        InputError: data or a site that cannot be used, or `out` holds another training.
        NonFiniteError: the loss left the numbers before the first validation.
        UnfinishedError: interrupted; `out` holds the state.

    Example:
        >>> trained = train("testbed", "testbed:animal", sites=("layers.3.resid_post",), out="runs/animal")
    """
    config = _config(config, settings)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    engine = as_engine(model, allow_fallback=allow_fallback, **options)
    found = prepare(engine, data, config)
    return train_batched(engine, found, config, out=out)


def as_engine(model: Any, **options: Any) -> Engine:
    """Return the model as an engine, loading it where it is not one.

    Raises:
        InputError: options for a model that is loaded.
    """
    if not isinstance(model, Engine):
        return Engine(model, **options)
    said = [name for name, value in options.items() if value not in (None, False)]
    if said:
        raise InputError(f"{said[0]} was given for an engine, whose model is loaded; give it to Engine(...)")
    return model


def train_batched(
    engine: Engine,
    data: TrainingData,
    config: TrainingConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    batched: Batched | None = None,
) -> Trained:
    """Train on prepared data; `batched` is what trainings on the same data share. See `train`."""
    folder = None if out is None else Path(out)
    if config.patience and not data.validation:
        config = replace(config, patience=0)  # nothing to be patient about: said in the notes
    sites = engine.sites(config.sites)
    identity = _identity(engine, data, config, sites)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with nullcontext() if folder is None else FileLock(folder / ".lock"):
        if folder is not None and (folder / saved.RESULT).is_file():
            return _finished(folder, identity)
        state = None if folder is None else folder / STATE
        progress = Progress.load(state, identity) if state is not None and state.is_file() else Progress()
        run = _Run(engine, data, config, sites, batched or Batched.of(engine, data, config), progress)
        made = run.train(state, identity)
        if folder is not None and state is not None:
            made.save(folder)
            state.unlink(missing_ok=True)
        return made


class _Run:
    def __init__(
        self,
        engine: Engine,
        data: TrainingData,
        config: TrainingConfig,
        sites: tuple[Site, ...],
        batched: Batched,
        progress: Progress,
    ) -> None:
        self._engine, self._config, self._batched, self._progress = engine, config, batched, progress
        self._maps: dict[Site, SiteMap] = {}
        for number, site in enumerate(sites):
            handle = engine.map.handle(site)
            self._maps[site] = make_map(handle.width, config, config.seed * 1009 + number).to(engine.device)
        self._model = SteeredModel(
            engine, self._maps, positions=config.positions, cache=batched.cache, checkpointing=config.checkpointing
        )
        self._notes = list(batched.notes)
        if not data.validation:
            self._notes.append("no validation data: the last parameters were kept, and nothing stopped early")

    def train(self, state: Path | None, identity: str) -> Trained:
        config, progress = self._config, self._progress
        advice = "lower batch_size, set checkpointing, or lower max_length"

        def save() -> None:
            if state is not None:
                progress.save(state, identity)

        with self._model.attached(), out_of_memory(f"training on batches of {config.batch_size}", advice):
            self._check_cache()
            loop = Loop(self._model, self._maps, self._batched, config, progress)
            with bars.progress(f"train {self._batched.name}", loop.total) as bar:
                bar.advance(progress.step)

                def shown(step: TrainingStep, total: int) -> None:
                    bar.advance()

                try:
                    loop.run(save=save, on_step=shown)
                except KeyboardInterrupt as error:
                    kept = f"{state} holds the state" if state is not None else "nothing was kept: give out="
                    raise UnfinishedError(f"interrupted after {progress.step} of {loop.total} steps; {kept}") from error
            self._check_finite()
            return self._result(loop, identity)

    def _check_cache(self) -> None:
        cache = self._batched.cache
        if (
            self._model.below
            and cache.limit
            and not cache.hits
            and not cache_is_exact(self._model, self._batched.train[0])
        ):
            cache.limit = 0
            self._notes.append("states below the lowest site were not kept: the blocks above need more than those")

    def _check_finite(self) -> None:
        progress = self._progress
        if progress.stopped != "non-finite":
            return
        where = f"step {progress.step + 1} at learning rate {self._config.learning_rate:g}"
        if not progress.best_step:
            raise NonFiniteError(
                f"the loss or its gradient is not finite at {where}; lower the learning rate, or use bfloat16"
            )
        self._notes.append(
            f"the loss or its gradient was not finite at {where}; the best parameters before it were kept"
        )

    def _result(self, loop: Loop, identity: str) -> Trained:
        engine, config, progress = self._engine, self._config, self._progress
        steering = Steering({site: part.op() for site, part in self._maps.items()}, positions=config.positions)
        maps = tuple(
            TrainedMap(
                site=str(site),
                kind=config.kind,
                width=engine.map.handle(site).width,
                norm=part.norm,
                digest=Steering({site: part.op()}, positions=config.positions).digest,
            )
            for site, part in self._maps.items()
        )
        has = bool(self._batched.validation)
        best, unsteered = progress.best_loss, progress.unsteered_loss
        if (
            progress.stopped != "non-finite"
            and has
            and best is not None
            and unsteered is not None
            and best >= unsteered
        ):
            self._notes.append("no validation was better than the unsteered model")
        tokens = self._batched.counts.tokens / len(self._batched.train) * config.accumulate * progress.step
        result = Training(
            name=self._batched.name,
            model=engine.model_id,
            model_digest=engine.info.weights_digest,
            hidden_size=engine.info.hidden_size,
            dtype=engine.info.dtype,
            config=jsonio.loads(config.json()),
            maps=maps,
            steering_digest=steering.digest,
            steps=tuple(progress.steps),
            evaluations=tuple(progress.evaluations),
            best_step=progress.best_step or progress.step,
            best_loss=best,
            unsteered_loss=unsteered,
            improved=None if best is None or unsteered is None else best < unsteered,
            stopped=progress.stopped,
            validation=self._perplexities(loop, "validation"),
            test=self._perplexities(loop, "test"),
            counts=self._batched.counts,
            seconds=progress.seconds,
            tokens_per_second=tokens / progress.seconds,
            peak_memory=peak_memory(engine.device),
            resumed=progress.resumed,
            notes=tuple(self._notes),
            provenance=provenance.collect(
                **engine.provenance(),
                data_digest=self._batched.digest,
                identity=identity,
                seed=config.seed,
                process=os.getpid(),
            ),
        )
        return Trained(result=result, steering=steering)

    def _perplexities(self, loop: Loop, split: str) -> Perplexities | None:
        if not getattr(self._batched, split):
            return None
        prompted = split == "validation" and self._batched.prompted
        return Perplexities(
            unsteered=loop.evaluate(split, steered=False).perplexity,
            steered=loop.evaluate(split, steered=True).perplexity,
            prompted=self._prompted(loop) if prompted else None,
        )

    def _prompted(self, loop: Loop) -> float:
        return loop.evaluate("prompted", steered=False).perplexity


def _config(config: TrainingConfig | None, settings: Mapping[str, Any]) -> TrainingConfig:
    if config is None:
        return TrainingConfig.of(settings)
    unknown = sorted(set(settings) - set(TrainingConfig.__dataclass_fields__))
    if unknown:
        raise RecipeError(f"no setting {unknown[0]!r}; there are {', '.join(TrainingConfig.__dataclass_fields__)}")
    return replace(config, **settings)


def _identity(engine: Engine, data: TrainingData, config: TrainingConfig, sites: tuple[Site, ...]) -> str:
    parts = (engine.info.weights_digest, engine.info.dtype, data.digest, config.json(), *map(str, sites))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _finished(folder: Path, identity: str) -> Trained:
    found = saved.load_trained(folder)
    if found.result.provenance.get("identity") != identity:
        raise InputError(f"{folder} holds another training: model, data or settings differ; give another directory")
    _LOG.info("%s: finished before, nothing is repeated", folder)
    return found
