"""`trimtab sae train`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, LineOutput, run
from trimtab.cli._options import Dtype, Engine, given
from trimtab.sae.train.config import SAESettings, TrainConfig
from trimtab.sae.train.config import given as changed

_DATA_DEFAULTS: dict[str, Any] = {
    "batch_size": 4096,
    "buffer_rows": 65536,
    "held_out": 8192,
    "storage": "bfloat16",
    "prefetch": 2,
    "special": True,
    "tokens": (),
    "max_norm": 10.0,
    "context_size": 128,
    "model_batch": 16,
    "column": "text",
    "model": "testbed",
    "backend": "hf",
    "model_dtype": "float32",
}


@Parameter(name="*", group="Data")
@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """How activations become batches."""

    batch_size: int = 4096
    """Tokens of a training step."""
    buffer_rows: int = 65536
    """Tokens that are shuffled together; they bound the memory."""
    held_out: int = 8192
    """The first tokens, kept for evaluation."""
    storage: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What activations wait in."""
    prefetch: int = 2
    """Chunks that a thread keeps ready; 0: none."""
    keep_special: Annotated[bool, Parameter(negative="")] = False
    """Train on the tokens that begin or pad a text too."""
    drop_token: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = ()
    """Ids of tokens to leave out."""
    max_norm: float = 10.0
    """Leave out rows longer than so many times the median length; 0 keeps them."""

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the call."""
        names = ("batch_size", "buffer_rows", "held_out", "storage", "prefetch")
        found = {name: getattr(self, name) for name in names}
        return found | {
            "special": not self.keep_special,
            "tokens": tuple(self.drop_token),
            "max_norm": self.max_norm or None,
        }


def train(
    data: str = "testbed",
    /,
    *,
    out: Path,
    site: Annotated[tuple[str, ...], Parameter(alias="-s", negative="", consume_multiple=True)] = (),
    target: str = "",
    saes: SAESettings = SAESettings(),
    config: TrainConfig = TrainConfig(),
    stream: Data = Data(),
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    backend: str = "hf",
    model_dtype: Dtype = "float32",
    device: str | None = None,
    context_size: int = 128,
    model_batch: int = 16,
    column: str = "text",
    engine: Engine = Engine(),
    output: LineOutput = LineOutput(),
) -> int:
    """Train autoencoders or transcoders on the activations of a model, a trace or a synthetic dictionary.

    All SAEs of a call learn from one stream: the sites times the widths times the seeds that are given. The same call
    goes on where it was stopped.

    Args:
        data: a .txt, .jsonl or .parquet file, a directory that datasets saved, datasets:NAME[:SPLIT], testbed[:N], the
            directory of a trace, or synthetic:FxD[:ACTIVE] (F features in D dimensions).
        out: directory of the run.
        site: patterns of the inputs, such as layers.4.mlp_out; synthetic data need none.
        target: reconstruct this site instead of the input: a transcoder.
        model: a directory, a hub id, or "testbed" for the embedded model.
        backend: who runs it: hf, mock or vllm.
        model_dtype: the model's dtype.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        context_size: tokens of a context of the model.
        model_batch: contexts that run together.
        column: of the texts, in files and data sets.
    """
    options = stream.kwargs() | {
        "context_size": context_size,
        "model_batch": model_batch,
        "column": column,
        "model": model,
        "backend": backend,
        "model_dtype": model_dtype,
    }
    kwargs = given(out=out, sites=tuple(site), target=target or None, device=device) | engine.kwargs()
    kwargs |= {name: value for name, value in options.items() if value != _DATA_DEFAULTS[name]}
    kwargs |= changed(saes) | changed(config)
    call = Call(function="trimtab.sae.train", args=(data,), kwargs=kwargs)
    with _shown_once():
        return run(call, output, stream="on_line", show=_table)


@contextmanager
def _shown_once() -> Iterator[None]:
    """Print in the first of torchrun's processes alone: every one of them knows the same."""
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _table(made: Any) -> str:
    head = ("sae", "site", "latents", "loss", "recon", "L0", "FVU held out", "dead")
    rows = [head]
    for one in made.saes:
        last, check = one.last, one.checks[-1] if one.checks else None
        figures = (None,) * 3 if last is None else (last.loss, last.recon, last.l0)
        held = (None, None) if check is None else (check.fvu, check.dead)
        site = one.site + (f" -> {one.target}" if one.target else "")
        rows.append((one.name, site, str(one.d_sae), *map(_number, (*figures, *held))))
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    state = "passed" if made.passed else "not passed"
    lines = [f"{state}: {made.reason}; {made.tokens} tokens, {made.tokens_per_second:,.0f} a second; {made.path}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    warnings = [f"{one.level}: {one.sae} step {one.step}: {one.rule}: {one.text}" for one in made.warnings]
    notes = [f"note: {note}" for note in made.notes]
    return "\n".join([*lines, *([""] if warnings or notes else []), *warnings, *notes])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
