"""Gemma 1, 2 and 3: norms with 1 + w, scaled embeddings; 2 and 3 norm each branch again before it is added."""

from __future__ import annotations

from trimtab.architectures._family import (
    DENSE,
    QK_NORM,
    BlockPaths,
    Config,
    Disk,
    Family,
    Numerics,
    Vllm,
    base_numerics,
)

_SANDWICH = {
    **DENSE,
    "attn_post_norm": "layers.{layer}.post_attention_layernorm.weight",
    "mlp_norm": "layers.{layer}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "layers.{layer}.post_feedforward_layernorm.weight",
}


def _block(config: Config) -> BlockPaths:
    if config.model_type == "gemma":
        return BlockPaths()
    return BlockPaths(
        attn_out="post_attention_layernorm", mid="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
    )


def _numerics(config: Config) -> Numerics:
    common = {"norm": "rmsnorm_plus_one", "norm_rounds_first": False, "embed_scale": config.hidden_size**0.5}
    if config.model_type == "gemma":
        return base_numerics(config, **common)
    return base_numerics(
        config,
        **common,
        residual="sandwich",
        activation=config.hidden_activation,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        qk_norm="none" if config.model_type == "gemma2" else "per_head",
        # Gemma 3 keeps the option; its class never applies it
        attention_softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        logit_softcap=config.final_logit_softcapping,
    )


def _disk(config: Config) -> Disk:
    if config.model_type == "gemma":
        return Disk(layers=DENSE)
    text = config.get_text_config(decoder=True)
    layers = {**_SANDWICH, **QK_NORM} if text.model_type == "gemma3_text" else _SANDWICH
    prefix, head = ("model.", "lm_head.weight")
    if config.model_type == "gemma3":
        prefix, head = ("language_model.model.", "language_model.lm_head.weight")
    return Disk(layers=layers, prefix=prefix, head=head)


FAMILY = Family(
    name="gemma",
    model_types=("gemma", "gemma2", "gemma3_text"),
    text_paths=("model", "model.language_model", "language_model", ""),
    block=_block,
    numerics=_numerics,
    disk=_disk,
    vllm=Vllm(
        architectures=(
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Gemma3ForConditionalGeneration",
        )
    ),
    note="the factor sqrt(hidden) is inside the embedding module",
)
