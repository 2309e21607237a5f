"""Attach functions to sites of a model: the one place where module hooks are set, ordered and removed.

    with attach(model, [(model_map.handle(site), visit), ...]) as hooks:
        model(**inputs)

`visit(x)` gets the live tensor of the site and returns None (read only) or a tensor of the same shape and dtype, which
takes its place. A visitor that keeps `x` clones it. An exception in a visitor leaves through the model's forward.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trimtab.errors import BackendError, SiteError
from trimtab.sites import Site

__all__ = [
    "HookPoint",
    "HookSet",
    "ModuleHandle",
    "Reader",
    "Visitor",
    "attach",
    "is_compiled",
    "leaves",
    "module_handle",
    "observe",
]

Visitor = Callable[[Tensor], Tensor | None]
Reader = Callable[[Any], None]
Side = Literal["input", "output", "logits", "grad_output", "grad_input"]


class HookPoint(Protocol):
    """What `attach` must know about a site; `architectures.Handle` and `ModuleHandle` are such."""

    @property
    def site(self) -> Site:
        """The site's name."""

    @property
    def module_path(self) -> str:
        """Dotted path of the module; "" is the model."""

    @property
    def side(self) -> Side:
        """Which of the module's tensors."""

    @property
    def in_place(self) -> bool:
        """Write into the tensor itself: the caller goes on with the object that it passed in."""

    @property
    def fragile(self) -> bool:
        """The framework changes the tensor afterwards, so visitors get copies."""

    @property
    def flat(self) -> bool:
        """The module merges batch and sequence."""

    @property
    def plain(self) -> bool:
        """`read` and `put` change nothing."""

    def read(self, raw: Tensor, leading: tuple[int, ...] | None = None) -> Tensor:
        """Cut the site's tensor out of the module's."""

    def put(self, raw: Tensor, value: Tensor) -> Tensor:
        """Return the module's tensor with the site's value in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleHandle:
    """A side of any module, by its path. Of several tensors the first is meant."""

    site: Site
    module_path: str
    side: Side
    in_place: bool = False
    fragile: bool = False
    flat: bool = False
    plain: bool = True

    def read(self, raw: Tensor, leading: tuple[int, ...] | None = None) -> Tensor:
        """Return the module's tensor."""
        return raw

    def put(self, raw: Tensor, value: Tensor) -> Tensor:
        """Return the new tensor."""
        return value


def module_handle(model: nn.Module, site: Site | str) -> ModuleHandle:
    """Return the handle of a site such as `module:encoder.block.3.output`.

    `.grad_output` is the gradient of the loss with respect to the module's output, `.grad_input` the gradient with
    respect to its input through this module alone.

    Raises:
        SiteError: not a module site, or no such module; names the nearest.
    """
    site = Site.parse(site)
    if site.module is None:
        raise SiteError(f"{site} is not a module site; expected module:<path>.output (or .input, .grad_output, ...)")
    paths = dict(model.named_modules())
    if site.module not in paths:
        near = ", ".join(difflib.get_close_matches(site.module, paths, n=3, cutoff=0.0))
        raise SiteError(f"{site}: {type(model).__name__} has no module {site.module!r}; nearest: {near}")
    return ModuleHandle(site=site, module_path=site.module, side=site.point)  # type: ignore[arg-type]


class _Attachment:
    """The visitors of one site, in order, and how often they ran."""

    __slots__ = ("active", "calls", "compiled_calls", "in_forward", "point", "visits")

    def __init__(self, point: HookPoint, visits: Sequence[Visitor], device: torch.device) -> None:
        self.point = point
        self.visits = tuple(visits)
        self.calls = 0
        self.compiled_calls = torch.zeros((), dtype=torch.int64, device=device)
        self.in_forward = 0
        self.active = True

    def run(self, x: Tensor) -> Tensor | None:
        """Pass `x` through the visitors; None when none of them wrote."""
        if torch.compiler.is_compiling():
            self.compiled_calls.add_(1)  # compiled code would be recompiled whenever a Python number changes
        else:
            self.calls += 1
            self.in_forward += 1
        written: Tensor | None = None
        for visit in self.visits:
            result = visit(x)
            if result is not None:
                if result.dtype is not x.dtype or result.shape != x.shape:
                    raise BackendError(self._mismatch(x, result))
                written = x = result
        return written

    def on_tensor(self, raw: Tensor, leading: tuple[int, ...] | None) -> Tensor | None:
        """Return the module's new tensor; None when it stays as it is."""
        point = self.point
        if point.in_place:
            # Visitors get a copy: what they keep, or what autograd saved for them, must survive the write.
            written = self.run(point.read(raw.clone()))
            if written is not None:
                raw.copy_(point.put(raw, written))
            return None
        if point.fragile:
            written = self.run(point.read(raw.clone(), leading))
            return None if written is None else point.put(raw, written).clone()
        if point.plain:
            return self.run(raw)
        written = self.run(point.read(raw, leading))
        return None if written is None else point.put(raw, written)

    def on_gradient(self, gradient: Tensor) -> Tensor | None:
        return self.run(gradient) if self.active else None

    def _mismatch(self, x: Tensor, result: Tensor) -> str:
        return (
            f"{self.point.site}: a visitor returned {result.dtype} {tuple(result.shape)}, the site holds "
            f"{x.dtype} {tuple(x.shape)}; cast and reshape the result before returning it"
        )


class HookSet:
    """Hooks that are set; removes them when the `with` block ends, whatever happened inside."""

    def __init__(self) -> None:
        self._attachments: dict[Site, _Attachment] = {}
        self._removers: list[Callable[[], None]] = []

    @property
    def calls(self) -> Mapping[Site, int]:
        """How often each site's tensor passed, since the hooks were set."""
        return {site: one.calls + int(one.compiled_calls) for site, one in self._attachments.items()}

    def call_index(self, site: Site) -> int:
        """Return which call of the current forward pass this is: 0 unless the module runs several times in one.

        Meant to be read inside a visitor. A forward pass begins when the model given to `attach` is called. Code
        compiled by torch.compile does not keep this index; it reads 0 there.
        """
        return max(self._attachments[site].in_forward - 1, 0)

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for attachment in self._attachments.values():
            attachment.active = False
        while self._removers:
            self._removers.pop()()

    def __enter__(self) -> HookSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def attach(model: nn.Module, visitors: Iterable[tuple[HookPoint, Visitor]], *, allow_autocast: bool = False) -> HookSet:
    """Set hooks at sites of a model.

    Visitors of one site run in the order given. Sites that share a module see each other's writes in the order of a
    forward pass (`attn_raw` before `attn_out`, table sites before `module:` sites).

    Args:
        model: the module whose call is one forward pass.
        visitors: pairs of a site's handle and a function on its tensor.
        allow_autocast: let the model run under autocast; without it a forward pass under autocast raises, because
            autocast also rounds the visitors' own products.

    Returns:
        The hooks, to be used in a `with` statement.

    Raises:
        BackendError: a module is compiled by torch.compile, which would ignore the hook.
    """
    grouped: dict[Site, tuple[HookPoint, list[Visitor]]] = {}
    for point, visit in visitors:
        grouped.setdefault(point.site, (point, []))[1].append(visit)
    hooks = HookSet()
    try:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        hooks._removers.append(_set_boundary(model, hooks, device.type, allow_autocast))
        for site in sorted(grouped, key=lambda site: site.sort_key):
            point, visits = grouped[site]
            module = _find_module(model, point)
            hooks._attachments[site] = attachment = _Attachment(point, visits, device)
            hooks._removers.append(_SETTERS[point.side](module, attachment))
    except BaseException:
        hooks.remove()
        raise
    return hooks


def observe(
    module: nn.Module, *, inputs: Reader | None = None, outputs: Reader | None = None, first: bool = False
) -> Callable[[], None]:
    """Let functions see everything that a module is called with and returns, without a way to change it.

    They are not called in code that torch.compile traces, so that what is compiled stays what it was. Around a module
    that is compiled in place they run outside the compiled code.

    Args:
        module: the module.
        inputs: called with a dict of the arguments, positional ones under their number, before the module runs.
        outputs: called with what the module returned.
        first: run before the hooks that the module has already.

    Returns:
        A function that removes the hooks.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inputs is not None and not torch.compiler.is_compiling():
            inputs({**dict(enumerate(args)), **kwargs})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if outputs is not None and not torch.compiler.is_compiling():
            outputs(output)

    compiled: Any = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def around(*args: Any, **kwargs: Any) -> Any:
            before(module, args, kwargs)
            output = compiled(*args, **kwargs)
            after(module, args, output)
            return output

        module._compiled_call_impl = around
        return lambda: setattr(module, "_compiled_call_impl", compiled)
    handles = []
    if inputs is not None:
        handles.append(module.register_forward_pre_hook(before, prepend=first, with_kwargs=True))
    if outputs is not None:
        handles.append(module.register_forward_hook(after, prepend=first))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Walk mappings, tuples and lists: pairs of a dotted key ("" for a bare value) and what is no container."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, (Mapping, tuple, list)):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _set_boundary(model: nn.Module, hooks: HookSet, device: str, allow_autocast: bool) -> Callable[[], None]:
    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not allow_autocast and torch.is_autocast_enabled(device):
            raise BackendError(
                f"autocast is active on {device}: it would round products inside ops and captures; leave the autocast "
                "block, or load the model in the dtype that is meant"
            )
        if not torch.compiler.is_compiling():
            for attachment in hooks._attachments.values():
                attachment.in_forward = 0

    return model.register_forward_pre_hook(begin).remove


def _set_output(module: nn.Module, attachment: _Attachment) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any, leading: tuple[int, ...] | None = None) -> Any:
        if isinstance(output, Tensor):
            return attachment.on_tensor(output, leading)
        written = attachment.on_tensor(_first(output, attachment.point), leading)
        return None if written is None else _replace_first(output, written)

    def flat_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return hook(module, args, output, tuple(_first_argument(args, kwargs, attachment.point)[1].shape[:-1]))

    if attachment.point.flat:
        return module.register_forward_hook(flat_hook, with_kwargs=True).remove
    return module.register_forward_hook(hook).remove


def _set_input(module: nn.Module, attachment: _Attachment) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, raw = _first_argument(args, kwargs, attachment.point)
        written = attachment.on_tensor(raw, None)
        return None if written is None else _replace_argument(args, kwargs, key, written)

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _set_logits(module: nn.Module, attachment: _Attachment) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if hasattr(output, "logits"):
            written = attachment.on_tensor(output.logits, None)
            if written is not None:
                output.logits = written
            return None
        with_loss = isinstance(output, tuple) and output[0].ndim == 0
        raw = output[1] if with_loss else _first(output, attachment.point)
        written = attachment.on_tensor(raw, None)
        if written is None:
            return None
        return (output[0], written, *output[2:]) if with_loss else _replace_first(output, written)

    return module.register_forward_hook(hook).remove


def _set_grad_output(module: nn.Module, attachment: _Attachment) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raw = _first(output, attachment.point)
        if raw.requires_grad:
            raw.register_hook(attachment.on_gradient)  # type: ignore[no-untyped-call]

    return module.register_forward_hook(hook).remove


def _set_grad_input(module: nn.Module, attachment: _Attachment) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, raw = _first_argument(args, kwargs, attachment.point)
        if not raw.requires_grad:
            return None
        branch = raw.view_as(raw)  # its gradient is that of this module alone, not of the tensor's other uses
        branch.register_hook(attachment.on_gradient)  # type: ignore[no-untyped-call]
        return _replace_argument(args, kwargs, key, branch)

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


_SETTERS: dict[str, Callable[[nn.Module, _Attachment], Callable[[], None]]] = {
    "output": _set_output,
    "input": _set_input,
    "logits": _set_logits,
    "grad_output": _set_grad_output,
    "grad_input": _set_grad_input,
}


def _first(output: Any, point: HookPoint) -> Tensor:
    """The first tensor of what a module returned."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise BackendError(f"{point.site}: module {point.module_path!r} returned {type(output).__name__} without a tensor")


def _replace_first(output: Any, value: Tensor) -> Any:
    """The same kind of container with its first tensor replaced."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(key for key, item in output.items() if isinstance(item, Tensor))] = value
        return changed
    index = next(i for i, item in enumerate(output) if isinstance(item, Tensor))
    items = [*output[:index], value, *output[index + 1 :]]
    return output._make(items) if hasattr(output, "_make") else type(output)(items)


def _first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], point: HookPoint) -> tuple[int | str, Tensor]:
    """The first tensor that a module is called with, and where it stands."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return index, value
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states", kwargs["hidden_states"]
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name, value
    raise BackendError(f"{point.site}: module {point.module_path!r} was called without a tensor")


def _replace_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


def _find_module(model: nn.Module, point: HookPoint) -> nn.Module:
    """The module of a site; refuses one that runs inside compiled code."""
    path = ""
    module = model
    _refuse_compiled(module, path, point)
    for name in point.module_path.split(".") if point.module_path else ():
        path = f"{path}.{name}" if path else name
        module = module.get_submodule(name)
        _refuse_compiled(module, path, point)
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs this module: hooks added to it or below it are ignored."""
    forward = vars(module).get("forward", type(module).forward)
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiled_call", None) is not None
        or (hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False))
    )


def _refuse_compiled(module: nn.Module, path: str, point: HookPoint) -> None:
    if is_compiled(module):
        name = repr(path) if path else "the model"
        raise BackendError(
            f"{point.site}: {name} ({type(module).__name__}) is compiled by torch.compile, which ignores hooks "
            "that are added later; attach before compiling, or use the uncompiled model"
        )
