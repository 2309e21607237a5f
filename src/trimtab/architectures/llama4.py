"""Llama 4 text: chunked attention, layers without rotary embedding, experts that return flattened rows."""

from __future__ import annotations

from dataclasses import replace

from trimtab.architectures._family import (
    DENSE,
    SHARED_EXPERT,
    BlockPaths,
    Config,
    Disk,
    Family,
    Numerics,
    Rope,
    Router,
    Temperature,
    Vllm,
    base_numerics,
)

_LAYERS = {
    **{role: name.replace(".mlp.", ".feed_forward.") for role, name in DENSE.items()},
    **{
        role: name.replace(".mlp.", ".feed_forward.") for role, name in SHARED_EXPERT.items() if role != "shared_router"
    },
    "router": "layers.{layer}.feed_forward.router.weight",
    "experts_gate_up": "layers.{layer}.feed_forward.experts.gate_up_proj",
    "experts_down": "layers.{layer}.feed_forward.experts.down_proj",
}

_REORDERED = "vLLM loads each head's dimensions in another order (rotary halves); use v, attn_z or attn_raw"


def _disk(config: Config) -> Disk:
    if config.model_type == "llama4":
        return Disk(
            layers=_LAYERS,
            experts_transposed=True,
            prefix="language_model.model.",
            head="language_model.lm_head.weight",
        )
    return Disk(layers=_LAYERS, experts_transposed=True)


def _numerics(config: Config) -> Numerics:
    qk_norm = "l2" if config.use_qk_norm else "none"
    return base_numerics(config, qk_norm=qk_norm, rope=Rope(pairing="interleaved"))


def _layer_numerics(config: Config, numerics: Numerics, layer: int) -> Numerics:
    if config.no_rope_layers[layer]:
        return numerics
    tuned = Temperature(scale=config.attn_scale, floor=config.floor_scale) if config.attn_temperature_tuning else None
    return replace(numerics, rope=None, qk_norm="none", temperature=tuned)


def _router(config: Config) -> Router:
    return Router(form="sigmoid_input", num_experts=config.num_local_experts, top_k=config.num_experts_per_tok)


def _sparse(config: Config, layer: int) -> bool:
    step = config.interleave_moe_layer_step
    return bool(step > 0 and (layer + 1) % step == 0)


FAMILY = Family(
    name="llama4",
    model_types=("llama4_text",),
    text_paths=("model", "language_model.model", ""),
    block=lambda config: BlockPaths(mlp="feed_forward", flat_experts=True),
    numerics=_numerics,
    disk=_disk,
    router=_router,
    layer_numerics=_layer_numerics,
    vllm=Vllm(
        architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        sparse=_sparse,
        absent={"q": _REORDERED, "k": _REORDERED},
    ),
    note="the rotary embedding and the weightless q/k norm act only in layers that config.no_rope_layers marks with 1",
)
