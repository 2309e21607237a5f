"""Qwen 3 and its mixture-of-experts form: q and k are normed per head before the rotary embedding."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, EXPERTS, BlockPaths, Disk, Family, Vllm, base_numerics, sparse_steps

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3", "qwen3_moe"),
    block=lambda config: BlockPaths(),
    numerics=lambda config: base_numerics(config, qk_norm="per_head"),
    disk=lambda config: Disk(layers={**DENSE, **EXPERTS} if config.model_type == "qwen3_moe" else DENSE),
    vllm=Vllm(architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), sparse=sparse_steps),
)
