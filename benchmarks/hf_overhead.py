"""Claims about the Hugging Face backend: what capturing and steering cost beside the plainest way to do the same.

The model is a random Qwen3 of 6 blocks, width 384 (a decode step of a few milliseconds, so that overheads show), in
float32 on the CPU; 4 prompts of 32 tokens, 26 generated tokens each, greedy, no end token. Capturing is compared with
`model.generate(..., output_hidden_states=True)`, steering with a bare forward hook in the same generation loop.

`--prefill` prints what one op costs on the activation of a large prefill, beside the addition of a bare hook; the same
table stands in the notes of `one_add_at_one_site`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from _claims import Measured, main, overhead, summary
from safetensors.torch import save_file

from trimtab.backends import Capture, Request, open_backend
from trimtab.steering import Ablate, Add, Cap, Op, Rows, Steering
from trimtab.trace import NullWriter, TraceWriter

LAYERS, WIDTH, VOCABULARY = 6, 384, 512
BATCH, PROMPT, NEW = 4, 32, 26
SITE = f"layers.{LAYERS // 2}.resid_post"


def make_model(width: int = WIDTH) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def prompts(count: int = BATCH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count, PROMPT), generator=torch.Generator().manual_seed(1))


def requests(ids: torch.Tensor, new: int = NEW, steering: Steering | None = None) -> list[Request]:
    return [
        Request(prompt=tuple(row), id=f"r{index}", prompt_index=index, max_new_tokens=new, steering=steering)
        for index, row in enumerate(ids.tolist())
    ]


def plain_hidden_states(model: Any, ids: torch.Tensor, new: int = NEW) -> list[torch.Tensor]:
    """Generate the usual way and return one [batch, rows, width] tensor per block."""
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    return [torch.cat([step[layer + 1] for step in made.hidden_states], dim=1) for layer in range(LAYERS)]


def capture_claims(pairs: int) -> Iterator[Measured]:
    model, ids = make_model(), prompts()
    backend = open_backend("hf", model, batch_size=BATCH)
    capture, wanted = Capture(sites=("layers.*.resid_post",)), requests(ids)

    def baseline() -> object:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )

    found, control = overhead(
        lambda: backend.generate(wanted, capture=capture, writer=NullWriter()), baseline, pairs=pairs
    )
    yield Measured(name="capture_all_layers_null_writer", samples=found, control=control, notes=summary(found))

    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(10**6))

        def write() -> None:
            with TraceWriter(Path(folder) / f"run{next(number)}", kind="generation", provenance={}) as writer:
                backend.generate(wanted, capture=capture, writer=writer)

        def save() -> None:
            states = plain_hidden_states(model, ids)
            tensors = {f"layers.{layer}": one.contiguous() for layer, one in enumerate(states)}
            save_file(tensors, Path(folder) / f"plain{next(number)}.safetensors")

        found, control = overhead(write, save, pairs=pairs)
    yield Measured(name="capture_all_layers_writing", samples=found, control=control, notes=summary(found))


def add_claim(pairs: int) -> Measured:
    model, ids = make_model(), prompts()
    backend = open_backend("hf", model, batch_size=BATCH)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    steered, plain = requests(ids, steering=Steering({SITE: [Add(vector, scale=0.5)]})), requests(ids)
    shift, block = vector * 0.5, model.model.layers[LAYERS // 2]

    def bare() -> object:
        handle = block.register_forward_hook(lambda module, args, output: output + shift)
        try:
            return backend.generate(plain)
        finally:
            handle.remove()

    assert [one.token_ids for one in bare()] == [one.token_ids for one in backend.generate(steered)]  # type: ignore[attr-defined]
    found, control = overhead(lambda: backend.generate(steered), bare, pairs=pairs)
    notes = {**summary(found), "prefill": prefill_table(pairs)}
    return Measured(name="one_add_at_one_site", samples=found, control=control, notes=notes)


# -- one op on the activation of a large prefill

PREFILL = (4, 512, 4096)


def prefill_row(name: str, op: Op, positions: str, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """Return median milliseconds of `h + v` and of the op, taken in turn, and their ratio."""
    batch, length, width = PREFILL
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(batch * length, width, generator=generator).to(dtype)
    shift = torch.randn(width, generator=generator).to(dtype)
    (program,) = Steering({"embed": op}, positions=positions).resolve(num_layers=1, hidden_size=width).values()
    where = torch.arange(length).repeat(batch)

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    took = [
        (seconds(lambda: h + shift), seconds(lambda: program.apply(h, Rows(where, length // 2))))
        for _ in range(pairs + 2)
    ][2:]
    bare, steered = (1e3 * statistics.median(column) for column in zip(*took, strict=True))
    case = f"{name}, {positions}, {str(dtype).removeprefix('torch.')}"
    return {"case": case, "bare_ms": bare, "op_ms": steered, "ratio": steered / bare}


def prefill_table(pairs: int) -> list[dict[str, Any]]:
    u = torch.randn(PREFILL[-1], generator=torch.Generator().manual_seed(4))
    ops: dict[str, Op] = {"Add": Add(u, 0.5), "Cap": Cap(u, max=0.1), "Ablate": Ablate(u, 0.0)}
    return [
        prefill_row(name, op, positions, dtype, pairs)
        for dtype in (torch.bfloat16, torch.float32)
        for name, op in ops.items()
        for positions in ("all", "prompt")
    ]


# -- memory: each case in a process of its own, because a peak never falls

QUEUE = 1 << 20
TOKENS = 128
MEMORY_WIDTH = 128


def peak_megabytes() -> float:
    # not getrusage: a new process inherits the ru_maxrss of the one that started it
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def memory_case(captures: bool) -> list[float]:
    """Return the peaks after generating TOKENS and 8 * TOKENS tokens per request."""
    backend = open_backend("hf", make_model(MEMORY_WIDTH), batch_size=8)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for new in (TOKENS, 8 * TOKENS):
            wanted = requests(prompts(8), new)
            if captures:
                path = Path(folder) / str(new)
                with TraceWriter(path, kind="generation", provenance={}, queue_bytes=QUEUE, part_bytes=QUEUE) as writer:
                    backend.generate(wanted, capture=Capture(sites=("layers.*.resid_post",)), writer=writer)
            else:
                backend.generate(wanted)
            peaks.append(peak_megabytes())
    return peaks


def memory_growth() -> tuple[float, dict[str, float]]:
    command = (sys.executable, __file__, "--memory")
    # large blocks go back to the system when they are freed: the peak is that of what lives, not of a torn heap
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    running = {
        case: subprocess.Popen((*command, case), stdout=subprocess.PIPE, env=environment)
        for case in ("plain", "capture")
    }
    grown = {}
    for case, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the memory case {case} failed")
        small, large = json.loads(output)
        grown[case] = large - small
    return grown["capture"] - grown["plain"] - QUEUE / 1e6, grown


def memory_claim(repetitions: int) -> Measured:
    found = [memory_growth() for _ in range(repetitions)]
    more = 8 * 7 * TOKENS * LAYERS * MEMORY_WIDTH * 4 / 1e6
    notes = {"cases": [grown for _, grown in found], "captured_megabytes_more": more}
    return Measured(name="capture_memory_growth", samples=[value for value, _ in found], notes=notes)


def measure(quick: bool) -> Iterator[Measured]:
    torch.set_num_threads(1)
    pairs = 15 if quick else 40
    yield from capture_claims(pairs)
    yield add_claim(pairs)
    yield memory_claim(1 if quick else 3)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(1)
        print(json.dumps(memory_case(sys.argv[2] == "capture")))
    elif sys.argv[1:2] == ["--prefill"]:
        torch.set_num_threads(1)
        for row in prefill_table(15):
            print(f"{row['case']:28} bare {row['bare_ms']:7.2f} ms   op {row['op_ms']:7.2f} ms   {row['ratio']:6.2f} x")
    else:
        main(__file__, measure)
