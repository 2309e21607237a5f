"""The structural probe: it finds what the table says, and says plainly what it cannot explain."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trimtab import architectures, hooks
from trimtab.architectures import ModelMap
from trimtab.errors import BackendError, SiteError
from trimtab.sites import Site
from trimtab.testing.models import tiny

FUSED = ("phi3", "gpt2", "gpt_neox", "gpt_neox_sequential")
UNEXPLAINED = ("gemma4", "mamba", "bloom")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structure_and_table_agree(family: str, dtype: torch.dtype, tools: SimpleNamespace) -> None:
    """Same blocks, same sites, same tensors; only q, k, v inside a fused projection need the table."""
    model, table = tools.built(family, dtype)
    found = tools.probed(family, dtype)
    assert found.fallback and not table.fallback
    assert (found.blocks_path, found.text_path, found.num_layers) == (
        table.blocks_path,
        table.text_path,
        table.num_layers,
    )
    assert set(found.handles) <= set(table.handles)
    missing = {site.point for site in set(table.handles) - set(found.handles)}
    assert missing == ({"q", "k", "v"} if family in FUSED else {"q"} if family == "qwen3_next" else set())
    by_table, by_structure = tools.capture(model, table, found.sites()), tools.capture(model, found)
    for site in map(str, found.sites()):
        assert torch.equal(by_table[site], by_structure[site]), site


@pytest.mark.parametrize("family", ["falcon", "falcon_sequential", "granite", "cohere2", "gpt_oss", "gemma4", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unknown_families_keep_their_logits_when_sites_are_written_back(
    family: str, dtype: torch.dtype, tools: SimpleNamespace
) -> None:
    model, found = tools.built(family, dtype)
    ids = tools.tokens()
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        pairs = [(found.handle(site), lambda x: x.clone()) for site in found.sites()]
        with hooks.attach(model, pairs) as attached:
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    assert set(attached.calls.values()) == {1}


@pytest.mark.parametrize("family", ["falcon", "falcon_sequential", "granite", "cohere2", "gpt_oss"])
def test_contributions_of_unknown_families_add_up(family: str, tools: SimpleNamespace) -> None:
    """Falcon adds the attention into the MLP's output in place: without copies mlp_out would hold both."""
    model, found = tools.built(family, torch.float32)
    seen = tools.capture(model, found)
    for layer in range(2):
        pre, attn, mlp, post = (
            seen[f"layers.{layer}.{point}"] for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-6, atol=1e-5)
        if "resid_mid" in found.points(layer):
            assert torch.equal(pre + attn, seen[f"layers.{layer}.resid_mid"])


def test_granites_multiplier_belongs_to_the_contribution(tools: SimpleNamespace) -> None:
    model, found = tools.built("granite", torch.float32)
    assert found.handle("layers.0.attn_out").scale == model.config.residual_multiplier == 0.22
    ids, vector = tools.tokens(), torch.linspace(-1, 1, 64)
    shifted = [
        logits_with(model, ids, found, "layers.0.mlp_out", lambda x: x + vector),
        logits_with(model, ids, found, "layers.0.resid_post", lambda x: x + vector),
    ]
    torch.testing.assert_close(*shifted, rtol=1e-5, atol=1e-6)


def logits_with(
    model: nn.Module, ids: Tensor, found: ModelMap, site: str, visit: Callable[[Tensor], Tensor | None]
) -> Tensor:
    with hooks.attach(model, [(found.handle(site), visit)]), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", UNEXPLAINED)
def test_blocks_without_two_contributions_offer_only_their_ends(family: str, tools: SimpleNamespace) -> None:
    """Gemma 4 scales the stream after three additions, Mamba has one mixer, BLOOM's modules add the stream."""
    found = tools.built(family, torch.float32)[1]
    assert found.points(0) == found.points(1) == ("resid_pre", "resid_post")
    with pytest.raises(
        SiteError, match=r"layers\.0\.mlp_out: no two of its modules add up .* use resid_pre and resid_post"
    ):
        found.handle("layers.0.mlp_out")


def test_parallel_blocks_have_no_resid_mid(tools: SimpleNamespace) -> None:
    for family in ("falcon", "cohere2"):
        with pytest.raises(SiteError, match="use attn_out or mlp_out"):
            tools.built(family, torch.float32)[1].handle("layers.0.resid_mid")


def test_a_model_found_by_structure_is_read_freely_and_steered_by_consent() -> None:
    model = tiny("falcon")
    found = architectures.describe(model)
    assert found.fallback and not found.steerable and found.numerics is None
    with pytest.raises(BackendError, match=r"'falcon' is in no table .* allow_fallback=True"):
        found.require_steerable()
    allowed = architectures.describe(model, allow_fallback=True)
    assert allowed.fallback and allowed.steerable
    allowed.require_steerable()
    architectures.describe(tiny("llama")).require_steerable()


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny("falcon").train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    architectures.probe(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failing_model_is_refused_and_left_without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("falcon")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(model.transformer.h[1].mlp, "forward", broken)
    with pytest.raises(BackendError, match=r"could not be probed.*RuntimeError: no kernel for this device"):
        architectures.probe(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class _Config:
    """As much of a transformers configuration as the probe reads."""

    model_type = "homemade"
    hidden_size, num_attention_heads, num_hidden_layers, vocab_size = 16, 2, 2, 64

    def get_text_config(self, decoder: bool) -> _Config:
        return self

    def to_dict(self) -> dict[str, object]:
        return {"hidden_size": 16}


class _Block(nn.Module):
    """A sequential block; `copies` makes it keep its own copy of the stream while its MLP's norm gets another."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.attn, self.norm, self.mlp = (
            nn.Sequential(nn.Linear(16, 16)),
            nn.LayerNorm(16),
            nn.Sequential(nn.Linear(16, 16)),
        )
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm(x.clone() if self.copies else x))


class _Homemade(nn.Module):
    def __init__(self, copies: bool = False, streams: int = 0) -> None:
        super().__init__()
        self.config, self.streams = _Config(), streams
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(_Block(copies) for _ in range(2))
        self.head = nn.Linear(16, 64)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        x = x.expand(self.streams, *x.shape) if self.streams else x
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


def test_resid_mid_is_dropped_where_a_write_would_miss_the_stream() -> None:
    assert "resid_mid" in architectures.probe(_Homemade()).points(0)
    found = architectures.probe(_Homemade(copies=True))
    with pytest.raises(SiteError, match="does not reach the stream; use attn_out or mlp_out"):
        found.handle("layers.1.resid_mid")
    assert Site("attn_out", layer=1) in found.handles


def test_several_streams_are_refused() -> None:
    with pytest.raises(BackendError, match=r"shape \(4, 2, 7, 16\), several streams instead of one"):
        architectures.probe(_Homemade(streams=4))


def test_a_model_without_blocks_is_refused() -> None:
    model = _Homemade()
    model.blocks = nn.Sequential(*model.blocks)  # type: ignore[assignment]
    with pytest.raises(BackendError, match=r"'homemade'.* no list of decoder blocks"):
        architectures.probe(model)


def test_notes_say_what_stands_between_embedding_and_blocks(tools: SimpleNamespace) -> None:
    assert any(
        "between embed and layers.0.resid_pre" in note for note in tools.built("granite", torch.float32)[1].notes
    )
    assert tools.built("falcon", torch.float32)[1].notes == ()
