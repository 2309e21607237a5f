"""A dump that is on: what the program calls, and what its models and optimizers report to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.dump import _manifest, _state
from trimtab.dump._calls import guard_forks
from trimtab.dump._clock import BACKWARD, Calls, Clock, in_backward
from trimtab.dump._modules import ModelWatch, keep_gradient
from trimtab.dump._names import owned
from trimtab.dump._sink import Sink
from trimtab.dump.config import DumpConfig, StepRange
from trimtab.errors import BackendError, InputError, SiteError

_active: Dump | None = None


class Dump:
    """Records a training or inference run into a trace; made by `record`, used in a `with` block.

    Args:
        config: what is recorded.
        coordinates: where this process stands in the parallel layout: a DeviceMesh with named dimensions, or a mapping
            such as `{"tp": 1, "dp": 0}`.
        counts_steps: the program does not call `step`: one begins with the first forward pass after an update.
    """

    def __init__(self, config: DumpConfig, *, coordinates: Any = None, counts_steps: bool = False) -> None:
        self.config = config
        self._counts_steps, self._updated = counts_steps, False
        self._clock = Clock(StepRange.parse(config.steps), config.phase)
        self._sink = Sink(config, coordinates)
        self._watches: list[ModelWatch] = []
        self._removers: list[Callable[[], None]] = []
        self._calls: dict[str, Calls] = {}
        self._captured: set[tuple[str, int]] = set()
        self._graded: set[int] = set()
        self._settings: dict[str, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
        self._precision: dict[str, dict[str, Any]] = {}
        self._random: dict[str, Tensor] = {}
        self._refused: list[dict[str, str]] = []
        self._closed = False

    @property
    def path(self) -> Path:
        """Directory of the trace."""
        return Path(self.config.out)

    @property
    def stopped(self) -> str:
        """Why recording ended before the run did; empty when it did not."""
        return self._sink.stopped

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, name: str = "") -> Self:
        """Record a model's modules and state, and an optimizer's.

        Args:
            model: any module, as the program calls it: bare, in DDP, FSDP2 or torch.compile.
            optimizer: its optimizer; gradients are recorded before, and its state after, each of its steps.
            name: put before the model's names; needed for the second model of a run.

        Raises:
            InputError: a second model without a name.
            SiteError: a site that the model does not have.
        """
        prefix = f"{name}." if name else ""
        if any(one.prefix == prefix for one in self._watches):
            raise InputError(
                f"a model named {name!r} is watched already; give this one another name: watch(model, name=...)"
            )
        self._watches.append(ModelWatch(model, prefix, self._clock, self._sink, self._begin))
        if optimizer is not None:
            self.watch_optimizer(optimizer)
        return self

    def watch_found(self, model: nn.Module) -> None:
        """Watch a model that the program just called, before that call goes on.

        A model that contains a watched one, as a wrapper does, takes its place and its name; others are numbered.
        """
        inside = {id(module) for module in model.modules()}
        replaced = [watch for watch in self._watches if id(watch.model) in inside]
        for watch in replaced:
            watch.remove()
            self._watches.remove(watch)
        taken = {watch.prefix for watch in self._watches}
        names = ("", *(f"model{number}" for number in range(1, len(taken) + 1)))
        name = next(name for name in names if (f"{name}." if name else "") not in taken)
        try:
            self.watch(model, name=name)
        except (SiteError, BackendError) as error:  # one of several models may lack the sites that are meant
            self._refused.append({"module": name, "class": type(model).__name__, "reason": str(error)})

    def abandon(self) -> None:
        """Record nothing more and leave the trace alone: it is another process's."""
        global _active
        self._closed = True
        self._clock.recording = False
        if _active is self:
            _active = None
        self._take_off()

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record gradients before, and the optimizer's state after, each of its steps."""
        before = optimizer.register_step_pre_hook(lambda *_: self.before_update())
        after = optimizer.register_step_post_hook(lambda one, *_: self.after_update(one))
        self._removers += [before.remove, after.remove]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the program does in this block: `inference`, `fwd_only`, `fwd_bwd`, or a name of yours."""
        before = self._clock.set_phase(name)
        try:
            yield
        finally:
            self._clock.set_phase(before)

    def step(self) -> None:
        """A step of the run has ended."""
        if self._clock.recording:
            self.before_update()
        self._graded.clear()
        self._updated = False
        self._sink.end_step()
        self._clock.next_step()

    def micro_step(self, number: int) -> None:
        """Number the forward passes from here to the next call; without it they are counted per phase and step."""
        self._clock.set_micro_step(number)

    def flush(self) -> None:
        """Return when everything recorded so far is committed."""
        self._sink.open().flush()

    def loss(self, loss: Tensor) -> None:
        """Record a loss; `backward()` on a scalar does it by itself."""
        if self._clock.recording:
            self._write("loss", loss, {})

    def dump(self, name: str, tensor: Tensor, *, dims: str | None = None, depth: int = 1, **tags: Any) -> None:
        """Record a tensor under a name, and its gradient; `trimtab.dump.dump` calls it on the dump that is on."""
        if not self._clock.recording or torch.compiler.is_compiling():
            return
        frame = sys._getframe(depth)
        place = {"source_file": frame.f_code.co_filename, "source_line": frame.f_lineno}
        fields = {**place, **tags} if dims is None else {"dims": dims, **place, **tags}
        self._write(name, tensor, fields)
        if "gradients" in self.config.parts and tensor.requires_grad and not in_backward():
            calls = self._calls[name].last
            fields = {**self._clock.tags(), "call_index": calls, **fields, "kind": "grad"}
            keep_gradient(tensor, name, fields, self._sink)

    def close(self, *, interrupted: str | None = None) -> None:
        """Take all hooks off and commit; closing twice is harmless.

        Args:
            interrupted: why the run ended early.
        """
        global _active
        if self._closed:
            return
        self._closed = True
        if self._updated and self._counts_steps:
            self.step()
        if _active is self:
            _active = None
        self._take_off()
        if interrupted is None and self._clock.recording and self._captured:
            self._capture_models(self._watches, self._clock.phase)
        if interrupted is not None:
            self._sink.empty_ring()
        self._sink.close(interrupted)
        _manifest.add(self.path, self._sink.rank, self._report())

    def before_update(self) -> None:
        """Record gradients, once per step: before an optimizer changes the parameters or someone clears them."""
        if not self._clock.recording or "param_grads" not in self.config.parts:
            return
        for watch in self._watches:
            if id(watch) not in self._graded:
                found = list(_state.param_grads(watch.model, watch.prefix))
                if found:
                    self._graded.add(id(watch))
                    self._write_items(found, BACKWARD)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Record what an optimizer holds after its step."""
        self._updated = True
        if not self._clock.recording:
            return
        self._note_settings(optimizer)
        if "optimizer" in self.config.parts:
            known = {id(p): (w.prefix + n, w.model) for w in self._watches for n, p in owned(w.model, "_parameters")}
            self._write_items(_state.optimizer_state(optimizer, known), BACKWARD)
        if "lr" in self.config.parts:
            self._write_items(_state.learning_rates(optimizer), BACKWARD)

    def _note_settings(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what an optimizer is set to when it is first seen; a second one of its class has a number."""
        if any(one is optimizer for one, _ in self._settings.values()):
            return
        kind = type(optimizer).__name__
        same = sum(type(one).__name__ == kind for one, _ in self._settings.values())
        self._settings[f"{kind}_{same}" if same else kind] = (optimizer, _state.optimizer_settings(optimizer))

    def start(self) -> Self:
        """Be the dump that `trimtab.dump.dump` writes to, and see losses."""
        global _active
        if _active is not None:
            raise InputError(f"a dump into {_active.config.out} is on already; end it first")
        _active = self
        self._random = {item.name: item.tensor for item in _state.random_state()}
        if "loss" in self.config.parts:
            self._removers.append(_see_losses(self.loss))
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(interrupted=None if value is None else f"{type(value).__name__}: {value}")

    def _take_off(self) -> None:
        while self._removers:
            self._removers.pop()()
        for watch in self._watches:
            watch.remove()

    def _begin(self, watch: ModelWatch) -> None:
        if in_backward():
            return
        if self._updated and self._counts_steps:
            self.step()
        self._clock.begin_forward(watch.model.training)
        if not self._clock.recording:
            return
        self._precision.setdefault(self._clock.phase, _state.precision_settings())
        self._capture_models([watch], self._clock.phase)
        if "rng" in self.config.parts:
            for item in _state.random_state():
                began = self._random.get(item.name)
                if began is None or not torch.equal(item.tensor, began):  # the run does not use the others
                    self._write(item.name, item.tensor, {})

    def _capture_models(self, watches: Iterable[ModelWatch], phase: str) -> None:
        """Record parameters and buffers as the first forward pass of a step and phase finds them."""
        for watch in watches:
            where = (f"{phase} {watch.prefix}", self._clock.step)
            if where in self._captured:
                continue
            self._captured.add(where)
            if "params" in self.config.parts:
                self._write_items(_state.params(watch.model, watch.prefix), phase)
            if "buffers" in self.config.parts:
                self._write_items(_state.buffers(watch.model, watch.prefix), phase)

    def _write_items(self, items: Iterable[_state.Item], phase: str) -> None:
        if self.config.phase:
            phase = self.config.phase
        for item in items:
            fields: dict[str, Any] = {"phase": phase, "step": self._clock.step, "micro_step": 0, "kind": item.kind}
            if item.dims is not None:
                fields["dims"] = item.dims
            self._sink.write(item.name, item.tensor, fields)

    def _write(self, name: str, tensor: Tensor, fields: dict[str, Any]) -> None:
        recompute = in_backward()
        calls = self._calls.setdefault(name, Calls(self._clock))
        number = {"call_index": calls.next(recompute), "recompute": recompute}
        self._sink.write(name, tensor, {**self._clock.tags(), **number, **fields})

    def _report(self) -> dict[str, Any]:
        names = self._sink.names
        return {
            "not_hooked": self._refused + [entry for watch in self._watches for entry in watch.report()],
            "unstored": self._sink.unstored,
            "coordinates": self._sink.coordinates,
            "counts": self._sink.counts,
            "stopped": self._sink.stopped,
            "optimizer": {name: settings for name, (_, settings) in self._settings.items()},
            "precision": self._precision,
            "phases": {phase: list(self.config.expect) for phase in names} if self.config.expect else {},
        }


def active() -> Dump | None:
    """Return the dump that is on."""
    return _active


guard_forks(active)


def dump(name: str, tensor: Tensor, *, dims: str | None = None, **tags: Any) -> None:
    """Record a tensor under a name, with the file and line of this call; does nothing while no dump is on.

    Args:
        name: what the tensor is.
        tensor: any tensor; its gradient is recorded too, if it gets one.
        dims: names of its dimensions and how they are cut over ranks, such as "b s h[tp]".
        tags: columns of the record, such as `layer=3`.
    """
    if _active is not None:
        _active.dump(name, tensor, dims=dims, depth=2, **tags)


def _see_losses(see: Callable[[Tensor], None]) -> Callable[[], None]:
    """Call `see` with every scalar that `backward` begins from."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1 and not in_backward():
                see(tensor)
        original(tensors, *args, **kwargs)

    torch.autograd.backward = backward

    def restore() -> None:
        if torch.autograd.backward is backward:
            torch.autograd.backward = original

    return restore
