"""Two checkpoints of one architecture, checked tensor by tensor before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from trimtab.errors import InputError
from trimtab.weights.load import Checkpoint, LayerWeights, load


class LayerPair(NamedTuple):
    """One layer of both models."""

    base: LayerWeights
    tuned: LayerWeights


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and a tuned model with the same matrices. Made by `pair`; a context manager."""

    base: Checkpoint
    tuned: Checkpoint
    notes: tuple[str, ...] = ()
    """What differs without making a comparison impossible: stored dtypes, vocabulary, numerics."""

    @property
    def num_layers(self) -> int:
        """Layers of each model."""
        return self.base.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.base.hidden_size

    @property
    def family(self) -> str:
        """Name of the family of both."""
        return self.base.family

    def layer(self, layer: int) -> LayerPair:
        """Return one layer of both models; nothing is read yet."""
        return LayerPair(self.base.layer(layer), self.tuned.layer(layer))

    def close(self) -> None:
        """Close both."""
        self.base.close()
        self.tuned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pair(base: str | Path | Checkpoint, tuned: str | Path | Checkpoint) -> Pair:
    """Open two models and check that their weights can be compared matrix by matrix.

    Raises:
        InputError: another family, other sizes, or matrices that one of them lacks or has in another shape; names what
            differs.
    """
    first = base if isinstance(base, Checkpoint) else load(base)
    second = tuned if isinstance(tuned, Checkpoint) else load(tuned)
    differ = [*_architecture(first, second)]
    if not differ:
        differ = [
            line for layer in range(first.num_layers) for line in _matrices(first.layer(layer), second.layer(layer))
        ]
    if differ:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise InputError(f"{first.name} and {second.name} cannot be compared: {'; '.join(differ[:4])}{more}")
    return Pair(first, second, tuple(_notes(first, second)))


def _architecture(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    kinds = base.config.model_type, tuned.config.model_type
    if kinds[0] != kinds[1]:
        yield f"the model types are {kinds[0]} and {kinds[1]}"
    if base.num_layers != tuned.num_layers:
        yield f"the layers are {base.num_layers} and {tuned.num_layers}"
    for field in fields(base.sizes):
        one, other = getattr(base.sizes, field.name), getattr(tuned.sizes, field.name)
        if one != other and field.name != "vocab":
            yield f"{field.name} is {one} and {other}"


def _matrices(base: LayerWeights, tuned: LayerWeights) -> Iterator[str]:
    where = f"layer {base.layer}"
    for name in dict.fromkeys((*base.pieces, *tuned.pieces)):
        if name not in tuned or name not in base:
            yield f"{where} {name} is only in the {'base' if name in base else 'tuned'} model"
        elif base.shape(name) != tuned.shape(name):
            yield f"{where} {name} is {list(base.shape(name))} and {list(tuned.shape(name))}"
        elif (base.pieces[name].bias is None) != (tuned.pieces[name].bias is None):
            yield f"{where} {name} has a bias only in the {'base' if base.pieces[name].bias else 'tuned'} model"


def _notes(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    if base.sizes.vocab != tuned.sizes.vocab:
        yield f"the vocabularies hold {base.sizes.vocab} and {tuned.sizes.vocab} tokens"
    for field in fields(base.numerics):
        one, other = getattr(base.numerics, field.name), getattr(tuned.numerics, field.name)
        if one != other:
            yield f"{field.name} is {one} and {other}"
    one, other = (getattr(model.config, "rope_parameters", None) for model in (base, tuned))
    if one != other:
        yield f"rope_parameters are {one} and {other}"
    kinds = [sorted({tensor.dtype for tensor in model.stored.values()}) for model in (base, tuned)]
    if kinds[0] != kinds[1]:
        yield f"stored dtypes are {', '.join(kinds[0])} and {', '.join(kinds[1])}"
