"""Qwen 2, 2.5 and their mixture-of-experts form: Llama's blocks with biases on q, k and v."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    EXPERTS,
    SHARED_EXPERT,
    STACKED,
    BlockPaths,
    Config,
    Disk,
    Family,
    Vllm,
    base_numerics,
    qkv_biases,
    softmax_router,
    sparse_steps,
)


def _disk(config: Config) -> Disk:
    if config.model_type == "qwen2_moe":
        return Disk(layers={**DENSE, **EXPERTS, **SHARED_EXPERT}, stacked=STACKED)
    return Disk(layers=DENSE)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2", "qwen2_moe"),
    block=lambda config: BlockPaths(),
    numerics=base_numerics,
    disk=_disk,
    biased=qkv_biases,
    router=softmax_router,
    vllm=Vllm(architectures=("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"), sparse=sparse_steps),
)
