"""Axes of parts (query, key, value; gate, up), shared out part by part, against index lists made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.compare import compare
from trimtab.compare.dims import parse_dims
from trimtab.errors import InputError
from trimtab.results.comparison import Comparison
from trimtab.trace import TraceWriter

HEAD = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(part: torch.Tensor) -> list[torch.Tensor]:
    """The heads of a part, each [rows, HEAD]."""
    return list(part.split(HEAD, dim=-1))


def write(path: Path, dims: str | None, shares: list[torch.Tensor]) -> Path:
    for rank, share in enumerate(shares):
        with TraceWriter(path, provenance={}, rank=rank) as writer:
            writer.write("qkv", share, dims=dims, tp_rank=rank)
    return path


def against_whole(tmp_path: Path, dims: str, shares: list[torch.Tensor], whole: torch.Tensor) -> Comparison:
    """One process that has it whole against ranks."""
    return compare(write(tmp_path / "one", dims.partition("[")[0], [whole]), write(tmp_path / "many", dims, shares))


def grouped(ranks: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """What each rank holds of grouped heads: its share of q, and the k and v heads that those attend to."""
    found = []
    for rank in range(ranks):
        parts = []
        for part in (q, k, v):
            every = heads(part)
            mine = max(1, len(every) // ranks)
            first = rank * len(every) // ranks
            parts += every[first : first + mine]
        found.append(torch.cat(parts, dim=-1))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_grouped_heads_are_put_together_part_by_part(tmp_path: Path, ranks: int) -> None:
    """Eight query heads, two of key and value: on four and on eight ranks each of these is on several."""
    q, k, v = normal(5, 8 * HEAD), normal(5, 2 * HEAD, seed=1), normal(5, 2 * HEAD, seed=2)
    result = against_whole(tmp_path, "t (q:8+k:2+v:2)[tp]", grouped(ranks, q, k, v), torch.cat([q, k, v], dim=-1))
    assert result.passed, result.reason
    (record,) = result.records
    assert record.metrics is None or record.metrics.max_abs == 0
    if ranks > 1:
        assert record.shape_candidate == (5, 12 * HEAD)


def test_a_copy_of_a_head_that_differs_is_named(tmp_path: Path) -> None:
    q, k, v = normal(5, 8 * HEAD), normal(5, 2 * HEAD, seed=1), normal(5, 2 * HEAD, seed=2)
    shares = grouped(4, q, k, v)
    shares[3][2, 2 * HEAD + 1] += 0.5  # the key head that rank 2 holds as well
    result = against_whole(tmp_path, "t (q:8+k:2+v:2)[tp]", shares, torch.cat([q, k, v], dim=-1))
    (entry,) = result.ledger.entries
    assert not result.passed and entry.kind == "replica"
    assert "rank 3 (tp=3) differs from rank 2 (tp=2) in k, which both hold: 1 of 20 elements" in entry.reason
    assert result.counts["failed"] == 0  # the copy that counts is right


def test_a_wrong_share_of_a_part_is_found_on_its_rank(tmp_path: Path) -> None:
    q, k, v = normal(5, 8 * HEAD), normal(5, 2 * HEAD, seed=1), normal(5, 2 * HEAD, seed=2)
    shares = grouped(2, q, k, v)
    shares[1][:, 4 * HEAD : 5 * HEAD] *= 1.2  # its key head
    result = against_whole(tmp_path, "t (q:8+k:2+v:2)[tp]", shares, torch.cat([q, k, v], dim=-1))
    (record,) = result.records
    assert not result.passed and record.ranks == (1,)
    assert {one.index[1] // HEAD for one in record.worst_elements} == {9}  # the second of two key heads behind q


def test_equal_parts_need_no_counts(tmp_path: Path) -> None:
    gate, up = normal(5, 12), normal(5, 12, seed=1)
    shares = [torch.cat([gate[:, at : at + 4], up[:, at : at + 4]], dim=1) for at in (0, 4, 8)]
    assert against_whole(tmp_path, "t (gate+up)[tp]", shares, torch.cat([gate, up], dim=1)).passed
    wrong = compare(
        write(tmp_path / "whole", "t h", [torch.cat([gate, up], dim=1)]), write(tmp_path / "cut", "t h[tp]", shares)
    )
    assert not wrong.passed  # which consecutive shares would have made of it


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_that_keep_their_parts_together_are_put_in_order(tmp_path: Path, ranks: int) -> None:
    """Megatron's order: the query heads of a group, its key, its value; then the next group."""
    q, k, v = normal(5, 8 * HEAD), normal(5, 2 * HEAD, seed=1), normal(5, 2 * HEAD, seed=2)
    groups = [torch.cat([*heads(q)[4 * g : 4 * g + 4], heads(k)[g], heads(v)[g]], dim=-1) for g in (0, 1)]
    shares = groups if ranks == 2 else [torch.cat(groups, dim=-1)]
    dims = "t (g:2*(q:4+k+v))[tp]"
    whole = torch.cat([q, k, v], dim=-1)
    many = write(tmp_path / "megatron", dims, shares)
    for name, said in (("named", "t (q:8+k:2+v:2)"), ("silent", None)):
        result = compare(write(tmp_path / name, said, [whole]), many)
        assert result.passed and result.records[0].metrics is not None, result.reason
    assert not compare(
        write(tmp_path / "unlike", "t (q:8+k:2+v:2)", [shares[0].repeat(1, 2 // len(shares))]), many
    ).passed


@pytest.mark.parametrize(
    ("dims", "ranks", "said"),
    [
        ("t (q:8+k:3+v:3)[tp]", 2, "3 units of k in (q+k+v) cannot be shared by 2 ranks"),
        ("t (q:7+k+v)[tp]", 7, "cannot be cut into 3 equal units"),
        ("t (g:3*(q:4+k+v))[tp]", 2, "3 groups of (g:3*(q+k+v)) cannot be shared by 2 ranks"),
    ],
)
def test_counts_that_do_not_fit_cost_the_tensor(tmp_path: Path, dims: str, ranks: int, said: str) -> None:
    one = write(tmp_path / "one", "t (q+k+v)", [normal(5, 40 * ranks)])
    result = compare(one, write(tmp_path / "many", dims, [normal(5, 40, seed=rank) for rank in range(ranks)]))
    assert not result.passed and said in " ".join(entry.reason for entry in result.ledger.entries)


def test_unequal_shares_of_parts_are_refused(tmp_path: Path) -> None:
    many = write(tmp_path / "many", "t (a+b)[tp]", [normal(5, 4), normal(5, 6)])
    result = compare(write(tmp_path / "one", "t (a+b)", [normal(5, 10)]), many)
    assert not result.passed and "unequal shares of (a+b)" in result.ledger.entries[0].reason


def test_the_grammar_of_parts() -> None:
    axis = parse_dims("t ( q:8 + k:2 + v )[tp]").axes[1]
    assert axis.names == ("q+k+v",) and [part.count for part in axis.parts] == [8, 2, 1] and axis.text == "(q+k+v)"
    assert parse_dims("(g:2*(q:4+k+v))[tp]").axes[0].groups == 2
    assert not parse_dims("t (a+b)").parallel and parse_dims("t (g:2*(a+b))").parallel
    for text, said in (
        ("(q+q)[tp]", "'q' is named twice"),
        ("(q:0+k)", "a part of 0 units"),
        ("(q+k)[cp:zigzag]", "shared out in rank order"),
        ("(q+)", "is no axis"),
        ("(g*(q+k))", "is no axis"),
    ):
        with pytest.raises(InputError, match="dims") as error:
            parse_dims(text)
        assert said in str(error.value)
