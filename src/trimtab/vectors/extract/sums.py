"""What a pass keeps of a site: means, scatter, random combinations and a bounded sample. All in float64.

Nothing here grows with the number of examples. A block of rows is reduced around its own means and blocks are joined by
the update of Chan, Golub and LeVeque (1979), so that a large common offset costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.numerics import QuantileSketch

_BLOCK = 64
_NORMS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a method reads."""

    scatter: bool = False
    """The covariance within the labels."""
    pairs: bool = False
    """The second moment of the differences of pairs."""
    sample: int = 0
    """Rows (or differences of pairs) to keep, drawn evenly from all."""


class Sums:
    """The statistics of one site. Label 0 is the positive one.

    Args:
        width: D.
        needs: what to keep.
        device: where sums are made.
        seed: of the sample.
    """

    def __init__(self, width: int, needs: Needs, device: torch.device, *, seed: int = 0) -> None:
        self._device = device if device.type != "mps" else torch.device("cpu")  # mps has no float64
        self.needs = needs
        self.counts = [0, 0]
        self.means = self._zeros(2, width)
        self.scatter = self._zeros(width, width) if needs.scatter else None
        """[D, D]: sum of outer products of the deviations from the own label's mean."""
        self.pairs = 0
        self.second = self._zeros(width, width) if needs.pairs else None
        """[D, D]: sum of outer products of the differences, positive minus negative, of pairs."""
        self.combined: Tensor | None = None
        """[C, 2, D]: sum of the rows of each label under C weights an example."""
        self.weights: Tensor | None = None
        """[C, 2]: sum of the weights."""
        self.sample = torch.zeros(needs.sample, width)
        """float32: rows, or differences of pairs."""
        self.sample_labels = np.zeros(needs.sample, dtype=np.int64)
        self.seen = 0
        self._source = np.random.default_rng(seed)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._held = 0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    def add(self, rows: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Take rows [N, D] with their labels int64 [N] and their random weights float64 [N, C].

        Where pairs are asked for the rows are positive, negative, positive, negative.
        """
        self._waiting.append((rows, labels, weights))
        self._held += len(rows)
        if self._held >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Reduce what was taken."""
        if not self._waiting:
            return
        rows, labels, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._held = [], 0
        wide = rows.to(device=self._device, dtype=torch.float64)
        labels, weights = labels.to(wide.device), weights.to(wide.device)
        for label in (0, 1):
            inside = labels == label
            self._moments(label, wide[inside])
            self._combine(label, wide[inside], weights[inside])
        differences = None
        if self.second is not None:
            differences = wide[0::2] - wide[1::2]
            self.second += differences.T @ differences
            self.pairs += len(differences)
        if self.needs.sample:
            kept = wide if differences is None else differences
            self._keep(kept.float().cpu(), labels[: len(kept)].cpu().numpy())

    def _moments(self, label: int, rows: Tensor) -> None:
        count = len(rows)
        if not count:
            return
        mean = rows.mean(dim=0)
        before, total = self.counts[label], self.counts[label] + count
        delta = mean - self.means[label]
        if self.scatter is not None:
            centred = rows - mean
            self.scatter.addmm_(centred.T, centred)
            self.scatter.addr_(delta, delta, alpha=before * count / total)
        self.means[label] += delta * (count / total)
        self.counts[label] = total

    def _combine(self, label: int, rows: Tensor, weights: Tensor) -> None:
        if self.combined is None or self.weights is None:
            self.combined = self._zeros(weights.shape[1], 2, rows.shape[1])
            self.weights = self._zeros(weights.shape[1], 2)
        self.combined[:, label] += weights.T @ rows
        self.weights[:, label] += weights.sum(dim=0)

    def _keep(self, rows: Tensor, labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Reservoir sampling (Vitter's algorithm R): every row is kept with the same probability."""
        for row, label in zip(rows, labels, strict=True):
            place = self.seen if self.seen < self.needs.sample else int(self._source.integers(0, self.seen + 1))
            if place < self.needs.sample:
                self.sample[place] = row
                self.sample_labels[place] = label
            self.seen += 1

    @property
    def difference(self) -> Tensor:
        """Positive mean minus negative mean, float64 [D]."""
        found: Tensor = self.means[0] - self.means[1]
        return found

    @property
    def kept(self) -> int:
        """Rows in the sample."""
        return min(self.seen, self.needs.sample)

    @property
    def covariance(self) -> Tensor:
        """Covariance within the labels, float64 [D, D]: the scatter over its degrees of freedom."""
        assert self.scatter is not None, "the scatter was not asked for"
        found: Tensor = self.scatter / max(sum(self.counts) - 2, 1)
        return found


class Sketches:
    """Quantile sketches of the tokens of several sites, in bounded memory."""

    def __init__(self, count: int) -> None:
        self.found = [QuantileSketch() for _ in range(count)]
        self._waiting: list[Tensor] = []
        self._held = 0

    def add(self, values: Tensor) -> None:
        """Take float32 [sites, tokens]."""
        self._waiting.append(values.cpu())
        self._held += values.shape[1]
        if self._held >= _NORMS:
            self.flush()

    def flush(self) -> None:
        """Count what was taken."""
        if self._waiting:
            whole = torch.cat(self._waiting, dim=1)
            self._waiting, self._held = [], 0
            self.found = [one.merge(QuantileSketch.of(values)) for one, values in zip(self.found, whole, strict=True)]

    def quantiles(self, place: int, fractions: tuple[float, ...]) -> list[float]:
        """Return quantiles of one site, within 0.4 % of their magnitude."""
        self.flush()
        return [float(value) for value in self.found[place].quantiles(fractions)]
