"""GPT-NeoX (Pythia): parallel or sequential blocks, fused [q, k, v] per head, partial rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from trimtab.architectures._family import BlockPaths, Config, Disk, Family, Numerics, Vllm, base_numerics

_LAYERS = {
    "attn_norm": "layers.{layer}.input_layernorm.weight",
    "qkv": "layers.{layer}.attention.query_key_value.weight",
    "o": "layers.{layer}.attention.dense.weight",
    "mlp_norm": "layers.{layer}.post_attention_layernorm.weight",
    "up": "layers.{layer}.mlp.dense_h_to_4h.weight",
    "down": "layers.{layer}.mlp.dense_4h_to_h.weight",
}


def _block(config: Config) -> BlockPaths:
    return BlockPaths(
        attn="attention",
        attn_out="post_attention_dropout",
        mid=None if config.use_parallel_residual else "post_attention_layernorm",
        mlp_out="post_mlp_dropout",
        o="dense",
        down="dense_4h_to_h",
        qkv="fused_per_head",
        fused="query_key_value",
    )


def _numerics(config: Config) -> Numerics:
    form = "parallel" if config.use_parallel_residual else "sequential"
    return base_numerics(config, norm="layernorm", norm_rounds_first=False, residual=form)


def _biased(config: Config) -> tuple[str, ...]:
    attention = ("qkv", "o")
    return tuple(role for role in _LAYERS if config.attention_bias or role not in attention)


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    text_paths=("gpt_neox", ""),
    embed="embed_in",
    final_norm="final_layer_norm",
    block=_block,
    numerics=_numerics,
    biased=_biased,
    disk=lambda config: Disk(
        prefix="gpt_neox.",
        layers=_LAYERS,
        embed="embed_in.weight",
        final_norm="final_layer_norm.weight",
        head="embed_out.weight",
    ),
    vllm=Vllm(
        architectures=("GPTNeoXForCausalLM",),
        returns_residual=False,
        native=False,
        block=lambda config: replace(_block(config), attn_out=None, mlp_out=None),
    ),
)
