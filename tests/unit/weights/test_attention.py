"""Attention's options: rotary scaling, softcap, scales, temperature, and value-output along probes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.weights.variants import variant
from tests.unit.weights.watching import watch
from trimtab.errors import InputError
from trimtab.weights import LayerMath, load

Saved = Callable[..., tuple[nn.Module, Path]]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 4,
    "partial_rotary_factor": 1.0,
}  # fmt: skip


def rows(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 4}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"rope_parameters": YARN}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 4}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama4", {"use_qk_norm": False}),
        ("llama4", {"no_rope_layers": [1, 0], "floor_scale": 2, "attn_scale": 0.5}),
        ("llama4", {"no_rope_layers": [1, 0], "attn_temperature_tuning": False}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gemma2", {"attn_logit_softcapping": 0.7}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"attn_logit_softcapping": 0.7}),
        ("gemma3", {"query_pre_attn_scalar": 3}),
        ("olmo2", {"rms_norm_eps": 0.3}),
        ("qwen3", {"rms_norm_eps": 0.3}),
        ("llama4", {"rms_norm_eps": 0.3}),
    ],
    ids=str,
)
def test_options_change_the_formula_as_they_change_the_model(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = variant(family, tmp_path, **options)
    for layer in range(2):
        formula, x = LayerMath(load(tmp_path).layer(layer)), rows()
        # the key is the first token of a sequence that ends with the query: scaled rotary forms see its length
        for offset in range(6):
            logits = watch(model, layer, x[None, : offset + 1])["logits"]
            assert distance(formula.qk(x[offset, None], x[:1], offset)[:, 0, 0], logits[0, :, offset, 0]) < 5e-6
        assert distance(formula.vo(x).total, watch(model, layer, x[:, None])["attn_out"][:, 0]) < 5e-6


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama4", {"no_rope_layers": [1, 0], "floor_scale": 2, "attn_scale": 0.5}),
        ("gemma2", {"attn_logit_softcapping": 0.7}),
        ("qwen2", {"rope_parameters": YARN}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 4}),
    ],
    ids=str,
)
def test_these_options_matter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same rows give other logits under the options, so that a formula that ignores them is seen."""
    variant(family, tmp_path / "plain")
    variant(family, tmp_path / "other", **options)
    one, other = (LayerMath(load(tmp_path / name).layer(1)).qk(rows(), rows(), 5) for name in ("plain", "other"))
    assert distance(one, other) > 0.02


OLDER = [
    (
        "gemma3",
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ([10 ** (-i / 2) for i in range(8)], [10 ** (-6 * i / 8) / 8 for i in range(8)]),
    ),
    (
        "qwen2_vl",
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        ([10 ** (-6 * i / 8) for i in range(8)],) * 2,
    ),
    ("gpt_neox", {"rotary_emb_base": 100, "rotary_pct": 0.5}, ([10 ** (-i / 2) for i in range(4)],) * 2),
]


@pytest.mark.parametrize(("family", "published", "expected"), OLDER, ids=["gemma3", "qwen2_vl", "gpt_neox"])
def test_rotary_parameters_of_older_configurations(
    family: str, published: dict[str, Any], expected: tuple[list[float], ...], saved: Saved, tmp_path: Path
) -> None:
    """Published config.json files still hold rope_theta and rope_scaling; Gemma 3 scales its global layers only."""
    shutil.copytree(saved(family)[1], tmp_path / family)
    written = json.loads((tmp_path / family / "config.json").read_text())
    text = written.get("text_config", written)
    text.pop("rope_parameters")
    text.update(published)
    (tmp_path / family / "config.json").write_text(json.dumps(written))
    for layer in range(2):
        table = load(tmp_path / family).layer(layer).rotary()
        assert table.factor == 1
        torch.testing.assert_close(table.frequencies, torch.tensor(expected[layer]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "llama4", "gpt_neox", "phi3", "gemma3"])
def test_an_offset_rotates_and_zero_does_not(family: str, saved: Saved) -> None:
    formula = LayerMath(load(saved(family)[1]).layer(0), "float64")
    x = rows()
    assert distance(formula.qk(x, x, 40), formula.qk(x, x)) > 0.05
    assert torch.equal(formula.qk(x, x, 0), formula.qk(x, x))


def test_positions_do_not_matter_where_nothing_rotates(saved: Saved) -> None:
    formula = LayerMath(load(saved("gpt2")[1]).layer(0))
    assert torch.equal(formula.qk(rows(), rows(), 40), formula.qk(rows(), rows()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "olmo2", "qwen3_next", "gpt_neox"])
def test_heads_add_up_and_products_are_those_of_the_outputs(family: str, saved: Saved) -> None:
    layer = 1 if family == "qwen3_next" else 0
    formula = LayerMath(load(saved(family)[1]).layer(layer), "float64")
    x, probes = 3 * rows(5), rows(4, seed=9).double()
    out, products = formula.vo(x), formula.vo_products(x, probes)
    assert distance(out.heads.sum(0) + out.rest, out.total) < 1e-13
    assert (out.rest.abs().max() > 0) == (family in ("gpt2", "gpt_neox"))
    assert distance(products.heads, out.heads @ probes.T) < 1e-12
    assert distance(products.head_norms, out.heads.norm(dim=-1)) < 1e-12
    assert distance(products.total, out.total @ probes.T) < 1e-12
    assert distance(products.total_norms, out.total.norm(dim=-1)) < 1e-12


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_bias_before_the_norm_is_scaled_as_the_heads_are(family: str, tmp_path: Path) -> None:
    variant(family, tmp_path, attention_bias=True)
    formula, probes = LayerMath(load(tmp_path).layer(1), "float64"), rows(4, seed=9).double()
    out = formula.vo(rows())
    assert out.rest.abs().max() > 1e-3
    assert distance(out.heads.sum(0) + out.rest, out.total) < 1e-13
    assert distance(formula.vo_products(rows(), probes).total, out.total @ probes.T) < 1e-12


def test_a_norm_after_attention_scales_every_head_by_the_factor_of_the_sum(saved: Saved) -> None:
    """Normed one by one the heads would not add up, and their lengths would say nothing."""
    weights = load(saved("gemma2")[1]).layer(0)
    out = LayerMath(weights, "float64").vo(rows())
    raw = torch.einsum(
        "nhc,dhc->hnd",
        LayerMath(weights, "float64").inputs("o", rows()).view(6, 4, 16),
        weights.matrix("o", torch.float64).view(64, 4, 16),
    )
    ratio = out.heads / raw
    assert distance(ratio, ratio[:1].expand_as(ratio)) < 1e-12


def test_the_norm_before_the_mlp_is_not_taken_for_a_norm_after_attention(saved: Saved) -> None:
    """`post_attention_layernorm` is the MLP's input norm in Llama and the attention's output norm in Gemma 2."""
    for family, after in {"llama": False, "qwen3": False, "gemma": False, "gemma2": True, "olmo2": True}.items():
        assert ("attn_post_norm" in load(saved(family)[1]).layer(0)) == after


def test_layers_without_softmax_attention_are_refused(saved: Saved) -> None:
    weights = load(saved("qwen3_next")[1]).layer(0)
    assert not weights.attention
    for call in (lambda f: f.qk(rows(), rows()), lambda f: f.vo(rows()), lambda f: f.vo_products(rows(), rows())):
        with pytest.raises(InputError, match=r"layer 0 has no [qv].*; it has: "):
            call(LayerMath(weights))


def test_bad_arguments_are_refused(saved: Saved) -> None:
    formula = LayerMath(load(saved("llama")[1]).layer(0))
    with pytest.raises(InputError, match="offset -1: a query cannot come before its key"):
        formula.qk(rows(), rows(), -1)
    with pytest.raises(InputError, match=r"\[n, 64\] is expected"):
        formula.qk(rows(), rows()[:, :60])
    with pytest.raises(InputError, match=r"\[n, 64\] is expected"):
        formula.vo_products(rows(), torch.zeros(3, 65))
