"""One model trained in one process and shared out over real ranks: recorded, compared and triaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests.integration import parallel_training
from tests.integration.parallel_training import LAYOUTS, RANKS, STEPS
from trimtab.trace import Trace

ROOT = Path(__file__).parents[2]
FEW = ("ddp", "tp", "cp", "ep")
OTHERS = tuple(name for name in LAYOUTS if name not in FEW)
BAD = RANKS - 1
Ran = Callable[[str], Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Train in one process, and in a pair of processes that take several layouts one after the other."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        parallel_training.single(folder)
    done: set[str] = set()

    def make(name: str) -> Path:
        wanted = FEW if name in FEW else OTHERS
        if name not in done:
            launch(folder, wanted)
            done.update(wanted)
        return folder

    return make


def launch(folder: Path, layouts: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.integration.parallel_training", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), ",".join(layouts)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(one[-2000:] for one in said)


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_a_right_layout_passes_and_a_wrong_shard_is_found(name: str, ran: Ran) -> None:
    layout, folder = LAYOUTS[name], ran(name)
    reference = folder / layout.reference
    kinds = set(Trace.open(folder / f"{name}-good").index["kind"])
    assert kinds == {"value", "grad", "param", "optim"}

    good = tt.compare(reference, folder / f"{name}-good", dims=layout.dims)
    assert good.passed, good.reason
    assert good.ledger.reference.compared == good.ledger.reference.found == len(good.records)
    names = {(record.key.tensor, record.key.kind) for record in good.records}
    assert {("loss", "value"), ("head.weight", "grad"), (f"module:{layout.bug}.grad_output", "grad")} <= names
    assert max(record.key.step for record in good.records) == STEPS
    assert all(entry.waived_by == "passed on between stages" for entry in good.ledger.entries)
    assert not good.ledger.entries or name == "pp"

    bad = tt.compare(reference, folder / f"{name}-bad", dims=layout.dims)
    first = bad.first_divergence
    assert not bad.passed and first is not None
    assert first.key.tensor == f"module:{layout.bug}.output" and first.ranks == (BAD,)
    (record,) = [one for one in bad.failing() if one.key == first.key]
    assert record.ranks == (BAD,)

    found = tt.triage(reference, folder / f"{name}-bad", dims=layout.dims).divergence
    assert found is not None and (found.module_path, found.ranks) == (layout.bug, (BAD,))
