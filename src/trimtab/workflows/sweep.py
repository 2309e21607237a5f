"""Backends x precisions x prompts under one steering, in one resumable directory."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from trimtab import testbed
from trimtab._base import provenance
from trimtab._base.files import safe_name
from trimtab._base.progress import Progress, progress
from trimtab.backends import Backend, Capture, ModelInfo, Request, Sampling
from trimtab.errors import InputError, RecipeError, UnfinishedError
from trimtab.results import SweepRun
from trimtab.sites import split_patterns
from trimtab.steering import Steering
from trimtab.trace import TraceWriter
from trimtab.workflows import _sweep_files
from trimtab.workflows._arguments import checked
from trimtab.workflows._fresh import removed_when_refused
from trimtab.workflows._open import open_for
from trimtab.workflows._plan import captured_sites, trace_plan
from trimtab.workflows._steer import SteeringInput, build_steering, describe, refuse_own_math, with_math
from trimtab.workflows._sweep_files import Pass, SweepFiles, SweepPlan
from trimtab.workflows.config import SWEEP_DEFAULTS, Steer, SweepConfig, SweepOptions
from trimtab.workflows.run import PromptInput, as_prompt

QUICK_PROMPTS, QUICK_TOKENS = 2, 8


@checked
def sweep(
    model: str | Path | None = None,
    prompts: str | Sequence[PromptInput] | None = None,
    *,
    spec: str | Path | None = None,
    steering: SteeringInput = None,
    configs: str | Sequence[str] | None = None,
    reference: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    allow_unfired: bool | None = None,
    allow_fallback: bool | None = None,
    sites: str | None = None,
    engine: Mapping[str, Any] | None = None,
    out: str | Path = "runs",
    run_id: str | None = None,
    resume: bool = True,
    quick: bool = False,
) -> SweepRun:
    """Run every configuration free and along the reference's tokens, and keep both in one directory.

    The reference runs first. Each configuration then generates freely (token agreement), and once more fed with the
    reference's tokens (drift, cap deltas, log-probabilities), with the same batches, so that only precision differs.

    Args:
        model: a directory, a hub id, or "testbed".
        prompts: text, token ids, or chat messages; one or several. None on the testbed takes its own.
        spec: a YAML file with any of these options; arguments win over it.
        steering: a `Steering`, a `Steer`, or the path of a steering file. Each configuration sets the ops' arithmetic.
        configs: presets (bf16, bf16_cap_fp32, float16, float32, float64) or `[LABEL=]BACKEND:DTYPE[:OP_MATH]`.
        reference: label of the configuration that the others are compared with.
        backend: backend of the presets; "hf,vllm" runs each preset on both.
        device: where the model runs.
        max_tokens: tokens to generate for each prompt.
        logprobs: how many most probable tokens are kept at each step.
        seed: seed of everything random.
        batch_size: prompts per batch, the same for every configuration.
        allow_unfired: an op that selects no row is reported instead of refused.
        allow_fallback: steer a model whose family is unknown, at sites found by its structure.
        sites: what the forced pass captures; drift is read from the `resid_post` of layers among it.
        engine: settings of the vLLM engine.
        out: directory of all runs.
        run_id: name of this run's directory; None makes one from the time.
        resume: go on with a run of the same name and settings, after the last batch that it committed.
        quick: two prompts and 8 tokens.

    Returns:
        The state of the run's directory.

    Raises:
        RecipeError: unknown or impossible settings, or a run of that name with other ones.
        UnfinishedError: interrupted; the batches that were committed are kept and are not repeated.
        TraceLockedError: another process runs this sweep.

    Example:
        >>> run = tt.sweep("testbed", steering=tt.Steer(vector="random:0", layer=2, cap=5.0), run_id="first")
    """
    options = {key: value for key, value in locals().items() if key in _KINDS and value is not None}
    settings = _settings(spec, options)
    name = safe_name(run_id or datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), "run id")
    plan, given = _plan(settings, quick=quick)
    call = {"function": "sweep", "quick": quick, "run_id": name}
    place = Path(out) / name
    with removed_when_refused(place, "done.json", _sweep_files.PROGRESS):
        files = _sweep_files.create(place, plan, provenance.collect(call=call), resume=resume)
        if given is not None and not files.steering_path.exists():
            given.save(files.steering_path)
        return _finish(files, given)


def resume_sweep(path: str | Path) -> SweepRun:
    """Finish the sweep in a directory, with the settings that it holds."""
    files = _sweep_files.load(path)
    return _finish(files, Steering.load(files.steering_path) if files.plan.steering_digest else None)


def _finish(files: SweepFiles, given: Steering | None) -> SweepRun:
    """Run what is left, the reference first."""
    plan = files.plan
    try:
        with files.lock(), progress("sweep", len(plan.configs) * len(_sweep_files.PASSES) * len(plan.prompts)) as bar:
            for config in sorted(plan.configs, key=lambda config: config.label != plan.reference):
                _run_config(files, config, given, bar)
    except KeyboardInterrupt as error:
        raise UnfinishedError(
            f"{files.path} was interrupted; go on with the same command again, or: "
            f"trimtab rerun {files.path} --out {files.path}"
        ) from error
    return files.state(f"trimtab analyze {files.path}")


_KINDS: dict[str, Any] = {
    "model": str,
    "prompts": str | list[str | list[int] | list[dict[str, str]]],
    **get_type_hints(SweepOptions),
    "configs": str | list[str],
    "steering": str | Steer,
    "engine": dict[str, Any],
}
"""Every option of a sweep, and what a YAML file may give for it."""


def _settings(spec: str | Path | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options: arguments win over the file, and both over the defaults."""
    said = _read_spec(Path(spec)) if spec is not None else {}
    merged = {**SWEEP_DEFAULTS.given(), **said, **arguments}
    for name in ("prompts", "configs"):
        given = merged.get(name, ())
        merged[name] = (given,) if isinstance(given, str) else tuple(given)
    merged["model"] = str(merged["model"])
    return merged


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"sweep file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"sweep file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"sweep file {path} must be a mapping of options, such as 'model: testbed'")
    unknown = sorted(set(document) - set(_KINDS))
    if unknown:
        raise RecipeError(f"sweep file {path}: unknown option {unknown[0]!r}; options: {', '.join(_KINDS)}")
    words = document.get("steering")
    if isinstance(words, dict):
        known = [one.name for one in fields(Steer)]
        unknown = sorted(set(words) - set(known))
        if unknown:
            raise RecipeError(f"sweep file {path}: unknown steering option {unknown[0]!r}; options: {', '.join(known)}")
    return {name: _checked(path, name, value) for name, value in document.items() if value is not None}


def _checked(path: Path, name: str, value: Any) -> Any:
    try:
        return TypeAdapter(_KINDS[name]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"sweep file {path}: {name} is {value!r:.80}: {first['msg']}") from error


def _plan(settings: Mapping[str, Any], *, quick: bool) -> tuple[SweepPlan, Steering | None]:
    configs = _configs(settings)
    prompts = tuple(as_prompt(one) for one in settings["prompts"])
    if not prompts and settings["model"] == "testbed":
        prompts = tuple(testbed.prompts(8, seed=settings["seed"]))
    if not prompts:
        raise InputError("a sweep needs prompts: give --prompt TEXT or --prompt-file FILE")
    if settings["max_tokens"] < 1:
        raise InputError(f"max_tokens is {settings['max_tokens']}; at least 1 token must be generated")
    if settings["logprobs"] < 0:
        raise InputError(f"logprobs is {settings['logprobs']}; 0 or a positive number was expected")
    made = {
        "prompts": prompts[:QUICK_PROMPTS] if quick else prompts,
        "configs": configs,
        "max_tokens": QUICK_TOKENS if quick else settings["max_tokens"],
        "logprobs": max(2, settings["logprobs"]),
        "engine": dict(settings.get("engine") or {}),
    }
    refuse_own_math(settings.get("steering"), 'each configuration has its own, such as "hf:bfloat16:model"')
    draft = SweepPlan(**{key: value for key, value in settings.items() if key not in ("backend", "steering")} | made)
    if draft.engine and all(config.backend != "vllm" for config in draft.configs):
        raise InputError("engine settings were given and no configuration runs on vllm: add --backend vllm")
    with closing(_open(draft, draft.config(draft.reference), settings.get("steering"))) as backend:
        info = backend.info
        given = build_steering(settings.get("steering"), info)
        digest = "" if given is None else given.digest
        _check_sites(backend, given, draft.sites)
    plan = replace(
        draft,
        steering=describe(given),
        steering_digest=digest,
        num_layers=info.num_layers,
        model_digest=info.weights_digest,
    )
    return plan, given


def _configs(settings: Mapping[str, Any]) -> tuple[SweepConfig, ...]:
    names = [name.strip() for name in settings["backend"].split(",")]
    configs = tuple(SweepConfig.parse(text, name) for name in names for text in settings["configs"])
    labels = [config.label for config in configs]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise RecipeError(
            f"two configurations are called {sorted(repeated)[0]!r}; name one with LABEL=BACKEND:DTYPE:OP_MATH"
        )
    for label in labels:
        safe_name(label, "configuration label")
    if settings["reference"] not in labels:
        raise RecipeError(
            f"the reference {settings['reference']!r} is not among the configurations {', '.join(labels)}; "
            "add it or choose one"
        )
    return configs


def _check_sites(backend: Backend, given: Steering | None, sites: str) -> None:
    """Refuse, before a directory is made, what no pass could run."""
    info = backend.info
    if given is not None:
        given.resolve(num_layers=info.num_layers, hidden_size=info.hidden_size, sites=backend.sites())
    if not any(site.point == "resid_post" for site in captured_sites(backend, split_patterns(sites))):
        raise RecipeError(f"sites is {sites!r}; analyze reads drift from resid_post: add layers.*.resid_post")


def _open(plan: SweepPlan, config: SweepConfig, steering: SteeringInput) -> Backend:
    options = {
        "dtype": config.dtype,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "allow_fallback": plan.allow_fallback or None,
        "engine": dict(plan.engine) if plan.engine and config.backend == "vllm" else None,
    }
    return open_for(config.backend, plan.model, options, steering=steering, sites=split_patterns(plan.sites))


def _run_config(files: SweepFiles, config: SweepConfig, given: Steering | None, bar: Progress) -> None:
    plan = files.plan
    left: list[Pass] = [which for which in _sweep_files.PASSES if files.done(config.label, which) is None]
    bar.advance(len(plan.prompts) * (len(_sweep_files.PASSES) - len(left)))
    if not left:
        return
    bar.describe(f"{config.label}: loading")
    with closing(_open(plan, config, given)) as backend:
        _check_model(plan, backend.info, files.path)
        steering = with_math(given, config.op_math)
        for which in left:
            bar.describe(f"{config.label}: {which}")
            _run_pass(files, config, backend, steering, which, bar)


def _run_pass(
    files: SweepFiles, config: SweepConfig, backend: Backend, steering: Steering | None, which: Pass, bar: Progress
) -> None:
    plan = files.plan
    forced = _reference_tokens(files) if which == "forced" else [None] * len(plan.prompts)
    requests = [
        Request(
            id=f"prompt-{index:04d}",
            prompt=text,
            prompt_index=index,
            steering=steering,
            max_new_tokens=plan.max_tokens if tokens is None else len(tokens),
            forced_tokens=tokens,
            sampling=Sampling(seed=plan.seed),
            logprobs=plan.logprobs,
        )
        for index, (text, tokens) in enumerate(zip(plan.prompts, forced, strict=True))
    ]
    capture = Capture(sites=tuple(split_patterns(plan.sites)), positions="response") if which == "forced" else None
    record = provenance.collect(
        model=plan.model, model_digest=plan.model_digest, config=config.label, dtype=config.dtype
    )
    done = files.committed(config.label, which)
    bar.advance(done.prompts)
    path = files.trace_path(config.label, which)
    promise = trace_plan(backend, requests, capture, config.label)
    with TraceWriter(path, kind="generation", plan=promise, provenance=record, resume=done.prompts > 0) as writer:
        for start in range(done.prompts, len(requests), plan.batch_size):
            batch = requests[start : start + plan.batch_size]
            began = time.perf_counter()
            made = backend.generate(
                batch, capture=capture, writer=writer, config=config.label, allow_unfired=plan.allow_unfired
            )
            writer.flush()
            seconds = time.perf_counter() - began
            done = done.after(len(batch), sum(len(one.token_ids) for one in made), seconds)
            files.commit(config.label, which, done)
            bar.advance(len(batch))
    files.finish(config.label, which, done)


def _reference_tokens(files: SweepFiles) -> list[tuple[int, ...] | None]:
    tokens = files.trace(files.plan.reference, "free").tokens
    generated = tokens.filter(tokens["generated"]).sort("prompt", "position")
    return [
        tuple(generated.filter(generated["prompt"] == index)["token_id"].to_list())
        for index in range(len(files.plan.prompts))
    ]


def _check_model(plan: SweepPlan, info: ModelInfo, path: Path) -> None:
    if info.weights_digest != plan.model_digest:
        raise RecipeError(
            f"the model {plan.model!r} changed since {path} was begun (weights {plan.model_digest[:12]} then, "
            f"{info.weights_digest[:12]} now); use another run id"
        )
