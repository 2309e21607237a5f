"""Tokens that a mixture sends to the ranks of its experts, compared by what they are, not by where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.compare import compare
from trimtab.results.comparison import Comparison
from trimtab.trace import TraceWriter

TOKENS, EXPERTS, TOP, WIDTH = 24, 4, 2, 8
DIMS = "t[ep:dispatched] h"


class Mixture:
    """A routed batch: which expert gets which token, and what it makes of it."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(TOKENS, WIDTH, generator=generator)
        self.weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
        self.chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(TOKENS)])

    def rows(self, experts: range, order: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [rows, 2] and outputs [rows, WIDTH] of some experts, each expert's tokens in an order of its own."""
        ids, out = [], []
        for expert in experts:
            mine = torch.nonzero((self.chosen == expert).any(dim=1)).flatten()
            mine = mine[torch.from_numpy(order.permutation(len(mine)))]
            ids.append(torch.stack([mine, torch.full_like(mine, expert)], dim=1))
            out.append(torch.stack([self.hidden[token] @ self.weights[expert] for token in mine]))
        return torch.cat(ids), torch.cat(out)


def write(
    path: Path,
    mixture: Mixture,
    ranks: int,
    *,
    scale: dict[int, float] | None = None,
    ids: bool = True,
    layers: int = 1,
) -> Path:
    """Write what every rank holds; a rank's experts may make a mistake."""
    order = np.random.default_rng(ranks)
    each = EXPERTS // ranks
    for rank in range(ranks):
        with TraceWriter(path, provenance={}, rank=rank) as writer:
            for layer in range(layers):
                names, out = mixture.rows(range(rank * each, (rank + 1) * each), order)
                if ids:
                    writer.write("dispatched_ids", names, dims="t[ep:dispatched] k", layer=layer, ep_rank=rank)
                factor = (scale or {}).get(rank, 1.0)
                writer.write("experts", out * factor, dims=DIMS, layer=layer, ep_rank=rank)
    return path


def reasons(result: Comparison) -> str:
    return " | ".join(entry.reason for entry in result.ledger.entries)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_are_ordered_by_id(tmp_path: Path, ranks: int) -> None:
    """The ranks hold them in other orders, and other numbers of them; each layer has its own."""
    mixture = Mixture()
    one = write(tmp_path / "one", mixture, 1, layers=2)
    many = write(tmp_path / f"many{ranks}", mixture, ranks, layers=2) if ranks > 1 else None
    result = compare(one, many or write(tmp_path / "again", mixture, 1, layers=2))
    assert result.passed and len(result.records) == 4, result.reason + reasons(result)
    assert not result.ledger.entries
    record = result.records[-1]
    assert record.metrics is None or (record.metrics.max_abs < 1e-5 and record.metrics.numel == TOKENS * TOP * WIDTH)


def test_a_mistake_of_one_rank_is_found_there(tmp_path: Path) -> None:
    mixture = Mixture()
    many = write(tmp_path / "many", mixture, 4, scale={2: 1.05})
    result = compare(write(tmp_path / "one", mixture, 1), many)
    (bad,) = result.failing()
    assert bad.key.name == "experts" and bad.ranks == (2,)
    assert {one.ranks for one in bad.shards if one.share > 0.9} == {(2,)}


def test_a_token_that_went_elsewhere_is_said_and_the_others_are_compared(tmp_path: Path) -> None:
    mixture, other = Mixture(), Mixture()
    gone = int(other.chosen[5, 0])
    other.chosen[5, 0] = next(one for one in range(EXPERTS) if one not in other.chosen[5])
    result = compare(write(tmp_path / "one", mixture, 1), write(tmp_path / "two", other, 2))
    assert not result.passed and not result.failing()
    assert f"id [5, {gone}]" in reasons(result) and f"id [5, {int(other.chosen[5, 0])}]" in reasons(result)
    record = next(one for one in result.records if one.key.name == "experts")
    assert record.status == "passed" and record.metrics is not None
    assert record.metrics.numel == (TOKENS * TOP - 1) * WIDTH


def test_without_ids_nothing_is_guessed(tmp_path: Path) -> None:
    mixture = Mixture()
    result = compare(write(tmp_path / "one", mixture, 1, ids=False), write(tmp_path / "two", mixture, 2, ids=False))
    assert not result.passed and not result.records
    assert "record dispatched_ids of the same layer on both sides" in reasons(result)


def test_ids_that_do_not_tell_rows_apart_are_refused(tmp_path: Path) -> None:
    def make(name: str, ranks: int) -> Path:
        for rank in range(ranks):
            with TraceWriter(tmp_path / name, provenance={}, rank=rank) as writer:
                rows = torch.arange(8).view(ranks, -1)[rank]
                writer.write("dispatched_ids", rows // 2, dims="t[ep:dispatched]", ep_rank=rank)
                writer.write("experts", rows[:, None] * torch.ones(3), dims=DIMS, ep_rank=rank)
        return tmp_path / name

    result = compare(make("one", 1), make("two", 2))
    assert "dispatched_ids do not tell rows apart: [0] is on 2 rows of the reference" in reasons(result)


def test_ids_of_other_rows_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with TraceWriter(tmp_path / name, provenance={}) as writer:
            writer.write("dispatched_ids", torch.arange(5), dims="t[ep:dispatched]")
            writer.write("experts", torch.randn(6, 3), dims=DIMS)
    assert "6 rows need integer ids" in reasons(compare(tmp_path / "one", tmp_path / "two"))
