"""Mixtral: Mistral's attention with a mixture of experts in every layer."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    STACKED,
    BlockPaths,
    Disk,
    Family,
    Router,
    Vllm,
    base_numerics,
    no_biases,
)

_ATTENTION = {role: name for role, name in DENSE.items() if ".mlp." not in name}
_EXPERTS = {
    "router": "layers.{layer}.block_sparse_moe.gate.weight",
    "expert_gate": "layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "expert_up": "layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "expert_down": "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    biased=no_biases,
    disk=lambda config: Disk(layers={**_ATTENTION, **_EXPERTS}, stacked=STACKED),
    router=lambda config: Router(
        num_experts=config.num_local_experts, top_k=config.num_experts_per_tok, renormalise=True
    ),
    vllm=Vllm(
        architectures=("MixtralForCausalLM",),
        block=lambda config: BlockPaths(mlp="block_sparse_moe"),
        sparse=lambda config, layer: True,
    ),
)
