"""Taps of vLLM's models: against transformers with the same weights, and on stand-ins for ranks and stages."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from trimtab.backends.vllm.taps import VllmMap, describe, is_draft
from trimtab.errors import BackendError, SiteError
from trimtab.sites import Site
from trimtab.testing.models import tiny

FAMILIES = (
    "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "llama", "llama4", "gemma", "gemma2", "gemma3",
    "mistral", "phi3", "gpt2", "olmo2", "gpt_neox", "gpt_neox_sequential",
)  # fmt: skip
"""The first must hold experts: vLLM makes their process group when it starts, or never."""
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3_multimodal", "llama4_multimodal")
LACKING = {
    "llama4": {"q", "k"},
    "qwen3_next": {"q"},
    "gpt_neox": {"q", "k", "v"},
    "gpt_neox_sequential": {"q", "k", "v"},
}
without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def with_vllm(test: Any) -> Any:
    return pytest.mark.vllm(pytest.mark.xdist_group("vllm")(without_vllm(test)))


def save(family: str, path: Path) -> str:
    model = tiny(family, layers=2)
    config = model.config
    if config.get_text_config().__dict__.get("num_key_value_heads", 1) is None:
        del config.num_key_value_heads
    if family == "llama4":
        config.num_experts_per_tok = 1  # all that vLLM's experts do with a weight on their input
    if family == "qwen3_moe":
        del config.shared_expert_intermediate_size  # vLLM would make a shared expert, for which there are no weights
    if family == "gemma2":
        config.tie_word_embeddings = True  # vLLM's class has no head of its own
        model.tie_weights()
    if family == "qwen3_vl_moe":
        config.text_config.norm_topk_prob = True
    config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tapped.py` saw, for every family in one process."""
    folder = tmp_path_factory.mktemp("tapped")
    paths = [{family: save(family, folder / family) for family in group} for group in (FAMILIES, MULTIMODAL)]
    given, made = folder / "given.json", folder / "made.json"
    given.write_text(json.dumps(paths))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("tapped.py")
    done = subprocess.run(
        [sys.executable, str(script), str(given), str(made)],
        env=os.environ | settings,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert made.exists(), done.stderr[-3000:]
    return dict(json.loads(made.read_text()))


@pytest.fixture(params=FAMILIES)
def one(request: pytest.FixtureRequest, found: dict[str, Any]) -> SimpleNamespace:
    seen = found[request.param]
    assert "error" not in seen, seen["error"][-3000:]
    return SimpleNamespace(family=request.param, **seen)


@with_vllm
def test_every_site_reads_what_transformers_reads(one: SimpleNamespace) -> None:
    assert max(one.states.values()) < 2e-6, {site: error for site, error in one.states.items() if error >= 2e-6}
    assert all(ours == theirs for ours, theirs in one.widths.values())


@with_vllm
def test_a_shift_at_every_site_reaches_the_final_norm_as_in_transformers(one: SimpleNamespace) -> None:
    assert one.moved > 1e-3
    assert max(one.shifted.values()) < 2e-6, {site: error for site, error in one.shifted.items() if error >= 2e-6}


@with_vllm
def test_taps_fire_in_the_stated_order(one: SimpleNamespace) -> None:
    assert one.order


@with_vllm
def test_the_stream_is_rounded_as_the_blocks_round_it(one: SimpleNamespace) -> None:
    if one.family in ("gpt2", "olmo2", "gpt_neox", "gpt_neox_sequential"):
        assert one.rounding is None
    else:
        assert one.rounding == [True, True]


@with_vllm
def test_only_what_vllm_fuses_out_of_reach_is_missing(one: SimpleNamespace) -> None:
    assert one.extra == []
    assert {site.rpartition(".")[2] for site in one.missing} == LACKING.get(one.family, set())


@with_vllm
@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_classes_are_tapped_inside_their_language_model(family: str, found: dict[str, Any]) -> None:
    seen = found[family]
    assert "error" not in seen, seen["error"][-3000:]
    assert seen["class"].endswith("ForConditionalGeneration") and seen["inside"]
    assert seen["entries"] == ["layers.0.in", "layers.1.in"] if "qwen3" in family else ["layers.0.in"]
    assert seen["argument"] == [1, "hidden_states"]


class Linear(nn.Module):
    """A projection as vLLM's look from outside, on one of several ranks."""

    return_bias = True

    def __init__(self, width: int, *, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.input_size, self.input_size_per_partition = width, width // ranks
        self.tp_rank = rank

    def forward(self, input_: Any) -> Any:
        return input_, None


class Fused(Linear):
    def __init__(self, heads: int, kv_heads: int, dim: int, *, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(heads * dim, rank=rank)
        self.num_heads, self.num_kv_heads, self.head_size = heads // ranks, max(1, kv_heads // ranks), dim
        self.num_kv_head_replicas = max(1, ranks // kv_heads)


class Block(nn.Module):
    def __init__(self, **ranks: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj, self.self_attn.o_proj = Fused(8, 2, 4, **ranks), Linear(32, **ranks)
        self.mlp.down_proj = Linear(48, **ranks)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        return hidden_states, residual


class PPMissingLayer(nn.Identity):
    """As vLLM calls what another pipeline stage holds."""


def stand_in(name: str = "Qwen3ForCausalLM", held: range = range(4), *, inner: str = "", **ranks: int) -> nn.Module:
    """A model of four layers, of which one pipeline stage holds some."""
    model = type(name, (nn.Module,), {})()
    top = model
    if inner:
        model.language_model = top = nn.Module()
    top.model = nn.Module()
    top.model.layers = nn.ModuleList(Block(**ranks) if layer in held else PPMissingLayer() for layer in range(4))
    top.model.embed_tokens = top.model.norm = nn.Identity()
    return model


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4,
        "vocab_size": 50, "intermediate_size": 48, **changes,
    }  # fmt: skip
    made = SimpleNamespace(**values)
    made.get_text_config = lambda: made
    return made


def names(model_map: VllmMap, *sites: str) -> list[str]:
    return [tap.name for tap in model_map.taps(sites)]


def test_only_needed_taps_are_given_and_r_is_kept_up_to_its_last_reader() -> None:
    model_map = describe(stand_in(), config())
    assert names(model_map, "layers.2.attn_out", "layers.1.q") == ["layers.1.q", "layers.2.attn"]
    assert not model_map.needs_residual(["layers.2.attn_out"])
    taps = model_map.taps(["layers.1.resid_mid", "layers.3.mlp_out"])
    assert [(tap.name, tap.after) for tap in taps] == [
        ("layers.0.in", "set"),
        ("layers.0.attn", "add"),
        ("layers.0.mlp", "add"),
        ("layers.1.attn", "none"),
        ("layers.3.mlp", "none"),
    ]
    assert [[str(stage.site) for stage in tap.stages] for tap in taps] == [
        [], [], [], ["layers.1.resid_mid"], ["layers.3.mlp_out"]
    ]  # fmt: skip
    assert model_map.needs_residual(["layers.1.resid_mid"])
    assert names(model_map, "layers.0.resid_pre") == ["layers.0.in"]
    assert not model_map.needs_residual(["layers.0.resid_pre", "embed"])
    assert names(model_map, "logits") == []


def test_a_site_between_two_layers_is_one_tap_with_both_names_in_order() -> None:
    (*_, tap) = describe(stand_in(), config()).taps(["layers.2.resid_pre", "layers.1.resid_post", "layers.1.mlp_raw"])
    assert [str(stage.site) for stage in tap.stages] == [
        "layers.1.mlp_raw", "layers.1.resid_post", "layers.2.resid_pre"
    ]  # fmt: skip
    assert [stage.over_residual for stage in tap.stages] == [False, True, True]


def test_a_pipeline_stage_knows_all_sites_and_taps_its_own_layers() -> None:
    first, second = (describe(stand_in(held=held), config()) for held in (range(2), range(2, 4)))
    whole = describe(stand_in(), config())
    assert first.sites() == second.sites() == whole.sites()
    assert {site: whole.widths(site) for site in whole.sites()} == {site: first.widths(site) for site in whole.sites()}
    assert (first.layers, second.layers, first.num_layers) == (range(2), range(2, 4), 4)
    assert (first.first_layer_has_residual, second.first_layer_has_residual) == (False, True)
    sites = ["embed", "layers.2.resid_pre", "layers.3.resid_post", "final_norm"]
    assert names(first, *sites) == ["layers.0.in", "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    assert names(second, *sites) == ["layers.2.attn", "layers.2.mlp", "layers.3.attn", "layers.3.mlp", "final_norm"]
    assert not first.needs_residual(["layers.3.resid_post"])


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (4, 3)])
def test_a_tensor_parallel_rank_holds_its_columns(ranks: int, rank: int) -> None:
    model_map = describe(stand_in(ranks=ranks, rank=rank), config())
    sites = [f"layers.0.{point}" for point in ("q", "k", "v", "attn_z", "mlp_act", "attn_out")]
    taps = {tap.name.rpartition(".")[2]: tap for tap in model_map.taps(sites)}
    q, kv = 32 // ranks, 4  # two key heads: with four ranks, two ranks each hold the same one
    assert [taps[name].columns for name in "qkv"] == [(0, q), (q, q + kv), (q + kv, q + 2 * kv)]
    assert [taps[name].offset for name in "qkv"] == [rank * q, 4, 4]
    assert (taps["attn_z"].width, taps["attn_z"].offset) == (32 // ranks, rank * 32 // ranks)
    assert (taps["mlp_act"].width, taps["mlp_act"].offset) == (48 // ranks, rank * 48 // ranks)
    assert [name for name, tap in taps.items() if tap.sharded] == ["q", "k", "v", "attn_z", "mlp_act"]
    assert [model_map.widths(site) for site in sites] == [32, 8, 8, 32, 48, 32]


def test_visual_features_come_between_two_layers_of_qwen3_vl() -> None:
    seeing = config(model_type="qwen3_vl_text", vision_config=SimpleNamespace(deepstack_visual_indexes=[5, 9]))
    name = "Qwen3VLForConditionalGeneration"
    model_map = describe(stand_in(name, inner="language_model"), seeing)
    taps = model_map.taps([Site("resid_pre", layer=layer) for layer in range(4)] + [Site("resid_post", layer=0)])
    assert [(tap.name, tap.after, [str(stage.site) for stage in tap.stages]) for tap in taps] == [
        ("layers.0.in", "set", ["layers.0.resid_pre"]),
        ("layers.0.attn", "add", []),
        ("layers.0.mlp", "none", ["layers.0.resid_post"]),
        ("layers.1.in", "add", ["layers.1.resid_pre"]),
        ("layers.1.attn", "add", []),
        ("layers.2.in", "add", ["layers.2.resid_pre"]),
        ("layers.2.attn", "add", []),
        ("layers.2.mlp", "none", ["layers.3.resid_pre"]),
    ]
    assert taps[0].module_path == "language_model.model.layers.0" and taps[0].argument == (1, "hidden_states")
    with pytest.raises(BackendError, match="VLLM_PP_LAYER_PARTITION"):
        describe(stand_in(name, range(2, 4), inner="language_model"), seeing)


def test_what_cannot_be_tapped_is_refused_in_one_line() -> None:
    model_map = describe(stand_in(), config())
    with pytest.raises(SiteError, match=r"has no layers\.9\.q: it has layers 0 to 3; nearest: layers\.\d\.q"):
        model_map.taps(["layers.9.q"])
    with pytest.raises(SiteError, match="read with the hf backend"):
        model_map.taps(["module:model.layers.0.output"])
    with pytest.raises(BackendError, match=r"FalconForCausalLM .* is of no known family; known: GPT2LMHeadModel, "):
        describe(stand_in("FalconForCausalLM"), config(model_type="falcon"))
    with pytest.raises(BackendError, match="serves"):
        describe(stand_in("EagleLlamaForCausalLM"), config(model_type="llama"))
    model = stand_in()
    model.model.layers[1].use_attn_reduce_scatter_for_moe = True
    with pytest.raises(BackendError, match="splits the rows"):
        describe(model, config())
    model = stand_in()
    model.model.layers[2].layer_scale = True
    with pytest.raises(BackendError, match="layer_scale"):
        describe(model, config())
    del (model := stand_in()).model.layers[0].mlp
    with pytest.raises(BackendError, match=r"no module model\.layers\.0\.mlp"):
        describe(model, config())


def test_experts_and_reordered_heads_say_why_a_site_is_missing() -> None:
    experts = config(model_type="qwen3_moe", num_experts=4, decoder_sparse_step=2, mlp_only_layers=[3])
    model_map = describe(stand_in("Qwen3MoeForCausalLM"), experts)
    assert [layer for layer in range(4) if "mlp_act" not in model_map.points(layer)] == [1]
    with pytest.raises(SiteError, match=r"mixture of experts.*layer 1 has: resid_pre, resid_mid"):
        model_map.widths("layers.1.mlp_act")


@without_vllm
def test_exactly_vllms_draft_classes_are_drafts() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    registry = Path(spec.origin).parent / "model_executor" / "models" / "registry.py"
    seen = 0
    for node in ast.walk(ast.parse(registry.read_text())):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        for value in node.value.values:
            if isinstance(value, ast.Tuple):
                _, name = ast.literal_eval(value)
                drafts = node.targets[0].id == "_SPECULATIVE_DECODING_MODELS"  # type: ignore[attr-defined]
                assert is_draft(type(name, (nn.Module,), {})()) == drafts, name
                seen += drafts
    assert seen > 40
