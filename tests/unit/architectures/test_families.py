"""Every site of every family, against the model's own modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab import architectures, hooks
from trimtab.errors import BackendError, SiteError
from trimtab.sites import Site
from trimtab.testing.models import tiny

DTYPES = (torch.float32, torch.bfloat16)
SANDWICH = ("gemma2", "gemma3", "gemma3_multimodal", "olmo2")


def run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_every_site_back_unchanged_keeps_the_logits_bit_for_bit(
    family: str, dtype: torch.dtype, tools: SimpleNamespace
) -> None:
    model, model_map = tools.built(family, dtype)
    ids = tools.tokens()
    plain = run(model, ids)
    pairs = [(model_map.handle(site), lambda x: x.clone()) for site in model_map.sites()]
    with hooks.attach(model, pairs) as attached:
        written = run(model, ids)
    assert torch.equal(plain, written)
    assert set(attached.calls.values()) == {1}, "every site's module runs once per forward pass"
    assert torch.equal(run(model, ids), plain), "hooks are gone"


@pytest.mark.parametrize("dtype", DTYPES)
def test_contributions_add_up_exactly_and_blocks_are_chained(
    family: str, dtype: torch.dtype, tools: SimpleNamespace
) -> None:
    model, model_map = tools.built(family, dtype)
    seen = tools.capture(model, model_map)
    for layer in range(model_map.num_layers):
        pre, attn, mlp, post = (
            seen[f"layers.{layer}.{point}"] for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if "resid_mid" in model_map.points(layer):
            mid = seen[f"layers.{layer}.resid_mid"]
            assert torch.equal(pre + attn, mid)
            assert torch.equal(mid + mlp, post)
        else:
            assert torch.equal(mlp + attn + pre, post)
        if layer:
            assert torch.equal(seen[f"layers.{layer - 1}.resid_post"], pre)


@pytest.mark.parametrize("family", SANDWICH)
def test_raw_module_outputs_are_not_what_a_sandwich_block_adds(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.float32)
    seen = tools.capture(model, model_map)
    pre, attn, mlp, post = (seen[f"layers.0.{p}"] for p in ("resid_pre", "attn_raw", "mlp_raw", "resid_post"))
    assert (pre + attn + mlp - post).abs().max() > 1.0
    assert model_map.numerics.residual in ("sandwich", "post_norm")


def test_shapes_are_batch_sequence_width(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.float32)
    seen = tools.capture(model, model_map)
    for site in model_map.sites():
        assert seen[str(site)].shape == (2, 12, model_map.handle(site).width), site
    sizes = model_map.sizes
    full = f"layers.{model_map.num_layers - 1}"
    assert seen[f"{full}.q"].shape[-1] == seen[f"{full}.attn_z"].shape[-1] == sizes.heads * sizes.head_dim
    assert seen[f"{full}.k"].shape[-1] == seen[f"{full}.v"].shape[-1] == sizes.kv_heads * sizes.head_dim
    assert seen["logits"].shape[-1] == model_map.vocab_size == 128


def test_branches_recomputed_from_the_models_modules(family: str, tools: SimpleNamespace) -> None:
    """attn_z through the output projection is attn_raw, mlp_act through the down projection is mlp_raw, and so on."""
    model, model_map = tools.built(family, torch.float32)
    seen = tools.capture(model, model_map)
    for layer in range(model_map.num_layers):
        for inner, outer in (("attn_z", "attn_raw"), ("mlp_act", "mlp_raw")):
            if inner in model_map.points(layer):
                project = model.get_submodule(model_map.handle(f"layers.{layer}.{inner}").module_path)
                with torch.no_grad():
                    again = project(seen[f"layers.{layer}.{inner}"])
                torch.testing.assert_close(again, seen[f"layers.{layer}.{outer}"])
        if "resid_mid" in model_map.points(layer):
            assert_mlp_follows_mid(model, model_map, layer, seen)
    with torch.no_grad():
        normed = model.get_submodule(model_map.handle("final_norm").module_path)(
            seen[f"layers.{model_map.num_layers - 1}.resid_post"]
        )
        logits = model.get_output_embeddings()(normed)
    assert torch.equal(normed, seen["final_norm"])
    cap = model_map.numerics.logit_softcap
    expected = logits if cap is None or "multimodal" in family else cap * torch.tanh(logits / cap)
    assert torch.equal(expected, seen["logits"])
    assert torch.equal(seen["logits"], seen["result"])


def assert_mlp_follows_mid(model: nn.Module, model_map: Any, layer: int, seen: dict[str, Tensor]) -> None:
    """The block's own modules, called on resid_mid in the order of the family, give mlp_out."""
    block = model.get_submodule(f"{model_map.blocks_path}.{layer}")
    mid_path = model_map.handle(f"layers.{layer}.resid_mid").module_path
    mlp = model.get_submodule(model_map.handle(f"layers.{layer}.mlp_raw").module_path)
    with torch.no_grad():
        x = seen[f"layers.{layer}.resid_mid"]
        entry = model.get_submodule(mid_path)
        x = x if entry is mlp else entry(x)
        x = mlp(x)
        x = (x[0] if isinstance(x, tuple) else x).reshape(seen[f"layers.{layer}.resid_mid"].shape)
        x = block.post_feedforward_layernorm(x) if hasattr(block, "post_feedforward_layernorm") else x
    torch.testing.assert_close(x, seen[f"layers.{layer}.mlp_out"])


def test_q_k_v_are_what_the_attention_function_receives(
    family: str, tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At position 0 the rotary embedding is the identity, so that q and k can be compared through their norms alone."""
    model, model_map = tools.built(family, torch.float32)
    received: dict[int, tuple[Tensor, ...]] = {}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        received[module.layer_idx] = (query, key, value)
        return plain(module, query, key, value, *args, **kwargs)

    for config in (model.config, model.config.get_text_config(decoder=True)):
        monkeypatch.setattr(config, "_attn_implementation", "spy")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "spy", spy)
    seen = tools.capture(model, model_map)
    assert received
    for layer, tensors in received.items():
        attention = model.get_submodule(model_map.handle(f"layers.{layer}.attn_raw").module_path)
        for name, actual in zip("qkv", tensors, strict=True):
            flat = seen[f"layers.{layer}.{name}"]
            norm = getattr(attention, f"{name}_norm", None) or getattr(attention, "qk_norm", None)
            with torch.no_grad():
                if norm is not None and name != "v" and model_map.numerics.qk_norm == "full_width":
                    flat = norm(flat)
                heads = flat.reshape(2, 12, -1, model_map.head_dim)
                if norm is not None and name != "v" and model_map.numerics.qk_norm != "full_width":
                    heads = norm(heads)
            positions = slice(None) if name == "v" else slice(0, 1)
            torch.testing.assert_close(heads.transpose(1, 2)[:, :, positions], actual[:, :, positions])


def test_an_ablation_at_any_site_changes_the_logits(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.float32)
    ids = tools.tokens()
    plain = run(model, ids)
    after: dict[str, Tensor] = {}
    for site in model_map.sites():
        keep = (torch.arange(model_map.handle(site).width) % 2).float()  # scaling alone is undone by a norm
        with hooks.attach(model, [(model_map.handle(site), lambda x, keep=keep: x * keep)]):
            after[str(site)] = run(model, ids)
        assert (after[str(site)] - plain).abs().max() > 1e-4, site
    assert torch.equal(after["layers.0.resid_post"], after["layers.1.resid_pre"])


def test_resid_mid_and_attn_out_steer_alike(family: str, tools: SimpleNamespace) -> None:
    """Adding a vector to the contribution or to the sum is one thing; a norm's input alone would miss the residual."""
    model, model_map = tools.built(family, torch.float32)
    if "resid_mid" not in model_map.points(0):
        assert model_map.numerics.residual == "parallel"
        return
    ids = tools.tokens()
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    plain = run(model, ids)
    effects = []
    for point in ("attn_out", "resid_mid"):
        with hooks.attach(model, [(model_map.handle(f"layers.0.{point}"), lambda x: x + vector)]):
            effects.append(run(model, ids) - plain)
    # 1e-5: two orders of adding three float32 numbers, carried through the rest of the model
    assert (effects[0] - effects[1]).norm() < 1e-5 * effects[0].norm()


def test_an_absent_site_says_why_and_what_exists(tools: SimpleNamespace) -> None:
    def message(family: str, site: str) -> str:
        with pytest.raises(SiteError) as caught:
            tools.built(family, torch.float32)[1].handle(site)
        return str(caught.value)

    parallel = message("gpt_neox", "layers.1.resid_mid")
    assert "parallel" in parallel and all(name in parallel for name in ("attn_out", "mlp_out", "resid_post"))
    linear = message("qwen3_next", "layers.0.q")
    assert "linear attention" in linear and "attn_raw" in linear and "layer 0 has: resid_pre" in linear
    assert "mixture of experts" in message("mixtral", "layers.0.mlp_act")
    assert "layers 0 to 1; nearest: layers.1.resid_post" in message("llama", "layers.7.resid_post")
    assert "module tree" in message("llama", "module:model.norm.output")


def test_a_base_model_without_head_has_no_logits(tools: SimpleNamespace) -> None:
    base = tools.built("llama", torch.float32)[0].model
    model_map = architectures.describe(base)
    assert model_map.handle("layers.1.resid_post").module_path == "layers.1"
    with pytest.raises(SiteError, match="no logits: its class has no such module; it has: embed, final_norm"):
        model_map.handle("logits")


def test_embed_is_not_the_first_resid_pre_where_positions_are_added(tools: SimpleNamespace) -> None:
    sites = ("embed", "layers.0.resid_pre")
    for family, equal in (("gpt2", False), ("granite", False), ("llama", True), ("gemma", True)):
        seen = tools.capture(*tools.built(family, torch.float32), sites)
        assert torch.equal(*(seen[site] for site in sites)) is equal, family


def test_the_text_tower_is_found_in_wrappers(tools: SimpleNamespace) -> None:
    expected = {
        "llama4": "model",
        "llama4_multimodal": "language_model.model",
        "gemma3": "model",
        "gemma3_multimodal": "model.language_model",
        "qwen2_5_vl": "model.language_model",
    }
    for family, path in expected.items():
        model, model_map = tools.built(family, torch.float32)
        assert model_map.text_path == path
        assert model_map.hidden_size == 64 and model_map.num_layers == 2
        assert model.get_submodule(path).layers is model.get_submodule(model_map.blocks_path)


def test_auto_classes_give_described_models() -> None:
    """AutoModelForCausalLM gives the multimodal class for gemma3 and the text class for llama4."""
    from transformers import AutoModelForCausalLM

    for family, name in (("gemma3_multimodal", "Gemma3ForConditionalGeneration"), ("llama4", "Llama4ForCausalLM")):
        model = AutoModelForCausalLM.from_config(tiny(family).config)
        assert type(model).__name__ == name
        assert architectures.describe(model).num_layers == 2


def test_hidden_states_of_the_last_layer_are_normed_and_the_site_is_not(tools: SimpleNamespace) -> None:
    model, model_map = tools.built("qwen3", torch.float32)
    seen = tools.capture(model, model_map, ["layers.0.resid_post", "layers.1.resid_post", "final_norm"])
    with torch.no_grad():
        states = tiny("qwen3")(input_ids=tools.tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen["layers.0.resid_post"])
    assert torch.equal(states[2], seen["final_norm"])
    assert not torch.equal(states[2], seen["layers.1.resid_post"])


def test_a_model_without_configuration_is_refused() -> None:
    with pytest.raises(BackendError, match=r"Linear has no transformers configuration.*module:"):
        architectures.describe(nn.Linear(2, 2))


def test_weights_that_do_not_fit_the_configuration_are_refused() -> None:
    model = tiny("phi3")
    model.config.num_key_value_heads = 4
    with pytest.raises(BackendError, match=r"projection is 128 wide; 4 \+ 2 x 4 heads of 16 make 192"):
        architectures.describe(model)


def test_sites_are_listed_in_the_order_of_a_forward_pass(tools: SimpleNamespace) -> None:
    names = [str(site) for site in tools.built("llama", torch.float32)[1].sites()]
    assert names[0] == "embed" and names[-2:] == ["final_norm", "logits"]
    assert names.index("layers.0.resid_mid") < names.index("layers.0.mlp_out") < names.index("layers.1.resid_pre")
    assert Site.parse(names[3]).layer == 0
