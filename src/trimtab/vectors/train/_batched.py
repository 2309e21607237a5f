"""Training data cut, batched and counted for one model; what trainings on the same data share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.results.training import TrainingCounts
from trimtab.vectors.train._batches import Batch, make_batches
from trimtab.vectors.train._model import Cache, packing_works
from trimtab.vectors.train.config import TrainingConfig
from trimtab.vectors.train.engine import Engine
from trimtab.vectors.train.sequences import Item, TrainingData, cut, sequences


@dataclass(frozen=True, kw_only=True)
class Batched:
    """Micro-batches on the model's device; the states below the lowest site are kept in `cache`."""

    name: str
    digest: str
    pairs: bool
    train: tuple[Batch, ...]
    validation: tuple[Batch, ...]
    test: tuple[Batch, ...]
    prompted: tuple[Batch, ...]
    counts: TrainingCounts
    cache: Cache
    notes: tuple[str, ...]

    @classmethod
    def of(cls, engine: Engine, data: TrainingData, config: TrainingConfig) -> Batched:
        """Cut, shuffle once and batch; an epoch shuffles batches, so that their states can be kept.

        Raises:
            InputError: data that does not fit the loss, or nothing left to train on.
        """
        if data.pairs != (config.loss == "bipo"):
            what = "preference pairs" if data.pairs else "sequences"
            raise InputError(f"{data.name} holds {what}; loss={'bipo' if data.pairs else 'lm'!r} was expected for them")
        _check_ids(engine, data)
        length = min(config.max_length, engine.info.max_positions or config.max_length)
        train, short, gone = cut(data.train, length)
        validation, short_v, gone_v = cut(data.validation, length)
        test, short_t, gone_t = cut(data.test, length)
        if not train:
            raise InputError(
                f"{data.name}: no target is left of {gone} sequences cut at {length} tokens; raise max_length"
            )
        notes = []
        packing = config.packing and packing_works(engine)
        if config.packing and not packing:
            notes.append("sequences are padded, not packed: this model does not keep those of one row apart")
        prompted, short_p, _ = cut(data.prompted, length)
        if short_p or short_v or gone_v:
            notes += ["the prompted model was not measured: sequences were cut"] if prompted else []
            prompted = []
        random.Random(config.seed).shuffle(train)

        def batches(items: Sequence[Item], name: str) -> tuple[Batch, ...]:
            return tuple(
                make_batches(
                    items,
                    size=config.batch_size,
                    packing=packing,
                    device=engine.device,
                    name=name,
                    by_length=name != "train",
                )
            )

        return cls(
            name=data.name,
            digest=data.digest,
            pairs=data.pairs,
            train=batches(train, "train"),
            validation=batches(validation, "validation"),
            test=batches(test, "test"),
            prompted=batches(prompted, "prompted"),
            counts=_counts(train, validation, test, short + short_v + short_t, gone + gone_v + gone_t),
            cache=Cache(config.cache_mib << 20),
            notes=tuple(notes),
        )


def _counts(
    train: Sequence[Item], validation: Sequence[Item], test: Sequence[Item], short: int, gone: int
) -> TrainingCounts:
    found = sequences(train)
    return TrainingCounts(
        sequences=len(found),
        tokens=sum(len(one.ids) for one in found),
        targets=sum(one.num_targets for one in found),
        validation_sequences=len(sequences(validation)),
        validation_targets=sum(one.num_targets for one in sequences(validation)),
        test_sequences=len(sequences(test)),
        test_targets=sum(one.num_targets for one in sequences(test)),
        cut=short,
        dropped=gone,
    )


def _check_ids(engine: Engine, data: TrainingData) -> None:
    known = engine.info.vocab_size
    for one in sequences((*data.train, *data.validation, *data.test, *data.prompted)):
        if min(one.ids) < 0 or max(one.ids) >= known:
            wrong = min(one.ids) if min(one.ids) < 0 else max(one.ids)
            raise InputError(f"{data.name}: token {wrong} is outside the model's vocabulary of {known}; encode it anew")
