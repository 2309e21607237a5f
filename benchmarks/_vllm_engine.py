"""vLLM engines in processes of their own, driven over their standard inputs and outputs by lines of JSON.

`Engine` is the side of the benchmark; run as a program this file is the engine's side: it starts one, stock or with
steering, and then runs the batches it is told to, one at a time, each measured in the CPU seconds of its own process.
A batch is all that a user pays for: requests made (`client.params`), `LLM.generate`, and results brought home
(`client.collect`).

`together` runs batches of several engines by turns, an engine step each. What else runs on a shared machine slows a
program down by half for seconds or minutes: here both sides run on one core and meet the same within milliseconds. Each
step finds the caches as the other engine left them.

Freed memory stays with the process, as with tcmalloc, which vLLM advises for CPUs. With glibc's own settings a process
asks the kernel for the pages of its larger batches anew each time, or never, by the chance of what lies on its heap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRIMTAB_VLLM": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 151936,
}
SITES = "layers.*.resid_post"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One batch of requests, and what each of them carries."""

    count: int = 16
    prompt: int = 80
    new: int = 64
    steerings: int = 0
    """Distinct steerings among the requests, each at every layer; 0: requests as they are without the plugin."""
    dose: str = "counts"
    capture: str = ""
    """Site pattern to record."""
    positions: str = "generated"
    number: int = 0
    """Seed of the prompts."""


class Engine:
    """A running engine process.

    Args:
        model: "testbed" or "qwen".
        steered: with the plugin's setting, or stock.
        eager: without compilation.
    """

    def __init__(self, model: str, *, steered: bool, eager: bool = False) -> None:
        self.name = f"{model} {'steered' if steered else 'stock'} {'eager' if eager else 'compiled'}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the engine
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"model": model, "steered": steered, "eager": eager})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def wait(self) -> dict[str, Any]:
        """Return what the engine says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the engine {self.name} ended: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, line: str) -> dict[str, Any]:
        """Return what the engine answers to a line: {} where it waits for the next one."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def together(*asked: tuple[Engine, Batch]) -> list[dict[str, float]]:
    """Run batches on engines that take turns; return {"cpu": seconds, "wall": seconds} of each."""
    answers = [engine.tell(json.dumps(asdict(batch))) for engine, batch in asked]
    while not all(answers):
        for index, (engine, _) in enumerate(asked):
            answers[index] = answers[index] or engine.tell("")
    return answers


# -- the engine's side


def start(model: str, steered: bool, eager: bool, folder: Path) -> Any:
    """Return a `vllm.LLM`."""
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": eager, "seed": 0, "skip_tokenizer_init": True}
    if model == "testbed":
        from trimtab import testbed

        settings |= {"model": str(testbed.path()), "max_model_len": 256}
    else:
        (folder / "config.json").write_text(json.dumps(QWEN))
        settings |= {"model": str(folder), "max_model_len": 128, "load_format": "dummy"}
    if steered:
        settings["additional_config"] = {"trimtab": {"sites": [SITES], "max_steering": 256}}
    return LLM(**settings)


def batches(llm: Any, steered: bool) -> Callable[[Batch], Callable[[], None]]:
    """Return what prepares a batch; what that returns runs it from its requests to its results."""
    import torch
    from vllm import SamplingParams

    from trimtab.backends.vllm import attach
    from trimtab.steering import Add, Cap, Steering

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    client = attach(llm) if steered else None
    known: list[Steering] = []

    def make(count: int) -> None:
        while len(known) < count:
            generator = torch.Generator().manual_seed(len(known))
            assert client is not None
            vectors = torch.randn(2, client.info.hidden_size, generator=generator)
            known.append(Steering({SITES: [Add(vectors[0], scale=0.1), Cap(vectors[1], max=0.5)]}))

    def requests(batch: Batch) -> list[Any]:
        plain = {"temperature": 0.0, "max_tokens": batch.new, "ignore_eos": True, "detokenize": False}
        if not batch.steerings and not batch.capture:
            return [SamplingParams(**plain) for _ in range(batch.count)]
        assert client is not None
        settings: dict[str, Any] = {"dose": batch.dose, **plain}
        if batch.capture:
            settings |= {"sites": [batch.capture], "positions": batch.positions}
        return [
            client.params(known[index % batch.steerings] if batch.steerings else None, **settings)
            for index in range(batch.count)
        ]

    def prepare(batch: Batch) -> Callable[[], None]:
        make(batch.steerings)
        generator = torch.Generator().manual_seed(batch.number)
        ids = torch.randint(3, vocabulary, (batch.count, batch.prompt), generator=generator).tolist()

        def work() -> None:
            params = requests(batch)
            llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
            if client is not None and params[0].extra_args:
                client.collect(params)

        return work

    return prepare


def serve(given: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Start an engine and run batches until the input ends."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        llm = start(given["model"], given["steered"], given["eager"], Path(folder))
        prepare = batches(llm, given["steered"])
        turns = Turns(say, llm.llm_engine)
        _pin()
        say({"started": time.perf_counter() - began})
        for line in sys.stdin:
            say(turns.run(prepare(Batch(**json.loads(line)))))


def _pin() -> None:
    """Have all threads of this process run on one core, the same for every engine."""
    core = max(os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


class Turns:
    """Runs work that waits for a line of the input before it begins and before every step of an engine.

    Args:
        say: tells that it waits.
        engine: a `vllm.LLMEngine`.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None], engine: Any) -> None:
        self._say = say
        self._seconds: dict[str, float] | None = None
        step = engine.step

        def waiting() -> Any:
            self._stop()
            self._start()
            return step()

        engine.step = waiting

    def _start(self) -> None:
        if self._seconds is not None:
            self._say({})
            sys.stdin.readline()
            self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _stop(self) -> None:
        if self._seconds is not None:
            self._seconds["cpu"] += time.process_time() - self._cpu
            self._seconds["wall"] += time.perf_counter() - self._wall

    def run(self, work: Callable[[], None]) -> dict[str, float]:
        """Return the seconds that the work took without its waits: {"cpu", "wall"}."""
        self._seconds = seconds = {"cpu": 0.0, "wall": 0.0}
        self._start()
        work()
        self._stop()
        self._seconds = None
        return seconds


def main(arguments: Sequence[str]) -> None:
    """Answer on what standard output was; whatever else the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    serve(json.loads(arguments[0]), say)


if __name__ == "__main__":
    main(sys.argv[1:])
