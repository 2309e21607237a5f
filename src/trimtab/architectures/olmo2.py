"""OLMo 2: no norm before a branch, one after it; q and k are normed over their whole width."""

from __future__ import annotations

from trimtab.architectures._family import DENSE, QK_NORM, BlockPaths, Disk, Family, Vllm, base_numerics

_LAYERS = {
    **{role: name for role, name in DENSE.items() if not role.endswith("_norm")},
    **QK_NORM,
    "attn_post_norm": "layers.{layer}.post_attention_layernorm.weight",
    "mlp_post_norm": "layers.{layer}.post_feedforward_layernorm.weight",
}

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    block=lambda config: BlockPaths(
        attn_out="post_attention_layernorm", mid="mlp", mlp_out="post_feedforward_layernorm"
    ),
    numerics=lambda config: base_numerics(config, residual="post_norm", qk_norm="full_width", norm_rounds_first=False),
    disk=lambda config: Disk(layers=_LAYERS),
    vllm=Vllm(architectures=("Olmo2ForCausalLM",), returns_residual=False, native=False),
)
