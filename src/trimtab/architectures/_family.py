"""What a model family is made of: module paths of its block, numerics, weight names on disk, its vLLM counterpart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from trimtab.architectures._handle import Columns, Point
from trimtab.errors import BackendError

Config = Any
"""A transformers text configuration; attributes are read by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Widths of a decoder, read off its text configuration."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """Read the sizes of a text configuration."""
        heads = getattr(config, "num_attention_heads", None) or 1
        return cls(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPaths:
    """Module paths inside one decoder block. The defaults are those of Llama."""

    attn: str = "self_attn"
    linear_attn: str | None = None
    """What a block has instead of `attn` when it mixes tokens without softmax attention."""
    attn_out: str | None = None
    """Module whose output is added to the stream; None: `attn` itself."""
    mid: str | None = "post_attention_layernorm"
    """Module that `resid_mid` enters; None: the block is parallel and has none."""
    mlp: str = "mlp"
    mlp_out: str | None = None
    """Module whose output is added to the stream; None: `mlp` itself."""
    o: str = "o_proj"
    down: str = "down_proj"
    """Down projection inside a dense MLP; a block without it is a mixture of experts."""
    qkv: Literal["separate", "fused", "fused_per_head", "gated"] = "separate"
    """separate: q_proj, k_proj, v_proj. fused: q, k, v one after the other. fused_per_head: [q, k, v] per head.
    gated: as separate, but q_proj holds [q, gate] per head."""
    fused: str = "qkv_proj"
    """Name of the fused projection."""
    flat_experts: bool = False
    """Mixture-of-experts modules return [batch * sequence, width]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding of a family."""

    pairing: Literal["half", "interleaved"] = "half"
    """half: dimension i rotates with i + n/2; interleaved: 2i with 2i + 1."""
    fraction: float = 1.0
    """Share of each head's dimensions that is rotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """Queries at `position` are multiplied by 1 + scale * ln(1 + floor((position + 1) / floor))."""

    scale: float
    floor: float

    def factor(self, position: int) -> float:
        """Return the factor at a position."""
        return 1.0 + self.scale * math.log1p(math.floor((position + 1) / self.floor))


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """What the arithmetic of one model is, resolved from its configuration."""

    norm: Literal["rmsnorm", "rmsnorm_plus_one", "layernorm"] = "rmsnorm"
    """rmsnorm: x_hat * w; rmsnorm_plus_one: x_hat * (1 + w); layernorm: x_hat * w + b."""
    norm_rounds_first: bool = True
    """x_hat is rounded to the model's dtype before the weight is applied (Llama); False: one rounding at the end."""
    norm_eps: float
    """Added to the mean square (LayerNorm: to the variance); that of the q and k norms as well."""
    activation: str
    """Of the MLP, a name that `trimtab.architectures.activation` resolves."""
    residual: Literal["sequential", "parallel", "sandwich", "post_norm"] = "sequential"
    """sandwich: norms before and after each branch (Gemma 2, 3); post_norm: only after (OLMo 2)."""
    attention_scale: float
    """Factor on q k^T."""
    qk_norm: Literal["none", "per_head", "full_width", "l2"] = "none"
    """l2 has no weight and comes after the rotary embedding; the others come before it."""
    rope: Rope | None = Rope()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    contribution_scale: float = 1.0
    embed_scale: float = 1.0
    """Factor inside the embedding module (Gemma: sqrt(hidden))."""
    tied: bool = False
    """The head's weight is the embedding's."""
    temperature: Temperature | None = None
    """Factor on the queries that grows with the position (Llama 4, layers without rotary embedding)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """How a mixture of experts chooses. Which of its layers have experts is read off their weights."""

    form: Literal["softmax", "sigmoid_input"] = "softmax"
    """softmax: the outputs of the `top_k` most probable experts, weighted by probability.
    sigmoid_input: the inputs of the `top_k` are scaled by the sigmoid of their logit, the outputs added (Llama 4)."""
    num_experts: int
    top_k: int
    renormalise: bool = False
    """The chosen probabilities are divided by their sum."""


def _no_experts(config: Config, layer: int) -> bool:
    return False


def _nothing_added(config: Config) -> int:
    return 0


def _no_router(config: Config) -> Router | None:
    return None


def _same(config: Config, numerics: Numerics, layer: int) -> Numerics:
    return numerics


def attention_biases(config: Config) -> tuple[str, ...]:
    """Return the roles with a bias in the families that have one option for all four attention projections."""
    return ("q", "k", "v", "o") if getattr(config, "attention_bias", False) else ()


def no_biases(config: Config) -> tuple[str, ...]:
    """Return the roles with a bias where the family has none."""
    return ()


def qkv_biases(config: Config) -> tuple[str, ...]:
    """Return the roles with a bias in Qwen 2: q, k and v unless its option says otherwise."""
    return ("q", "k", "v") if getattr(config, "qkv_bias", True) else ()


def softmax_router(config: Config) -> Router | None:
    """Return the router of the Qwen mixtures of experts; None for their dense forms."""
    if not getattr(config, "num_experts", 0):
        return None
    # Qwen3-VL's class has no such option: it always divides
    renormalise = bool(getattr(config, "norm_topk_prob", True))
    return Router(num_experts=config.num_experts, top_k=config.num_experts_per_tok, renormalise=renormalise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vllm:
    """The family in vLLM. Embedding and final norm lie beside the blocks, under the names that the family has."""

    architectures: tuple[str, ...]
    """Class names of the architectures."""
    layers: str = "model.layers"
    """Module path of the decoder blocks; inside a multimodal class below `language_model.`."""
    returns_residual: bool = True
    """A block returns (delta, residual), whose sum is the stream, and the final norm takes both; False: one tensor."""
    native: bool = True
    """False: vLLM runs the transformers modules (`TransformersForCausalLM`)."""
    block: Callable[[Config], BlockPaths] | None = None
    """Paths inside a block; None: those of transformers. Separate q, k, v are one `qkv_proj` in any case."""
    sparse: Callable[[Config, int], bool] = _no_experts
    """Whether a layer's MLP is a mixture of experts."""
    absent: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Point -> why vLLM's form does not have it, where `block` does not tell."""
    positions: str | None = None
    """The module, beside the embedding, whose positions are added before the first block (GPT-2); None: that receives
    `embed`, scaled as it is."""
    added_after: Callable[[Config], int] = _nothing_added
    """How many first blocks are followed by an addition to the stream (Qwen3-VL's visual features); called with the
    top configuration."""


def sparse_steps(config: Config, layer: int) -> bool:
    """Whether a Qwen layer holds experts: every `decoder_sparse_step`-th, without those of `mlp_only_layers`."""
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or ()
    return getattr(config, "num_experts", 0) > 0 and layer not in dense and (layer + 1) % step == 0


DENSE: Mapping[str, str] = {
    "attn_norm": "layers.{layer}.input_layernorm.weight",
    "q": "layers.{layer}.self_attn.q_proj.weight",
    "k": "layers.{layer}.self_attn.k_proj.weight",
    "v": "layers.{layer}.self_attn.v_proj.weight",
    "o": "layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "layers.{layer}.post_attention_layernorm.weight",
    "gate": "layers.{layer}.mlp.gate_proj.weight",
    "up": "layers.{layer}.mlp.up_proj.weight",
    "down": "layers.{layer}.mlp.down_proj.weight",
}
EXPERTS: Mapping[str, str] = {
    "router": "layers.{layer}.mlp.gate.weight",
    "expert_gate": "layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "expert_up": "layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "expert_down": "layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
STACKED: Mapping[str, str] = {
    "router": "layers.{layer}.mlp.gate.weight",
    "experts_gate_up": "layers.{layer}.mlp.experts.gate_up_proj",
    "experts_down": "layers.{layer}.mlp.experts.down_proj",
}
SHARED_EXPERT: Mapping[str, str] = {
    "shared_gate": "layers.{layer}.mlp.shared_expert.gate_proj.weight",
    "shared_up": "layers.{layer}.mlp.shared_expert.up_proj.weight",
    "shared_down": "layers.{layer}.mlp.shared_expert.down_proj.weight",
    "shared_router": "layers.{layer}.mlp.shared_expert_gate.weight",
}
QK_NORM: Mapping[str, str] = {
    "q_norm": "layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "layers.{layer}.self_attn.k_norm.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Tensor names in checkpoint files, by role. A dense and a sparse layer have some of the roles each."""

    prefix: str = "model."
    """Stands before every name in `layers` and before `embed` and `final_norm`."""
    layers: Mapping[str, str]
    stacked: Mapping[str, str] = field(default_factory=dict)
    """Roles of `layers` in files that keep the form of the modules: all experts of a layer in one tensor."""
    experts_transposed: bool = False
    """Stacked experts are [expert, in, out] where their shape does not tell (both dimensions equal)."""
    embed: str = "embed_tokens.weight"
    final_norm: str = "norm.weight"
    head: str = "lm_head.weight"
    """Whole name; absent from the file when the head is tied."""
    transposed: bool = False
    """Projections are stored [in, out], y = x W + b (GPT-2's Conv1D)."""

    def name(self, role: str, *, layer: int = 0, expert: int = 0) -> str:
        """Return the whole tensor name of a role ("embed", "final_norm", "head", or a key of `layers`)."""
        if role == "head":
            return self.head
        template = {"embed": self.embed, "final_norm": self.final_norm, **self.layers}[role]
        return self.prefix + template.format(layer=layer, expert=expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family: everything about it that does not depend on a particular checkpoint."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` of the text configuration."""
    text_paths: tuple[str, ...] = ("model", "")
    """Where the module that owns the blocks may be, from the model; the first that exists counts."""
    embed: str = "embed_tokens"
    blocks: str = "layers"
    final_norm: str = "norm"
    block: Callable[[Config], BlockPaths]
    numerics: Callable[[Config], Numerics]
    disk: Callable[[Config], Disk]
    """Called with the top configuration, because wrappers store their text tower under other names."""
    vllm: Vllm
    router: Callable[[Config], Router | None] = _no_router
    biased: Callable[[Config], tuple[str, ...]] = attention_biases
    """Roles of `Disk.layers` whose projections or norms have a bias."""
    layer_numerics: Callable[[Config, Numerics, int], Numerics] = _same
    """What one layer's arithmetic is, where layers differ; called with the model's numerics."""
    note: str = ""


def base_numerics(config: Config, **changes: Any) -> Numerics:
    """Return Llama's numerics for a configuration, with `changes`."""
    sizes = Sizes.of(config)
    values: dict[str, Any] = {
        "attention_scale": sizes.head_dim**-0.5,
        "norm_eps": _first(config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
        "activation": _first(config, "hidden_act", "hidden_activation", "activation_function"),
        "tied": bool(config.tie_word_embeddings),
        "rope": Rope(fraction=rope_fraction(config)),
    }
    return Numerics(**{**values, **changes})


def _first(config: Config, *names: str) -> Any:
    found = next((name for name in names if hasattr(config, name)), None)
    if found is None:
        raise BackendError(f"the configuration of a {config.model_type} model has none of {', '.join(names)}")
    return getattr(config, found)


def rope_fraction(config: Config) -> float:
    """Return the share of head dimensions that a configuration rotates."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0))


def block_points(block: nn.Module, paths: BlockPaths, sizes: Sizes) -> dict[str, Point]:
    """Return the points of one block, looking at which modules it has."""
    linear = paths.linear_attn is not None and not hasattr(block, paths.attn)
    attn = paths.linear_attn if linear and paths.linear_attn else paths.attn
    dense = hasattr(block.get_submodule(paths.mlp), paths.down)
    flat = paths.flat_experts and not dense
    width = sizes.hidden
    points = {
        "resid_pre": Point(path="", side="input", width=width),
        "attn_raw": Point(path=attn, width=width),
        "attn_out": Point(path=paths.attn_out or attn, width=width),
        "mlp_raw": Point(path=paths.mlp, width=width, flat=flat),
        "mlp_out": Point(path=paths.mlp_out or paths.mlp, width=width, flat=flat),
        "resid_post": Point(path="", width=width),
    }
    if paths.mid is not None:
        points["resid_mid"] = Point(path=paths.mid, side="input", in_place=True, width=width)
    if dense:
        down = block.get_submodule(f"{paths.mlp}.{paths.down}")
        points["mlp_act"] = Point(path=f"{paths.mlp}.{paths.down}", side="input", width=fan(down)[0])
    if not linear:
        points["attn_z"] = Point(path=f"{attn}.{paths.o}", side="input", width=sizes.heads * sizes.head_dim)
        points.update(_projections(attn, paths, sizes))
        if paths.qkv.startswith("fused"):
            _check_fused(block.get_submodule(f"{attn}.{paths.fused}"), sizes)
    return points


def _projections(attn: str, paths: BlockPaths, sizes: Sizes) -> dict[str, Point]:
    """q, k and v before their norms and the rotary embedding, per head laid out flat."""
    dim, kv = sizes.head_dim, sizes.kv_heads * sizes.head_dim
    q = sizes.heads * dim
    widths = {"q": q, "k": kv, "v": kv}
    if paths.qkv == "fused":
        columns = {"q": Columns(1, 0, q), "k": Columns(1, q, q + kv), "v": Columns(1, q + kv, q + 2 * kv)}
    elif paths.qkv == "fused_per_head":
        columns = {name: Columns(sizes.heads, i * dim, (i + 1) * dim) for i, name in enumerate("qkv")}
    elif paths.qkv == "gated":
        columns = {"q": Columns(sizes.heads, 0, dim)}
    else:
        columns = {}
    fused = paths.qkv.startswith("fused")
    return {
        name: Point(path=f"{attn}.{paths.fused if fused else name + '_proj'}", columns=columns.get(name), width=width)
        for name, width in widths.items()
    }


def _check_fused(projection: nn.Module, sizes: Sizes) -> None:
    """A fused projection of another width would be cut in the wrong places without any other sign."""
    expected = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    found = fan(projection)[1]
    if found != expected:
        raise BackendError(
            f"the fused q, k, v projection is {found} wide; {sizes.heads} + 2 x {sizes.kv_heads} heads of "
            f"{sizes.head_dim} make {expected}; the configuration does not describe these weights"
        )


def fan(linear: nn.Module) -> tuple[int, int]:
    """Return the widths that a projection takes and gives: Linear stores [out, in], Conv1D [in, out]."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (first, second) if type(linear).__name__ == "Conv1D" else (second, first)
