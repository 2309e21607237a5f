"""Known mistakes, recognised from a failing pair: undo the mistake and see whether the difference goes away.

Each hypothesis predicts the candidate from the reference. It is accepted when most of the squared error goes away and
what is left is either within the expected rounding or a small part of the error. The list is ordered by the share that
is explained, then from the special to the general.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.compare._patterns import find_patterns
from trimtab.compare._permuted import find_permutation, find_transpose
from trimtab.numerics.dtypes import dtype_name, unit_roundoff
from trimtab.results.comparison import Fingerprint

Neighbour = Callable[[int], Tensor | None]
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_STEPS = (-1, 1, -2, 2)
_SHARDS = (64, 32, 16, 8, 4, 2)
_COARSE = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Evidence:
    """A pair as float64 rows, and how large an error rounding explains."""

    reference: Tensor
    candidate: Tensor
    tolerance: float
    """Relative error that rounding explains at most (a few times the expected one)."""

    def explained(self, predicted: Tensor, rows: slice | None = None) -> float:
        """Share of the squared error that a prediction explains; 0 when what is left is neither rounding nor small.

        Rows count by their relative error, so that a huge one does not hide the others.
        """
        part = slice(None) if rows is None else rows
        squares, errors = self._squares
        sizes = torch.maximum(squares[part], _row_squares(predicted)).clamp_min(self.floor**2)
        before = float((errors[part] / sizes).sum())
        left = float((_row_squares(self.candidate[part] - predicted) / sizes).sum())
        if before == 0:
            return 0.0
        share = 1 - left / before
        rounding = left <= self.tolerance**2 * len(sizes)
        return share if share > 0.98 or (share > 0.5 and rounding) else 0.0

    @functools.cached_property
    def floor(self) -> float:
        """Norm below which a row counts as if it had this one."""
        return max(0.01 * math.sqrt(float(self._squares[0].mean())), 1e-300)

    @functools.cached_property
    def _squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the reference's rows and of the errors."""
        return _row_squares(self.reference), _row_squares(self.candidate - self.reference)

    def off(self, times: float) -> Tensor:
        """Mask of the rows whose relative error is over so many tolerances."""
        squares, errors = self._squares
        return errors > (times * self.tolerance) ** 2 * squares.clamp_min(self.floor**2)


def find_fingerprints(
    reference: Tensor,
    candidate: Tensor,
    *,
    tolerance: float,
    whole: bool = True,
    neighbour: Neighbour | None = None,
    limit: int = 3,
) -> tuple[Fingerprint, ...]:
    """Recognise what happened to a failing tensor.

    Args:
        reference: trusted values, any shape; the last dimension holds channels, the first tokens or rows.
        candidate: values under test, of the same shape.
        tolerance: relative error that rounding explains at most; smaller differences are never explained.
        whole: whether these are whole tensors, not a window of rows.
        neighbour: step distance -> the reference's tensor of that step (same shape), or None where there is none.
        limit: how many to return.

    Returns:
        The explanations, best first; empty when nothing known fits.
    """
    if reference.numel() == 0 or reference.shape != candidate.shape:
        return ()
    if not (reference.is_floating_point() or reference.is_complex()):
        return tuple(_integers(reference, candidate))[:limit]
    dtype = candidate.dtype
    if reference.is_complex():
        reference, candidate = torch.view_as_real(reference), torch.view_as_real(candidate)
    shape = reference.shape
    reference, candidate = (side.reshape(-1, shape[-1] if side.ndim else 1).double() for side in (reference, candidate))
    found = list(_nan_rows(reference, candidate))
    good = reference.isfinite() & candidate.isfinite()
    reference, candidate = reference.where(good, 0), candidate.where(good, 0)
    evidence = Evidence(reference, candidate, tolerance)
    if not evidence.off(1).any():
        return tuple(found)[:limit]
    for search in (_zero_rows, _scale, _signs):
        found += search(evidence)
    found += _shift(evidence, shape[-2] if whole and len(shape) > 2 else len(reference))
    found += _stale(evidence, neighbour)
    found += _coarse_rounding(evidence, dtype)
    said = [one for one in found if one.kind not in ("nan_rows", "inf_rows")]
    if not any(one.explained > 0.995 for one in said):  # what costs more would not come before it
        found += find_transpose(evidence, shape) if whole else ()
        found += find_permutation(evidence)
    for search in (_shard, _bias, _few_rows):
        found += search(evidence)
    found += find_patterns(evidence, shape if whole else reference.shape, dtype)
    order = {id(one): index for index, one in enumerate(found)}
    return tuple(sorted(found, key=lambda one: (-round(one.explained, 2), order[id(one)])))[:limit]


def _nan_rows(reference: Tensor, candidate: Tensor) -> Iterator[Fingerprint]:
    for name, test in (("nan_rows", torch.isnan), ("inf_rows", torch.isinf)):
        bad = (test(candidate) & ~test(reference)).any(dim=1)
        count = int(bad.sum())
        if count:
            what = "NaN" if name == "nan_rows" else "Inf"
            detail = f"{count} of {len(bad)} rows hold {what} in the candidate only: {_some(bad)}"
            yield Fingerprint(kind=name, detail=detail, explained=1.0, value=float(count))


def _zero_rows(evidence: Evidence) -> Iterator[Fingerprint]:
    zero = (evidence.candidate == 0).all(dim=1) & (evidence.reference != 0).any(dim=1)
    count = int(zero.sum())
    if count == 0:
        return
    predicted = evidence.reference.masked_fill(zero[:, None], 0)
    share = evidence.explained(predicted)
    if share:
        detail = f"{count} of {len(zero)} rows are zero in the candidate only: {_some(zero)}"
        yield Fingerprint(kind="zero_rows", detail=detail, explained=share, value=float(count))


def _scale(evidence: Evidence) -> Iterator[Fingerprint]:
    """One factor for the whole tensor: sign, reductions done twice or not at all, or any constant."""
    reference, candidate = evidence.reference, evidence.candidate
    square = _square(reference)
    factor = float((reference * candidate).sum()) / square if square else 0.0
    if factor == 0:
        return
    share = evidence.explained(factor * reference)
    if not share or abs(factor - 1) <= evidence.tolerance / math.sqrt(max(reference.shape[0], 1)):
        return
    left = _square(candidate - factor * reference) / (factor**2 * square)
    near = max(3 * math.sqrt(left / max(reference.shape[0], 1)), evidence.tolerance / 2, 1e-3)
    times = round(factor)
    parts = round(1 / factor)
    if abs(factor + 1) < near:
        kind, said = "sign", "the sign is flipped"
    elif 2 <= times <= 512 and abs(factor / times - 1) < near:
        kind, said = "double_reduction", f"{times} times the reference: reduced once too often over {times} ranks?"
    elif 2 <= parts <= 512 and abs(factor * parts - 1) < near:
        kind, said = (
            "missing_reduction",
            f"1/{parts} of the reference: a sum over {parts} ranks or micro-batches missing?",
        )
    else:
        kind, said = "scale", f"{factor:.6g} times the reference"
    yield Fingerprint(kind=kind, detail=said, explained=share, value=factor)


def _signs(evidence: Evidence) -> Iterator[Fingerprint]:
    """Some rows or some channels have the wrong sign, the rest agrees."""
    for dim, what in ((0, "channels"), (1, "rows")):
        product = (evidence.reference * evidence.candidate).sum(dim=dim)
        flipped = product < 0
        if not flipped.any() or flipped.all():
            continue
        factor = torch.where(flipped, -1.0, 1.0).unsqueeze(dim)
        share = evidence.explained(evidence.reference * factor.double())
        if share:
            detail = f"the sign of {int(flipped.sum())} of {len(flipped)} {what} is flipped: {_some(flipped)}"
            yield Fingerprint(kind="sign", detail=detail, explained=share, value=-1.0)


def _shift(evidence: Evidence, length: int) -> Iterator[Fingerprint]:
    """Rows moved along sequences of `length`; what comes in at the ends does not count."""
    at = torch.arange(len(evidence.reference)) % length
    for shift in _SHIFTS:
        if length < abs(shift) + 3:
            continue
        inside = (at >= shift) & (at < length + shift)
        predicted = torch.where(inside[:, None], evidence.reference.roll(shift, dims=0), evidence.candidate)
        share = evidence.explained(predicted)
        if share:
            way = "later" if shift > 0 else "earlier"
            detail = f"rows come {abs(shift)} token{'s' * (abs(shift) > 1)} {way} than in the reference"
            yield Fingerprint(kind="shift", detail=detail, explained=share, value=float(shift))
            return


def _bias(evidence: Evidence) -> Iterator[Fingerprint]:
    """One vector was added to, or left out of, every row."""
    rows = evidence.reference.shape[0]
    if rows < 4:
        return
    bias = (evidence.candidate - evidence.reference).mean(dim=0)
    share = evidence.explained(evidence.reference + bias)
    if share:
        detail = f"every row differs by one vector of norm {float(bias.norm()):.4g}: a bias missing or added twice?"
        yield Fingerprint(kind="missing_bias", detail=detail, explained=share, value=float(bias.norm()))


def _shard(evidence: Evidence) -> Iterator[Fingerprint]:
    """All of the error lies in one of 2 to 64 equal blocks of a dimension; the rest agrees."""
    for dim, what in ((1, "channels"), (0, "rows")):
        size = evidence.reference.shape[dim]
        error = (evidence.candidate - evidence.reference).square().sum(dim=1 - dim)
        norm = evidence.reference.square().sum(dim=1 - dim)
        for count in _SHARDS:
            if size % count or size // count < 2:
                continue
            blocks, norms = error.view(count, -1).sum(dim=1), norm.view(count, -1).sum(dim=1)
            worst = int(blocks.argmax())
            inside = float(blocks[worst])
            rest, rest_norm = float(blocks.sum()) - inside, float(norms.sum() - norms[worst])
            bad = inside > (4 * evidence.tolerance) ** 2 * float(norms[worst])
            filled = float((error.view(count, -1)[worst] > 0.01 * inside * count / size).double().mean()) > 0.5
            if bad and filled and rest <= max(evidence.tolerance**2 * rest_norm, 1e-6 * inside):
                width = size // count
                detail = f"only block {worst} of {count} differs: {what} {worst * width}-{(worst + 1) * width - 1}"
                share = inside / (inside + rest)
                yield Fingerprint(kind="bad_shard", detail=detail, explained=share, value=float(worst))
                break


def _few_rows(evidence: Evidence) -> Iterator[Fingerprint]:
    """At most a twentieth of the rows carries the error."""
    bad = evidence.off(4)
    count = int(bad.sum())
    if not 0 < count <= max(1, len(bad) // 20) or len(bad) < 4:
        return
    share = evidence.explained(torch.where(bad[:, None], evidence.candidate, evidence.reference))
    if share:
        detail = f"{count} of {len(bad)} rows carry the error: {_some(bad)}"
        yield Fingerprint(kind="few_rows", detail=detail, explained=min(share, 0.9), value=float(count))


def _stale(evidence: Evidence, neighbour: Neighbour | None) -> Iterator[Fingerprint]:
    for step in _STEPS if neighbour is not None else ():
        assert neighbour is not None
        other = neighbour(step)
        if other is None or other.numel() != evidence.reference.numel():
            continue
        share = evidence.explained(other.reshape(evidence.reference.shape).double())
        if share:
            detail = (
                f"equals the reference {abs(step)} step{'s' * (abs(step) > 1)} {'earlier' if step < 0 else 'later'}"
            )
            yield Fingerprint(kind="stale_step", detail=detail, explained=share, value=float(step))
            return


def _coarse_rounding(evidence: Evidence, dtype: torch.dtype) -> Iterator[Fingerprint]:
    """Every value of the candidate is one of a coarser dtype, and the error is of its size."""
    if not dtype.is_floating_point:
        return
    size = math.sqrt(_square(evidence.candidate - evidence.reference) / (_square(evidence.reference) or 1.0))
    fitting = [one for one in _COARSE if unit_roundoff(one) > unit_roundoff(dtype)]
    for coarse in sorted(fitting, key=unit_roundoff, reverse=True):  # a float8 is a bfloat16 too
        stays = _representable(evidence.candidate, coarse)
        if stays and not _representable(evidence.reference, coarse) and size < 4 * unit_roundoff(coarse):
            roundings = f"the error is {size / unit_roundoff(coarse):.2g} of its roundings"
            detail = f"every value is one of {dtype_name(coarse)}, and {roundings}"
            yield Fingerprint(kind="coarse_rounding", detail=detail, explained=1.0, value=unit_roundoff(coarse))
            return


def _representable(values: Tensor, dtype: torch.dtype) -> bool:
    return bool((values.float().to(dtype).double() == values).all())


def _integers(reference: Tensor, candidate: Tensor) -> Iterator[Fingerprint]:
    """Ids: shifted along the first dimension, off by a constant, or zero."""
    rows = reference.shape[0] if reference.ndim else 0
    for shift in _SHIFTS:
        if rows < abs(shift) + 3:
            continue
        to, start = (
            (slice(shift, None), slice(None, -shift)) if shift > 0 else (slice(None, shift), slice(-shift, None))
        )
        if torch.equal(candidate[to], reference[start]):
            yield Fingerprint(kind="shift", detail=f"ids moved by {shift}", explained=1.0, value=float(shift))
            return
    if reference.dtype == torch.bool or reference.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return
    gap = candidate.to(torch.int64) - reference.to(torch.int64)
    if gap.numel() > 1 and bool((gap == gap.flatten()[0]).all()):
        offset = int(gap.flatten()[0])
        yield Fingerprint(
            kind="offset", detail=f"every value is off by {offset:+d}", explained=1.0, value=float(offset)
        )


def _square(values: Tensor) -> float:
    return float(values.square().sum())


def _row_squares(values: Tensor) -> Tensor:
    return values.square().sum(dim=1)


def _some(mask: Tensor) -> str:
    indices = mask.nonzero().flatten()
    return ", ".join(str(int(one)) for one in indices[:6]) + (", ..." if len(indices) > 6 else "")
