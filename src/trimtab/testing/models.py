"""Tiny random models of every family and a tiny tokenizer: no downloads, seeded, built in milliseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from trimtab.errors import InputError

VOCABULARY = 128
_SHARED: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE: Mapping[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION: Mapping[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4}


def _text(config: str, model: str, **changes: Any) -> Callable[[int], nn.Module]:
    """A builder for a text-only class; `LAYERS` among the values stands for a function of the number of layers."""

    def build(layers: int) -> nn.Module:
        values = {**_SHARED, "num_hidden_layers": layers, **_called(changes, layers)}
        return _new(model, getattr(transformers, config)(**values))

    return build


def _wrapped(config: str, model: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Callable[[int], nn.Module]:
    """A builder for a multimodal class around a text tower."""

    def build(layers: int) -> nn.Module:
        values = {**_SHARED, "num_hidden_layers": layers, **_called(text, layers)}
        special = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "pad_token_id": 0}
        tied = {"tie_word_embeddings": False}
        return _new(
            model, getattr(transformers, config)(text_config=values, vision_config=dict(vision), **special, **tied)
        )

    return build


def _called(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {key: value(layers) if callable(value) else value for key, value in values.items()}


def _new(model: str, config: Any) -> nn.Module:
    return getattr(transformers, model)(config)  # type: ignore[no-any-return]


def _alternating(first: str, second: str) -> Callable[[int], list[str]]:
    return lambda layers: [first if layer % 2 == 0 else second for layer in range(layers)]


_ALL_HEADS = {"num_key_value_heads": None}
_GPT2 = {**_ALL_HEADS, "n_embd": 64, "n_head": 4, "n_positions": 512, "n_inner": 96}
_GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = {**_GEMMA, "query_pre_attn_scalar": 24, "layer_types": _alternating("sliding_attention", "full_attention"),
           "sliding_window": 8}  # fmt: skip
_FALCON = {**_ALL_HEADS, "alibi": False, "bias": False, "hidden_dropout": 0.0}
_BUILDERS: Mapping[str, Callable[[int], nn.Module]] = {
    "llama": _text("LlamaConfig", "LlamaForCausalLM"),
    "llama4": _text(
        "Llama4TextConfig", "Llama4ForCausalLM", **_MOE, head_dim=16, intermediate_size_mlp=96,
        interleave_moe_layer_step=2, attention_chunk_size=8,
    ),
    "llama4_multimodal": _wrapped(
        "Llama4Config", "Llama4ForConditionalGeneration",
        {**_MOE, "head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32,
         "projector_output_dim": 32},
    ),
    "mistral": _text("MistralConfig", "MistralForCausalLM", sliding_window=8),
    "mixtral": _text("MixtralConfig", "MixtralForCausalLM", **_MOE),
    "qwen2": _text("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2_moe": _text("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **_MOE, mlp_only_layers=[0]),
    "qwen3": _text("Qwen3Config", "Qwen3ForCausalLM", head_dim=32),
    "qwen3_moe": _text("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **_MOE, head_dim=16, mlp_only_layers=[0]),
    "qwen3_next": _text(
        "Qwen3NextConfig", "Qwen3NextForCausalLM", **_MOE, head_dim=16, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, mlp_only_layers=[1],
        layer_types=_alternating("linear_attention", "full_attention"),
    ),
    "qwen2_vl": _wrapped(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", {"rope_parameters": _MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": _wrapped(
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {"rope_parameters": _MROPE},
        {**_VISION, "intermediate_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": _wrapped(
        "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", {"head_dim": 16, "rope_parameters": _MROPE},
        {**_VISION, "intermediate_size": 32, "out_hidden_size": 64, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": _wrapped(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration",
        {**_MOE, "head_dim": 16, "mlp_only_layers": [0], "rope_parameters": _MROPE},
        {**_VISION, "intermediate_size": 32, "out_hidden_size": 64, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0]},
    ),
    "gemma": _text("GemmaConfig", "GemmaForCausalLM", **_GEMMA),
    "gemma2": _text(
        "Gemma2Config", "Gemma2ForCausalLM", **_GEMMA, query_pre_attn_scalar=24, sliding_window=8,
        attn_implementation="eager",
    ),
    "gemma3": _text("Gemma3TextConfig", "Gemma3ForCausalLM", **_GEMMA3),
    "gemma3_multimodal": _wrapped(
        "Gemma3Config", "Gemma3ForConditionalGeneration", _GEMMA3,
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 16, "patch_size": 4},
    ),
    "phi3": _text("Phi3Config", "Phi3ForCausalLM"),
    "olmo2": _text("Olmo2Config", "Olmo2ForCausalLM"),
    "gpt2": _text("GPT2Config", "GPT2LMHeadModel", **_GPT2),
    "gpt_neox": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", **_ALL_HEADS),
    "gpt_neox_sequential": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", **_ALL_HEADS, use_parallel_residual=False),
    # In no table of architectures; found by structure.
    "falcon": _text("FalconConfig", "FalconForCausalLM", **_FALCON, multi_query=True, parallel_attn=True),
    "falcon_sequential": _text("FalconConfig", "FalconForCausalLM", **_FALCON, multi_query=False, parallel_attn=False),
    "granite": _text(
        "GraniteConfig", "GraniteForCausalLM", residual_multiplier=0.22, embedding_multiplier=12.0,
        logits_scaling=8.0, attention_multiplier=0.2,
    ),
    "cohere2": _text("Cohere2Config", "Cohere2ForCausalLM", logit_scale=0.0625, sliding_window=8),
    "gpt_oss": _text("GptOssConfig", "GptOssForCausalLM", **_MOE, head_dim=16, sliding_window=8),
    "gemma4": _text(
        "Gemma4TextConfig", "Gemma4ForCausalLM", head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0, sliding_window=8,
        layer_types=_alternating("sliding_attention", "full_attention"),
    ),
    "mamba": _text("MambaConfig", "MambaForCausalLM", state_size=4),
    "bloom": _text("BloomConfig", "BloomForCausalLM", **_ALL_HEADS, n_head=4),
}  # fmt: skip

FAMILY_NAMES = tuple(_BUILDERS)


def tiny(family: str, *, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Build a tiny random model in eval mode: hidden 64, vocabulary 128, every weight and bias away from its default.

    Norm weights and biases are perturbed, so that `w` and `1 + w`, or a forgotten bias, cannot be mistaken.
    Rotary tables stay in float32, as `from_pretrained(dtype=...)` leaves them.

    Args:
        family: one of `FAMILY_NAMES`.
        layers: decoder blocks.
        dtype: of the weights.
        seed: of the weights; the global random state is left as it was.

    Raises:
        InputError: no such family.
    """
    if family not in _BUILDERS:
        raise InputError(f"no tiny model of family {family!r}; there are: {', '.join(FAMILY_NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family](layers).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomise(name, parameter)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _randomise(name: str, parameter: nn.Parameter) -> None:
    """Draw a weight matrix with a unit-preserving scale, and move every vector away from 0 and 1."""
    if parameter.ndim == 1:
        base = 1.0 if re.search(r"(norm|ln_\w+)\.weight$", name) else 0.0
        parameter.copy_(base + 0.3 * torch.randn_like(parameter))
    else:
        fan_in = parameter.shape[-1] if parameter.ndim == 2 else parameter[0].numel() // parameter.shape[1]
        parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 1 / math.sqrt(max(fan_in, 1))))


_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Build a tokenizer of 128 tokens, one per printable ASCII character, with a chat template of three roles.

    Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4-6 the roles, 7 end of a message, then newline and ASCII 32 to 126; the rest are
    reserved tokens. Every id decodes and every ASCII text comes back as it was.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["\n", *(chr(code) for code in range(32, 127))]
    tokens = [*_SPECIAL, *characters]
    tokens += [f"<reserved_{index}>" for index in range(VOCABULARY - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
