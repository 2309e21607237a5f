"""Checkpoints: forms of files, dtypes, what is refused, and that one layer is in memory at a time."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.unit.weights.numpy_reference import Reference
from tests.unit.weights.variants import variant
from trimtab.errors import InputError
from trimtab.testing.models import tiny
from trimtab.weights import LayerMath, load, pair

Saved = Callable[..., tuple[nn.Module, Path]]


def changed(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors and configuration entries."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    written = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**written, **config}))
    return out


def keep(tensors: dict[str, Tensor]) -> None:
    """Change nothing."""


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    model = tiny("qwen3", layers=3)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = load(tmp_path)
    assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.family) == (3, 64, "qwen3")
    for layer, block in enumerate(model.model.layers):
        assert torch.equal(checkpoint.layer(layer).matrix("up"), block.mlp.up_proj.weight)
        assert torch.equal(checkpoint.layer(layer).matrix("o"), block.self_attn.o_proj.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_stored_dtype_is_kept_and_computed_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("qwen2", dtype=dtype)
    model.save_pretrained(tmp_path)
    weights = load(tmp_path).layer(1)
    assert weights.matrix("gate").dtype == dtype
    assert torch.equal(weights.matrix("gate"), model.model.layers[1].mlp.gate_proj.weight)
    assert weights.nbytes == dtype.itemsize * sum(p.numel() for p in model.model.layers[1].parameters())
    x = torch.randn(3, 64)
    assert LayerMath(weights, "float32").mlp(x).dtype == torch.float32
    exact = LayerMath(weights, "float64").mlp(x)
    assert (LayerMath(weights, "float32").mlp(x) - exact).abs().max() < 5e-6 * exact.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_a_model_saved_without_its_head_is_read_too(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.base_model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    expected = Reference(model, 1).matrices
    assert all((checkpoint.layer(1).matrix(name, torch.float64).numpy() == expected[name]).all() for name in expected)
    assert not checkpoint.tied
    with pytest.raises(InputError, match=r"holds no (lm_head|embed_out).weight"):
        checkpoint.head()


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.tied
    assert torch.equal(checkpoint.head(), model.model.embed_tokens.weight)


def test_published_stacked_experts_that_lie_transposed_are_turned(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved("qwen3_vl_moe")

    def turn(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2)

    weights = load(changed(folder, tmp_path / "turned", turn)).layer(1)
    for name, matrix in Reference(model, 1).matrices.items():
        assert (weights.matrix(name, torch.float64).numpy() == matrix).all(), name


@pytest.mark.parametrize("family", ["llama", "llama4", "qwen3", "qwen3_next", "gemma", "gemma2", "gemma3", "olmo2"])
def test_optional_biases_are_read(family: str, tmp_path: Path) -> None:
    options = {"attention_bias": True, **({"mlp_bias": True} if family == "llama" else {})}
    model = variant(family, tmp_path, **options)
    weights, expected = load(tmp_path).layer(1), Reference(model, 1)
    assert {"q", "k", "v", "o"} <= set(expected.biases)
    found = {name for name in weights.names if weights.bias(name) is not None}
    assert found == set(expected.biases)


def test_absent_biases_are_not_invented(tmp_path: Path) -> None:
    for family, option in {"qwen2_moe": "qkv_bias", "gpt_neox": "attention_bias"}.items():
        model = variant(family, tmp_path / family, **{option: False})
        weights, expected = load(tmp_path / family).layer(1), Reference(model, 1)
        found = {name for name in weights.names if weights.bias(name) is not None}
        assert found == set(expected.biases)
        assert "q" not in found


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", "layer 1 of .* q_norm is missing"),
        ("qwen3", "model.layers.0.mlp.gate_proj.weight", "layer 0 of .* gate is missing"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "k_proj.bias is missing"),
        ("gpt2", "transformer.h.1.ln_2.bias", "ln_2.bias is missing"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", "q is missing; k is missing; v is missing"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight", "experts.3.up is missing"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", "router is missing"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", "shared.router is missing"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba.weight", "linear.b is missing; linear.a is missing"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight", "mlp_post_norm is missing"),
    ],
)
def test_a_missing_tensor_is_named(family: str, name: str, said: str, saved: Saved, tmp_path: Path) -> None:
    folder = changed(saved(family)[1], tmp_path / "short", drop(name))
    with pytest.raises(InputError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("qwen3", {"head_dim": 16}, r"gives a q of \[128, 64\], its configuration states \[64, 64\]"),
        ("phi3", {"num_key_value_heads": 4}, r"qkv_proj.weight gives a v of \[0, 64\]"),
        ("phi3", {"num_key_value_heads": 1}, r"qkv_proj.weight has 128 rows, its configuration states 96"),
        ("qwen3_next", {"linear_key_head_dim": 8}, r"in_proj_qkvz.weight has 192 rows, its configuration states 160"),
        ("llama", {"num_hidden_layers": 3}, "layer 2 of .* is missing"),
        ("llama", {"hidden_size": 128, "head_dim": 16}, r"states \[128\]"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    family: str, config: dict[str, Any], said: str, saved: Saved, tmp_path: Path
) -> None:
    folder = changed(saved(family)[1], tmp_path / "other", keep, **config)
    with pytest.raises(InputError, match=said):
        load(folder)


def test_a_file_that_was_cut_off_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = changed(saved("llama")[1], tmp_path / "cut", keep)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 100, len(whole) // 2, 100, 3, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model.safetensors cannot be read, it may have been cut off") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_a_file_cut_off_after_loading_is_refused_when_it_is_read(saved: Saved, tmp_path: Path) -> None:
    folder = changed(saved("llama")[1], tmp_path / "late", keep)
    checkpoint = load(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    with pytest.raises(InputError, match="cut off"):
        checkpoint.layer(0).matrix("q")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of \d+ shards: {gone.name}"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as an index of shards"):
        load(tmp_path)


def test_weights_in_another_format_are_refused_with_what_to_do(saved: Saved, tmp_path: Path) -> None:
    folder = changed(saved("llama")[1], tmp_path / "bin", keep)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"holds no safetensors weights; model.safetensors or .*index.json was expected"
    ):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(
        InputError, match=r"it holds pytorch_model.bin: load the model and save_pretrained\(\) it again"
    ):
        load(folder)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 32, dtype=torch.uint8)


def scales(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1)


@pytest.mark.parametrize(
    ("edit", "config", "what"),
    [
        (keep, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config"),
        (integers, {}, "up_proj.weight is U8"),
        (scales, {}, "weight_scale_inv"),
    ],
)
def test_quantised_checkpoints_are_refused_with_what_to_do(
    edit: Callable[[dict[str, Tensor]], None], config: Mapping[str, Any], what: str, saved: Saved, tmp_path: Path
) -> None:
    folder = changed(saved("llama")[1], tmp_path / "small", edit, **config)
    with pytest.raises(InputError, match=rf"is quantised \(.*{what}.*dequantize\(\) it and save_pretrained"):
        load(folder)


def test_what_is_no_known_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    falcon = tmp_path / "falcon"
    tiny("falcon").save_pretrained(falcon)
    with pytest.raises(InputError, match="'falcon', whose arithmetic is in no table of architectures; known: gemma"):
        load(falcon)
    broken = changed(saved("llama")[1], tmp_path / "broken", keep)
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"configuration in .* cannot be read"):
        load(broken)
    with pytest.raises(InputError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a directory, a hub id or testbed was expected"):
        load(3)  # type: ignore[arg-type]


def test_a_hub_id_without_a_network_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="'nobody/nothing' cannot be fetched") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_layers_and_names_outside_the_model_are_refused(saved: Saved) -> None:
    checkpoint = load(saved("llama")[1])
    for layer in (-1, 2, "0"):
        with pytest.raises(InputError, match="it has layers 0 to 1"):
            checkpoint.layer(layer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer 0 has no 'qq'; it has: "):
        checkpoint.layer(0).matrix("qq")
    with checkpoint:
        kept = checkpoint.layer(0)
    assert kept.matrix("q").shape == (64, 64)
    with pytest.raises(InputError, match="was closed"):
        checkpoint.layer(0)


def test_the_embedded_model_is_read() -> None:
    checkpoint = load("testbed")
    weights = checkpoint.layer(0)
    x = torch.randn(4, checkpoint.hidden_size)
    assert LayerMath(weights).mlp(x).shape == x.shape


def test_pairs_that_differ_are_refused_by_what_differs(saved: Saved, tmp_path: Path) -> None:
    base = saved("qwen3")[1]
    with pytest.raises(InputError, match="the model types are qwen3 and llama; head_dim is 32 and 16"):
        pair(base, saved("llama")[1])
    tiny("qwen3", layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(InputError, match="the layers are 2 and 3"):
        pair(base, tmp_path / "deep")
    variant("qwen3", tmp_path / "bias", attention_bias=True)
    with pytest.raises(InputError, match="layer 0 q has a bias only in the tuned model"):
        pair(base, tmp_path / "bias")
    model = tiny("qwen3")
    model.config.intermediate_size = 80
    type(model)(model.config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"layer 0 gate is \[96, 64\] and \[80, 64\]; .* and 2 more"):
        pair(base, tmp_path / "narrow")


def test_differences_that_do_no_harm_are_noted(saved: Saved, tmp_path: Path) -> None:
    base = saved("qwen3")[1]
    model = tiny("qwen3", dtype=torch.bfloat16)
    model.resize_token_embeddings(130)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(tmp_path)
    with pair(base, tmp_path) as both:
        text = "; ".join(both.notes)
        assert both.layer(1).tuned.matrix("q").dtype == torch.bfloat16
    for part in ("hold 128 and 130 tokens", "norm_eps is 1e-06 and 1e-05", "rope_parameters", "are F32 and BF16"):
        assert part in text
    assert pair(base, base).notes == ()
    assert pair(base, saved("qwen3", False)[1]).notes == ()


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """20 layers of 3 MB each: dropping a layer gives its pages back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"hidden_size": 256, "intermediate_size": 680, "num_attention_heads": 4, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=20, **options)).save_pretrained(tmp_path)
    gc.collect()
    checkpoint = load(tmp_path)
    process, x = psutil.Process(), torch.randn(8, 256)
    LayerMath(checkpoint.layer(0)).mlp(x)
    start = mapped(process, tmp_path)
    peaks = []
    for layer in range(20):
        weights = checkpoint.layer(layer)
        formula = LayerMath(weights)
        formula.mlp(x), formula.qk(x, x), formula.vo(x)
        peaks.append(mapped(process, tmp_path))
        del formula
    assert start == 0
    assert weights.nbytes == 4 * (4 * 256 * 256 + 3 * 256 * 680 + 2 * 256)
    assert weights.nbytes * 0.9 < max(peaks) < 1.5 * weights.nbytes


def mapped(process: psutil.Process, folder: Path) -> int:
    """Bytes of files in a folder that are mapped and resident."""
    return sum(part.rss for part in process.memory_maps() if part.path.startswith(str(folder)))
