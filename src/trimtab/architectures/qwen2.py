"""Qwen 2, 2.5 and their mixture-of-experts form: Llama's blocks with biases on q, k and v."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, EXPERTS, BlockPaths, Disk, Family, Vllm, base_numerics, sparse_steps

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2", "qwen2_moe"),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    disk=lambda config: Disk(layers={**DENSE, **EXPERTS} if config.model_type == "qwen2_moe" else DENSE),
    vllm=Vllm(architectures=("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"), sparse=sparse_steps),
)
