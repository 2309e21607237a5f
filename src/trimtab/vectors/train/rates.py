"""sweep_lr: one model and one set of data, many learning rates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab._base.files import atomic_write_text
from trimtab.errors import InputError, NonFiniteError
from trimtab.results import to_json
from trimtab.results.training import RateSweep, TrainingRow, row_of
from trimtab.vectors.train._batched import Batched
from trimtab.vectors.train.config import TrainingConfig
from trimtab.vectors.train.preparing import prepare
from trimtab.vectors.train.training import _config, as_engine, train_batched

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def sweep_lr(
    model: Any,
    data: Any,
    rates: Sequence[float] = RATES,
    config: TrainingConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    allow_fallback: bool = False,
    **settings: Any,
) -> RateSweep:
    """Train once per learning rate, with one model, one encoding and one cache of states.

    Args:
        model: as in `train`.
        data: as in `train`; it needs validation data, by which the rate is chosen.
        rates: learning rates above 0, each once.
        config: the settings, without the rate; or give them one by one.
        out: directory; each training is in `lr_RATE` below it, and `rates.json` is the table. Those that are finished
            are not repeated.
        dtype: the model's dtype, when it is loaded here.
        device: where it is loaded.
        device_map: spreads it over several devices with accelerate.
        allow_fallback: train at sites of a model whose family is unknown.
        settings: fields of `TrainingConfig`.

    Raises:
        InputError: no rates, one twice, or no validation data.
        NonFiniteError: no rate gave a finite loss.
    """
    rates = tuple(map(float, rates))
    if not rates or len(set(rates)) < len(rates) or min(rates) <= 0 or not all(map(math.isfinite, rates)):
        raise InputError(f"learning rates {rates}: finite numbers above 0, each once, were expected")
    config = _config(config, settings)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    engine = as_engine(model, allow_fallback=allow_fallback, **options)
    found = prepare(engine, data, config)
    if not found.validation:
        raise InputError(
            f"{found.name} has no validation data, by which a rate could be chosen; give validation_tokens"
        )
    batched = Batched.of(engine, found, config)
    rows = []
    for rate in rates:
        place = None if out is None else Path(out) / f"lr_{rate:g}"
        try:
            made = train_batched(engine, found, replace(config, learning_rate=rate), out=place, batched=batched)
        except NonFiniteError as error:
            rows.append(TrainingRow(name=found.name, state="failed", learning_rate=rate, error=str(error)))
            continue
        rows.append(row_of(made.result, "" if place is None else str(place)))
    best = min((row for row in rows if row.loss is not None), key=lambda row: row.loss or 0.0, default=None)
    if best is None or best.learning_rate is None:
        raise NonFiniteError(f"no rate of {', '.join(f'{rate:g}' for rate in rates)} gave a finite loss; lower them")
    result = RateSweep(
        name=found.name,
        model=engine.model_id,
        rows=tuple(rows),
        best_rate=best.learning_rate,
        reason=f"lowest validation loss, {best.loss:.5g}",
        seconds=math.fsum(row.seconds or 0.0 for row in rows),
    )
    if out is not None:
        atomic_write_text(Path(out) / "rates.json", to_json(result) + "\n")
    return result
