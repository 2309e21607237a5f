"""The arithmetic of every family in numpy float64, written out from the papers and model classes, one row at a time.

It reads a module tree (never our tables, files or formulas), so that it can disagree with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import nn

Array = NDArray[np.float64]
_TEXT = ("model.language_model", "language_model.model", "model", "transformer", "gpt_neox")


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().to(torch.float64).numpy()


class Reference:
    """One layer of one model."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.config: Any = model.config.get_text_config(decoder=True)
        self.kind: str = self.config.model_type
        for path in _TEXT:
            try:
                self.text = model.get_submodule(path)
                break
            except AttributeError:
                continue
        self.block = (self.text.h if self.kind == "gpt2" else self.text.layers)[layer]
        self.layer = layer
        self.heads = self.config.num_attention_heads
        self.kv = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.eps = next(
            getattr(self.config, name)
            for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
            if hasattr(self.config, name)
        )
        self.linear_attention = hasattr(self.block, "linear_attn")
        mlp = "feed_forward" if self.kind == "llama4_text" else "mlp"
        self.mlp_module = getattr(self.block, mlp)
        self.sparse = hasattr(self.mlp_module, "experts")
        self.matrices, self.biases = self._matrices()

    def _matrices(self) -> tuple[dict[str, Array], dict[str, Array]]:
        found: dict[str, Array] = {}
        biases: dict[str, Array] = {}

        def take(name: str, module: nn.Module, rows: Any = slice(None)) -> None:
            weight = array(module.weight)
            found[name] = (weight.T if type(module).__name__ == "Conv1D" else weight)[rows]
            if getattr(module, "bias", None) is not None:
                biases[name] = array(module.bias)[rows]

        self._take_attention(take)
        self._take_mlp(take, found)
        return found, biases

    def _take_attention(self, take: Any) -> None:
        q, kv = self.heads * self.dim, self.kv * self.dim
        if self.kind == "gpt2":
            for place, name in enumerate("qkv"):
                take(name, self.block.attn.c_attn, slice(place * q, (place + 1) * q))
            take("o", self.block.attn.c_proj)
        elif self.kind == "gpt_neox":
            for place, name in enumerate("qkv"):
                rows = [
                    3 * self.dim * head + self.dim * place + i for head in range(self.heads) for i in range(self.dim)
                ]
                take(name, self.block.attention.query_key_value, rows)
            take("o", self.block.attention.dense)
        elif self.linear_attention:
            self._take_delta_rule(take)
        elif self.kind == "phi3":
            for name, rows in {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}.items():
                take(name, self.block.self_attn.qkv_proj, rows)
            take("o", self.block.self_attn.o_proj)
        else:
            attention = self.block.self_attn
            for name in "kvo":
                take(name, getattr(attention, f"{name}_proj"))
            if self.kind == "qwen3_next":
                for place, name in enumerate(("q", "q_gate")):
                    rows = [self.dim * (2 * head + place) + i for head in range(self.heads) for i in range(self.dim)]
                    take(name, attention.q_proj, rows)
            else:
                take("q", attention.q_proj)

    def _take_delta_rule(self, take: Any) -> None:
        config, module = self.config, self.block.linear_attn
        ratio = config.linear_num_value_heads // config.linear_num_key_heads
        key, value = config.linear_key_head_dim, config.linear_value_head_dim * ratio
        group = 2 * key + 2 * value
        starts = {"q": (0, key), "k": (key, key), "v": (2 * key, value), "z": (2 * key + value, value)}
        for name, (start, width) in starts.items():
            rows = [h * group + start + i for h in range(config.linear_num_key_heads) for i in range(width)]
            take(f"linear.{name}", module.in_proj_qkvz, rows)
        for place, name in enumerate("ba"):
            rows = [h * 2 * ratio + place * ratio + i for h in range(config.linear_num_key_heads) for i in range(ratio)]
            take(f"linear.{name}", module.in_proj_ba, rows)
        take("linear.o", module.out_proj)

    def _take_mlp(self, take: Any, found: dict[str, Array]) -> None:
        mlp = self.mlp_module
        if self.sparse:
            take("router", mlp.router if self.kind == "llama4_text" else mlp.gate)
            both, down = array(mlp.experts.gate_up_proj), array(mlp.experts.down_proj)
            if self.kind == "llama4_text":
                both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
            half = both.shape[1] // 2
            for expert in range(len(both)):
                found[f"experts.{expert}.gate"] = both[expert, :half]
                found[f"experts.{expert}.up"] = both[expert, half:]
                found[f"experts.{expert}.down"] = down[expert]
            if hasattr(mlp, "shared_expert"):
                for name in ("gate", "up", "down"):
                    take(f"shared.{name}", getattr(mlp.shared_expert, f"{name}_proj"))
            if hasattr(mlp, "shared_expert_gate"):
                take("shared.router", mlp.shared_expert_gate)
        elif self.kind == "gpt2":
            take("up", mlp.c_fc), take("down", mlp.c_proj)
        elif self.kind == "gpt_neox":
            take("up", mlp.dense_h_to_4h), take("down", mlp.dense_4h_to_h)
        elif self.kind == "phi3":
            half = self.config.intermediate_size
            take("gate", mlp.gate_up_proj, slice(0, half)), take("up", mlp.gate_up_proj, slice(half, None))
            take("down", mlp.down_proj)
        else:
            for name in ("gate", "up", "down"):
                take(name, getattr(mlp, f"{name}_proj"))

    def apply(self, name: str, x: Array) -> Array:
        return self.matrices[name] @ x + self.biases.get(name, 0.0)

    def norm(self, module: nn.Module, x: Array) -> Array:
        weight = array(module.weight)
        if self.kind in ("gpt2", "gpt_neox"):
            x = x - x.mean()
            return x / np.sqrt((x * x).mean() + self.eps) * weight + array(module.bias)
        if self.kind.startswith("gemma") or self.kind == "qwen3_next":
            weight = weight + 1
        return x / np.sqrt((x * x).mean() + self.eps) * weight

    def attention_input(self, x: Array) -> Array:
        if self.kind == "olmo2":
            return x
        return self.norm(self.block.ln_1 if self.kind == "gpt2" else self.block.input_layernorm, x)

    def mlp_input(self, x: Array) -> Array:
        if self.kind == "olmo2":
            return x
        if self.kind == "gpt2":
            return self.norm(self.block.ln_2, x)
        if self.kind in ("gemma2", "gemma3_text"):
            return self.norm(self.block.pre_feedforward_layernorm, x)
        return self.norm(self.block.post_attention_layernorm, x)

    @property
    def sandwich(self) -> bool:
        return self.kind in ("gemma2", "gemma3_text", "olmo2")

    def activate(self, x: Array) -> Array:
        if self.kind.startswith("gemma") or self.kind == "gpt2":
            return gelu_tanh(x)
        return gelu_erf(x) if self.kind == "gpt_neox" else silu(x)

    def neurons(self, x: Array, prefix: str = "") -> Array:
        up = self.apply(f"{prefix}up", x)
        return (
            self.activate(self.apply(f"{prefix}gate", x)) * up
            if f"{prefix}gate" in self.matrices
            else self.activate(up)
        )

    def expert(self, x: Array, prefix: str) -> Array:
        return self.apply(f"{prefix}down", self.neurons(x, prefix))

    def mlp_raw(self, x: Array) -> Array:
        if not self.sparse:
            return self.expert(x, "")
        logits = self.apply("router", x)
        chosen = np.argsort(-logits)[: self.config.num_experts_per_tok]
        if self.kind == "llama4_text":
            out = sum(self.expert(x * sigmoid(logits[e]), f"experts.{e}.") for e in chosen)
            return out + self.expert(x, "shared.")
        weights = np.exp(logits - logits.max())
        weights = weights / weights.sum()
        if self.kind in ("mixtral", "qwen3_vl_moe_text") or self.config.norm_topk_prob:
            weights = weights / weights[chosen].sum()
        out = sum(weights[e] * self.expert(x, f"experts.{e}.") for e in chosen)
        if "shared.down" in self.matrices:
            out = out + sigmoid(self.apply("shared.router", x)) * self.expert(x, "shared.")
        return out

    def mlp(self, x: Array) -> Array:
        out = self.mlp_raw(self.mlp_input(x))
        return self.norm(self.block.post_feedforward_layernorm, out) if self.sandwich else out

    def scale(self) -> float:
        if self.kind in ("gemma2", "gemma3_text"):
            return float(self.config.query_pre_attn_scalar) ** -0.5
        scale = 1 / math.sqrt(self.dim)
        if self.kind == "gpt2" and self.config.scale_attn_by_inverse_layer_idx:
            scale /= self.layer + 1
        return scale

    @property
    def rotates(self) -> bool:
        return self.kind != "gpt2" and (self.kind != "llama4_text" or bool(self.config.no_rope_layers[self.layer]))

    def rotate(self, x: Array, position: int) -> Array:
        table = self.text.rotary_emb
        if self.kind == "gemma3_text":
            table = getattr(table, f"{self.config.layer_types[self.layer]}_inv_freq")
        else:
            table = table.inv_freq
        turn = np.exp(1j * position * array(table))
        n, out = len(turn), x.copy()
        first, second = (slice(0, n), slice(n, 2 * n))
        if self.kind == "llama4_text":
            first, second = slice(0, 2 * n, 2), slice(1, 2 * n, 2)
        turned = (x[first] + 1j * x[second]) * turn
        out[first], out[second] = turned.real, turned.imag
        return out

    def head(self, name: str, x: Array, head: int, position: int) -> Array:
        flat = self.apply(name, self.attention_input(x))
        if self.kind == "olmo2":
            flat = self.norm(getattr(self.block.self_attn, f"{name}_norm"), flat)
        one = flat[head * self.dim : (head + 1) * self.dim]
        if self.kind.startswith(("qwen3", "gemma3")):
            one = self.norm(getattr(self.block.self_attn, f"{name}_norm"), one)
        if self.rotates:
            one = self.rotate(one, position)
            if self.kind == "llama4_text" and self.config.use_qk_norm:
                one = one / np.sqrt((one * one).mean() + self.eps)
        elif self.kind == "llama4_text" and self.config.attn_temperature_tuning and name == "q":
            steps = math.floor((position + 1) / self.config.floor_scale)
            one = one * (math.log(1 + steps) * self.config.attn_scale + 1)
        return one

    def qk(self, query: Array, key: Array, offset: int) -> Array:
        """Logits of every head for a query `offset` tokens after its key, at positions offset + 3 and 3 or 0."""
        start = 3 if self.rotates else 0
        scores = np.empty(self.heads)
        for head in range(self.heads):
            shared = head // (self.heads // self.kv)
            q = self.head("q", query, head, start + offset)
            scores[head] = q @ self.head("k", key, shared, start) * self.scale()
        cap = getattr(self.config, "attn_logit_softcapping", None)
        return scores if cap is None else cap * np.tanh(scores / cap)

    def mixed(self, x: Array) -> Array:
        normed = self.attention_input(x)
        values = self.apply("v", normed).reshape(self.kv, self.dim)
        out = np.concatenate([values[head // (self.heads // self.kv)] for head in range(self.heads)])
        return out * sigmoid(self.apply("q_gate", normed)) if "q_gate" in self.matrices else out

    def vo(self, x: Array) -> tuple[Array, Array]:
        """What every head adds, [heads, d], and the total."""
        z = self.mixed(x)
        parts = [
            self.matrices["o"][:, head * self.dim : (head + 1) * self.dim] @ z[head * self.dim : (head + 1) * self.dim]
            for head in range(self.heads)
        ]
        heads, total = np.stack(parts), self.apply("o", z)
        if not self.sandwich:
            return heads, total
        normed = self.norm(self.block.post_attention_layernorm, total)
        return heads * (normed / total), normed

    def project(self, name: str, x: Array) -> Array:
        if name == "o":
            return self.apply(name, self.mixed(x))
        prefix = name.rpartition(".")[0]
        if name.endswith("down"):
            return self.apply(name, self.neurons(self.mlp_input(x), f"{prefix}." if prefix else ""))
        attention = name in ("q", "k", "v", "q_gate") or prefix == "linear"
        return self.apply(name, self.attention_input(x) if attention else self.mlp_input(x))
