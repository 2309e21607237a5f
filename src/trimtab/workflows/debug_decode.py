"""The quick check: one prompt, two precisions, step by step."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab._base.progress import Progress, progress
from trimtab.backends import Backend, Capture, Generation, Request
from trimtab.errors import InputError, SteeringError
from trimtab.numerics import dtype_name
from trimtab.results import CapStep, DecodeComparison, DecodeStep
from trimtab.sites import Site
from trimtab.steering import Steering
from trimtab.trace import Trace, TraceWriter
from trimtab.workflows._agreement import match
from trimtab.workflows._arguments import checked
from trimtab.workflows._drift import Side, cap_steps, final_edit, logprob_steps, row_metrics
from trimtab.workflows._open import open_for
from trimtab.workflows._steer import SteeringInput, build_steering, describe, refuse_own_math, with_math
from trimtab.workflows.run import as_prompt


@dataclass(frozen=True, slots=True)
class _Setting:
    """One of the two precisions."""

    label: str
    dtype: str
    math: str


@dataclass(frozen=True, slots=True)
class _Ran:
    """What one precision did: free, and along the reference's tokens."""

    setting: _Setting
    steering: Steering
    free: Generation
    names: dict[int, str]
    """Texts of the tokens that either of its runs passed, by id."""
    side: Side


@checked
def debug_decode(
    model: Any,
    prompt: str,
    *,
    steering: SteeringInput,
    compare_precision: str | None = None,
    compare_dtype: str | torch.dtype | None = None,
    max_tokens: int = 32,
    logprobs: int = 5,
    dtype: str | torch.dtype = "bfloat16",
    backend: str = "hf",
    device: str | torch.device | None = None,
    allow_fallback: bool = False,
    engine: Mapping[str, Any] | None = None,
) -> DecodeComparison:
    """Generate once in each of two precisions, then feed both the reference's tokens and compare every step.

    The reference is the side named by `compare_precision` or `compare_dtype`.

    Args:
        model: a directory, a hub id, or "testbed".
        prompt: what the model continues.
        steering: a `Steering`, a `Steer`, or the path of a steering file; one site.
        compare_precision: the reference does the op's arithmetic in this dtype (default: float32).
        compare_dtype: the reference runs the model in this dtype, with op arithmetic in float32.
        max_tokens: decode steps.
        logprobs: how many most probable tokens are compared at each step.
        dtype: the model's dtype on the side under test; its op arithmetic is the model's.
        backend: "hf", "mock" or "vllm".
        device: where the model runs.
        allow_fallback: steer a model whose family is unknown.
        engine: settings of the vLLM engine.

    Raises:
        InputError: both or an equal precision on both sides, no token, or an empty prompt.
        SteeringError: no steering, or ops at several sites.

    Example:
        >>> tt.debug_decode("testbed", "The old keeper", steering=tt.Steer(vector="random:0", layer=2, cap=5.0))
    """
    other = None if compare_dtype is None else dtype_name(compare_dtype)
    tested, reference = _settings(dtype_name(dtype), compare_precision, other)
    refuse_own_math(steering, "the two sides differ in it; compare_precision names the other side's")
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; at least 1 token must be generated")
    if logprobs < 0:
        raise InputError(f"logprobs is {logprobs}; 0 or a positive number was expected")
    request = Request(id="prompt-0000", prompt=as_prompt(prompt), max_new_tokens=max_tokens, logprobs=max(2, logprobs))
    options = {"device": device, "batch_size": 1, "allow_fallback": allow_fallback, "engine": engine}
    with tempfile.TemporaryDirectory(prefix="trimtab-") as scratch, progress("debug-decode", 4) as bar:
        ran: list[_Ran] = []
        for number, setting in enumerate((reference, tested)):
            with closing(open_for(backend, model, {"dtype": setting.dtype, **options}, steering=steering)) as runner:
                spec = with_math(build_steering(steering, runner.info), setting.math)
                if spec is None:
                    raise SteeringError(
                        "debug-decode looks at an op: give a vector with a layer and a cap, or a steering file"
                    )
                ran.append(_run(runner, setting, spec, request, ran, Path(scratch) / str(number), bar))
        return _compare(ran[0], ran[1], model=str(model), prompt=prompt)


def _settings(dtype: str, precision: str | None, other: str | None) -> tuple[_Setting, _Setting]:
    if precision is not None and other is not None:
        raise InputError("give compare_precision (the op's arithmetic) or compare_dtype (the model's), not both")
    if other is not None:
        if other == dtype:
            raise InputError(f"both sides would run the model in {dtype}; give another compare_dtype")
        return _Setting(dtype, dtype, "model"), _Setting(other, other, "float32")
    precision = precision or "float32"
    if precision in ("model", dtype):
        raise InputError(f"both sides would do the op's arithmetic in {dtype}; give another compare_precision")
    return _Setting(f"{dtype}, op in {dtype}", dtype, "model"), _Setting(
        f"{dtype}, op in {precision}", dtype, precision
    )


def _run(
    runner: Backend,
    setting: _Setting,
    spec: Steering,
    request: Request,
    before: Sequence[_Ran],
    place: Path,
    bar: Progress,
) -> _Ran:
    bar.describe(f"{setting.label}: free")
    steered = _with(request, spec, None)
    with TraceWriter(place / "free", kind="generation") as writer:
        free = runner.generate([steered], writer=writer)[0]
    bar.advance()
    tokens = before[0].free.token_ids if before else free.token_ids
    site = one_site(spec, runner.info.num_layers)
    bar.describe(f"{setting.label}: along the reference's tokens")
    capture = Capture(sites=(str(site),), edit=("before", "after"), positions="response")
    with TraceWriter(place / "fed", kind="generation") as writer:
        runner.generate([_with(request, spec, tokens)], capture=capture, writer=writer)
    bar.advance()
    trace = Trace.open(place / "fed")
    names = {
        token: text
        for tokens in (Trace.open(place / "free").tokens, trace.tokens)
        for token, text in tokens.select("token_id", "text").iter_rows()
    }
    return _Ran(setting, spec, free, names, Side(setting.label, trace, trace.tokens))


def _with(request: Request, spec: Steering, forced: tuple[int, ...] | None) -> Request:
    return Request(
        id=request.id,
        prompt=request.prompt,
        steering=spec,
        max_new_tokens=request.max_new_tokens,
        logprobs=request.logprobs,
        forced_tokens=forced,
    )


def one_site(steering: Steering, num_layers: int) -> Site:
    """Return the only site of a steering.

    Raises:
        SteeringError: it has several.
    """
    sites = {site for one in steering.bound for site in one.pattern.resolve(num_layers)}
    if len(sites) != 1:
        names = ", ".join(sorted(str(site) for site in sites))
        raise SteeringError(f"debug-decode looks at one site, and this steering has {len(sites)}: {names}")
    return sites.pop()


def _compare(reference: _Ran, tested: _Ran, *, model: str, prompt: str) -> DecodeComparison:
    found = match(reference.free.token_ids, tested.free.token_ids)
    site = str(reference.side.trace.index["site"][0])
    reason = (
        f"the same {len(tested.free.token_ids)} tokens"
        if found.first_divergence is None
        else f"tokens differ from step {found.first_divergence}: {found.ratio:.1%} are equal"
    )
    return DecodeComparison(
        passed=found.first_divergence is None,
        reason=reason,
        model=model,
        prompt=prompt,
        site=site,
        steering=describe(tested.steering),
        label=tested.setting.label,
        reference_label=reference.setting.label,
        text=tested.free.text,
        reference_text=reference.free.text,
        match_ratio=found.ratio,
        first_divergence=found.first_divergence,
        steps=tuple(_steps(reference.side, tested.side, site, reference.names | tested.names)),
    )


def _steps(reference: Side, tested: Side, site: str, names: dict[int, str]) -> list[DecodeStep]:
    count = len(reference.forced(0).ids)
    positions = [position - 1 for position in reference.forced(0).positions]
    tables = {edit: _rows(reference.trace, tested.trace, site, edit) for edit in ("before", "after")}
    caps, reference_caps = (_moves(cap_steps(reference, side, 0, count)) for side in (tested, reference))
    logprobs = {step.step: step for step in logprob_steps(reference, tested, 0, count, names)}
    steps = []
    for step in range(count):
        top = logprobs[step]
        (delta, clamped), (reference_delta, reference_clamped) = (
            one.get(step, _NONE) for one in (caps, reference_caps)
        )
        before, after = (
            {key: float(column[step]) for key, column in tables[edit].items()} for edit in ("before", "after")
        )
        steps.append(
            DecodeStep(
                step=step,
                position=positions[step],
                reference_token=top.reference_top,
                token=top.top,
                same_token=top.same_top,
                reference_margin=top.reference_margin,
                max_abs_before=before["max_abs"],
                mean_abs_before=before["mae"],
                rmse_before=before["rmse"],
                max_abs_after=after["max_abs"],
                mean_abs_after=after["mae"],
                rmse_after=after["rmse"],
                rel_l2_after=after["rel_l2"],
                max_ulp_after=int(after["max_ulp"]) if after["max_ulp"] >= 0 else None,
                cap_delta=delta,
                reference_cap_delta=reference_delta,
                clamped=clamped,
                reference_clamped=reference_clamped,
                delta_top_logprob=top.delta_top,
                max_delta_logprob=top.max_delta,
                shared_top=top.shared,
                num_top=top.num_top,
            )
        )
    return steps


_NONE = (math.nan, False)


def _moves(steps: Sequence[CapStep]) -> dict[int, tuple[float, bool]]:
    """Return, per step, the sum of the adjustments of the site's ops, and whether any was clamped."""
    found: dict[int, tuple[float, bool]] = {}
    for one in steps:
        delta, clamped = found.get(one.step, (0.0, False))
        found[one.step] = delta + one.cap_delta, clamped or one.clamped
    return found


def _rows(reference: Trace, tested: Trace, site: str, edit: str) -> dict[str, torch.Tensor]:
    ours, theirs = (
        trace.rows(site=site, prompt=0, edit=edit if edit in trace.index["edit"].to_list() else final_edit(trace, site))
        for trace in (reference, tested)
    )
    return row_metrics(ours.values, theirs.values)
