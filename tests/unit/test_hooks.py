"""Hooks: order, writes, containers, counts, gradients, refusals, and removal whatever happens."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import architectures, hooks
from trimtab.architectures import ModelMap
from trimtab.errors import BackendError, SiteError
from trimtab.sites import Site
from trimtab.testing.models import tiny

VECTOR = torch.linspace(-1, 1, 64)


@functools.cache
def built(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ModelMap]:
    model = tiny(family, dtype=dtype)
    return model, architectures.describe(model, allow_fallback=True)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(8, 104, (batch, length), generator=torch.Generator().manual_seed(7))


def run(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


def no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_visitors_of_a_site_run_in_order_and_see_earlier_writes() -> None:
    model, model_map = built("qwen3")
    handle = model_map.handle("layers.0.resid_post")
    seen: list[Tensor] = []

    def look(x: Tensor) -> None:
        seen.append(x.clone())

    pairs = [(handle, look), (handle, lambda x: x + VECTOR), (handle, look), (handle, lambda x: x * 2), (handle, look)]
    with hooks.attach(model, pairs):
        run(model)
    before, added, doubled = seen
    assert torch.equal(added, before + VECTOR)
    assert torch.equal(doubled, added * 2)


def test_sites_on_one_module_follow_the_forward_pass_not_the_order_given() -> None:
    """attn_raw, attn_out and the module itself are one tensor in Llama; raw comes first, module sites last."""
    model, model_map = built("llama")
    order: list[str] = []
    module_site = hooks.module_handle(model, "module:model.layers.0.self_attn.output")
    handles = [module_site, model_map.handle("layers.0.attn_out"), model_map.handle("layers.0.attn_raw")]
    with hooks.attach(model, [(handle, lambda x, name=str(handle.site): order.append(name)) for handle in handles]):
        run(model)
    assert order == ["layers.0.attn_raw", "layers.0.attn_out", "module:model.layers.0.self_attn.output"]


@pytest.mark.parametrize("family", ["falcon", "llama", "gpt_oss", "llama4", "gpt2"])
def test_every_row_is_steered_whatever_container_the_module_returns(family: str) -> None:
    """Falcon's blocks return tuples, Llama's tensors; MoE modules of gpt-oss tuples, of Llama 4 flattened rows."""
    model, model_map = built(family)
    plain = run(model)
    for site in ("layers.0.resid_post", "layers.1.mlp_out", "layers.1.attn_out"):
        shapes: list[torch.Size] = []

        def add(x: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(x.shape)
            return x + VECTOR

        with hooks.attach(model, [(model_map.handle(site), add)]):
            steered = run(model)
        assert shapes == [torch.Size((2, 9, 64))]
        assert ((steered - plain).abs().amax(-1) > 1e-4).all(), (family, site, "every row and position moves")


def test_containers_come_back_as_they_were() -> None:
    pair = namedtuple("pair", ["first", "second"])

    class Several(nn.Module):
        def __init__(self, make: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor) -> Any:
            return self.make(x)

    for make in (lambda x: (None, x, 3), lambda x: [x, 3], lambda x: pair(x, 3), lambda x: {"a": 3, "b": x}):
        model = nn.Sequential(Several(make))
        plain = model(torch.ones(2))
        with hooks.attach(model, [(hooks.module_handle(model, "module:0.output"), lambda x: x + 1)]):
            changed = model(torch.ones(2))
        assert type(changed) is type(plain) and len(changed) == len(plain)
        values = changed.values() if isinstance(changed, dict) else changed
        assert [v.tolist() if isinstance(v, Tensor) else v for v in values] == [
            [2.0, 2.0] if isinstance(v, Tensor) else v for v in (plain.values() if isinstance(plain, dict) else plain)
        ]


def test_a_module_without_a_tensor_is_an_error_that_names_the_site() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    model = nn.Sequential(Nothing())
    with (
        hooks.attach(model, [(hooks.module_handle(model, "module:0.output"), lambda x: None)]),
        pytest.raises(BackendError, match=r"module:0\.output: module '0' returned str without a tensor"),
    ):
        model(torch.ones(2))


def test_llama4_router_is_left_alone_by_a_write_at_mlp_out() -> None:
    model, model_map = built("llama4")
    results: list[Any] = []
    with hooks.attach(model, [(model_map.handle("layers.1.mlp_out"), lambda x: x + VECTOR)]):
        handle = model.model.layers[1].feed_forward.register_forward_hook(lambda m, a, out: results.append(out))
        run(model)
        handle.remove()
    plain: list[Any] = []
    handle = model.model.layers[1].feed_forward.register_forward_hook(lambda m, a, out: plain.append(out))
    run(model)
    handle.remove()
    assert results[0][0].shape == plain[0][0].shape == (18, 64)
    assert torch.equal(results[0][0], plain[0][0] + VECTOR)
    assert torch.equal(results[0][1], plain[0][1])


def test_inputs_given_by_keyword_are_found() -> None:
    """self_attn is called with keywords only: a bare pre-hook sees no arguments."""
    model, _ = built("llama")
    attention = model.model.layers[0].self_attn
    bare: list[int] = []
    remover = attention.register_forward_pre_hook(lambda module, args: bare.append(len(args)))
    seen: list[Tensor] = []
    handle = hooks.module_handle(model, "module:model.layers.0.self_attn.input")

    def visit(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    plain = run(model)
    with hooks.attach(model, [(handle, visit)]):
        changed = run(model)
    remover.remove()
    assert bare[0] == 0 and seen[0].shape == (2, 9, 64)
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "olmo2"])
def test_what_a_visitor_keeps_is_not_changed_by_later_writes(family: str) -> None:
    """resid_mid is written into the tensor itself, which must not reach a capture taken before, even uncloned."""
    model, model_map = built(family)
    handle = model_map.handle("layers.0.resid_mid")
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(x: Tensor) -> None:
        kept.append(x)
        copies.append(x.clone())

    with hooks.attach(model, [(handle, keep), (handle, lambda x: x + VECTOR), (handle, keep)]):
        run(model)
    assert all(torch.equal(one, two) for one, two in zip(kept, copies, strict=True))
    assert torch.equal(copies[1], copies[0] + VECTOR)


def test_falcons_in_place_addition_does_not_reach_captures_or_writes() -> None:
    model, model_map = built("falcon")
    kept: dict[str, list[Tensor]] = {"mlp": [], "attn": []}
    mlp, attn = model_map.handle("layers.0.mlp_out"), model_map.handle("layers.0.attn_out")
    pairs = [
        (mlp, lambda x: kept["mlp"].append(x)),
        (mlp, lambda x: x + VECTOR),
        (mlp, lambda x: kept["mlp"].append(x)),
        (attn, lambda x: kept["attn"].append(x)),
    ]
    with hooks.attach(model, pairs):
        run(model)
    before, after = kept["mlp"]
    assert torch.equal(after, before + VECTOR)
    with hooks.attach(model, [(mlp, lambda x: kept["mlp"].append(x))]):
        run(model)
    assert torch.equal(kept["mlp"][2], before), "also where nobody writes"
    block = model.transformer.h[0]
    captured: list[Tensor] = []
    remover = block.mlp.register_forward_hook(lambda module, args, output: captured.append(output))
    run(model)
    remover.remove()
    torch.testing.assert_close(captured[0], before + kept["attn"][0])  # what a bare hook keeps: both, added up


def test_hidden_states_of_transformers_do_not_disturb_own_hooks() -> None:
    """output_hidden_states installs hooks that hide later writes from its own tuple; ours see the true stream."""
    model, model_map = tiny("qwen3"), built("qwen3")[1]
    ids = tokens()
    with torch.no_grad():
        model(input_ids=ids, output_hidden_states=True)
    seen: list[Tensor] = []
    pairs = [
        (model_map.handle("layers.0.resid_post"), lambda x: x + VECTOR),
        (model_map.handle("layers.1.resid_pre"), lambda x: seen.append(x.clone())),
    ]
    with hooks.attach(model, pairs), torch.no_grad():
        reported = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert (seen[0] - reported - VECTOR).abs().max() < 1e-5, "the tuple shows the unsteered tensor"


def test_logits_are_those_after_the_softcap_and_can_be_written_in_generate() -> None:
    model, model_map = built("gemma2")
    handle = model_map.handle("logits")

    def prefer(x: Tensor) -> Tensor:
        assert x.abs().max() <= 30.0
        raised = x.clone()
        raised[..., 77] = 100.0
        return raised

    with hooks.attach(model, [(handle, prefer)]) as attached:
        out = model.generate(tokens(1), max_new_tokens=3, do_sample=False, attention_mask=torch.ones(1, 9).long())
    assert out[0, -3:].tolist() == [77, 77, 77]
    assert attached.calls[handle.site] == 3
    for labels in (None, tokens()):
        with hooks.attach(model, [(handle, lambda x: torch.zeros_like(x))]), torch.no_grad():
            result = model(input_ids=tokens(), labels=labels, return_dict=False)
        assert type(result) is tuple
        assert (result[0] if labels is None else result[1]).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vector_of_another_dtype_is_refused_and_the_stream_keeps_its_dtype(dtype: torch.dtype) -> None:
    model, model_map = built("qwen3", dtype)
    handle = model_map.handle("layers.0.resid_post")
    message = rf"layers\.0\.resid_post: a visitor returned torch\.float32 \(2, 9, 64\), the site holds {dtype}"
    with hooks.attach(model, [(handle, lambda x: x + VECTOR)]), pytest.raises(BackendError, match=message):
        run(model)
    dtypes: set[torch.dtype] = set()
    pairs = [(model_map.handle(site), lambda x: dtypes.add(x.dtype)) for site in model_map.sites()]
    with hooks.attach(model, [(handle, lambda x: (x + VECTOR).to(x.dtype)), *pairs]):
        run(model)
    assert dtypes == {dtype}


def test_a_result_of_another_shape_is_refused() -> None:
    model, model_map = built("qwen3")
    for wrong in (lambda x: x[:1], lambda x: x[..., :32]):
        with (
            hooks.attach(model, [(model_map.handle("layers.0.q"), wrong)]),
            pytest.raises(BackendError, match="cast and reshape the result"),
        ):
            run(model)


def test_hooks_are_removed_whatever_happens() -> None:
    model, model_map = built("gpt2")
    handle = model_map.handle("layers.1.resid_post")

    def fail(x: Tensor) -> None:
        raise ZeroDivisionError("inside a visitor")

    with pytest.raises(ZeroDivisionError, match="inside a visitor"), hooks.attach(model, [(handle, fail)]):
        run(model)
    assert no_hooks(model)
    with pytest.raises(ZeroDivisionError), hooks.attach(model, [(handle, fail)]):
        model.generate(tokens(1), max_new_tokens=2, attention_mask=torch.ones(1, 9).long())
    assert no_hooks(model)
    missing = hooks.ModuleHandle(site=Site.parse("module:zzz.output"), module_path="zzz", side="output")
    with pytest.raises(AttributeError):
        hooks.attach(model, [(handle, lambda x: None), (missing, lambda x: None)])
    assert no_hooks(model), "hooks set before the failure are taken off again"
    attached = hooks.attach(model, [(handle, lambda x: None)])
    attached.remove()
    attached.remove()
    assert no_hooks(model)


def test_calls_are_counted_and_indexed_within_a_forward_pass() -> None:
    """One block that runs three times per forward: its calls are told apart."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    model = Shared()
    handle = hooks.module_handle(model, "module:block.output")
    indices: list[int] = []
    with hooks.attach(model, [(handle, lambda x: indices.append(attached.call_index(handle.site)))]) as attached:
        model(torch.ones(4))
        model(torch.ones(4))
    assert indices == [0, 1, 2, 0, 1, 2]
    assert attached.calls == {handle.site: 6}


def test_decoding_calls_once_per_token() -> None:
    model, model_map = built("qwen3")
    lengths: list[int] = []
    handle = model_map.handle("layers.1.resid_post")
    with hooks.attach(model, [(handle, lambda x: lengths.append(x.shape[1]))]) as attached:
        model.generate(
            tokens(1), max_new_tokens=4, min_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, 9).long()
        )
    assert lengths == [9, 1, 1, 1]
    assert attached.calls[handle.site] == 4


# ---- gradients ------------------------------------------------------------------------------------------------------


def cap(x: Tensor) -> Tensor:
    """A nonlinear op whose backward needs its input."""
    unit = VECTOR / VECTOR.norm()
    p = x @ unit
    return x + (p.clamp(max=-1.0) - p)[..., None] * unit


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "olmo2", "gpt2"])
def test_gradients_flow_through_resid_mid_as_through_an_out_of_place_write(family: str) -> None:
    """The reference adds the op's correction to the attention contribution, out of place."""
    model, model_map = built(family)
    ids = tokens()
    pre: list[Tensor] = []

    def by_contribution(x: Tensor) -> Tensor:
        mid = pre[-1] + x
        return x + (cap(mid) - mid)

    gradients = []
    for pairs in (
        [(model_map.handle("layers.1.resid_mid"), cap)],
        [
            (model_map.handle("layers.1.resid_pre"), lambda x: pre.append(x)),
            (model_map.handle("layers.1.attn_out"), by_contribution),
        ],
    ):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with hooks.attach(model, pairs):
            loss = model(inputs_embeds=embedded, use_cache=False).logits.square().mean()
            gradients.append(torch.autograd.grad(loss, embedded)[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    plain = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=plain, use_cache=False).logits.square().mean()
    assert (torch.autograd.grad(loss, plain)[0] - gradients[1]).norm() > 1e-3 * gradients[1].norm()


def test_module_gradients_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(3, 4)
    seen: dict[str, Tensor] = {}
    sides = ("input", "output", "grad_input", "grad_output")
    handles = {side: hooks.module_handle(model, f"module:1.{side}") for side in sides}

    def keep(side: str) -> Callable[[Tensor], None]:
        return lambda value: seen.__setitem__(side, value.detach().clone())

    with hooks.attach(model, [(handle, keep(side)) for side, handle in handles.items()]) as attached:
        model(x).sum().backward()
    weight = model[2].weight
    torch.testing.assert_close(seen["grad_output"], weight.expand(3, 4).detach())
    torch.testing.assert_close(seen["grad_input"], (weight * (1 - seen["output"] ** 2)).detach())
    assert set(attached.calls.values()) == {1}


def test_grad_input_is_the_gradient_through_that_module_alone() -> None:
    """A residual stream is read by the branch and by the sum; the branch's share is 2, the stream's is 3."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(1, 1, bias=False)
            self.branch.weight.data.fill_(2.0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(input=x)

    model = Residual()
    shares: list[float] = []
    x = torch.ones(1, requires_grad=True)
    handle = hooks.module_handle(model, "module:branch.grad_input")
    with hooks.attach(model, [(handle, lambda g: shares.append(g.item()))]):
        model(x).backward()
    assert shares == [2.0] and x.grad is not None and x.grad.item() == 3.0


def test_gradients_can_be_written_until_the_hooks_are_removed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.ones(2, requires_grad=True)
    handle = hooks.module_handle(model, "module:0.grad_output")
    with hooks.attach(model, [(handle, lambda g: torch.zeros_like(g))]):
        model(x).backward()
        assert x.grad is not None and x.grad.abs().max() == 0
        later = model(x)
    later.backward()
    assert x.grad.abs().max() > 0, "a backward pass after removal is left alone"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrapped", "in_place", "forward", "layer", "generate"])
def test_a_hook_after_compilation_is_refused(how: str) -> None:
    model = tiny("qwen3")
    handle = built("qwen3")[1].handle("layers.0.mlp_out")
    target: Any = model
    if how == "wrapped":
        target = torch.compile(model, backend="eager")
    elif how == "in_place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    elif how == "layer":
        model.model.layers[0].compile(backend="eager")
    else:
        model._compiled_call = torch.compile(model.__call__, backend="eager")  # as generate does with a static cache
    with pytest.raises(
        BackendError, match=r"layers\.0\.mlp_out: .* compiled by torch\.compile.*attach before compiling"
    ):
        hooks.attach(target, [(handle, lambda x: None)])
    assert no_hooks(model)


def test_a_compiled_layer_elsewhere_does_not_matter() -> None:
    model = tiny("qwen3")
    model.model.layers[1].compile(backend="eager")
    hooks.attach(model, [(built("qwen3")[1].handle("layers.0.mlp_out"), lambda x: None)]).remove()


def test_hooks_set_before_compilation_act_and_count_without_recompiling() -> None:
    torch._dynamo.reset()
    model, model_map = tiny("qwen3"), built("qwen3")[1]
    pairs = [
        (model_map.handle("layers.0.resid_post"), lambda x: x + VECTOR),
        (model_map.handle("layers.1.resid_mid"), cap),
        (model_map.handle("logits"), lambda x: None),
    ]
    plain = run(model)
    with hooks.attach(model, pairs) as attached:
        eager = run(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        first = run(compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = run(compiled)
    assert torch.equal(eager, first) and torch.equal(first, second) and not torch.equal(plain, eager)
    assert set(attached.calls.values()) == {3}
    torch._dynamo.reset()


def test_autocast_is_refused_unless_allowed() -> None:
    model, model_map = built("qwen3")
    pairs = [(model_map.handle("layers.0.resid_post"), lambda x: None)]
    with (
        hooks.attach(model, pairs),
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(BackendError, match="autocast is active on cpu"),
    ):
        run(model)
    with hooks.attach(model, pairs, allow_autocast=True) as attached, torch.autocast("cpu", dtype=torch.bfloat16):
        run(model)
    assert set(attached.calls.values()) == {1}


def test_unknown_modules_are_refused_with_the_nearest_names() -> None:
    model, _ = built("qwen3")
    with pytest.raises(SiteError, match=r"no module 'model\.layer\.0\.mlp'; nearest: model\.layers\.0\.mlp"):
        hooks.module_handle(model, "module:model.layer.0.mlp.output")
    with pytest.raises(SiteError, match=r"layers\.0\.resid_post is not a module site"):
        hooks.module_handle(model, "layers.0.resid_post")
