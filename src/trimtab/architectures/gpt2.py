"""GPT-2: learned positions, LayerNorm, Conv1D projections stored [in, out]."""

from __future__ import annotations

from dataclasses import replace

from trimtab.architectures._family import BlockPaths, Config, Disk, Family, Numerics, Sizes, Vllm, base_numerics

_LAYERS = {
    "attn_norm": "h.{layer}.ln_1.weight",
    "qkv": "h.{layer}.attn.c_attn.weight",
    "o": "h.{layer}.attn.c_proj.weight",
    "mlp_norm": "h.{layer}.ln_2.weight",
    "up": "h.{layer}.mlp.c_fc.weight",
    "down": "h.{layer}.mlp.c_proj.weight",
}


def _numerics(config: Config) -> Numerics:
    scale = Sizes.of(config).head_dim ** -0.5 if config.scale_attn_weights else 1.0
    return base_numerics(config, norm="layernorm", norm_rounds_first=False, rope=None, attention_scale=scale)


def _layer_numerics(config: Config, numerics: Numerics, layer: int) -> Numerics:
    divisor = layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
    return replace(numerics, attention_scale=numerics.attention_scale / divisor)


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    text_paths=("transformer", ""),
    embed="wte",
    blocks="h",
    final_norm="ln_f",
    block=lambda config: BlockPaths(attn="attn", mid="ln_2", o="c_proj", down="c_proj", qkv="fused", fused="c_attn"),
    numerics=_numerics,
    biased=lambda config: tuple(_LAYERS),
    layer_numerics=_layer_numerics,
    disk=lambda config: Disk(
        prefix="transformer.", layers=_LAYERS, embed="wte.weight", final_norm="ln_f.weight", transposed=True
    ),
    vllm=Vllm(architectures=("GPT2LMHeadModel",), layers="transformer.h", returns_residual=False, positions="wpe"),
    note="learned positions are added after embed, so layers.0.resid_pre differs from embed",
)
