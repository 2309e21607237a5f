"""The plugin inside a worker: taps put into the model, the runner followed, requests of the client answered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab._base.log import get_logger
from trimtab.backends.vllm import answers, fused, op, taps
from trimtab.backends.vllm.config import KEY, PluginConfig
from trimtab.backends.vllm.live import LiveTap, stages_of
from trimtab.backends.vllm.runners import adapter
from trimtab.backends.vllm.state import WorkerState
from trimtab.errors import BackendError

_log = get_logger(__name__)


class SteeredWorker:
    """What the plugin adds to one worker.

    Args:
        worker: vLLM's worker, its model loaded.
        config: what the engine was asked to install.

    Raises:
        BackendError: a model family, runner or setting that steering does not know.
        SiteError: sites that the model does not have.
    """

    def __init__(self, worker: Any, config: PluginConfig) -> None:
        runner, vllm_config = worker.model_runner, worker.vllm_config
        _refuse(vllm_config)
        if runner.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            # vLLM's attention uses AMX tiles in bfloat16 and relies on an earlier matrix product to have asked the
            # kernel for them; where none did, the process ends with an illegal instruction
            torch.cpu._init_amx()
        model = runner.model
        found = taps.describe(model, vllm_config.model_config.hf_config)
        scheduler, device = vllm_config.scheduler_config, torch.device(runner.device)
        self.state = WorkerState(
            config,
            found,
            max_rows=max(scheduler.max_num_batched_tokens, getattr(runner, "max_num_tokens", 0)),
            max_requests=scheduler.max_num_seqs,
            max_length=vllm_config.model_config.max_model_len,
            dtype=vllm_config.model_config.dtype,
            device=device,
            graphs=device.type != "cpu" and not vllm_config.model_config.enforce_eager,
        )
        op.adapt()
        embeds = runner.supports_mm_inputs or vllm_config.model_config.enable_prompt_embeds
        norms = _fuses(vllm_config, config)
        self.taps = install(model, self.state, compiled=_compiles(vllm_config), norms=norms, embeds=embeds)
        _mark_graphs(vllm_config, self.taps)
        self.rank = worker.rank
        parallel = vllm_config.parallel_config
        self.tp_rank, self.pp_rank = (
            worker.rank % parallel.tensor_parallel_size,
            worker.rank // parallel.tensor_parallel_size,
        )
        self.engine, self.workers = parallel.data_parallel_index, parallel.world_size
        adapter(runner).install(self.state)
        _log.info(
            "steering: %d sites, %d slots of %d ops, %.1f MiB of buffers on %s",
            len(self.state.steered),
            config.max_steering,
            config.ops_per_site,
            self.state.nbytes / 2**20,
            device,
        )

    def rpc(self, verb: str, payload: bytes = b"") -> bytes:
        """Answer one request of the client. Errors travel as text, so that a bad request never ends the worker."""
        return answers.answer(self, verb, bytes(payload))


def prepare(vllm_config: Any, config: PluginConfig) -> None:
    """Set how the model will be compiled; called before vLLM makes it.

    Raises:
        SiteError: what is no site pattern.
    """
    if _fuses(vllm_config, config):
        fused.read_one_more(vllm_config.compilation_config.inductor_compile_config)


def _compiles(vllm_config: Any) -> bool:
    """Whether the model is compiled for the CPU."""
    cpu = vllm_config.device_config.device_type == "cpu"
    return cpu and not vllm_config.model_config.enforce_eager and bool(vllm_config.compilation_config.mode)


def _fuses(vllm_config: Any, config: PluginConfig) -> bool:
    """Whether norms behind branches have to be corrected beside the graph."""
    patterns = (*config.sites, *config.capture_sites)
    return _compiles(vllm_config) and taps.fuses(vllm_config.model_config.hf_config, patterns)


def install(
    model: nn.Module, state: WorkerState, *, compiled: bool = False, norms: bool = False, embeds: bool = False
) -> list[LiveTap]:
    """Put the taps of a state into a model: each tapped module becomes an instance of a subclass of its own class.

    Args:
        model: what the runner holds.
        state: what the taps act on.
        compiled: whether the model is compiled for the CPU, so that what enters the first block must not be stored.
        norms: whether the outputs of norms behind branches must not be stored.
        embeds: whether the model is given what is embedded, as a tensor.

    Returns:
        The taps.
    """
    live: list[LiveTap] = []
    by_module: dict[str, list[tuple[taps.Tap, str]]] = {}
    outside, entering = False, dict[str, LiveTap]()
    untapped = {tap.name: tap for tap in state.map.every_tap if norms and tap.fused == "norm"}
    for tap in state.map.taps(state.recorded):
        module, begins = model.get_submodule(tap.module_path), False
        if tap.fused == "embed" and ((compiled and not embeds) or not (tap.stages or state.map.positions)):
            outside = begins = True
            if not tap.stages:
                continue  # it only begins the stream
        one = LiveTap(
            tap, stages_of(tap, state.banks, state.residual), state.step, state.residual, state.recorder, state.doses
        )
        live.append(one)
        name = op.enroll(tap.name, one)
        if begins:
            entering[tap.side] = one
        elif norms and tap.fused == "norm":
            del untapped[tap.name]
            fused.correct_norm(module, name, one, state.step)
        else:
            by_module.setdefault(tap.module_path, []).append((tap, name))
    for tap in untapped.values():
        fused.correct_norm(model.get_submodule(tap.module_path), f"untapped {tap.name}", None, state.step)
    if outside:
        _begin_outside(model, state, entering)
    for path, listed in by_module.items():
        module = model.get_submodule(path)
        module.__class__ = _tapped(module, listed)
    return live


def _begin_outside(model: Any, state: WorkerState, entering: Mapping[str, LiveTap]) -> None:
    """Have what enters the first block taken up before the graph runs.

    An operator there would part what torch.compile fuses, embedding and first norm, and move roundings.

    Args:
        model: what the runner holds.
        state: what begins each pass.
        entering: "output" and "input" -> the tap of what is embedded, and of what enters the first block.
    """
    state.embed, table = model.embed_input_ids, model.get_submodule(state.map.embed)
    positions = None
    if state.map.positions is not None:
        positions = partial(_positions, state, model.get_submodule(state.map.positions))
    elif not entering and fused.is_table(table, model.embed_input_ids):
        held: dict[str, Any] = table._parameters  # looked at in every pass, where getattr of a module takes longer
        state.table = partial(held.__getitem__, "weight")
    names = {side: op.name_of(one) for side, one in entering.items()}
    state.enter = entry = fused.Entry(names, positions, state.step) if names or positions else None
    if entry is not None and entering:
        (first,) = (tap for tap in state.map.every_tap if tap.fused == "embed" and tap.argument is not None)
        block, argument = model.get_submodule(first.module_path), first.argument
        assert argument is not None
        side = next(iter(names))
        fused.look_up(table)
        fused.correct_entry(block, argument, entering[side], entry, names[side])


def _positions(state: WorkerState, embedded: nn.Module) -> Tensor:
    assert state.positions is not None
    found: Tensor = embedded(state.positions)
    return found


def _mark_graphs(config: Any, live: Sequence[LiveTap]) -> None:
    """Have vLLM's cache of compiled graphs tell this model from one with other taps, or none.

    The cache goes by the settings of the engine; taps asked for by the environment, those of a second engine in the
    process, and those of another release of this package differ where the settings do not.
    """
    additional = config.additional_config
    if isinstance(additional, dict):
        taps = [
            (op.name_of(one), one.tap.module_path, one.tap.side, one.tap.element, one.tap.argument, one.joins)
            for one in live
        ]
        beside = [one.beside is not None for one in live]
        additional[f"{KEY}_graph"] = hashlib.sha256(repr((op.CALLED, taps, beside)).encode()).hexdigest()


def _tapped(module: nn.Module, listed: Sequence[tuple[taps.Tap, str]]) -> type[nn.Module]:
    inputs = [(name, *tap.argument) for tap, name in listed if tap.side == "input" and tap.argument is not None]
    outputs = [(name, tap.element) for tap, name in listed if tap.side == "output"]
    stock = fused.taken_over(module)
    site_ = op.site_

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, position, argument in inputs:
            site_(kwargs[argument] if argument in kwargs else args[position], name)
        out = stock(self, *args, **kwargs)
        for name, element in outputs:
            site_(out if element is None else out[element], name)
        return out

    return fused.subclass(type(module), forward, stock)


def _refuse(config: Any) -> None:
    """Refuse settings under which rows cannot be followed."""
    if config.speculative_config is not None:
        raise BackendError(
            "steering does not run with speculative decoding: drafted rows that are rejected would be steered and "
            "recorded; start the engine without speculative_config"
        )
    parallel = config.parallel_config
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "num_ubatches", 1) > 1:
        raise BackendError("steering does not run with microbatches (enable_dbo): start the engine without them")
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        raise BackendError("steering does not run with sequence parallelism (enable_sp): start the engine without it")
    if config.scheduler_config.policy == "priority":
        raise BackendError(
            "steering does not run with priority scheduling, which keeps any number of preempted requests, and there "
            "are places for those of max_num_seqs; start the engine with scheduling_policy='fcfs'"
        )
    if config.model_config.runner_type == "pooling":
        raise BackendError("steering runs with generative models; this engine was started for pooling")
