"""What is summed up about one autoencoder while the evaluation set goes by; memory grows with latents, not tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.results.sae_evaluation import DecoderCosines, Densities, Measured
from trimtab.sae._intervals import GROUPS, Sums, ratio
from trimtab.sae._sets import Part
from trimtab.sae.model import SAE

_ELEMENTS = 1 << 25
"""Latents times rows of one piece."""
_DENSITY_EDGES = tuple(-7 + 0.25 * step for step in range(29))
_COSINE_EDGES = tuple(round(0.05 * step, 2) for step in range(21))
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_ALWAYS, _TWIN = 0.5, 0.9
_ROWS_OF_CONTRAST = 4096
"""Decoder rows that are compared with all others at most."""


class Spread:
    """The variation of what is reconstructed, for the denominator of the FVU; sums are about a shift, in float64."""

    def __init__(self) -> None:
        self.rows = torch.zeros(GROUPS, dtype=torch.float64)
        self.texts = 0
        self._shift: Tensor | None = None
        self._first = torch.zeros(0)
        self._second = torch.zeros(GROUPS, dtype=torch.float64)

    def add(self, part: Part) -> None:
        """Take the rows of one text."""
        y = part.y.double()
        self.texts += 1
        if self._shift is None:
            self._shift = y.mean(dim=0)
            self._first = torch.zeros(GROUPS, y.shape[1], dtype=torch.float64)
        group, centred = part.text % GROUPS, y - self._shift
        self.rows[group] += len(y)
        self._first[group] += centred.sum(dim=0)
        self._second[group] += centred.square().sum()

    @property
    def mean(self) -> Tensor:
        """Mean of all rows, float64 [d_out]."""
        assert self._shift is not None
        return self._shift + self._first.sum(dim=0) / self.rows.sum()

    def totals(self) -> Tensor:
        """Return `sum |y - mean|^2` of every group, with the mean of the whole set, float64 [groups].

        Raises:
            InputError: all rows are equal.
        """
        assert self._shift is not None
        moved = self.mean - self._shift
        found = self._second - 2 * (self._first @ moved) + self.rows * moved.square().sum()
        scale = float(self._second.sum()) + float(self.rows.sum()) * float(self._shift.square().sum())
        if float(found.sum()) <= 1e-14 * scale:
            raise InputError(f"all {int(self.rows.sum())} activations are equal: there is no variation to explain")
        return found.clamp_min(0.0)


class Shown(NamedTuple):
    """Where one latent fired most strongly in a text."""

    value: float
    text: int
    position: int


class Tally:
    """One autoencoder's sums.

    Args:
        sae: on the device where its products run.
        watched: latents whose strongest firings are kept.
        examples: how many of each, from different texts.
    """

    def __init__(self, sae: SAE, watched: Tensor, examples: int) -> None:
        self.sae = sae
        self._residual, self._active = Sums(), Sums()
        device, count = sae.W_enc.device, sae.d_sae
        self.fired = torch.zeros(count, dtype=torch.int64, device=device)
        self.total = torch.zeros(count, dtype=torch.float64, device=device)
        self.largest = torch.zeros(count, device=device)
        self.watched = watched
        self._best = torch.zeros(max(examples, 1), len(watched))
        self._where = torch.zeros(max(examples, 1), len(watched), 2, dtype=torch.int64)
        self._examples = examples
        self._cosine = self._length = self._squares = self._products = 0.0
        self.rows = 0

    def add(self, parts: Sequence[Part]) -> None:
        """Take the rows of some texts."""
        for piece in self._pieces(parts):
            self._add(piece)

    def _pieces(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """Put texts together, and cut long ones, so that no matrix of latents is large."""
        most = max(64, _ELEMENTS // self.sae.d_sae)
        held: list[Part] = []
        for part in parts:
            for at in range(0, len(part.x), most):
                cut = slice(at, at + most)
                piece = Part(text=part.text, x=part.x[cut], y=part.y[cut], positions=part.positions[cut])
                if held and sum(len(one.x) for one in held) + len(piece.x) > most:
                    yield held
                    held = []
                held.append(piece)
        if held:
            yield held

    def _add(self, parts: Sequence[Part]) -> None:
        device = self.sae.W_enc.device
        x = torch.cat([part.x for part in parts]).to(device)
        z = self.sae.encode(x)
        y = torch.cat([part.y for part in parts]).to(device).double()
        made = self.sae.decode(z).double()
        groups = torch.cat([torch.full((len(part.x),), part.text % GROUPS) for part in parts])
        firing = z > 0
        self._residual.add(groups, (y - made).square().sum(dim=1))
        self._active.add(groups, firing.sum(dim=1))
        # products with ones are many times faster than sums down the columns; counts of a piece are exact in float32
        ones, wide = z.new_ones(len(z), dtype=torch.float32), z.float()
        self.fired += (ones @ firing.float()).long()
        self.total += (ones @ wide).double()
        torch.maximum(self.largest, z.amax(dim=0).to(self.largest.dtype), out=self.largest)
        lengths, products = (y.norm(dim=1), made.norm(dim=1)), (y * made).sum(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        self._cosine += float((products / (lengths[0] * lengths[1]).clamp_min(tiny)).sum())
        self._length += float((lengths[1] / lengths[0].clamp_min(tiny)).sum())
        self._squares += float(lengths[1].square().sum())
        self._products += float(products.sum())
        self.rows += len(x)
        if self._examples:
            self._watch(z, parts)

    def _watch(self, z: Tensor, parts: Sequence[Part]) -> None:
        at = 0
        for part in parts:
            values, rows = z[at : at + len(part.x)][:, self.watched].cpu().float().max(dim=0)
            at += len(part.x)
            positions = torch.tensor(part.positions)[rows]
            # of a text that was cut, only its strongest firing counts
            mine = (self._where[..., 0] == part.text + 1) & (self._best > 0)
            known = mine.any(dim=0)
            slot = torch.where(known, mine.int().argmax(dim=0), self._best.argmin(dim=0))
            columns = torch.arange(len(self.watched))
            better = values > self._best[slot, columns]
            chosen = (slot[better], columns[better])
            self._best[chosen] = values[better]
            self._where[chosen] = torch.stack((torch.full_like(positions, part.text + 1), positions), dim=1)[better]

    def examples(self, column: int) -> list[Shown]:
        """Return the strongest firings of a watched latent, strongest first, each of another text."""
        found = [
            Shown(value, int(self._where[row, column, 0]) - 1, int(self._where[row, column, 1]))
            for row, value in enumerate(self._best[:, column].tolist())
            if value > 0
        ]
        return sorted(found, key=lambda one: (-one.value, one.text))

    def fvu(self, totals: Tensor, seed: int) -> Measured:
        """Return the share of the variance that is not explained."""
        return ratio(self._residual.values, totals, seed)

    def l0(self, rows: Tensor, seed: int) -> Measured:
        """Return the latents above 0 per token."""
        return ratio(self._active.values, rows, seed)

    @property
    def cosine(self) -> float:
        """Mean cosine of a row and its reconstruction; 0 where either is zero."""
        return self._cosine / self.rows

    @property
    def l2_ratio(self) -> float:
        """Mean ratio of the reconstruction's length to that of the row."""
        return self._length / self.rows

    @property
    def bias(self) -> float:
        """`E|y_hat|^2 / E<y, y_hat>`; NaN when nothing of the row is in its reconstruction."""
        return self._squares / self._products if self._products else math.nan

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fires, float64 [d_sae] on the CPU."""
        return self.fired.cpu().double() / self.rows

    def densities(self) -> Densities:
        """Return the distribution of the densities."""
        found = self.density
        alive = found[found > 0]
        edges = torch.tensor(_DENSITY_EDGES, dtype=torch.float64)
        places = torch.bucketize(alive.log10(), edges, right=True).clamp(1, len(edges) - 1) - 1
        counts = torch.bincount(places, minlength=len(edges) - 1)
        spread = torch.quantile(found, torch.tensor(_QUANTILES, dtype=torch.float64))
        dead = len(found) - len(alive)
        return Densities(
            edges=_DENSITY_EDGES,
            counts=tuple(counts.tolist()),
            quantiles={f"{share:g}": value for share, value in zip(_QUANTILES, spread.tolist(), strict=True)},
            dead=dead,
            dead_share=dead / len(found),
            dead_below=min(1.0, 3 / self.rows),
            always=int((found > _ALWAYS).sum()),
        )


def decoder_cosines(sae: SAE, seed: int) -> DecoderCosines:
    """Return the largest absolute cosine of each decoder row with another; zero rows have none."""
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    count = len(rows)
    chosen = torch.arange(count)
    if count > _ROWS_OF_CONTRAST:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:_ROWS_OF_CONTRAST]
        chosen = drawn.sort().values
    best = torch.zeros(len(chosen))
    step = max(1, _ELEMENTS // count)
    for at in range(0, len(chosen), step):
        part = chosen[at : at + step].to(rows.device)
        found = (rows[part] @ rows.T).abs_()
        found[torch.arange(len(part), device=rows.device), part] = 0.0
        best[at : at + step] = found.amax(dim=1).cpu()
    edges = torch.tensor(_COSINE_EDGES)
    places = torch.bucketize(best, edges, right=True).clamp(1, len(edges) - 1) - 1
    middle, high = torch.quantile(best.double(), torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return DecoderCosines(
        edges=_COSINE_EDGES,
        counts=tuple(torch.bincount(places, minlength=len(edges) - 1).tolist()),
        latents=len(chosen),
        median=middle,
        p95=high,
        twins=float((best > _TWIN).double().mean()),
    )
