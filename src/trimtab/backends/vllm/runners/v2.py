"""The second model runner (`vllm.v1.worker.gpu.model_runner`), which vLLM chooses on accelerators.

Its batches are sorted (decodes first, then by length), it adds a preempted request anew, and it replays captured graphs
in which Python does not run. So the tables of a pass are filled as soon as its batch is made, before anything of the
model runs, and they are blank whenever the pass is not one of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from trimtab.backends.vllm.runners.graphs import follow_graphs
from trimtab.backends.vllm.sampled import LOGITS, SampledRows
from trimtab.backends.vllm.state import WorkerState
from trimtab.errors import BackendError

METHODS = {
    "execute_model": ("scheduler_output", "intermediate_tensors", "dummy_run"),
    "finish_requests": ("scheduler_output",),
    "add_requests": ("scheduler_output",),
    "prepare_inputs": ("scheduler_output", "batch_req_state", "batch_desc"),
    "sample": ("hidden_states", "input_batch", "grammar_output"),
    "capture_model": (),
}
"""Methods of the runner that are wrapped, and the parameters that they must have."""
SAMPLE = ("logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np")
"""First parameters of the sampler's `sample`."""
BATCH = ("req_ids", "num_reqs", "num_tokens", "query_start_loc_np", "num_computed_tokens_np", "input_ids")
"""Fields of a batch that are read."""
ATTRIBUTES = ("vllm_config", "model", "sampler", "batch_sharder", "uses_inputs_embeds", "is_first_pp_rank")
"""Attributes of the runner that are read."""
EMBEDS = ("scheduled_encoder_inputs", "input_batch", "req_states")
"""Parameters of the method that embeds the rows of multimodal models."""
NEW = ("req_id", "prompt_token_ids", "sampling_params")
"""Fields of a new request that are read."""


@dataclass(slots=True)
class _Pass:
    """What the wrapped methods of one pass tell each other."""

    intermediate: Any = None
    sampled: Any = None
    """The batch whose last rows become logits right now."""


class RunnerV2:
    """Wraps the methods of one runner instance; the class stays as it is.

    Args:
        runner: a `GPUModelRunner` of the second kind, its model loaded.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._pass = _Pass()

    @staticmethod
    def accepts(runner: Any) -> bool:
        """Whether this is that runner."""
        try:
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        except ImportError:  # a vLLM without it
            return False
        return isinstance(runner, GPUModelRunner)

    def install(self, state: WorkerState) -> None:
        """Have the runner tell the state of its requests and of each pass.

        Raises:
            BackendError: a runner that lacks what is relied on, or a setting under which rows cannot be followed.
        """
        runner = self._runner
        self._refuse(state)
        self._follow_requests(runner, state)
        self._follow_passes(runner, state)
        follow_graphs(runner, state)
        if runner.sampler is not None:
            self._follow_samples(runner, state)

    def _refuse(self, state: WorkerState) -> None:
        runner = self._runner
        lacking = list(missing(runner))
        if lacking:
            raise BackendError(
                f"this vLLM's model runner V2 ({type(runner).__name__}) has no {', '.join(lacking)}, on which steering "
                "relies; vllm>=0.32,<0.33 is known, and VLLM_USE_V2_MODEL_RUNNER=0 selects the first runner"
            )
        if runner.vllm_config.parallel_config.prefill_context_parallel_size > 1:
            raise BackendError(
                "steering does not run with prefill context parallelism, which splits a request's rows over ranks; "
                "start the engine with prefill_context_parallel_size=1"
            )
        if runner.batch_sharder is not None and LOGITS in state.recorded:
            raise BackendError(
                "the site logits cannot be followed with enable_batch_sharded_sampling, which samples each request on "
                "one rank; start the engine without it, or without the site logits"
            )

    @staticmethod
    def _follow_requests(runner: Any, state: WorkerState) -> None:
        finish, add = runner.finish_requests, runner.add_requests

        def finish_requests(scheduler_output: Any) -> Any:
            for req_id in scheduler_output.finished_req_ids:  # preempted ones stay: they come back
                state.release(req_id)
            return finish(scheduler_output)

        def add_requests(scheduler_output: Any) -> Any:
            for new in scheduler_output.scheduled_new_reqs:
                params, ids = new.sampling_params, list(new.prompt_token_ids or [])
                known = state.bound.get(new.req_id)
                if known is not None and known.prompt_ids == ids:
                    continue  # resumed after a preemption
                if known is not None:
                    state.release(new.req_id)
                if params is not None and params.extra_args:
                    state.bind(new.req_id, params.extra_args, ids, params.max_tokens or 1)
            return add(scheduler_output)

        runner.finish_requests, runner.add_requests = finish_requests, add_requests

    def _follow_passes(self, runner: Any, state: WorkerState) -> None:
        execute, prepare, held = runner.execute_model, runner.prepare_inputs, self._pass

        def execute_model(
            scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            held.intermediate = intermediate_tensors
            if dummy_run:
                state.step.blank()
            try:
                return execute(scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)
            finally:
                held.intermediate = None
                state.step.end()
                state.doses.take(state.step)

        def begin(batch: Any, embeds: Tensor | None) -> None:
            if state.bound:
                state.positions = batch.positions
                state.begin(*rows_of(batch), batch.input_ids[: batch.num_tokens], embeds, held.intermediate)
            else:
                state.step.blank()

        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            if not embedded:
                begin(batch, None)
            return batch

        def prepare_inputs_embeds(scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> Any:
            embeds = embed(scheduled_encoder_inputs, input_batch, req_states)
            begin(input_batch, embeds)
            return embeds

        runner.execute_model, runner.prepare_inputs = execute_model, prepare_inputs
        embedded = runner.uses_inputs_embeds and runner.is_first_pp_rank  # the model is given embeddings, made later
        if embedded:
            embed = runner.model_state.prepare_inputs_embeds
            runner.model_state.prepare_inputs_embeds = prepare_inputs_embeds

    def _follow_samples(self, runner: Any, state: WorkerState) -> None:
        held, sampled = self._pass, SampledRows(state)
        sample, compute_logits, choose = runner.sample, runner.model.compute_logits, runner.sampler.sample

        def sample_batch(hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
            if state.bound:
                sampled.prompt(hidden_states, compute_logits)
            held.sampled = input_batch
            try:
                return sample(hidden_states, input_batch, grammar_output)
            finally:
                held.sampled = None

        def with_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(hidden_states, *args, **kwargs)
            batch = held.sampled  # None: logits of a prompt's rows, or of a dummy batch
            if batch is not None and state.bound and logits is not None:
                sampled.logits(logits, *rows_of(batch))
            return logits

        def with_forced(
            logits: Tensor, expanded_idx_mapping: Any, idx_mapping: Any, idx_mapping_np: Any, *args: Any, **kwargs: Any
        ) -> Any:
            ours = held.sampled is not None and state.bound
            names = runner.req_states.index_to_req_id
            ids = [names.get(int(index)) for index in idx_mapping_np] if ours else []
            if ours:
                sampled.check(logits, ids)
            tokens, processed = choose(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, *args, **kwargs)
            return (sampled.force(tokens, ids) if ours else tokens), processed

        runner.sample, runner.sampler.sample = sample_batch, with_forced
        if LOGITS in state.recorded:
            runner.model.compute_logits = with_logits


def rows_of(batch: Any) -> tuple[Sequence[str], Any, Any]:
    """Return the requests of a batch in the order of their rows, their first rows and the end, and what was computed.

    Raises:
        BackendError: a batch whose rows are not those of its requests, one after the other.
    """
    count = batch.num_reqs
    starts, computed = batch.query_start_loc_np[: count + 1], batch.num_computed_tokens_np[:count]
    if len(batch.req_ids) != count or int(starts[-1]) != batch.num_tokens:
        raise BackendError(
            f"a batch of {len(batch.req_ids)} requests and {batch.num_tokens} rows ends at row {int(starts[-1])}: rows "
            "are shared out in a way that steering cannot follow; select the first runner, VLLM_USE_V2_MODEL_RUNNER=0"
        )
    return batch.req_ids, starts, computed


def missing(runner: Any) -> Iterator[str]:
    """Yield what a runner and its parts lack of what is relied on, each as it would be written."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    for name, parameters in METHODS.items():
        yield from _unfit(f"{name}()", getattr(runner, name, None), parameters)
    for cls, names in (
        (InputBatch, BATCH),
        (NewRequestData, NEW),
        (SchedulerOutput, ("finished_req_ids", "scheduled_new_reqs")),
    ):
        there = {one.name for one in fields(cls)}
        yield from (f"{cls.__name__}.{name}" for name in names if name not in there)
    yield from (name for name in ATTRIBUTES if not hasattr(runner, name))
    if getattr(runner, "uses_inputs_embeds", False):
        embeds = getattr(runner.model_state, "prepare_inputs_embeds", None)
        yield from _unfit("model_state.prepare_inputs_embeds()", embeds, EMBEDS)
    if not hasattr(getattr(runner, "req_states", None), "index_to_req_id"):
        yield "req_states.index_to_req_id"
    sampler = getattr(runner, "sampler", None)
    if sampler is not None:
        sample = getattr(sampler, "sample", None)
        yield from _unfit("sampler.sample()", sample, SAMPLE)
        if sample is not None and tuple(inspect.signature(sample).parameters)[: len(SAMPLE)] != SAMPLE:
            yield f"sampler.sample({', '.join(SAMPLE)}, ...)"
        yield from _unfit("model.compute_logits()", getattr(runner.model, "compute_logits", None), ())


def _unfit(name: str, method: Any, parameters: Sequence[str]) -> Iterator[str]:
    if method is None:
        yield name
        return
    there = inspect.signature(method).parameters
    yield from (f"{name[:-1]}{parameter}=)" for parameter in parameters if parameter not in there)
