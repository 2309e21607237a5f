"""Text towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense and mixture of experts)."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    QK_NORM,
    STACKED,
    BlockPaths,
    Config,
    Disk,
    Family,
    Numerics,
    Vllm,
    attention_biases,
    base_numerics,
    qkv_biases,
    softmax_router,
    sparse_steps,
)


def _numerics(config: Config) -> Numerics:
    return base_numerics(config, qk_norm="per_head" if config.model_type.startswith("qwen3") else "none")


def _biased(config: Config) -> tuple[str, ...]:
    return attention_biases(config) if config.model_type.startswith("qwen3") else qkv_biases(config)


def _disk(config: Config) -> Disk:
    third = config.model_type.startswith("qwen3")
    layers = {**DENSE, **QK_NORM} if third else DENSE
    if "moe" in config.model_type:
        layers = {**layers, **STACKED}
    return Disk(layers=layers, prefix="model.language_model." if third else "model.")


def _sparse(config: Config, layer: int) -> bool:
    return "moe" in config.model_type and sparse_steps(config, layer)


def _added_after(config: Config) -> int:
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


FAMILY = Family(
    name="qwen_vl",
    model_types=("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"),
    text_paths=("model.language_model", "language_model", "model", ""),
    block=lambda config: BlockPaths(),
    numerics=_numerics,
    disk=_disk,
    biased=_biased,
    router=softmax_router,
    vllm=Vllm(
        architectures=(
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        sparse=_sparse,
        added_after=_added_after,
    ),
    note="Qwen3-VL adds visual features between its first blocks; resid_post[l] then is not resid_pre[l+1]",
)
