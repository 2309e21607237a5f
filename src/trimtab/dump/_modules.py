"""What is seen of a model while it runs: inputs, outputs and gradients of its modules."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.architectures import describe
from trimtab.dump._clock import Calls, Clock, in_backward
from trimtab.dump._names import WRAPPERS, Place, bare_class, layer_of, places, source
from trimtab.dump._ranks import columns, shard_of
from trimtab.dump._sink import Sink
from trimtab.dump.config import DumpConfig
from trimtab.errors import SiteError
from trimtab.hooks import HookPoint, attach, leaves, module_handle, observe
from trimtab.sites import SitePattern, resolve_sites

NEVER_CALLED = "hooked, but it was never called: its caller uses its weights, or a path around it"
_SIDES = {"inputs": "input", "outputs": "output", "gradients": "grad_output"}


class ModelWatch:
    """Hooks on one model, and the list of modules that have none.

    Args:
        model: the model as the program calls it, wrapped or bare.
        prefix: put before every name; "" for the first model.
        clock: says when.
        sink: takes the records.
        begin: called when a forward pass of the model begins.
    """

    def __init__(
        self, model: nn.Module, prefix: str, clock: Clock, sink: Sink, begin: Callable[[ModelWatch], None]
    ) -> None:
        self.model, self.prefix = model, prefix
        self.not_hooked: list[dict[str, str]] = []
        self._seen: list[_Seen] = []
        self._removers: list[Callable[[], None]] = []
        try:
            self._attach(clock, sink, begin)
        except BaseException:
            self.remove()
            raise

    def _attach(self, clock: Clock, sink: Sink, begin: Callable[[ModelWatch], None]) -> None:
        config = sink.config
        by_path, tabled = _by_pattern(self.model, config.sites)
        found = list(places(self.model))
        root = next(place.module for place in found if not place.reason)
        for place in found:
            reason = place.reason or _unselected(place, config, by_path)
            if reason and place.module is not root:
                self.not_hooked.append(_entry(self.prefix + place.path, place.module, reason))
                continue
            kind = _Root if place.module is root else _Seen
            seen = kind(place, self.prefix, _sides(place, config, by_path, root), clock, sink)
            self._seen.append(seen)
            self._removers.append(observe(place.module, inputs=seen.on_input, outputs=seen.on_output))
        self._attach_sites(tabled, by_path, clock, sink)
        # Last, to stand in front of all others: FSDP2 puts its gathering of the parameters in front as well.
        self._removers.append(observe(self.model, inputs=lambda _: begin(self), first=True))

    def report(self) -> list[dict[str, str]]:
        """Return every module without records, with the reason."""
        unused = [_entry(self.prefix + one.path, one.module, NEVER_CALLED) for one in self._seen if not one.called]
        return self.not_hooked + unused

    def remove(self) -> None:
        """Take the hooks off."""
        while self._removers:
            self._removers.pop()()

    def _attach_sites(self, tabled: list[str], by_path: list[tuple[str, str]], clock: Clock, sink: Sink) -> None:
        """Sites of the family's table, and gradients with respect to inputs, which need a branch in the graph."""
        bare = unwrap(self.model)
        points: list[HookPoint] = []
        if tabled:
            table = describe(bare)
            points += [table.handle(site) for site in resolve_sites(tabled, table.num_layers, table.points)]
        for glob, side in by_path:
            if side == "grad_input":
                paths = [name for name, _ in bare.named_modules() if name and fnmatch.fnmatchcase(name, glob)]
                points += [module_handle(bare, f"module:{path}.grad_input") for path in paths]
        if points:
            pairs = [(point, _SiteSeen(point, bare, self.prefix, clock, sink)) for point in points]
            self._removers.append(attach(bare, pairs, allow_autocast=True).remove)


class _Seen:
    """One module: turns its calls into records."""

    def __init__(self, place: Place, prefix: str, sides: frozenset[str], clock: Clock, sink: Sink) -> None:
        self.path, self.module, self.called = place.path, place.module, False
        self._clock, self._sink, self._sides = clock, sink, sides
        self._calls, self._call, self._recompute = Calls(clock), 0, False
        fields = _module_fields(place.module, prefix + place.path)
        self._fields = {side: {**fields, **self._identity(prefix, side)} for side in _SIDES.values()}

    def _identity(self, prefix: str, side: str) -> dict[str, Any]:
        kind = "grad" if side == "grad_output" else "value"
        return {"site": f"module:{prefix}{self.path}.{side}", "kind": kind}

    def _named(self, side: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        """The first tensor has the name of the site; the others have their key behind it."""
        name = suffixed = self._fields[side]["site"]
        for key, item in leaves(value):
            if isinstance(item, Tensor):
                yield suffixed if suffixed is name else f"{name}.{key}", item
                suffixed = ""

    def on_input(self, arguments: Mapping[Any, Any]) -> None:
        self.called = True
        if not self._clock.recording:
            return
        self._recompute = in_backward()
        self._call = self._calls.next(self._recompute)
        if "input" in self._sides:
            self._record("input", arguments)

    def on_output(self, output: Any) -> None:
        if not self._clock.recording:
            return
        if "output" in self._sides:
            self._record("output", output)
        if "grad_output" in self._sides and torch.is_grad_enabled():
            fields = {**self._fields["grad_output"], **self._when(), "recompute": False}
            for name, tensor in self._named("grad_output", output):
                if tensor.requires_grad:
                    keep_gradient(tensor, name, fields, self._sink)

    def _record(self, side: str, value: Any) -> None:
        fields = {**self._fields[side], **self._when()}
        for name, tensor in self._named(side, value):
            self._sink.write(name, tensor, fields)

    def _when(self) -> dict[str, Any]:
        return {**self._clock.tags(), "call_index": self._call, "recompute": self._recompute}


class _Root(_Seen):
    """The model itself: its arguments have their own names, its outputs are `output` with their key."""

    def __init__(self, place: Place, prefix: str, sides: frozenset[str], clock: Clock, sink: Sink) -> None:
        super().__init__(place, prefix, sides, clock, sink)
        self._prefix = prefix
        self._names = list(inspect.signature(bare_class(place.module).forward).parameters)[1:]

    def _identity(self, prefix: str, side: str) -> dict[str, Any]:
        return {"kind": "grad" if side == "grad_output" else "value"}

    def _named(self, side: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if side == "input":
            for key, item in value.items():
                name = self._names[key] if isinstance(key, int) and key < len(self._names) else str(key)
                for below, leaf in leaves(_as_tensor(item), self._prefix + name):
                    if isinstance(leaf, Tensor):
                        yield below, leaf
        else:
            for key, leaf in leaves(value, f"{self._prefix}output"):
                if isinstance(leaf, Tensor):
                    yield key, leaf


class _SiteSeen:
    """One site of `hooks.attach`: a visitor that reads."""

    def __init__(self, point: HookPoint, model: nn.Module, prefix: str, clock: Clock, sink: Sink) -> None:
        self._plain, self._clock, self._sink, self._calls = point.plain, clock, sink, Calls(clock)
        self._name = str(point.site) if not prefix else f"{prefix}{point.site}"
        module = model.get_submodule(point.module_path)
        kind = "grad" if point.side in ("grad_input", "grad_output") else "value"
        self._fields = {
            **_module_fields(module, prefix + point.module_path),
            "site": self._name,
            "kind": kind,
        }
        if point.site.layer is not None:
            self._fields["layer"] = point.site.layer

    def __call__(self, tensor: Tensor) -> None:
        if not self._clock.recording:
            return
        recompute = self._fields["kind"] == "value" and in_backward()
        fields = {
            **self._fields,
            **self._clock.tags(),
            "call_index": self._calls.next(recompute),
            "recompute": recompute,
        }
        self._sink.write(self._name, tensor, fields)
        if "gradients" in self._sink.config.parts and tensor.requires_grad and self._plain:
            keep_gradient(tensor, f"{self._name}.grad", {**fields, "kind": "grad", "recompute": False}, self._sink)


def keep_gradient(tensor: Tensor, name: str, fields: dict[str, Any], sink: Sink) -> None:
    """Record the gradient of a tensor when autograd has it, with the tags of now."""
    shard = shard_of(tensor, gradient=True)
    if shard.dims is not None:
        fields = {"dims": shard.dims, **columns(shard.coordinates), **fields}

    def keep(gradient: Tensor) -> None:
        sink.write(name, gradient, fields)

    tensor.register_hook(keep)  # type: ignore[no-untyped-call]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare model in its wrappers."""
    while True:
        child = WRAPPERS.get(type(model).__name__)
        if child is None or child not in model._modules:
            return model
        model = model.get_submodule(child)


def _module_fields(module: nn.Module, path: str) -> dict[str, Any]:
    kind = bare_class(module)
    file, line = source(cast(Any, kind))
    return {
        "layer": layer_of(path),
        "module_path": path,
        "module_class": kind.__name__,
        "source_file": file,
        "source_line": line,
    }


def _by_pattern(model: nn.Module, patterns: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[str]]:
    """Split patterns into globs of modules with a side, and sites of the table.

    Raises:
        SiteError: a glob that meets no module.
    """
    by_path, tabled = [], []
    paths = [place.path for place in places(model)] if patterns else []
    for text in patterns:
        pattern = SitePattern.parse(text)
        if pattern.module is None:
            tabled.append(text)
        elif any(fnmatch.fnmatchcase(path, pattern.module) for path in paths):
            by_path.append((pattern.module, pattern.point))
        else:
            known = ", ".join(path for path in paths[:8] if path)
            raise SiteError(f"{text}: {type(model).__name__} has no module {pattern.module!r}; it has {known}, ...")
    return by_path, tabled


def _unselected(place: Place, config: DumpConfig, by_path: list[tuple[str, str]]) -> str:
    depth = place.path.count(".") + 1 if place.path else 0
    if config.depth is not None and depth > config.depth:
        return f"not selected: depth {depth} is below depth={config.depth}"
    if config.classes and bare_class(place.module).__name__ not in config.classes:
        return f"not selected: classes={','.join(config.classes)}"
    if config.sites and not any(fnmatch.fnmatchcase(place.path, glob) for glob, _ in by_path):
        return "not selected by sites"
    return ""


def _sides(place: Place, config: DumpConfig, by_path: list[tuple[str, str]], root: nn.Module) -> frozenset[str]:
    wanted = frozenset(side for part, side in _SIDES.items() if part in config.parts)
    if not config.sites:
        return wanted
    if place.module is root:
        return wanted & {"input"}
    asked = {side for glob, side in by_path if fnmatch.fnmatchcase(place.path, glob)}
    return frozenset(asked | ({"grad_output"} & wanted if "output" in asked else set()))


def _as_tensor(value: Any) -> Any:
    """A plain argument as a tensor, so that two runs can be compared in it; texts as bytes."""
    if isinstance(value, str):
        return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8) if value else value
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else value


def _entry(path: str, module: nn.Module, reason: str) -> dict[str, str]:
    return {"module": path, "class": type(module).__name__, "reason": reason}
