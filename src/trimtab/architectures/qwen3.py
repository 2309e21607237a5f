"""Qwen 3 and its mixture-of-experts form: q and k are normed per head before the rotary embedding."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    EXPERTS,
    QK_NORM,
    STACKED,
    BlockPaths,
    Config,
    Disk,
    Family,
    Vllm,
    base_numerics,
    softmax_router,
    sparse_steps,
)


def _disk(config: Config) -> Disk:
    dense = {**DENSE, **QK_NORM}
    if config.model_type == "qwen3_moe":
        return Disk(layers={**dense, **EXPERTS}, stacked=STACKED)
    return Disk(layers=dense)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3", "qwen3_moe"),
    block=lambda config: BlockPaths(),
    numerics=lambda config: base_numerics(config, qk_norm="per_head"),
    disk=_disk,
    router=softmax_router,
    vllm=Vllm(architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), sparse=sparse_steps),
)
