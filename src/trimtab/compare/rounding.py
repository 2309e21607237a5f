"""How many roundings lie upstream of a recorded tensor, and so how large a row error they explain.

`numerics.rounding.expected_relative_error` turns a count of blocks b and a reduction length K into the error
e^2 = (0.42 u_d)^2 (1 + 2 b) + (0.42 u_acc)^2 K. Here b and K are chosen for a record:

- b = the decoder blocks upstream, plus the roundings inside the block that made the tensor, counted in blocks as well:
  `WITHIN_STREAM` for the stream, `WITHIN_BRANCH` for what attention and MLP make (weights, norms, projections, gate).
  A module of a block, `module:model.layers.3.mlp.gate.output`, counts as such a branch.
  A tensor that names neither site nor layer has b = 0, and K = max(last dimension, 256): storage rounding and one
  reduction, and the verdict says so.
- K = last dimension x (1 + b / 2): every block adds such reductions.
- Near 0 the steps of a dtype are of one size s (6e-8 in float16, 2e-3 in float8_e4m3fn) and the error s / sqrt(12) of
  an element, once per rounding, does not shrink with it: rows below that are judged against it.
- u_d belongs to the coarser dtype of the pair, or to the models' when they computed in a coarser one than was
  recorded; u_acc is float64's where that dtype is float64, else float32's.

The two were fitted to decoder blocks of four families with random weights (6 and 24 layers, float64 as the truth): with
1 + 2 l alone the median ratio of error to expectation was 3.8 after the first block and 7 at its gated MLP's output,
with these constants 0.5 to 2.6 everywhere. `docs/compare.md` has the figures.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch

from trimtab.errors import SiteError
from trimtab.numerics.dtypes import dtype_name
from trimtab.numerics.rounding import expected_relative_error
from trimtab.results.comparison import RecordKey
from trimtab.sites import Site

WITHIN_STREAM = 8
WITHIN_BRANCH = 24
UNKNOWN_REDUCTION = 256
LAYER = re.compile(r"(?:^|[.:])(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_STREAM_POINTS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The expected relative row error of one tensor and where it comes from."""

    error: float
    common: float = 0.0
    """Relative error that all elements may share: e, twice that for gradients, which all carry the loss's error."""
    underflow: float = 0.0
    """rms error of one element near 0, where the dtype's steps are of one size; absolute."""
    source: str
    dtype: str
    blocks: int


def blocks_upstream(key: RecordKey, num_layers: int | None) -> int | None:
    """Blocks of roundings that a tensor went through; None when neither its site nor its layer says.

    Args:
        key: identity of the record.
        num_layers: decoder blocks of the model, or one more than the last layer recorded.
    """
    site, layer = _site(key.site), layer_of(key)
    depth = num_layers or 0
    of_model = site is not None and site.module is None
    if of_model and site is not None and site.point == "embed":
        return 0
    if layer is None:
        return depth + WITHIN_STREAM if of_model else None
    if key.kind in ("grad", "optim"):  # the whole forward pass, then the backward pass down to this layer
        return 2 * max(depth, layer + 1) - layer + WITHIN_BRANCH
    if site is None or not of_model or site.point not in _STREAM_POINTS:
        return layer + WITHIN_BRANCH
    if site.point == "resid_pre" and layer == 0:
        return 0
    return layer + WITHIN_STREAM + (1 if site.point == "resid_post" else 0)


def layer_of(key: RecordKey) -> int | None:
    """The decoder layer of a tensor, from its site or its module's path; None when nothing says."""
    site = _site(key.site)
    if site is not None and site.layer is not None:
        return site.layer
    if key.layer is not None:
        return key.layer
    # gradients of parameters, and what an optimizer keeps of them, have no site: their names are paths
    found = LAYER.search(key.site or (key.name if key.kind in ("grad", "optim") else ""))
    return int(found[1]) if found else None


def expected_error(dtype: torch.dtype, *, blocks: int | None, width: int, kind: str = "value") -> Expected:
    """Evaluate the rounding model.

    Args:
        dtype: the coarser dtype.
        blocks: blocks of roundings upstream; None is unknown and counts as 0.
        width: length of the last dimension.
        kind: the record's kind: "value", "grad", "param" or "optim".
    """
    depth = blocks or 0
    length = max(width, 1 if blocks is not None else UNKNOWN_REDUCTION)
    error = expected_relative_error(
        dtype,
        blocks_upstream=depth,
        accumulator=torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32,
        reduction_length=length * (2 + depth) // 2,
    )
    known = "" if blocks is not None else " (depth unknown: storage rounding and one reduction)"
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    underflow = step / math.sqrt(12) * math.sqrt(1 + 2 * depth)
    return Expected(
        error=error,
        common=2 * error if kind in ("grad", "optim") else error,
        underflow=underflow,
        source=f"rounding model{known}",
        dtype=dtype_name(dtype),
        blocks=depth,
    )


@functools.lru_cache(maxsize=1 << 14)
def _site(text: str) -> Site | None:
    try:
        return Site.parse(text) if text else None
    except SiteError:
        return None
