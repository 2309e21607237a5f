"""Phi-3 and 4-mini: fused qkv and gate_up projections; what is added passes a dropout module first."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, BlockPaths, Disk, Family, Vllm, base_numerics, no_biases

_FUSED = {
    "qkv": "layers.{layer}.self_attn.qkv_proj.weight",
    "gate_up": "layers.{layer}.mlp.gate_up_proj.weight",
}
_REST = {role: name for role, name in DENSE.items() if role not in ("q", "k", "v", "gate", "up")}

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    block=lambda config: BlockPaths(
        attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout", qkv="fused", fused="qkv_proj"
    ),
    numerics=base_numerics,
    biased=no_biases,
    disk=lambda config: Disk(layers={**_REST, **_FUSED}),
    vllm=Vllm(architectures=("Phi3ForCausalLM",), block=lambda config: BlockPaths(qkv="fused")),
)
