"""The first model runner (`vllm.v1.worker.gpu_model_runner`), which the CPU runner extends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trimtab.backends.vllm.runners.graphs import follow_graphs, require_untested
from trimtab.backends.vllm.sampled import LOGITS, SampledRows
from trimtab.backends.vllm.state import WorkerState


class _Detour:
    """A method of one instance that goes through ours only while it has to: a call of ours takes time in every pass."""

    def __init__(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._ways = (getattr(owner, name), ours)
        self.taken = False

    def take(self, needed: bool) -> None:
        """Have calls go through ours, or not."""
        if needed != self.taken:
            self.taken = needed
            setattr(self._owner, self._name, self._ways[needed])


class RunnerV1:
    """Wraps the methods of one runner instance; the class stays as it is.

    Args:
        runner: a `GPUModelRunner`.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._planned: Any = None
        """The scheduler's output for the pass that comes."""
        self._sampled = False
        """Whether the next logits are those of the last rows of a pass."""
        self._quiet = False
        """Whether passes like the last one are the kernel's alone: begun here as they are planned, and run as stock."""

    @staticmethod
    def accepts(runner: Any) -> bool:
        """Whether this is that runner."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        return isinstance(runner, GPUModelRunner)

    def install(self, state: WorkerState) -> None:
        """Have the runner tell the state of its requests and of each pass.

        Raises:
            BackendError: device graphs, where they were not allowed.
        """
        runner = self._runner
        if state.graphs:
            require_untested("inside device graphs", "start the engine with enforce_eager=True")
            follow_graphs(runner, state)
        self._blank_dummies(runner, state)
        sampled = SampledRows(state)
        self._follow_requests(runner, state, self._passes(runner, state, sampled))
        compute_logits = runner.model.compute_logits

        def with_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(hidden_states, *args, **kwargs)
            if self._sampled and logits is not None and self._real(runner):
                self._sampled = False  # what comes before the next pass are logits of prompts
                ids, starts, computed = self._batch(runner)
                sampled.logits(logits, ids, starts, computed)
            return logits

        if LOGITS in state.recorded:
            runner.model.compute_logits = with_logits

    @staticmethod
    def _blank_dummies(runner: Any, state: WorkerState) -> None:
        """Let no row be tracked in passes that stand for nothing: the taps may run in them."""
        dummy = runner._dummy_run

        def dummy_run(*args: Any, **kwargs: Any) -> Any:
            state.step.blank()
            return dummy(*args, **kwargs)

        runner._dummy_run = dummy_run

    def _follow_requests(self, runner: Any, state: WorkerState, passes: _Detour) -> None:
        update, step = runner._update_states, state.step

        def follow(plan: Any) -> None:
            for req_id in plan.finished_req_ids:
                state.release(req_id)
            for new in plan.scheduled_new_reqs:
                params = new.sampling_params
                if params is not None and params.extra_args:
                    ids = new.prompt_token_ids or []
                    state.bind(new.req_id, params.extra_args, list(ids), params.max_tokens or 1)
            if not state.bound and (passes.taken or self._quiet):
                self._sampled = False
                step.blank()
            self._quiet = False
            passes.take(bool(state.bound))

        def update_states(scheduler_output: Any) -> Any:
            self._planned = plan = scheduler_output
            if plan.finished_req_ids or plan.scheduled_new_reqs:
                follow(plan)
            done = update(plan)
            if self._quiet and not (
                (step.table is None or (state.table is not None and state.table() is step.table))
                and step.goes_on(
                    runner.input_batch.req_ids,
                    plan.total_num_scheduled_tokens,
                    sum(plan.scheduled_cached_reqs.num_computed_tokens),
                )
            ):
                self._quiet = False
                passes.take(True)
            return done

        runner._update_states = update_states

    def _passes(self, runner: Any, state: WorkerState, sampled: SampledRows) -> _Detour:
        """Return the way of a pass through us, for as long as there are tracked requests."""
        forward, compute_logits, step = runner._model_forward, runner.model.compute_logits, state.step
        samples = self._samples(runner, state, sampled)

        def model_forward(
            input_ids: Tensor | None = None,
            positions: Tensor | None = None,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            self._sampled, state.positions = True, positions
            plan = self._planned  # it has what `_batch` has, in lists: most passes are like the one before
            if not step.goes_on(
                runner.input_batch.req_ids,
                plan.total_num_scheduled_tokens,
                sum(plan.scheduled_cached_reqs.num_computed_tokens),
            ):
                ids, starts, computed = self._batch(runner)
                # the ids of all passes lie here, also those of rows whose embeddings are given
                tokens = runner.input_ids.gpu[: int(starts[-1])]
                state.begin(ids, starts, computed, tokens, inputs_embeds, intermediate_tensors)
                samples.take(step.check_logits or step.forced)
            elif step.busy and (inputs_embeds is not None or state.table is None or state.table() is not step.table):
                state.begin_stream(input_ids, inputs_embeds, intermediate_tensors)
            try:
                hidden = forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            finally:
                step.end()
            if step.measured is not None:
                state.doses.take(step)
            if step.prompt_logits and isinstance(hidden, Tensor):  # the last pipeline stage
                sampled.prompt(hidden, compute_logits)
            if step.quiet and inputs_embeds is None and LOGITS not in state.recorded:
                self._quiet = not state.begins or step.table is not None
                passes.take(not self._quiet)
            return hidden

        passes = _Detour(runner, "_model_forward", model_forward)
        return passes

    @staticmethod
    def _samples(runner: Any, state: WorkerState, sampled: SampledRows) -> _Detour:
        """Return the way of samples through us, for as long as a request of the batch needs it."""
        sample = runner.sampler.sample

        def with_ours(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            if state.bound and state.step.check_logits:
                sampled.check(logits, runner.input_batch.req_ids)
            tokens, processed = sample(logits, *args, **kwargs)
            if state.bound and state.step.forced:
                tokens = sampled.force(tokens, runner.input_batch.req_ids)
            return tokens, processed

        return _Detour(runner.sampler, "sample", with_ours)

    @staticmethod
    def _batch(runner: Any) -> tuple[Sequence[str | None], Any, Any]:
        """Return the requests of the batch in the order of their rows, their first rows, and what was computed."""
        batch = runner.input_batch
        count = batch.num_reqs
        return batch.req_ids[:count], runner.query_start_loc.np[: count + 1], batch.num_computed_tokens_cpu[:count]

    @staticmethod
    def _real(runner: Any) -> bool:
        """Whether logits are computed for requests, and not to warm up."""
        return bool(runner.input_batch.num_reqs)
