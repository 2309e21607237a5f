"""Llama 4 text: chunked attention, layers without rotary embedding, experts that return flattened rows."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, BlockPaths, Config, Disk, Family, Numerics, Rope, Vllm, base_numerics

_LAYERS = {
    **{role: name.replace(".mlp.", ".feed_forward.") for role, name in DENSE.items()},
    "router": "layers.{layer}.feed_forward.router.weight",
    "experts_gate_up": "layers.{layer}.feed_forward.experts.gate_up_proj",
    "experts_down": "layers.{layer}.feed_forward.experts.down_proj",
}

_REORDERED = "vLLM loads each head's dimensions in another order (rotary halves); use v, attn_z or attn_raw"


def _disk(config: Config) -> Disk:
    if config.model_type == "llama4":
        return Disk(layers=_LAYERS, prefix="language_model.model.", head="language_model.lm_head.weight")
    return Disk(layers=_LAYERS)


def _numerics(config: Config) -> Numerics:
    qk_norm = "l2" if config.use_qk_norm else "none"
    return base_numerics(config, qk_norm=qk_norm, rope=Rope(pairing="interleaved"))


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
    vllm=Vllm(
        architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        sparse=_sparse,
        absent={"q": _REORDERED, "k": _REORDERED},
    ),
    note="the rotary embedding and the weightless q/k norm act only in layers that config.no_rope_layers marks with 1",
)
