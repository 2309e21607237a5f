"""Checkpoints read lazily, one layer at a time, under the names that every family shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from trimtab.architectures import Numerics, Rotary, Router, Sizes, read_config, rotary
from trimtab.backends._place import locate
from trimtab.errors import InputError
from trimtab.weights._complete import require_whole
from trimtab.weights._files import Reader, Stored, scan
from trimtab.weights._layout import VECTORS, Finder, Piece

_QUANTISED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F6_E2M3", "F6_E3M2")
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "qweight", "absmax", "quant_state")
_LEFT_OUT = ("visual", "vision", "mtp", "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """The weights of one layer, in their stored dtype, with what its family does with them.

    Matrices are [out, in] under the names `q k v o gate up down router experts.E.gate experts.E.up experts.E.down
    shared.gate shared.up shared.down shared.router`; a query gate is `q_gate`, the projections of a gated delta rule
    are `linear.q` to `linear.o`. Nothing is read before it is asked for.
    """

    layer: int
    sizes: Sizes
    numerics: Numerics
    """Of this layer."""
    router: Router | None
    """None: the layer's MLP is dense."""
    pieces: Mapping[str, Piece] = field(repr=False)
    stored: Mapping[str, Stored] = field(repr=False)
    config: Any = field(repr=False)
    reader: Reader = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices of this layer."""
        return tuple(name for name in self.pieces if name not in VECTORS)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of this layer, of `attn_norm mlp_norm attn_post_norm mlp_post_norm q_norm k_norm`."""
        return tuple(name for name in VECTORS if name in self.pieces)

    @property
    def attention(self) -> bool:
        """Whether the layer has softmax attention; False: a gated delta rule, which has no heads to take apart."""
        return "v" in self.pieces

    @property
    def num_experts(self) -> int:
        """Experts of the layer; 0 for a dense MLP."""
        return 0 if self.router is None else self.router.num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors as stored."""
        names = {name for piece in self.pieces.values() for name in (piece.tensor, piece.bias) if name}
        return sum(_nbytes(self.stored[name]) for name in names)

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def shape(self, name: str) -> tuple[int, ...]:
        """Return (out, in) of a matrix, or (width,) of a norm, without reading it."""
        piece = self._piece(name)
        return piece.shape(self.stored[piece.tensor].shape)

    def matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a matrix, [out, in], in `dtype` or as stored. A view of the file where nothing has to change.

        Raises:
            InputError: the layer has no such matrix; names those it has.
        """
        piece = self._piece(name)
        matrix = piece.cut(self.reader.tensor(piece.tensor))
        return matrix if dtype is None else matrix.to(dtype)

    def bias(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the bias of a matrix or norm, [out]; None where it has none."""
        piece = self._piece(name)
        if piece.bias is None:
            return None
        bias = piece.cut_rows(self.reader.tensor(piece.bias))
        return bias if dtype is None else bias.to(dtype)

    def norm(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight of a norm, [width], as stored: a family that multiplies by 1 + w stores w."""
        return self.matrix(name, dtype)

    def rotary(self, length: int = 1) -> Rotary | None:
        """Return the rotary frequencies of the layer in a sequence of `length` tokens; None where it has none."""
        return None if self.numerics.rope is None else rotary(self.config, self.layer, length=length)

    def _piece(self, name: str) -> Piece:
        if name not in self.pieces:
            raise InputError(f"layer {self.layer} has no {name!r}; it has: {_abridged(self.pieces)}")
        return self.pieces[name]


class Checkpoint:
    """A saved model whose weights are read one layer at a time. Made by `load`; a context manager.

    Example:
        >>> with load("Qwen/Qwen3-0.6B") as checkpoint:
        ...     checkpoint.layer(0).matrix("gate", torch.float32).shape
        torch.Size([3072, 1024])
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        """As given to `load`."""
        saved = read_config(path)
        self.config = saved.text
        """Configuration of the text decoder."""
        self.family = saved.family.name
        self.definition = saved.family
        self.sizes = Sizes.of(saved.text)
        self.num_layers = int(saved.text.num_hidden_layers)
        self.hidden_size = self.sizes.hidden
        self.numerics = saved.family.numerics(saved.text)
        self.router = saved.family.router(saved.text)
        self.stored = scan(path)
        disk = saved.family.disk(saved.top)
        prefix = _prefix(disk, self.stored, path)
        shapes = {key: value.shape for key, value in self.stored.items()}
        self._disk = disk
        # Files that keep the names of the modules have the head beside the model.
        self._head = next((name for name in (disk.head, "lm_head.weight") if name in self.stored), None)
        self._prefix = prefix
        self._finder = Finder(saved.family, disk, saved.text, prefix, shapes)
        self._closed = False
        _refuse_quantised(saved.top, self.stored, path, prefix)
        for layer in range(self.num_layers):
            require_whole(self._finder, layer, path)

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's: the configuration says so and the files hold no head."""
        return self._head is None and self.numerics.tied

    def layer(self, layer: int) -> LayerWeights:
        """Return the weights of one layer; nothing is read yet.

        Raises:
            InputError: no such layer, or the checkpoint was closed.
        """
        if self._closed:
            raise InputError(f"{self.name} was closed; load it again")
        if not isinstance(layer, int) or not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer!r} of {self.name}: it has layers 0 to {self.num_layers - 1}")
        pieces = self._finder.layer(layer)
        return LayerWeights(
            layer=layer,
            sizes=self.sizes,
            numerics=self.definition.layer_numerics(self.config, self.numerics, layer),
            router=self.router if "router" in pieces else None,
            pieces=pieces,
            stored=self.stored,
            config=self.config,
            reader=Reader(self.stored),
        )

    def embedding(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the token embedding, [vocabulary, hidden]."""
        return self._global(self._prefix + self._disk.embed, dtype)

    def head(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the head's matrix, [vocabulary, hidden]: the embedding where they are tied.

        Raises:
            InputError: the files hold none, and the configuration does not say that it is tied.
        """
        return self.embedding(dtype) if self.tied else self._global(self._head or self._disk.head, dtype)

    def close(self) -> None:
        """Forget the files; layers that were taken stay readable until they are dropped."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, family={self.family!r}, num_layers={self.num_layers})"

    def _global(self, name: str, dtype: torch.dtype | None) -> Tensor:
        if name not in self.stored:
            raise InputError(f"{self.path} holds no {name}; the checkpoint is incomplete")
        tensor = Reader(self.stored).tensor(name)
        return tensor if dtype is None else tensor.to(dtype)


def load(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a saved model without reading its weights.

    Args:
        model: directory of a saved model, a hub id (fetched where there is a network), or "testbed".
        revision: of a hub id.

    Raises:
        InputError: no such model, no safetensors files, of no known family, incomplete or quantised.
    """
    if not isinstance(model, (str, Path)):
        raise InputError(f"model is {model!r:.80}; a directory, a hub id or testbed was expected")
    place = locate(str(model))
    return Checkpoint(Path(place) if Path(place).is_dir() else _fetch(place, revision), str(model))


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be fetched: {' '.join(str(error).split())[:300]}") from error


def _prefix(disk: Any, stored: Mapping[str, Stored], path: Path) -> str:
    """Find what stands before the decoder's names: files of bare or wrapped models differ in it."""
    role = "attn_norm" if "attn_norm" in disk.layers else "attn_post_norm"
    ending = disk.layers[role].format(layer=0)
    found = [name.removesuffix(ending) for name in stored if name.endswith(ending)]
    found = [prefix for prefix in found if not any(word in prefix for word in _LEFT_OUT)]
    if disk.prefix in found:
        return str(disk.prefix)
    if len(found) != 1:
        raise InputError(
            f"{path} holds no {disk.prefix}{ending}; its {len(stored)} tensors begin with {_abridged(sorted(stored))}"
        )
    return found[0]


def _refuse_quantised(config: Any, stored: Mapping[str, Stored], path: Path, prefix: str) -> None:
    method = getattr(config, "quantization_config", None)
    name = next(
        (
            name
            for name, tensor in stored.items()
            if name.startswith(prefix) and (tensor.dtype in _QUANTISED or name.rpartition(".")[2] in _SCALES)
        ),
        None,
    )
    if method is None and name is None:
        return
    what = "quantization_config in its config.json" if method is not None else f"{name} is {stored[str(name)].dtype}"
    raise InputError(
        f"{path} is quantised ({what}); its formulas need the weights themselves: load it with transformers, "
        "dequantize() it and save_pretrained() it in bfloat16, or give the checkpoint that it was made from"
    )


def _nbytes(stored: Stored) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count * _WIDTHS.get(stored.dtype, 1)


_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _abridged(names: Any, limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
