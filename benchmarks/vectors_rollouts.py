"""The claim about rollouts: eight variants in one batch of vLLM, against one variant after another on HF.

The model is the embedded one, in float32, on one core of the same machine; 8 variants (unsteered, a vector at six
strengths, a random control), 16 prompts each, 64 greedy tokens. HF runs all prompts of a variant as one batch, with a
prefill and a cache; vLLM runs its compiled engine with all 128 requests at once. What is compared is tokens per CPU
second of the process that makes them, both engines warm, HF and vLLM in turn; tokens per second of wall time stand
beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _claims import Measured, main, summary

PROMPTS, TOKENS = 16, 64
SCALES = (-0.6, -0.4, -0.2, 0.2, 0.4, 0.6)
SITES = ("layers.3.resid_post",)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def measure(quick: bool) -> Iterator[Measured]:
    """Measure both in processes of their own, in turn."""
    workers = {name: Worker(name, TOKENS // 2 if quick else TOKENS) for name in ("vllm", "hf")}
    try:
        for worker in workers.values():
            worker.read()
        for worker in workers.values():
            worker.run()  # warm
        found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for number in range(3 if quick else 9):
            for name in sorted(workers, reverse=bool(number % 2)):
                found[name].append(workers[name].run())
    finally:
        for worker in workers.values():
            worker.close()
    ratios = [
        (fast["tokens"] / fast["cpu"]) / (slow["tokens"] / slow["cpu"])
        for fast, slow in zip(found["vllm"], found["hf"], strict=True)
    ]
    rates = {
        f"{name}_tokens_per_{clock}_second": summary([one["tokens"] / one[clock] for one in listed])
        for name, listed in found.items()
        for clock in ("cpu", "wall")
    }
    yield Measured(name="rollouts_of_8_variants_on_vllm", samples=ratios, notes=rates)


class Worker:
    """A process that holds one backend, and runs all variants when it is asked to."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def read(self) -> dict[str, float]:
        """Return what the process says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the {self.name} process ended: {self._errors.read()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def run(self) -> dict[str, float]:
        """Return tokens, CPU seconds and wall seconds of all variants."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


# -- the worker's side


def serve(name: str, tokens: int) -> None:
    """Run all variants for each line of the input; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    work = prepare(name, tokens)

    def say(answer: dict[str, float]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        say({"tokens": made, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


def prepare(name: str, tokens: int) -> Callable[[], int]:
    """Open a backend; return what runs every variant once and counts the tokens."""
    from trimtab import testbed
    from trimtab.backends import open_backend
    from trimtab.evaluate import Variant, make_variants, rollouts

    options: dict[str, Any] = {"sites": SITES, "batch_size": 128} if name == "vllm" else {"batch_size": PROMPTS}
    backend = open_backend(name, "testbed", dtype="float32", **options)
    vectors = {"animal": "testbed:animal"}
    steered = make_variants(vectors, backend.info, scales=SCALES, controls=1)[: 2 + len(SCALES)]
    prompts = testbed.prompts(PROMPTS, seed=3)

    def run(variants: tuple[Variant, ...]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            return rollouts(backend, prompts, variants, out=out, max_tokens=tokens, ignore_eos=True).tokens

    if name == "vllm":
        return lambda: run(steered)
    return lambda: sum(run((one,)) for one in steered)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main(__file__, measure)
