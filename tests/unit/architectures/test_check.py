"""What is refused or warned about before a model is run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab import architectures
from trimtab.errors import BackendError
from trimtab.testing.models import tiny


def test_a_sound_model_passes_without_a_warning() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert architectures.check_model(tiny("qwen3", dtype=dtype)) == ()
    assert architectures.check_model(tiny("gpt2")) == ()


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16().float(),  # float32 again, the values stay rounded
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4", "qwen2_vl"])
def test_a_model_cast_after_loading_is_refused(family: str, cast: object) -> None:
    with pytest.raises(BackendError, match=r"inv_freq was rounded .*from_pretrained\(\.\.\., dtype=\.\.\.\)"):
        architectures.check_model(cast(tiny(family)))  # type: ignore[operator]


def test_frequencies_that_are_powers_of_two_are_not_taken_for_rounded() -> None:
    model = tiny("llama")
    model.model.rotary_emb.inv_freq = 2.0 ** -torch.arange(8)
    assert architectures.check_model(model) == ()


def test_training_mode_is_refused_and_would_draw_dropout() -> None:
    model = tiny("gpt2")
    model.train()
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(BackendError, match=r"training mode.*model\.eval\(\)"):
        architectures.check_model(model)


def test_active_autocast_is_refused() -> None:
    model = tiny("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(BackendError, match="autocast is active on cpu"):
        architectures.check_model(model)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(BackendError, match=r"training mode.*inv_freq was rounded"):
        architectures.check_model(tiny("llama").train().half())


def enlarged(attention: str) -> nn.Module:
    """Gemma 2 with query and key weights so large that its softcap matters."""
    model = tiny("gemma2")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    model.set_attn_implementation(attention)
    return model


def test_a_softcap_lost_under_sdpa_is_warned_about() -> None:
    eager, sdpa = enlarged("eager"), enlarged("sdpa")
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        with_cap, without = eager(input_ids=ids).logits, sdpa(input_ids=ids).logits
    assert (with_cap - without).norm() > 0.05 * with_cap.norm(), "the cap matters here"
    assert architectures.check_model(eager) == ()
    (warning,) = architectures.check_model(sdpa)
    assert "sdpa, which drops this model's attention softcap of 50" in warning and '"eager"' in warning


def test_coarse_float32_products_are_warned_about() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        (warning,) = architectures.check_model(tiny("llama"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert "'medium'" in warning and "'highest'" in warning
