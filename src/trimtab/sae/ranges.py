"""What a precision would do to the numbers of a training, measured before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.numerics import dtype_name
from trimtab.results import PrecisionReport
from trimtab.results.sae_evaluation import TensorRange, TensorRole
from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.learner import Learner
from trimtab.sae.precision import Precision
from trimtab.sae.scaling import Scales

_HEADROOM = 64.0
"""How much larger than in the first batches a gradient may become before it leaves the range."""


@dataclass(slots=True)
class _Seen:
    """The magnitudes of one tensor, so far."""

    role: TensorRole
    dtype: torch.dtype
    count: int = 0
    finite: int = 0
    squares: float = 0.0
    absmin: float = math.inf
    absmax: float = 0.0
    zeros: int = 0
    underflow: int = 0
    subnormal: int = 0
    overflow: int = 0

    def add(self, values: Tensor) -> None:
        values = values.detach().float()
        magnitude, rounded = values.abs(), values.to(self.dtype).float().abs()
        finite, zero = values.isfinite(), values == 0
        self.count += values.numel()
        self.finite += int(finite.sum())
        self.squares += float(torch.where(finite, values, 0).double().square().sum())
        above = magnitude[~zero]
        if above.numel():
            self.absmin = min(self.absmin, float(above.min()))
            self.absmax = max(self.absmax, float(above.max())) if not above.isnan().any() else math.nan
        self.zeros += int(zero.sum())
        self.underflow += int(((rounded == 0) & ~zero).sum())
        self.subnormal += int(((rounded > 0) & (rounded < torch.finfo(self.dtype).tiny)).sum())
        self.overflow += int((~rounded.isfinite()).sum())

    def range(self, name: str) -> TensorRange:
        share = 1 / max(self.count, 1)
        return TensorRange(
            name=name,
            role=self.role,
            dtype=dtype_name(self.dtype),
            count=self.count,
            rms=math.sqrt(self.squares / self.finite) if self.finite else 0.0,
            absmin=self.absmin if self.absmin < math.inf else 0.0,
            absmax=self.absmax,
            zeros=self.zeros * share,
            underflow=self.underflow * share,
            subnormal=self.subnormal * share,
            overflow=self.overflow * share,
        )


@dataclass(slots=True)
class _Book:
    precision: Precision
    seen: dict[str, _Seen] = field(default_factory=dict)

    def note(self, name: str, role: TensorRole, values: Tensor, dtype: torch.dtype | None = None) -> None:
        if name not in self.seen:
            self.seen[name] = _Seen(role, self.precision.compute if dtype is None else dtype)
        self.seen[name].add(values)

    def watch(self, name: str, values: Tensor) -> None:
        """Note an activation, and its gradient when that comes."""
        self.note(name, "activation", values)
        if values.requires_grad:
            hook = lambda gradient: self.note(f"grad {name}", "gradient", gradient)  # noqa: E731
            values.register_hook(hook)  # type: ignore[no-untyped-call]


def precision_report(
    learner_or_config: Learner | SAEConfig,
    batches: Iterable[Tensor],
    *,
    precision: Precision | None = None,
    scales: Scales | None = None,
    optim: OptimConfig | None = None,
) -> PrecisionReport:
    """Measure what a precision would do to the tensors of a training.

    The batches are computed in float32 under the scales; ranges are then held against the dtypes that the training
    would use, so that what is lost can be told from what is 0. Nothing moves.

    Args:
        learner_or_config: a learner as it stands, or a configuration, whose first parameters are used.
        batches: [batch, d_in] activations of mean squared length 1; a handful.
        precision: with a configuration: the precision in question; None: float32.
        scales: with a configuration: the scales in question; None: what `Scales.choose` says.
        optim: with a configuration: the optimizer, whose moments are looked at.

    Raises:
        InputError: there is no batch.
    """
    if isinstance(learner_or_config, Learner):
        subject = learner_or_config
    else:
        subject = Learner(learner_or_config, precision=precision, scales=scales, optim=optim)
    wide = subject.widened()
    book = _Book(subject.precision)
    for name, value in wide.parameters_stored().items():
        storage = torch.float32 if name == "threshold" else subject.precision.dtype
        book.note(name, "weight", value, storage)
    number, rows = 0, 0
    for batch in batches:
        number, rows = number + 1, len(batch)
        book.note("x", "input", batch.float() * subject.scales.s)
        for name, gradient in wide.compute(batch, watch=book.watch).gradients.items():
            _note_gradient(book, subject, name, gradient)
    if not number:
        raise InputError("no batch of activations was given; at least 1 was expected")
    return _report(book, subject, number, rows)


def _note_gradient(book: _Book, subject: Learner, name: str, gradient: Tensor) -> None:
    precision = book.precision
    storage = torch.float32 if name == "threshold" else precision.dtype
    product = precision.compute if name in ("W_enc", "W_dec") else storage
    book.note(f"grad {name}", "gradient", gradient, product)
    book.note(f"v {name}", "moment", gradient.square() * (1 - subject.optim.beta2), storage)


def _recommended(book: _Book, subject: Learner) -> float:
    """Return the gradient scale that leaves headroom above the largest gradient, and the largest moment."""
    if not subject.precision.narrow:
        return subject.scales.g
    room = math.inf
    for one in book.seen.values():
        if one.role == "gradient" and one.dtype == torch.float16 and one.absmax > 0:
            room = min(room, torch.finfo(torch.float16).max / _HEADROOM / one.absmax)
        if one.role == "moment" and one.dtype == torch.float16 and one.absmax > 0:
            steady = one.absmax / (1 - subject.optim.beta2)  # what v comes to when gradients stay as they are
            room = min(room, math.sqrt(torch.finfo(torch.float16).max / _HEADROOM / steady))
    return subject.scales.g if math.isinf(room) else float(subject.scales.g * 2.0 ** math.floor(math.log2(room)))


def _report(book: _Book, subject: Learner, number: int, rows: int) -> PrecisionReport:
    config, scales = subject.config, subject.scales
    tensors = tuple(one.range(name) for name, one in book.seen.items())
    problems = [f"{one.name} overflows {one.dtype} ({one.overflow:.3g} of it)" for one in tensors if one.overflow]
    problems += [
        f"{one.name} is 0 everywhere"
        for one in tensors
        if one.name.removeprefix("grad ") in subject.parameters_stored()
        and one.role == "gradient"
        and one.zeros + one.underflow == 1
    ]
    warnings = [
        f"{one.name}: {one.underflow:.1%} of it rounds to 0 in {one.dtype}" for one in tensors if one.underflow > 0.01
    ]
    warnings += [
        f"{name}: a step of the peak rate {subject.optim.lr:g} rounds to nothing in {share:.1%} of it"
        for name, share in subject.too_small().items()
        if share > 0.01
    ]
    return PrecisionReport(
        passed=not problems,
        reason="; ".join(problems) or "every tensor is in range and every parameter has a gradient",
        architecture=config.architecture,
        d_in=config.d_in,
        d_sae=config.d_sae,
        d_out=config.output,
        dtype=dtype_name(subject.precision.dtype),
        compute=dtype_name(subject.precision.compute),
        batches=number,
        batch_size=rows,
        scales={"s": scales.s, "b_e": scales.b_e, "b_d": scales.b_d, "c": scales.c, "g": scales.g},
        recommended_g=_recommended(book, subject),
        tensors=tensors,
        warnings=tuple(warnings),
    )
