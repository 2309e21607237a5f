"""The fast path of a CPU: losses and gradients of JumpReLU, TopK and BatchTopK without autograd.

Where few latents are active a step is one dense product, the encoder's, and compiled passes over what is active:
decode, error and its products with the decoder's rows while these are in the cache, then the gradients latent by
latent. Where many are, it is the five dense products of the forward and backward pass, with two fused passes between
them. Nothing computes a gradient to x. Results agree with the general form to rounding; tests hold one against the
other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.sae import fused
from trimtab.sae._threads import array, kernels, share
from trimtab.sae.architectures import Scene, Terms

_DENSE = 0.1
"""Share of latents, active or near their threshold, from which the dense products are faster."""
_SAMPLED = 64

Array = np.ndarray[Any, Any]


class Gradients(NamedTuple):
    """A batch's loss and what it asks of the stored parameters."""

    terms: Terms
    gradients: dict[str, Tensor]


class _Code(NamedTuple):
    """Entries of a batch row by row: those of row b are `ptr[b]` to `ptr[b + 1]`."""

    ptr: Array
    cols: Array
    values: Array


class _Work(NamedTuple):
    """One batch, ready for the passes; numbers that scale elements have the elements' dtype."""

    scene: Scene
    centred: Tensor
    pre: Tensor
    bias: Array
    threshold: Array
    bandwidth: Any
    c: Any
    factor: Any
    """Gradient of y is this times its error."""
    counted: Any
    """Gradient of the number of active latents."""

    @property
    def number(self) -> Any:
        return self.threshold.dtype.type


def fits(scene: Scene) -> bool:
    """Whether this path knows the architecture, the device and the precision."""
    config = scene.config
    known = config.architecture in ("topk", "batchtopk") or (
        config.architecture == "jumprelu" and config.penalty == "step" and not config.pre_act_coefficient
    )
    plain = scene.watch is None and scene.x.device.type == "cpu" and scene.precision.compute != torch.float16
    return known and plain and _by_row(scene)


def _by_row(scene: Scene) -> bool:
    """Whether the loss is a mean over rows that are here with all latents; then their gradients are means too."""
    if scene.split is None:
        return True
    start, stop, _ = scene.split.own(scene.config.d_sae).indices(scene.config.d_sae)
    waiting = scene.dead is not None and bool(scene.dead.any())  # they learn from the mean over the whole batch
    return (start, stop) == (0, scene.config.d_sae) and scene.config.architecture != "batchtopk" and not waiting


def differentiate(scene: Scene) -> Gradients:
    """Return the loss of a batch and the gradients of the stored parameters; those of weights may be bfloat16."""
    work = _begin(scene)
    if scene.config.is_topk:
        return _sparse(work, _top(work) if scene.config.architecture == "topk" else _top_of_batch(work))
    floor = work.threshold - work.bandwidth / 2
    code = _above(work, floor)
    return _dense(work) if code is None else _sparse(work, code)


def _begin(scene: Scene) -> _Work:
    p, wide, config = scene.parameters, scene.precision.wide, scene.config
    x = scene.x - p["b_dec"].to(wide) if config.centres else scene.x
    low = scene.low["W_enc"]
    centred = x.to(low.dtype)
    number = np.float64 if wide == torch.float64 else np.float32
    threshold = array(p["threshold"]) if config.is_jumprelu else np.zeros(len(low), number)
    return _Work(
        scene=scene,
        centred=centred,
        pre=fused.matmul(centred, low.t()),
        bias=array(p["b_enc"].to(wide)),
        threshold=threshold,
        bandwidth=number(config.kernel * scene.scales.pre if config.is_jumprelu else 0.0),
        c=number(scene.scales.c),
        factor=number(2 * scene.scales.g / len(x)),
        counted=number(scene.scales.loss * scene.coefficient / len(x) if config.is_jumprelu else 0.0),
    )


def _pointers(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _above(work: _Work, floor: Array, *, most: float = _DENSE) -> _Code | None:
    """Return the entries over a floor per latent; None where they are too many for sparse passes."""
    pre, rows = array(work.pre), len(work.pre)
    counts = np.empty(rows, np.int64)
    share(kernels().count_above, rows, pre, work.bias, floor, counts)
    ptr = _pointers(counts)
    if ptr[-1] > most * work.pre.numel():
        return None
    cols, values = np.empty(ptr[-1], np.int32), np.empty(ptr[-1], work.number)
    share(kernels().take_above, rows, pre, work.bias, floor, ptr, cols, values)
    return _Code(ptr, cols, values)


def _top(work: _Work, k: int | None = None, allowed: Array | None = None) -> _Code:
    """Return the k largest positive entries of every row, of allowed latents."""
    rows, width = work.pre.shape
    k = min(work.scene.config.k or width, width) if k is None else min(k, width)
    allowed = np.ones(width, np.bool_) if allowed is None else allowed
    cols, values = np.empty((rows, k), np.int32), np.empty((rows, k), work.number)
    counts = np.empty(rows, np.int64)
    share(kernels().top_of_rows, rows, array(work.pre), work.bias, allowed, k, cols, values, counts)
    if (counts == k).all():
        return _Code(_pointers(counts), cols.reshape(-1), values.reshape(-1))
    kept = np.arange(k) < counts[:, None]
    return _Code(_pointers(counts), cols[kept], values[kept])


def _top_of_batch(work: _Work) -> _Code:
    """Return the k largest positive entries per row of the whole batch; of equal ones the first."""
    rows, width = work.pre.shape
    wanted = min((work.scene.config.k or width) * rows, rows * width)
    counts = np.empty(rows, np.int64)
    sample = work.pre[:: max(1, rows // _SAMPLED)].to(work.scene.precision.wide).numpy() + work.bias
    place = min(sample.size, int(1.1 * wanted / rows * len(sample)) + 1)
    floor = max(work.number(0), np.partition(sample, sample.size - place, axis=None)[sample.size - place])
    while True:
        share(kernels().count_over, rows, array(work.pre), work.bias, work.number(floor), counts)
        if floor == 0 or counts.sum() >= wanted:
            break
        floor = work.number(0) if floor < 1e-30 else work.number(floor * 0.8)
    code = _above(work, np.full(width, floor, work.number), most=1.0)
    assert code is not None
    if len(code.values) <= wanted:
        return code
    cut = np.partition(code.values, len(code.values) - wanted)[len(code.values) - wanted]
    kept = code.values > cut
    equal = np.flatnonzero(code.values == cut)[: wanted - int(kept.sum())]
    kept[equal] = True
    return _Code(_pointers(kept)[code.ptr], code.cols[kept], code.values[kept])


class _Sums:
    """Gradients that passes add to."""

    def __init__(self, work: _Work) -> None:
        scene = work.scene
        latents, wide = len(work.bias), scene.precision.wide
        self.encoder = torch.zeros(latents, scene.config.d_in, dtype=wide)
        self.decoder = torch.zeros(latents, scene.config.output, dtype=wide)
        self.bias, self.steps = np.zeros(latents), np.zeros(latents)
        self.fired = np.zeros(latents, np.int64)


def _decoded(work: _Work, code: _Code, offset: Tensor, target: Tensor) -> tuple[Tensor, Array, float]:
    """Return the error [batch, d_out], its products with the decoder's rows, entry by entry, and its square."""
    rows = len(code.ptr) - 1
    error, by_latent, squares = torch.empty_like(target), np.empty_like(code.values), np.empty(rows)
    weight = array(work.scene.low["W_dec"])
    share(
        kernels().sparse_rows, rows, code.ptr, code.cols, code.values, work.threshold, work.c, weight,
        array(offset), array(target), array(error), by_latent, squares,
    )  # fmt: skip
    return error, by_latent, float(squares.sum())


def _learned(
    work: _Work, code: _Code, by_latent: Array, error: Tensor, factor: Any, counted: Any, sums: _Sums, fired: Array
) -> None:
    """Add the gradients of a code."""
    latents = len(work.bias)
    starts = np.zeros(latents + 1, np.int64)
    order, rows = np.empty(len(code.cols), np.int64), np.empty(len(code.cols), np.int32)
    kernels().order_by_latent(code.cols, code.ptr, starts, order, rows)
    share(
        kernels().sparse_latents, latents, starts, order, rows, code.values, by_latent, work.threshold, work.bandwidth,
        work.scene.config.ste_to_input, work.c, factor, counted, array(work.centred), array(error),
        array(sums.encoder), array(sums.decoder), sums.bias, sums.steps, fired,
        parts=16,
    )  # fmt: skip


def _sparse(work: _Work, code: _Code) -> Gradients:
    scene, sums = work.scene, _Sums(work)
    error, by_latent, square = _decoded(work, code, scene.offset().detach().contiguous(), scene.target.contiguous())
    _learned(work, code, by_latent, error, work.factor, work.counted, sums, sums.fired)
    aux = _auxiliary(work, error, sums)
    cut = None
    if scene.config.architecture == "batchtopk":
        cut = torch.tensor(float(code.values.min()) if len(code.values) else np.inf, dtype=scene.precision.wide)
    return _finish(work, sums, error, square, aux, cut, (sums.encoder, sums.decoder))


def _auxiliary(work: _Work, error: Tensor, sums: _Sums) -> float:
    """Return the loss of the dead latents, and add its gradients."""
    scene = work.scene
    if scene.dead is None or not scene.dead.any():
        return 0.0
    left = -error
    spread = float((left - left.mean(0)).double().square().sum())
    code = _top(work, scene.config.dead_k, array(scene.dead))
    missed, by_latent, square = _decoded(work, code, torch.zeros_like(left[0]), left)
    coefficient = scene.config.aux_coefficient
    factor = work.number(2 * coefficient * scene.scales.loss / spread)
    _learned(work, code, by_latent, missed, factor, work.number(0), sums, np.zeros_like(sums.fired))
    return coefficient * square / spread


def _dense(work: _Work) -> Gradients:
    scene, sums, latents = work.scene, _Sums(work), len(work.bias)
    low, wide = scene.low["W_dec"], scene.precision.wide
    pre, z = array(work.pre), torch.empty_like(work.pre)
    share(
        kernels().dense_forward, latents, pre, work.bias, work.threshold, work.c, array(z), sums.fired,
        parts=1, least=256,
    )  # fmt: skip
    error = fused.matmul(z, low).to(wide).add_(scene.offset().detach()).sub_(scene.target)
    narrow = (error * work.factor).to(low.dtype)
    gradient = fused.matmul(narrow, low.t())
    share(
        kernels().dense_backward, latents, pre, work.bias, work.threshold, work.bandwidth, scene.config.ste_to_input,
        work.c, work.counted, array(gradient), sums.bias, sums.steps,
        parts=1, least=256,
    )  # fmt: skip
    encoder, decoder = fused.matmul(gradient.t(), work.centred), fused.matmul(z.t(), narrow)
    square = float(torch.linalg.vector_norm(error, dtype=torch.float64) ** 2)
    return _finish(work, sums, error, square, 0.0, None, (encoder, decoder))


def _finish(
    work: _Work,
    sums: _Sums,
    error: Tensor,
    square: float,
    aux: float,
    cut: Tensor | None,
    weights: tuple[Tensor, Tensor],
) -> Gradients:
    scene, tokens = work.scene, len(error)
    p, wide = scene.parameters, scene.precision.wide
    bias = torch.from_numpy(sums.bias)
    of_output = error.sum(0, dtype=torch.float64) * (float(work.factor) * scene.scales.kappa)
    if scene.config.centres:
        of_output = of_output - (bias.to(wide) @ scene.low["W_enc"].to(wide)).double()
    gradients = {"W_enc": weights[0], "W_dec": weights[1], "b_enc": bias.to(wide), "b_dec": of_output.to(wide)}
    if "threshold" in p:
        gradients["threshold"] = torch.from_numpy(sums.steps).to(wide)
    fired = torch.from_numpy(sums.fired)
    scalar = torch.tensor
    penalty = scene.coefficient * float(sums.fired.sum()) / tokens if scene.config.is_jumprelu else 0.0
    terms = Terms(
        recon=scalar(square / (tokens * scene.scales.total**2), dtype=wide),
        sparsity=scalar(penalty, dtype=wide),
        aux=scalar(aux, dtype=wide),
        fired=fired,
        cut=cut,
    )
    return Gradients(terms, gradients)
