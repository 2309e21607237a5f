"""Models that gloo ranks share out, against one process: DTensor, zigzag attention, experts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.compare import parallel_models
from trimtab.compare import Fixed, compare

ROOT = Path(__file__).parents[3]
# What a mistake in the weights of one rank of four (dp = 2 x tp = 2, cp = ep = 4) changes there and there only.
LOCAL = ("mlp.inner", "attention.out", "moe.weights", "moe.experts")


def launch(folder: Path, world: int, bad: int) -> Path:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.unit.compare.parallel_models", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(bad)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    said: list[bytes] = []
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):  # then all are killed, which is an end of its own
            for rank in ranks:
                said.append(rank.communicate(timeout=180)[1])
    finally:
        for rank in ranks:
            rank.kill()
    said += [rank.communicate()[1] for rank in ranks[len(said) :]]
    ends = [f"rank {i}: {one.returncode}, {said[i].decode()[-2000:]}" for i, one in enumerate(ranks)]
    assert all(one.returncode == 0 for one in ranks), "\n".join(ends)
    return folder


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_against_one_process(tmp_path: Path, world: int) -> None:
    torch.set_num_threads(1)
    one, many = parallel_models.single(tmp_path / "one"), launch(tmp_path / "many", world, world - 1)
    good = compare(one, many / "good")
    assert good.passed, good.reason
    assert len(good.records) == 15 and good.ledger.candidate.compared == 15 * world
    assert all(record.key.rank is None for record in good.records)

    wrong = compare(one, many / "bad", verdict=Fixed(rel_l2=1e-4))
    assert not wrong.passed
    failing = {(record.key.name, record.key.kind): record for record in wrong.failing()}
    for name in LOCAL:
        record = failing.get((name, "value")) or failing[name, "param"]
        assert record.ranks == (world - 1,), name
        worst = max(record.shards, key=lambda shard: shard.share)
        assert worst.ranks == (world - 1,) and worst.share > 0.999, name
    terms = failing["attention.qkv", "grad"]
    assert terms.ranks == tuple(range(world))  # a sum: every rank holds a term of every element
    if world == 4:  # the weights of the two replicas are no longer the same
        entries = [
            entry for entry in wrong.ledger.entries if entry.kind == "replica" and entry.name.startswith("mlp.up")
        ]
        assert any("rank 3 (dp=1 tp=1) differs from rank 1 (dp=0 tp=1)" in entry.reason for entry in entries)
