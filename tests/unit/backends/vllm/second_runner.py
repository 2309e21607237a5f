"""vLLM's second model runner on the CPU: its own class and methods, with Triton's kernels replaced by loops.

What the runner does to requests and batches is its own code: the order of rows, slots, chunks, preemption and resume.
The model adds what is known of a token and of its position, so that every row can be told from every other.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import vllm.v1.worker.gpu.buffer_utils as buffer_utils
import vllm.v1.worker.gpu.model_runner as module
import vllm.v1.worker.gpu.sample.sampler as sampler_module
from torch import Tensor, nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.sample.sampler import NO_LOGPROBS, Sampler
from vllm.v1.worker.gpu.states import RequestState

WIDTH, VOCABULARY, LENGTH, REQUESTS, TOKENS = 8, 32, 64, 6, 24


class Block(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randn(VOCABULARY, WIDTH, generator=draw)
        self.places = torch.randn(LENGTH, WIDTH, generator=draw)
        self.head = torch.randn(WIDTH, VOCABULARY, generator=draw)
        self.layers = nn.ModuleList([Block()])

    def row(self, token: int, position: int) -> Tensor:
        return (self.tokens[token] + self.places[position]) * 2 + 1

    def forward(self, input_ids: Tensor, positions: Tensor, **_: Any) -> Tensor:
        h: Tensor = self.layers[0](self.tokens[input_ids.long()] + self.places[positions])
        return h

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return (hidden_states[:, :, None] * self.head).sum(1)


class Greedy(Sampler):
    """vLLM's sampler, which takes the likeliest token."""

    def __init__(self) -> None:
        self.compute_nans, self.trace_replay_state, self.return_sampling_mask = False, None, False
        self.use_flashinfer = self.use_xpu_sampler = False
        self.req_states = SimpleNamespace(prefill_len=SimpleNamespace(gpu=None))
        no = SimpleNamespace(max_num_token_ids=lambda _: 0)
        self.logprob_token_ids_state = no
        self.sampling_states = SimpleNamespace(
            max_num_logprobs=lambda _: NO_LOGPROBS, get_top_k_top_p=lambda *_: (None, None)
        )

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        pass

    def apply_staged_writes(self) -> None:
        pass

    def apply_sampling_params(self, logits: Tensor, *_: Any, **__: Any) -> Tensor:
        return logits

    def _sample_random(self, processed_logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return processed_logits.argmax(-1), processed_logits


class Runner(module.GPUModelRunner):
    def __init__(self) -> None:
        self.model, self.sampler = Model(), Greedy()
        self.device = torch.device("cpu")
        self.req_states = RequestState(REQUESTS, LENGTH, TOKENS, 0, VOCABULARY, self.device)
        self.input_buffers = InputBuffers(REQUESTS, TOKENS, self.device)
        self.max_num_reqs, self.max_num_tokens, self.max_model_len = REQUESTS, TOKENS, LENGTH
        parallel = {"data_parallel_size": 1, "data_parallel_rank": 0, "prefill_context_parallel_size": 1}
        self.parallel_config = SimpleNamespace(**parallel)
        self.vllm_config = SimpleNamespace(parallel_config=self.parallel_config)
        self.observability_config = SimpleNamespace(cudagraph_metrics=False)
        self.model_config = SimpleNamespace(rswa_window=None)
        for name in ("pooling_runner", "pp_handler", "encoder_cache", "aux_output_connector", "lora_config"):
            setattr(self, name, None)
        for name in ("adaptive_verification", "pcp_manager", "fast_prefill", "ubatch_runner", "batch_sharder"):
            setattr(self, name, None)
        for name in ("rejection_sampler", "speculator", "execute_model_state", "cudagraph_manager", "kv_cache_config"):
            setattr(self, name, None)
        self.dcp_size, self.decode_query_len, self.attn_groups = 1, 1, []
        self.use_pp = self.uses_inputs_embeds = self.is_encoder_decoder = self.use_aux_hidden_state_outputs = False
        self.is_first_pp_rank = self.is_last_pp_rank = True
        for name in ("lora_state", "block_tables", "kv_connector", "eplb", "step_timing", "prompt_logprobs_worker"):
            setattr(self, name, mock.MagicMock())
        self.model_state = mock.MagicMock(num_new_sampled_tokens_per_step=1)
        self.model_state.prepare_inputs.return_value = {}

    def _merge_ec_connector_no_forward(self, scheduler_output: Any, output: Any) -> Any:
        return output

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        return (), torch.empty(0)

    def prepare_dummy_attn(self, input_batch: Any, valid_state_slots: bool = False) -> tuple[Any, Tensor]:
        return (), torch.empty(0)

    def step(self, scheduled: SchedulerOutput) -> dict[str, int]:
        """Run one pass and sample; return the token that each request of the batch got."""
        self.execute_model(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return {}
        held, states = self.execute_model_state, self.req_states
        self.execute_model_state = None
        out, _, _ = self.sample(held.hidden_states, held.input_batch, None)
        tokens = dict(zip(held.input_batch.req_ids, out.sampled_token_ids[:, 0].tolist(), strict=True))
        for name, count in scheduled.num_scheduled_tokens.items():
            index = states.req_id_to_index[name]
            states.num_computed_tokens.gpu[index] += count
            states.last_sampled_tokens[index] = tokens[name]
        return tokens


def new(name: str, prompt: list[int], known: list[int], params: Any) -> NewRequestData:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=known,
    )


def scheduled(
    counts: dict[str, int],
    fresh: list[NewRequestData],
    computed: dict[str, int],
    finished: set[str],
    preempted: set[str],
) -> SchedulerOutput:
    """Return what vLLM's scheduler sends for one pass; `computed` holds the requests that the runner knows."""
    known = [name for name in counts if name in computed]
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = fresh
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.num_computed_tokens = known, [computed[name] for name in known]
    cached.new_block_ids = [None] * len(known)
    output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = counts, sum(counts.values())
    output.finished_req_ids, output.preempted_req_ids = finished, preempted
    return output


def _write(self: Any) -> None:
    """StagedWriteTensor.apply_write."""
    start = 0
    flat = self._staged_write_contents
    for index, first, end in zip(
        self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True
    ):
        row = self.gpu[index : index + 1] if self.gpu.dim() == 1 else self.gpu[index]
        row[first : first + end - start] = torch.tensor(flat[start:end], dtype=self.gpu.dtype)
        start = end
    for listed in (self._staged_write_indices, self._staged_write_starts, flat, self._staged_write_cu_lens):
        listed.clear()


def _prefill(ids: Tensor, _: Any, index: Tensor, starts: Tensor, known: Tensor, lengths: Tensor, done: Tensor) -> None:
    for row, slot in enumerate(index.tolist()):
        if done[slot] < lengths[slot]:
            first, last = starts[row : row + 2].tolist()
            ids[first:last] = known[slot, done[slot] : done[slot] + last - first]


def _positions(index: Tensor, starts: Tensor, done: Tensor, positions: Tensor, lengths: Tensor) -> None:
    lengths.zero_()
    for row, slot in enumerate(index.tolist()):
        first, last = starts[row : row + 2].tolist()
        positions[first:last] = torch.arange(last - first) + int(done[slot])
        lengths[row] = done[slot] + last - first


def _combine(
    ids: Tensor, index: Tensor, last: Tensor, starts: Tensor, lengths: Tensor, prefill: Tensor, *_: Any
) -> Tensor:
    for row, slot in enumerate(index.tolist()):
        if lengths[row] > prefill[slot]:
            ids[starts[row + 1] - 1] = last[slot, 0]
    return starts[1 : len(index) + 1].long() - 1


def _dispatch(manager: Any, requests: int, tokens: int, *_: Any, **__: Any) -> tuple[BatchExecutionDescriptor, None]:
    padded = min(TOKENS, -(-tokens // 4) * 4)  # as graphs would have it
    return BatchExecutionDescriptor(CUDAGraphMode.NONE, padded, REQUESTS if padded >= REQUESTS else None), None


@contextlib.contextmanager
def on_the_cpu() -> Any:
    """Have the second runner's modules run here."""
    counted = lambda ones, *_: (ones, torch.zeros_like(ones))  # noqa: E731
    with contextlib.ExitStack() as stack:
        for where, name, other in (
            (buffer_utils, "is_uva_available", lambda: False),
            (buffer_utils.StagedWriteTensor, "apply_write", _write),
            (module, "prepare_prefill_inputs", _prefill),
            (module, "prepare_pos_seq_lens", _positions),
            (module, "combine_sampled_and_draft_tokens", _combine),
            (module, "dispatch_cg_and_sync_dp", _dispatch),
            (module, "build_slot_mappings_by_layer", lambda *_: {}),
            (module, "set_forward_context", lambda *_, **__: contextlib.nullcontext()),
            (sampler_module, "get_num_sampled_and_rejected", counted),
        ):
            stack.enter_context(mock.patch.object(where, name, other))
        yield
