"""Rollouts: every variant continues every prompt, some samples each, in batches that mix the variants."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab._base import provenance
from trimtab._base.files import FileLock
from trimtab._base.progress import Progress, progress
from trimtab.backends import Backend, Message, Prompt, Request, Sampling, open_backend
from trimtab.errors import InputError, UnfinishedError
from trimtab.evaluate import _files
from trimtab.evaluate._files import Rollout, RolloutFiles, RolloutPlan
from trimtab.evaluate.variants import (
    ScaleUnit,
    Variant,
    VectorInput,
    apply_prompt,
    buffers,
    check_variants,
    make_variants,
)
from trimtab.results.evaluation import RolloutRun

_ENGINE_CHUNK = 512
"""Outputs between two commits where an engine schedules them itself."""

PromptInput = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]


def rollouts(
    model: Any,
    prompts: Sequence[PromptInput],
    variants: Sequence[Variant] | None = None,
    *,
    out: str | Path,
    vectors: Mapping[str, VectorInput] | None = None,
    scales: Sequence[float] = (),
    unit: ScaleUnit = "token_norm",
    learned: str = "",
    prompted: str = "",
    controls: int = 0,
    layer: int | None = None,
    positions: str = "all",
    no_system: bool = False,
    samples: int = 1,
    max_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    backend: str = "hf",
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    engine: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> RolloutRun:
    """Let every variant continue every prompt, and keep the outputs in a resumable directory.

    Give `variants`, or `vectors` with `scales` and the other options of `make_variants`. Output (prompt, sample) has
    the same seed in every variant, so that variants are compared pair by pair. All variants share their batches; vLLM
    runs them as one.

    Args:
        model: a directory, a hub id, "testbed", a module, or an open backend, which stays open.
        prompts: text, token ids or messages.
        variants: the conditions, made already.
        out: directory of this run.
        vectors: name -> vector or its file.
        scales: strengths of each vector.
        unit: of the scales.
        learned: name of the vector whose norm the others are also run at.
        prompted: a system prompt for the variant `prompted`.
        controls: random directions to run beside the vectors.
        layer: 0-based layer for vectors that do not say theirs.
        positions: rows that are steered.
        no_system: drop the system messages of the prompts, except for the variant `prompted`.
        samples: outputs per prompt; more than one needs a temperature.
        max_tokens: most tokens of an output.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: seed of all samplers and controls.
        ignore_eos: go on after an end-of-sequence token.
        backend: "hf" or "vllm".
        dtype: of the model.
        device: where it runs.
        batch_size: outputs that run together; None: 8 on hf, 64 on vllm.
        engine: settings of the vLLM engine.
        resume: go on with a run of the same plan where it stopped.

    Returns:
        The state of the run's directory.

    Raises:
        InputError: settings that make no sense together.
        RecipeError: the directory holds a run with other settings.
        UnfinishedError: interrupted; what was committed is kept and is not repeated.

    Example:
        >>> run = rollouts("testbed", testbed.prompts(4), vectors={"animal": "testbed:animal"}, scales=[0.1], out="r")
    """
    listed = _prompts(prompts)
    recipe: dict[str, Any] = {"scales": tuple(scales), "learned": learned, "prompted": prompted, "controls": controls}
    _check(listed, variants, vectors, recipe, samples, max_tokens, temperature)
    options = {"dtype": dtype, "device": device, "batch_size": batch_size, "engine": dict(engine or {}) or None}
    recipe |= {"unit": unit, "layer": layer, "positions": positions, "seed": seed}
    sampled: dict[str, Any] = {
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    given = () if variants is None else check_variants(variants)
    with _opened(model, backend, options, given, positions_of=vectors or {}) as (running, chunk):
        made = make_variants(vectors or {}, running.info, **recipe) if variants is None else given
        plan = RolloutPlan(
            model=running.model_id,
            model_digest=running.info.weights_digest,
            backend=running.name,
            dtype=running.info.dtype,
            prompts=listed,
            no_system=no_system,
            ignore_eos=ignore_eos,
            chunk=chunk,
            **sampled,
        )
        for text in dict.fromkeys(apply_prompt(one, prompt, no_system=no_system) for one in made for prompt in listed):
            running.encode(text)  # all of it is refused before a directory is made
        record = provenance.collect(call={"function": "evaluate.rollouts"}, backend=running.provenance())
        files = _files.create(Path(out), plan, made, record, resume=resume)
        with FileLock(files.path / "rollouts.lock"), progress("rollouts", files.expected) as bar:
            try:
                _run(files, running, bar)
            except KeyboardInterrupt as error:
                raise UnfinishedError(f"{files.path} was interrupted; go on with the same command again") from error
    return files.state()


def output_seed(seed: int, prompt: int, sample: int) -> int:
    """Return the seed of one output's sampler: of the run, the prompt and the sample, and of no variant."""
    text = f"{seed}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _check(
    prompts: Sequence[Prompt],
    variants: Sequence[Variant] | None,
    vectors: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
    samples: int,
    max_tokens: int,
    temperature: float,
) -> None:
    if not prompts:
        raise InputError("rollouts need prompts; at least one was expected")
    if variants is not None and vectors:
        raise InputError("give variants, or vectors and their scales, not both")
    idle = [name for name, value in recipe.items() if value]
    if variants is not None and idle:
        raise InputError(f"{', '.join(idle)} would do nothing to variants that are made already; give vectors instead")
    if samples < 1 or max_tokens < 1:
        raise InputError(f"samples is {samples} and max_tokens {max_tokens}; at least 1 of each was expected")
    if samples > 1 and temperature == 0:
        raise InputError(f"{samples} samples at temperature 0 are {samples} times the same; give a temperature above 0")
    if not math.isfinite(temperature):
        raise InputError(f"temperature is {temperature}; a finite number was expected")


@contextmanager
def _opened(
    model: Any, name: str, options: Mapping[str, Any], variants: Sequence[Variant], positions_of: Mapping[str, Any]
) -> Iterator[tuple[Backend, int]]:
    """Yield a backend and the number of outputs between two commits; one that was given stays open."""
    if hasattr(model, "generate") and hasattr(model, "info"):
        chunk = _ENGINE_CHUNK if model.name == "vllm" else getattr(model, "_batch_size", 8)
        yield model, int(chunk)
        return
    given = {key: value for key, value in options.items() if value is not None}
    if name == "vllm":
        given |= buffers(variants) if variants else {"max_steering": 64, "sites": _sites(positions_of)}
    elif "engine" in given:
        raise InputError(f"engine settings were given for the {name} backend; they are for vllm")
    running = open_backend(name, model, **given)
    try:
        yield running, _ENGINE_CHUNK if name == "vllm" else int(given.get("batch_size", 8))
    finally:
        running.close()


def _sites(vectors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sites that vectors say they belong to; the output of every block can be steered anyway."""
    from trimtab.directions import load_direction

    found = []
    for given in vectors.values():
        if not (isinstance(given, str) and given.startswith("random:")):
            site = load_direction(given).site
            found += [str(site)] if site is not None else []
    return tuple(dict.fromkeys(found))


def _run(files: RolloutFiles, backend: Backend, bar: Progress) -> None:
    plan = files.plan
    todo = list(_order(files))
    kept = files.committed()
    if [one.key for one in kept] != [(variant.name, prompt, sample) for variant, prompt, sample in todo[: len(kept)]]:
        raise InputError(f"{files.path}: {_files.LINES} is not in the order of its plan; use another --out")
    bar.advance(len(kept))
    for start in range(len(kept), len(todo), plan.chunk):
        chunk = todo[start : start + plan.chunk]
        requests = [_request(plan, *one) for one in chunk]
        began = time.perf_counter()
        made = backend.generate(requests)
        each = (time.perf_counter() - began) / len(chunk)
        files.append(
            [
                Rollout(
                    variant=variant.name,
                    prompt=prompt,
                    sample=sample,
                    seed=output_seed(plan.seed, prompt, sample),
                    text=one.text,
                    prompt_ids=one.prompt_ids,
                    token_ids=one.token_ids,
                    stop=one.stop,
                    seconds=each,
                )
                for (variant, prompt, sample), one in zip(chunk, made, strict=True)
            ]
        )
        bar.advance(len(chunk))


def _order(files: RolloutFiles) -> Iterator[tuple[Variant, int, int]]:
    """Yield the outputs, prompts outermost: an unfinished run has as much of every variant."""
    for prompt in range(len(files.plan.prompts)):
        for sample in range(files.plan.samples):
            for variant in files.variants:
                yield variant, prompt, sample


def _request(plan: RolloutPlan, variant: Variant, prompt: int, sample: int) -> Request:
    return Request(
        prompt=apply_prompt(variant, plan.prompts[prompt], no_system=plan.no_system),
        id=f"{variant.name}/{sample}",
        prompt_index=prompt,
        steering=variant.steering,
        max_new_tokens=plan.max_tokens,
        sampling=Sampling(temperature=plan.temperature, top_p=plan.top_p, seed=output_seed(plan.seed, prompt, sample)),
        ignore_eos=plan.ignore_eos,
        logprobs=None,
    )


def _prompts(given: Iterable[PromptInput]) -> tuple[Prompt, ...]:
    if isinstance(given, str):
        raise InputError("prompts is one text; a list of prompts was expected")
    return tuple(_prompt(one) for one in given)


def _prompt(given: PromptInput) -> Prompt:
    if isinstance(given, str):
        return given
    items = tuple(given)
    if items and all(isinstance(one, Mapping) and set(one) == {"role", "content"} for one in items):
        return tuple(Message(role=one["role"], content=one["content"]) for one in items)  # type: ignore[index]
    if items and all(isinstance(one, (int, Message)) for one in items) and len({type(one) for one in items}) == 1:
        return items  # type: ignore[return-value]
    raise InputError(f"a prompt is text, token ids, or messages with the keys role and content, not {given!r:.80}")
