"""Run a model once, steered or not: print the text, or write its hidden states to a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch

from trimtab._base import provenance
from trimtab._base.progress import Progress, progress
from trimtab.backends import Backend, Capture, Generation, Message, Prompt, Request, Sampling
from trimtab.errors import ComparisonError, InputError
from trimtab.numerics import dtype_name
from trimtab.results import GeneratedLine, GeneratedText, GenerationRun
from trimtab.sites import split_patterns
from trimtab.steering import Positions, Steering
from trimtab.trace import Trace, TraceWriter
from trimtab.workflows._arguments import checked
from trimtab.workflows._fresh import removed_when_refused
from trimtab.workflows._open import open_for
from trimtab.workflows._plan import trace_plan
from trimtab.workflows._steer import SteeringInput, build_steering, describe

OnGenerated = Callable[[GeneratedLine], None]
PromptInput = str | Sequence[int] | Sequence[Mapping[str, str]] | Sequence[Message]
MODEL_OPTIONS = ("dtype", "device", "batch_size", "allow_fallback", "engine", "tokenizer")
_NOT_RECORDED = ("out", "function", "on_generated")
STEERING_FILE = "steering.safetensors"
_EDITS: dict[str, tuple[Literal["before", "after"], ...]] = {
    "after": ("after",),
    "before": ("before",),
    "both": ("before", "after"),
}


@checked
def generate(
    model: Any = "testbed",
    prompts: str | Sequence[PromptInput] = (),
    *,
    steering: SteeringInput = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    logprobs: int = 0,
    allow_unfired: bool = False,
    out: str | Path | None = None,
    on_generated: OnGenerated | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str = "hf",
    device: str | torch.device | None = None,
    batch_size: int = 8,
    allow_fallback: bool = False,
    engine: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> GenerationRun:
    """Run a model, steered or not, and return the texts.

    Args:
        model: a directory, a hub id, "testbed", or an `nn.Module` (with its `tokenizer`).
        prompts: text, token ids, or chat messages (`{"role", "content"}`); one or several.
        steering: a `Steering`, a `Steer`, or the path of a steering file.
        max_tokens: tokens to generate for each prompt.
        temperature: 0 takes the most probable token.
        seed: seed of the sampler; each prompt has its own stream.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: log-probabilities of so many most probable tokens are kept in the trace.
        allow_unfired: an op that selects no row is reported instead of refused.
        out: directory for a trace of tokens and doses; None writes none.
        on_generated: called with each generation as soon as its batch is finished.
        dtype: the model's dtype.
        backend: "hf", "mock" or "vllm".
        device: where the model runs; None takes the best there is.
        batch_size: prompts per batch.
        allow_fallback: steer a model whose family is unknown.
        engine: settings of the vLLM engine.
        tokenizer: with an `nn.Module`.

    Returns:
        Texts with their doses.

    Raises:
        InputError: no prompt, or one that is empty.
        SiteError: a site that this model does not have.
        UnfiredError: an op selected no row, unless `allow_unfired`.

    Example:
        >>> tt.generate("testbed", ["The old keeper"], steering=tt.Steer(vector="random:0", layer=2, cap=5.0))
    """
    call = _call("generate", locals())
    requests = _requests(call)
    with closing(_open(model, call)) as runner:
        spec = build_steering(steering, runner.info)
        requests = [replace(one, steering=spec) for one in requests]
        about: dict[str, Any] = {
            "model": runner.model_id,
            "backend": runner.name,
            "dtype": runner.info.dtype,
            "steering": describe(spec),
            "steering_digest": "" if spec is None or not spec.serialisable else spec.digest,
            "trace": None if out is None else str(out),
        }
        texts: list[GeneratedText] = []
        size = len(requests) if on_generated is None else max(batch_size, 1)

        def finished(made: Sequence[Generation]) -> None:
            for one in made:
                texts.append(_text(runner, one))
                if on_generated is not None:
                    on_generated(GeneratedLine(prompt_index=one.prompt_index, generated=texts[-1], **about))

        _run(
            runner, requests, out, call, capture=None, allow_unfired=allow_unfired, steering=spec, size=size,
            finished=finished,
        )  # fmt: skip
        return GenerationRun(texts=tuple(texts), **about)


@checked
def capture(
    model: Any = "testbed",
    prompts: str | Sequence[PromptInput] = (),
    *,
    sites: str | Sequence[str],
    out: str | Path,
    positions: str | Positions | Sequence[int] = "all",
    edit: Literal["after", "before", "both"] = "after",
    along: Trace | str | Path | None = None,
    steering: SteeringInput = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    logprobs: int = 0,
    allow_unfired: bool = False,
    max_bytes: int | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str = "hf",
    device: str | torch.device | None = None,
    batch_size: int = 8,
    allow_fallback: bool = False,
    engine: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Trace:
    """Run a model, steered or not, and write its hidden states, tokens and doses to a trace.

    A request of P prompt tokens and g generated ones has P + max(g - 1, 0) rows, before `positions` selects among them.

    Args:
        model: a directory, a hub id, "testbed", or an `nn.Module` (with its `tokenizer`).
        prompts: text, token ids, or chat messages; one or several. With `along` they must be those of that trace.
        sites: patterns such as "layers.*.resid_post"; one or several.
        out: directory of the trace; it must not exist.
        positions: rows to keep, in the language of positions.
        edit: hidden states after steering, before it, or both.
        along: a trace whose generated tokens are fed instead of the model's own (teacher forcing).
        steering: a `Steering`, a `Steer`, or the path of a steering file.
        max_tokens: tokens to generate for each prompt.
        temperature: 0 takes the most probable token.
        seed: seed of the sampler.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: log-probabilities of so many most probable tokens are kept.
        allow_unfired: an op that selects no row is reported instead of refused.
        max_bytes: refuse to write more than this.
        dtype: the model's dtype.
        backend: "hf", "mock" or "vllm".
        device: where the model runs; None takes the best there is.
        batch_size: prompts per batch.
        allow_fallback: steer a model whose family is unknown.
        engine: settings of the vLLM engine.
        tokenizer: with an `nn.Module`.

    Returns:
        The trace, open.

    Raises:
        InputError: no prompt, or one that is empty.
        SiteError: a site that this model does not have.
        TraceExistsError: `out` already holds a run.

    Example:
        >>> ref = tt.capture("testbed", ["The old keeper"], sites="layers.*.resid_post", out="runs/ref")
    """
    call = _call("capture", locals()) | {"positions": Positions.parse(positions)}
    requests = _requests(call)
    if max_bytes is not None and max_bytes < 1:
        raise InputError(f"max_bytes is {max_bytes}; a positive number was expected, or None for no limit")
    wanted = Capture(
        sites=tuple(split_patterns(sites)) if isinstance(sites, str) else tuple(sites),
        positions=call["positions"],
        edit=_EDITS[edit],
    )
    with closing(_open(model, call)) as runner:
        spec = build_steering(steering, runner.info)
        requests = [replace(one, steering=spec) for one in requests]
        if along is not None:
            requests = _following(along, requests, runner)
        _run(
            runner,
            requests,
            out,
            call,
            capture=wanted,
            allow_unfired=allow_unfired,
            steering=spec,
            max_bytes=max_bytes,
        )
    return Trace.open(out)


def as_prompt(given: PromptInput) -> Prompt:
    """Return a prompt as backends take it.

    Raises:
        InputError: it is empty, or neither text, token ids nor messages.
    """
    if isinstance(given, str):
        if not given.strip():
            raise InputError("a prompt is empty; give at least one word")
        return given
    items: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (None,)
    if not items:
        raise InputError("a prompt is empty; give at least one token or message")
    if all(isinstance(item, (int, Message)) for item in items) and len({type(item) for item in items}) == 1:
        return items
    if all(isinstance(item, Mapping) and set(item) == {"role", "content"} for item in items):
        return tuple(Message(role=item["role"], content=item["content"]) for item in items)
    raise InputError(
        f"a prompt is text, token ids, or messages with exactly the keys role and content, not {given!r:.80}"
    )


def _listed(prompts: str | Sequence[PromptInput]) -> list[PromptInput]:
    listed: list[PromptInput] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("no prompt was given; give at least one text, list of token ids, or list of messages")
    return listed


def _requests(call: Mapping[str, Any]) -> list[Request]:
    """Return the requests of a call, as far as they can be made without the model."""
    return [
        Request(
            id=f"prompt-{index:04d}",
            prompt=as_prompt(prompt),
            prompt_index=index,
            max_new_tokens=call["max_tokens"],
            sampling=Sampling(temperature=call["temperature"], seed=call["seed"] + index),
            ignore_eos=call["ignore_eos"],
            logprobs=call["logprobs"],
        )
        for index, prompt in enumerate(_listed(call["prompts"]))
    ]


def _call(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `rerun` needs to make this call again: the function's name and its arguments."""
    made = {"function": function, **{key: value for key, value in given.items() if key not in _NOT_RECORDED}}
    device = given["device"]
    return made | {"dtype": dtype_name(given["dtype"]), "device": None if device is None else str(device)}


def _recordable(call: Mapping[str, Any], steering: Steering | None) -> dict[str, Any] | None:
    """Return a call as plain JSON, or None when no file can hold it: a module in memory, an op that is a function."""
    if not isinstance(call["model"], (str, Path)) or call["tokenizer"] is not None:
        return None
    if steering is not None and not steering.serialisable:
        return None
    plain: dict[str, Any] = {
        key: str(value) if isinstance(value, (Path, Positions)) else value for key, value in call.items()
    }
    if isinstance(call.get("along"), Trace):
        plain["along"] = str(call["along"].path)
    plain["steering"] = None if steering is None else STEERING_FILE
    prompts = [plain["prompts"]] if isinstance(plain["prompts"], str) else plain["prompts"]
    plain["prompts"] = [_plain_prompt(prompt) for prompt in prompts]
    return plain


def _plain_prompt(prompt: PromptInput) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [asdict(item) if isinstance(item, Message) else item for item in prompt]


def _open(model: Any, call: Mapping[str, Any]) -> Backend:
    sites = call.get("sites") or ()
    patterns = split_patterns(sites) if isinstance(sites, str) else sites
    options = {key: call[key] for key in MODEL_OPTIONS}
    return open_for(call["backend"], model, options, steering=call["steering"], sites=patterns)


def _run(
    runner: Backend,
    requests: Sequence[Request],
    out: str | Path | None,
    call: Mapping[str, Any],
    *,
    capture: Capture | None,
    allow_unfired: bool,
    steering: Steering | None,
    max_bytes: int | None = None,
    size: int | None = None,
    finished: Callable[[Sequence[Generation]], None] = lambda made: None,
) -> None:
    """Run the requests, `size` at a time, calling `finished` with the results of each part."""
    step = size or len(requests)
    with progress(f"{runner.model_id} ({runner.info.dtype})", len(requests)) as bar:

        def go(writer: TraceWriter | None) -> None:
            for start in range(0, len(requests), step):
                part = requests[start : start + step]
                made = runner.generate(
                    part, capture=capture, writer=writer, allow_unfired=allow_unfired, progress=_advance(bar)
                )
                finished(made)

        if out is None:
            go(None)
            return
        record = provenance.collect(
            **runner.provenance(),
            steering=describe(steering),
            steering_digest="" if steering is None or not steering.serialisable else steering.digest,
            call=_recordable(call, steering),
        )
        plan = trace_plan(runner, requests, capture)
        with (
            removed_when_refused(out, "part-*" if capture is None else "tensors/part-*"),
            TraceWriter(out, kind="generation", plan=plan, provenance=record, max_bytes=max_bytes) as writer,
        ):
            go(writer)
        if steering is not None and steering.serialisable:
            steering.save(Path(out) / STEERING_FILE)


def _advance(bar: Progress) -> Callable[[int, int], None]:
    """Return what a backend calls with the number of its finished requests."""
    done = 0

    def advance(count: int, _total: int) -> None:
        nonlocal done
        bar.advance(count - done)
        done = count

    return advance


def _following(along: Trace | str | Path, requests: Sequence[Request], runner: Backend) -> list[Request]:
    """Return the requests with the generated tokens of a trace to follow, checking that its prompts are these."""
    trace = along if isinstance(along, Trace) else Trace.open(along)
    found = []
    for request in requests:
        rows = trace.tokens.filter(pl.col("prompt") == request.prompt_index).sort("position")
        prompt = tuple(rows.filter(~pl.col("generated"))["token_id"].to_list())
        if prompt != runner.encode(request.prompt).ids:
            raise ComparisonError(
                f"prompt {request.prompt_index} is not the one that the trace {trace.path} followed; "
                "give the same prompts in the same order"
            )
        tokens = tuple(rows.filter(pl.col("generated"))["token_id"].to_list())
        found.append(replace(request, forced_tokens=tokens, max_new_tokens=len(tokens)))
    return found


def _text(runner: Backend, made: Generation) -> GeneratedText:
    prompt = runner.tokenizer.decode(list(made.prompt_ids)) if runner.tokenizer is not None else ""
    mean = sum(made.logprobs) / len(made.logprobs) if made.logprobs else None
    return GeneratedText(
        prompt=prompt,
        text=made.text,
        token_ids=made.token_ids,
        prompt_tokens=len(made.prompt_ids),
        stop=made.stop,
        mean_logprob=mean,
        doses=made.doses,
    )
