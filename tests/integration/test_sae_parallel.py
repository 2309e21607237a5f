"""Training on several processes (gloo) is the training on one, up to the order of sums.

Tolerance: float32 sums of a step differ in their order, by about sqrt(terms) u = 1e-6 of the largest; Adam without a
first moment divides a gradient by its own size, so that elements near 0 turn such a difference into a step of another
sign, a learning rate each. After 20 steps of at most 3e-3 figures agree within 2e-3 and parameters within 1e-2 of their
norm; a missing sum, a local instead of a global TopK, or a mean over the wrong number of tokens is far outside.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.integration.sae_parallel import KINDS, train
from trimtab.results import from_json
from trimtab.results.sae import SAERun, SAEStepLine

FIGURES, WEIGHTS = 2e-3, 1e-2
FIRST = 2e-6
"""Of the first step, before anything has moved: the order of sums alone."""


def launch(processes: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run the jobs in so many processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    environment |= {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.sae_parallel", str(folder), json.dumps(jobs)],
            cwd=Path(__file__).parents[2],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    failed = [f"rank {rank}: {one.communicate(timeout=300)[1][-2000:]}" for rank, one in enumerate(running)]
    assert not any(one.returncode for one in running), "\n".join(failed)


def lines(folder: Path) -> list[SAEStepLine]:
    return [from_json(SAEStepLine, line) for line in (folder / "sae" / "steps.jsonl").read_text().splitlines()]


def assert_same_training(found: Path, expected: Path) -> None:
    mine, other = lines(found), lines(expected)
    assert len(mine) == len(other)
    for one, wanted in zip(mine, other, strict=True):
        tolerance = FIRST if one.step == 1 else FIGURES
        for name in ("loss", "recon", "l0", "sparsity", "aux", "grad_norm", "coefficient", "dead"):
            assert getattr(one, name) == pytest.approx(getattr(wanted, name), rel=tolerance, abs=tolerance), (
                f"{name} at step {one.step}"
            )
    for name, value in other[-1].statistics.items():
        if "mean" not in name and "grad" not in name:
            assert mine[-1].statistics[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name
    told = [from_json(SAERun, (one / "run.json").read_text()).warnings for one in (found, expected)]
    assert [(one.rule, one.step) for one in told[0]] == [(one.rule, one.step) for one in told[1]]
    weights = [safetensors.torch.load_file(one / "sae" / "sae_weights.safetensors") for one in (found, expected)]
    for name, value in weights[1].items():
        assert weights[0][name].shape == value.shape
        assert float((weights[0][name] - value).norm()) <= WEIGHTS * float(value.norm()) + 1e-6, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        train(kind, folder / kind, 1)
    return folder


FEW = ("jumprelu", "jumprelu-step", "topk", "batchtopk", "matryoshka-jumprelu")
SHARDED = ("jumprelu", "topk", "batchtopk")


def jobs(kinds: Iterable[str], layouts: list[int]) -> list[dict[str, Any]]:
    return [{"kind": kind, "name": f"{kind}-{latents}", "latents": latents} for kind in kinds for latents in layouts]


def sharded(kinds: Iterable[str], latents: int = 1) -> list[dict[str, Any]]:
    """Trainings of which every process of the tokens keeps a part of the parameters."""
    settings = {"shard_parameters": True}
    return [
        {"kind": kind, "name": f"{kind}-{latents}-sharded", "latents": latents, "settings": settings} for kind in kinds
    ]


def look(name: str, *, latents: int = 1, shard: bool = False, states: Iterable[str] = ()) -> dict[str, Any]:
    """What every process says of itself."""
    return {"name": name, "latents": latents, "shard": shard, "states": [*states]}


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(one.read_text()) for one in sorted(folder.glob(f"{name}-*.json"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kinds in two processes, that share tokens and that share latents; then some that stop and go on."""
    folder = tmp_path_factory.mktemp("two")
    resumed = [
        {"kind": "jumprelu", "name": "resumed", "latents": 2, "settings": {"early_exit": 10}},
        {"kind": "jumprelu", "name": "resumed", "latents": 1},
    ]
    early = {"shard_parameters": True, "early_exit": 10}
    resumed += [
        {"kind": "jumprelu", "name": "resumed-sharded", "latents": 1, "settings": early},
        {"kind": "jumprelu", "name": "resumed-sharded", "latents": 1, "settings": {"shard_parameters": True}},
        {"kind": "jumprelu", "name": "resumed-otherwise", "latents": 1, "settings": early},
        {"kind": "jumprelu", "name": "resumed-otherwise", "latents": 2},
    ]
    low = [
        {
            "kind": "jumprelu",
            "name": f"{dtype}-{shard}",
            "latents": 1,
            "settings": {"lower_dtype": dtype, "shard_parameters": shard},
        }
        for dtype in ("bf16", "fp16")
        for shard in (False, True)
    ]
    states = ["jumprelu-1", "jumprelu-2", "jumprelu-1-sharded"]
    looks = [look("replicated", states=states), look("sharded", shard=True, states=states)]
    launch(2, folder, [*jobs(FEW, [1, 2]), *sharded(SHARDED), *resumed, *low, *looks])
    return folder


@pytest.mark.parametrize("latents", [1, 2], ids=["tokens", "latents"])
@pytest.mark.parametrize("kind", FEW)
def test_two_processes_train_as_one(kind: str, latents: int, alone: Path, two: Path) -> None:
    assert_same_training(two / f"{kind}-{latents}", alone / kind)


def test_a_run_goes_on_with_its_processes_arranged_otherwise(alone: Path, two: Path) -> None:
    run = from_json(SAERun, (two / "resumed" / "run.json").read_text())
    assert (run.resumed, run.processes, run.steps) == (1, 2, 20)
    found, expected = lines(two / "resumed"), lines(alone / "jumprelu")
    for one, wanted in zip(found, expected, strict=True):
        assert one.recon == pytest.approx(wanted.recon, rel=FIGURES), one.step


def test_processes_that_share_tokens_alone_take_the_compiled_passes_where_rows_do_not_meet(two: Path) -> None:
    """BatchTopK and dead latents look at the whole batch; at the first step no latent is dead."""
    taken = {"jumprelu 10000000": 2, "topk 10000000": 2, "topk 1": 1, "batchtopk 10000000": 0}
    assert [one["fast"] for one in seen(two, "replicated")] == [taken, taken]


@pytest.mark.parametrize("kind", SHARDED)
def test_processes_that_share_the_parameters_train_as_one(kind: str, alone: Path, two: Path) -> None:
    assert_same_training(two / f"{kind}-1-sharded", alone / kind)
    run, one = (
        from_json(SAERun, (path / "run.json").read_text()) for path in (two / f"{kind}-1-sharded", alone / kind)
    )
    assert (run.processes, run.notes) == (2, one.notes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_low_precision_too_shared_parameters_change_nothing(dtype: str, two: Path) -> None:
    """Both round the same halves of a batch; only the length of a gradient is summed in another order.

    The first ten steps: later a rounding to float16 may carry a latent over its threshold.
    """
    shared, whole = lines(two / f"{dtype}-True")[:10], lines(two / f"{dtype}-False")[:10]
    for one, wanted in zip(shared, whole, strict=True):
        for name in ("loss", "recon", "l0", "grad_norm"):
            assert getattr(one, name) == pytest.approx(getattr(wanted, name), rel=1e-4), f"{name} at step {one.step}"
    assert shared[-1].recon < 0.5 * shared[0].recon


def test_each_process_keeps_its_part_of_masters_and_moments(two: Path) -> None:
    """Adam with a first moment: three times the parameters; beside them counters, a batch and nothing whole."""
    whole = 4 * 3 * (2 * 64 * 2048 + 2 * 2048 + 64)
    replicated, parts = seen(two, "replicated"), seen(two, "sharded")
    assert [one["held"]["kept"] for one in replicated] == [whole, whole]
    assert [one["held"]["kept"] for one in parts] == [whole // 2, whole // 2]
    counters = 8 * 2048
    assert all(one["held"]["alive"] < whole // 2 + 4 * counters for one in parts), parts
    assert all(one["held"]["alive"] > whole for one in replicated), replicated  # what is counted is all there is


def test_weights_are_gathered_in_the_compute_dtype_and_their_gradients_averaged_in_float32(two: Path) -> None:
    """Each process's gradients are rounded once to bfloat16, by its own product; their mean is not."""
    for one in seen(two, "sharded"):
        assert one["gathered"] == {
            "W_enc": "(50, 16) torch.bfloat16",
            "W_dec": "(50, 16) torch.bfloat16",
            "b_enc": "(50,) torch.float32",
            "b_dec": "(16,) torch.float32",
            "threshold": "(50,) torch.float32",
        }
        assert one["gradients"] == dict.fromkeys([*one["gathered"], "reduced wide"], True)


def test_a_state_has_the_same_bits_however_processes_share_it(alone: Path, two: Path) -> None:
    for one in ("replicated", "sharded"):
        writes, helps = seen(two, one)
        states = [name for name in writes if name.startswith("state")]
        assert len(states) == 3
        for name in states:
            assert all(writes[name].values()), (one, name, writes[name])
            assert {*writes[name]} >= {"parameter.W_enc", "second.W_dec", "second.b_dec", "silent", "generator"}
            assert helps[name] == {"keeps nothing": True}
    checkpoints = [max((one / "checkpoints").iterdir()) for one in (two / "jumprelu-1-sharded", alone / "jumprelu")]
    shapes = [{name: value.shape for name, value in safetensors.torch.load_file(one).items()} for one in checkpoints]
    assert shapes[0] == shapes[1]


def test_a_run_of_shared_parameters_goes_on_to_the_bit_and_with_processes_arranged_otherwise(
    alone: Path, two: Path
) -> None:
    found, whole = lines(two / "resumed-sharded"), lines(two / "jumprelu-1-sharded")
    assert [(one.loss, one.l0, one.grad_norm) for one in found] == [(one.loss, one.l0, one.grad_norm) for one in whole]
    weights = [
        (two / name / "sae" / "sae_weights.safetensors").read_bytes()
        for name in ("resumed-sharded", "jumprelu-1-sharded")
    ]
    assert weights[0] == weights[1]
    assert_same_training(two / "resumed-otherwise", alone / "jumprelu")


def test_the_command_prints_one_document_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """As torchrun starts it; the figures that it prints are those of both processes together."""
    words = ["synthetic:32x16:3", "--out", str(tmp_path / "run"), "--d-sae", "48", "--batch-size", "64", "--json"]
    words += ["--buffer-rows", "256", "--held-out", "64", "--steps", "3", "--skip-initial-eval", "--shard-parameters"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *("-m", "trimtab", "sae", "train", *words),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = from_json(SAERun, done.stdout)
    assert (run.processes, run.steps, run.tokens) == (2, 3, 192)


@pytest.mark.full
@pytest.mark.parametrize("latents", [1, 2], ids=["tokens", "latents"])
def test_two_processes_train_the_other_kinds_as_one(latents: int, alone: Path, tmp_path: Path) -> None:
    others = [kind for kind in KINDS if kind not in FEW]
    launch(2, tmp_path, jobs(others, [latents]))
    for kind in others:
        assert_same_training(tmp_path / f"{kind}-{latents}", alone / kind)


@pytest.mark.full
@pytest.mark.parametrize("latents", [1, 2, 4], ids=["tokens", "both", "latents"])
def test_four_processes_train_as_one(latents: int, alone: Path, tmp_path: Path) -> None:
    launch(4, tmp_path, jobs(KINDS, [latents]))
    for kind in KINDS:
        assert_same_training(tmp_path / f"{kind}-{latents}", alone / kind)


@pytest.mark.full
@pytest.mark.parametrize("latents", [1, 2], ids=["tokens", "both"])
def test_four_processes_that_share_the_parameters_train_as_one(latents: int, alone: Path, tmp_path: Path) -> None:
    looks = [look("sharded", latents=latents, shard=True, states=[f"jumprelu-{latents}-sharded"])]
    launch(4, tmp_path, [*sharded(KINDS, latents), *looks])
    for kind in KINDS:
        assert_same_training(tmp_path / f"{kind}-{latents}-sharded", alone / kind)
    whole = 4 * 3 * (2 * 64 * 2048 + 2 * 2048 + 64)
    alike = 4 * 3 * 64 * (latents - 1)  # the decoder's bias is each group of latents' own
    found = seen(tmp_path, "sharded")
    assert sum(one["held"]["kept"] for one in found) == whole + alike
    assert max(one["held"]["kept"] for one in found) <= (whole + alike) // 4
    assert all(found[0][f"state of jumprelu-{latents}-sharded"].values())
