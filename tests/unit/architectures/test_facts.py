"""What the table says about a family, against the modules, checkpoint files and vLLM's own registry."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.architectures import FAMILIES, Family, Numerics
from trimtab.testing.models import tiny


def norm_by_formula(numerics: Numerics, module: nn.Module, x: Tensor) -> Tensor:
    """The norm of the table, in the dtype of `x`, with the roundings that the table states."""
    wide, weight = x.float(), module.weight.float()
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if numerics.norm == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if numerics.norm == "layernorm":
        return (normed * weight + module.bias.float()).to(x.dtype)
    if numerics.norm == "rmsnorm_plus_one":
        weight = 1 + weight
    if numerics.norm_rounds_first:
        return (normed.to(x.dtype).float() * weight).to(x.dtype)
    return (normed * weight).to(x.dtype)


def test_norms_follow_the_stated_formula_bit_for_bit(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.bfloat16)
    module = model.get_submodule(model_map.handle("final_norm").module_path)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    with torch.no_grad():
        actual, expected = module(x), norm_by_formula(model_map.numerics, module, x)
    if model_map.numerics.norm == "layernorm":
        # torch's fused kernel sums in another order: one bfloat16 step, in few places
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-9)
    else:
        assert torch.equal(actual, expected)


def test_attention_scale_and_q_k_norm(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.float32)
    numerics, sizes = model_map.numerics, model_map.sizes
    attention = model.get_submodule(model_map.handle("layers.1.attn_z").module_path.rpartition(".")[0])
    # GPT-2 keeps no attribute; its class divides by sqrt(head_dim) unless scale_attn_weights is off
    assert numerics.attention_scale == pytest.approx(getattr(attention, "scaling", 0.25), rel=1e-12)
    norm = getattr(attention, "q_norm", None)
    if norm is not None:
        width = norm.weight.shape[0]
        assert {sizes.head_dim: "per_head", sizes.heads * sizes.head_dim: "full_width"}[width] == numerics.qk_norm
    else:
        assert numerics.qk_norm == ("l2" if hasattr(attention, "qk_norm") or "llama4" in family else "none")


def test_rotary_embedding_and_embedding_scale(family: str, tools: SimpleNamespace) -> None:
    model, model_map = tools.built(family, torch.float32)
    text = model.get_submodule(model_map.text_path)
    rope = model_map.numerics.rope
    assert (rope is None) == (not hasattr(text, "rotary_emb"))
    if rope is not None:
        tables = [b for name, b in text.rotary_emb.named_buffers() if name.endswith("inv_freq")]
        assert tables and all(2 * t.numel() == rope.fraction * model_map.head_dim for t in tables)
        halves = hasattr(sys.modules[type(text).__module__], "rotate_half")
        assert halves == (rope.pairing == "half")
    ids = tools.tokens()
    embedding = model.get_submodule(model_map.handle("embed").module_path)
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), embedding.weight[ids] * model_map.numerics.embed_scale)


def test_softcaps_and_residual_form(tools: SimpleNamespace) -> None:
    numerics = {
        name: tools.built(name, torch.float32)[1].numerics for name in ("gemma2", "gemma3", "llama", "gpt_neox")
    }
    assert (numerics["gemma2"].attention_softcap, numerics["gemma2"].logit_softcap) == (50.0, 30.0)
    assert numerics["gemma3"].attention_softcap is None and numerics["gemma3"].logit_softcap is None
    assert numerics["llama"].residual == "sequential" and numerics["gpt_neox"].residual == "parallel"
    assert tools.built("gpt_neox_sequential", torch.float32)[1].numerics.residual == "sequential"
    assert numerics["gpt_neox"].rope.fraction == 0.25


def test_tied_heads_are_recognised() -> None:
    from trimtab import architectures

    model = tiny("llama")
    assert architectures.describe(model).numerics.tied is False
    model.config.tie_word_embeddings = True
    assert architectures.describe(model).numerics.tied is True


def test_weight_names_are_those_of_the_checkpoint_file(family: str, tools: SimpleNamespace, tmp_path: Path) -> None:
    model, model_map = tools.built(family, torch.float32)
    model.save_pretrained(tmp_path)
    disk = model_map.definition.disk(model.config)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for role in (*disk.layers, "embed", "final_norm", "head"):
            layers = [layer for layer in range(2) if disk.name(role, layer=layer, expert=1) in names]
            assert layers, (role, disk.name(role), sorted(names))
        assert torch.equal(file.get_tensor(disk.name("head")), model.get_output_embeddings().weight)
        if "q" in disk.layers:
            module = model.get_submodule(model_map.handle("layers.1.q").module_path)
            assert torch.equal(file.get_tensor(disk.name("q", layer=1)), module.weight)
    assert disk.transposed == (family == "gpt2")
    matrices = {name for name in names if re.search(r"^(?!.*visual).*(layers|h)\.1\.", name) and "bias" not in name}
    known = {disk.name(role, layer=1, expert=expert) for role in disk.layers for expert in range(4)}
    extra = ("_norm.", "shared_expert", "linear_attn", "rotary")
    assert {name for name in matrices - known if not any(part in name for part in extra)} == set()


def families() -> list[Family]:
    return list({family.name: family for family in FAMILIES.values()}.values())


@pytest.mark.parametrize("entry", families(), ids=lambda family: family.name)
def test_vllm_names_are_in_vllms_registry(entry: Family) -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed: its registry cannot be read")
    models = Path(spec.origin).parent / "model_executor" / "models"
    registered = registry(models / "registry.py")
    for name in entry.vllm.architectures:
        module, _ = registered[name]
        assert (module != "transformers") == entry.vllm.native, name
        if not entry.vllm.native:
            continue
        source = (models / f"{module}.py").read_text()
        if "DecoderLayer(nn.Module)" in source:
            assert ("return hidden_states, residual" in source) == entry.vllm.returns_residual, name


def registry(path: Path) -> dict[str, tuple[str, str]]:
    """Architecture -> (module, class), read from the source so that vLLM is not imported."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    found[key.value] = tuple(ast.literal_eval(one) for one in value.elts)  # type: ignore[assignment]
    return found


def test_head_dim_may_differ_from_hidden_over_heads(tools: SimpleNamespace) -> None:
    model_map = tools.built("qwen3", torch.float32)[1]
    assert model_map.head_dim == 32 and model_map.handle("layers.0.q").width == 128
    assert model_map.numerics.attention_scale == pytest.approx(1 / math.sqrt(32))
