"""Qwen 3-Next: three gated-delta-rule layers to one softmax layer; q_proj holds [q, gate] per head."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    EXPERTS,
    QK_NORM,
    SHARED_EXPERT,
    STACKED,
    BlockPaths,
    Disk,
    Family,
    Vllm,
    base_numerics,
    softmax_router,
    sparse_steps,
)

_LINEAR = {
    "linear_qkvz": "layers.{layer}.linear_attn.in_proj_qkvz.weight",
    "linear_ba": "layers.{layer}.linear_attn.in_proj_ba.weight",
    "linear_o": "layers.{layer}.linear_attn.out_proj.weight",
}

FAMILY = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    block=lambda config: BlockPaths(linear_attn="linear_attn", qkv="gated"),
    numerics=lambda config: base_numerics(config, norm="rmsnorm_plus_one", norm_rounds_first=False, qk_norm="per_head"),
    disk=lambda config: Disk(layers={**DENSE, **QK_NORM, **EXPERTS, **SHARED_EXPERT, **_LINEAR}, stacked=STACKED),
    router=softmax_router,
    vllm=Vllm(architectures=("Qwen3NextForCausalLM",), sparse=sparse_steps),
    note="attn_z is taken after the output gate, before o_proj; linear-attention layers have no q, k, v, attn_z",
)
