"""Susceptibility: how each matrix of a layer treats a direction before and after training.

Every matrix reads the direction through its own block's input norm; `o` reads the values and `down` the neurons that
the direction makes in the base model, in both models, so that a change before them is not taken for theirs. Base and
tuned outputs are compared by angle, length and relative change. A norm's weight that was only scaled changes the
lengths and no angle.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch

from trimtab.results.weights import MatrixChange, NormChange
from trimtab.weights._excess import excess
from trimtab.weights._lengths import apart
from trimtab.weights._open import Options, analyse
from trimtab.weights._rows import Change, LayerPart, direction_rows
from trimtab.weights._run import Context
from trimtab.weights.matrices import compare_matrices
from trimtab.weights.run import WeightsRun


def measure_susceptibility(
    base: str | Path, tuned: str | Path, directions: Any, *, rank: int = 32, **options: Unpack[Options]
) -> WeightsRun:
    """Compare what every matrix makes of every direction in a base and a tuned model, and the matrices themselves.

    Measures, for each matrix: `angle` between the outputs in radians; `cosine_distance`, 1 minus their cosine;
    `norm_ratio`, tuned length over base length, minus 1; `relative_change`, |tuned - base| / |base|; `excess`,
    |tuned - base| over what the controls' outputs of the same length moved by. All are 0 for equal matrices.

    Args:
        base: directory, hub id, or "testbed".
        tuned: a model of the same architecture.
        directions: what `read_directions` takes.
        rank: singular values of each matrix's change.
        options: see `Options`.

    Returns:
        The run: `.report`, `.frame()`, `.matrices()`.

    Raises:
        InputError: models that cannot be compared, layers outside the model, too few controls.
        VectorError: directions of another width or layer.

    Example:
        >>> run = measure_susceptibility("base", "tuned", ["personas"], vector_layer=16, out="runs/weights")
        >>> run.report.rankings[0]
    """
    return analyse("susceptibility", measure_layer, base, tuned, directions, rank=rank, **options)


def measure_layer(context: Context) -> LayerPart:
    """Measure the matrices of one layer; each is read and multiplied once for each model."""
    changes: list[Change] = []
    tuned = context.tuned.responses(context.units, [name for name in context.tuned.names if not _inner(name)])
    for before in context.base.responses(context.units):
        name = before.name
        outputs = context.tuned.apply(name, before.inputs) if _inner(name) else next(tuned).outputs
        found = apart(before.outputs, outputs)
        known = found.base > 0
        ratio = torch.where(known, found.tuned / found.base, torch.where(found.tuned > 0, torch.inf, 1.0))
        relative = torch.where(known, found.change / found.base, torch.where(found.change > 0, torch.inf, 0.0))
        changes += [
            Change(part=name, measure="relative_change", delta=relative),
            excess(name, found.change, found.base, context.settings.reference, context.unit),
            Change(part=name, measure="angle", delta=found.angle),
            Change(part=name, measure="cosine_distance", delta=2 * torch.sin(found.angle / 2) ** 2),
            Change(part=name, measure="norm_ratio", delta=ratio - 1, base=found.base, tuned=found.tuned),
        ]
    settings = context.settings
    return LayerPart(
        layer=context.layer,
        rows=direction_rows(context.layer, changes, settings.directions, settings.reference, context.unit),
        matrices=tuple(asdict(one) for one in _matrices(context)),
        norms=tuple(asdict(one) for one in _norms(context)),
    )


def _inner(name: str) -> bool:
    """Whether a matrix reads what others made: it gets the base model's, so that its own change alone is seen."""
    return name == "o" or name.rpartition(".")[2] == "down"


def _matrices(context: Context) -> list[MatrixChange]:
    found = []
    base, tuned = context.base.weights, context.tuned.weights
    for name in base.names:
        rows, columns = base.shape(name)
        one = compare_matrices(
            base.matrix(name), tuned.matrix(name), rank=context.settings.rank, seed=context.settings.seed
        )
        found.append(
            MatrixChange(
                layer=context.layer,
                matrix=name,
                rows=rows,
                columns=columns,
                frobenius_base=one.base_norm,
                frobenius_tuned=one.tuned_norm,
                frobenius=one.change_norm,
                relative=one.relative_change,
                cosine=one.cosine,
                spectral=one.spectrum.singular_values,
                spectral_error=one.spectrum.error,
                effective_rank=one.spectrum.effective_rank,
                effective_rank_error=one.spectrum.effective_rank_error,
            )
        )
    return found


def _norms(context: Context) -> list[NormChange]:
    """Compare what the norms multiply by: 1 + w where the family stores w."""
    plus_one = context.base.weights.numerics.norm == "rmsnorm_plus_one"
    found = []
    for name in context.base.weights.norms:
        one, other = (
            side.weights.norm(name, torch.float64).reshape(-1) + plus_one for side in (context.base, context.tuned)
        )
        measured = apart(one[None], other[None])
        square = float(one @ one)
        found.append(
            NormChange(
                layer=context.layer,
                norm=name,
                relative=float(measured.change) / square**0.5 if square else 0.0,
                scale=float(other @ one) / square if square else 1.0,
                angle=float(measured.angle),
            )
        )
    return found
