"""Claims about training autoencoders: steps per CPU second against sae-lens and dictionary-learning, and memory.

Every system is a process of its own that begins from the same parameters on the same activations (`peers/sae`): 4096
tokens a step, 64 latents active; thresholds, bandwidth, penalty, learning rate, clipping and Adam are the same. So loss
and L0 agree, which is a claim too. Steps are interleaved, the order reversed every round; what decides is CPU seconds,
all threads, of the process that steps, and wall time stands beside it. A second process of ours in every round is the
A/A control. `make bench-peers` makes the peers' environments; without them their claims are missing.

Shares of the GEMM ceiling: 12 d_in d_sae operations per token are what dense forward and backward products cost; the
ceiling is the rate of the encoder's product alone, measured in the same process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from _claims import Measured, interval, main
from peers import home

FOLDER = Path(__file__).parent / "peers" / "sae"
SCRIPTS = {"sae_lens": "saelens.py", "dictionary_learning": "dictionary.py"}
SIZES = {512: 4096, 768: 12288}
BATCH, L0, THREADS = 4096, 64, 2
OPTIONS = {"lr": 1e-5, "bandwidth": 0.05, "l0_coefficient": 1e-3, "threads": THREADS}


class System:
    """One process that trains."""

    def __init__(self, script: str, interpreter: str) -> None:
        # Threads that wait do not spin: CPU seconds are then those of work.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(THREADS)}
        self._process = subprocess.Popen(
            [interpreter, str(FOLDER / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=FOLDER,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def make(self, d_in: int, kind: str, compute: str, **more: Any) -> int:
        """Make a trainer; returns the bytes in use before it."""
        state = {"d_in": d_in, "d_sae": SIZES[d_in], "l0": L0, "batch": BATCH}
        return int(self.ask(state=state, kind=kind, compute=compute, **OPTIONS, **more)["before"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Round:
    """Interleaved steps of several systems."""

    def __init__(self, systems: dict[str, System], d_in: int, kind: str, compute: dict[str, str]) -> None:
        before = {name: one.make(d_in, kind, compute[name]) for name, one in systems.items()}
        self._systems, self._before = systems, before
        first = {name: one.ask(steps=1) for name, one in systems.items()}  # warms up, too
        self.cpu: dict[str, list[float]] = {name: [] for name in systems}
        self.wall: dict[str, list[float]] = {name: [] for name in systems}
        self.losses = {name: list(one["losses"]) for name, one in first.items()}
        self.peak: dict[str, int] = {}

    def run(self, pairs: int) -> None:
        names = list(self._systems)
        for number in range(pairs):
            for name in names if number % 2 else reversed(names):
                answer = self._systems[name].ask(steps=1)
                self.cpu[name].append(answer["cpu"])
                self.wall[name].append(answer["wall"])
                self.losses[name] += answer["losses"]
                self.peak[name] = answer["peak"] - self._before[name]

    def ratios(self, slow: str, fast: str) -> list[float]:
        return [a / b for a, b in zip(self.cpu[slow], self.cpu[fast], strict=True)]

    def notes(self, slow: str, fast: str) -> dict[str, Any]:
        wall = [a / b for a, b in zip(self.wall[slow], self.wall[fast], strict=True)]
        found = {
            "tokens_per_cpu_second": {name: BATCH / median(one) for name, one in self.cpu.items()},
            "tokens_per_second": {name: BATCH / median(one) for name, one in self.wall.items()},
            "wall_ratio": median(wall),
        }
        if slow != "control":
            found["control_interval"] = interval(self.ratios("control", "ours"))[1:]
            if "dictionary_learning" in self.cpu:
                found["times_dictionary_learning"] = median(self.ratios("dictionary_learning", fast))
        return found

    def differences(self, one: str, other: str) -> list[float]:
        """Return the largest relative difference of loss and of L0, step by step."""
        pairs = zip(self.losses[one], self.losses[other], strict=True)
        return [max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs]


def measure(quick: bool) -> Iterator[Measured]:
    ours = {name: System("ours.py", sys.executable) for name in ("ours", "control")}
    peers = {
        name: System(script, str(home(name) / "bin" / "python"))
        for name, script in SCRIPTS.items()
        if (home(name) / ".installed").exists()
    }
    try:
        for d_in in (512,) if quick else SIZES:
            pairs = 3 if quick else (9 if d_in == 512 else 5)
            yield from jumprelu(ours, peers, d_in, pairs)
            if "sae_lens" in peers:
                systems = ours | peers
                found = Round(systems, d_in, "topk", dict.fromkeys(systems, "fp32"))
                found.run(pairs)
                notes = found.notes("sae_lens", "ours")
                notes["largest_difference"] = max(found.differences("ours", "sae_lens"))
                yield Measured(
                    name=f"sae_topk_{d_in}_vs_sae_lens", samples=found.ratios("sae_lens", "ours"), notes=notes
                )
    finally:
        for one in (*ours.values(), *peers.values()):
            one.close()


def jumprelu(ours: dict[str, System], peers: dict[str, System], d_in: int, pairs: int) -> Iterator[Measured]:
    name = f"sae_jumprelu_{d_in}"
    low = dict.fromkeys(ours, "bf16")
    for compute, label in (("fp32", "fp32"), ("bf16", "autocast")) if "sae_lens" in peers else ():
        others = {one: peers[one] for one in peers if one == "sae_lens" or compute == "fp32"}
        found = Round(ours | others, d_in, "jumprelu", low | dict.fromkeys(others, compute))
        found.run(pairs)
        notes = found.notes("sae_lens", "ours")
        yield Measured(name=f"{name}_vs_sae_lens_{label}", samples=found.ratios("sae_lens", "ours"), notes=notes)
        if compute == "fp32":
            yield Measured(name=f"{name}_same_loss_and_l0", samples=found.differences("ours", "sae_lens"))
            share = found.peak["ours"] / found.peak["sae_lens"]
            yield Measured(name=f"{name}_peak_memory", samples=[share], notes={"bytes": found.peak})
    found = Round(ours, d_in, "jumprelu", {"ours": "bf16", "control": "fp32"})
    found.run(pairs)
    notes = found.notes("control", "ours") | ceiling(ours["ours"], d_in, found.cpu["ours"])
    yield Measured(name=f"{name}_bf16_vs_own_fp32", samples=found.ratios("control", "ours"), notes=notes)


def ceiling(system: System, d_in: int, cpu: list[float]) -> dict[str, Any]:
    """Return the share of the GEMM rate that a step reaches, and where its time goes."""
    rate = system.ask(gemm="bfloat16")["flops"]
    dense = 12 * d_in * SIZES[d_in] * BATCH
    system.make(d_in, "jumprelu", "bf16", parts=True)
    system.ask(steps=1)
    gradients, update = (median(values) for values in zip(*system.ask(steps=3)["losses"], strict=True))
    return {
        "gemm_gflops_per_cpu_second": rate / 1e9,
        "share_of_gemm_ceiling": dense / median(cpu) / rate,
        "share_in_the_encoders_product": dense / 6 / rate / median(cpu),
        "share_of_wall_in_gradients": gradients / (gradients + update),
        "share_of_wall_in_update": update / (gradients + update),
    }


if __name__ == "__main__":
    main(__file__, measure)
