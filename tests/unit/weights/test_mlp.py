"""The MLP's options: activations, routers, norms, and rows of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.weights.numpy_reference import Reference
from tests.unit.weights.variants import variant
from tests.unit.weights.watching import watch
from trimtab.errors import InputError
from trimtab.testing.models import tiny
from trimtab.weights import LayerMath, block, load

Saved = Callable[..., tuple[nn.Module, Path]]


def rows(count: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "relu2"}),
        ("llama", {"hidden_act": "linear"}),
        ("gemma2", {"hidden_activation": "silu"}),
        ("gemma", {"hidden_act": "relu"}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt_neox", {"hidden_act": "gelu_fast"}),
        ("qwen3", {"rms_norm_eps": 0.3}),
        ("gpt2", {"layer_norm_epsilon": 0.3}),
        ("gpt_neox", {"layer_norm_eps": 0.3}),
        ("gemma3", {"rms_norm_eps": 0.3}),
        ("olmo2", {"rms_norm_eps": 0.3}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("llama4", {"num_experts_per_tok": 1}),
    ],
    ids=str,
)
def test_options_change_the_formula_as_they_change_the_model(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = variant(family, tmp_path, **options)
    plain = load(tmp_path).layer(1)
    seen = watch(model, 1, rows()[:, None])
    entered = seen.get("resid_mid", rows()[:, None])[:, 0]
    # 5e-6 of the largest value: the modules cast their norms to float32
    assert distance(LayerMath(plain).mlp(entered), seen["mlp_out"].reshape(-1, 64)) < 5e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_length_of_a_direction_does_not_matter_behind_an_input_norm(family: str, saved: Saved) -> None:
    formula = LayerMath(load(saved(family)[1]).layer(0), "float64")
    x = rows()
    # what is left of the length is eps against a mean square of 100
    assert distance(formula.mlp(100 * x), formula.mlp(10 * x)) < 1e-6


def test_the_length_of_a_direction_matters_without_an_input_norm(saved: Saved) -> None:
    formula = LayerMath(load(saved("olmo2")[1]).layer(0), "float64")
    assert distance(formula.mlp(2 * rows()), formula.mlp(rows())) > 0.05
    assert torch.equal(formula.normed(rows(), "mlp"), rows().double())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "llama4", "gpt2", "olmo2"])
def test_a_row_does_not_depend_on_its_batch(family: str, saved: Saved) -> None:
    formula = LayerMath(load(saved(family)[1]).layer(1), "float64")
    together, alone = formula.mlp(rows()), torch.cat([formula.mlp(row[None]) for row in rows()])
    assert distance(together, alone) < 1e-13
    assert formula.mlp(rows(0)).shape == (0, 64)


def test_an_expert_is_asked_as_if_it_had_been_chosen(saved: Saved) -> None:
    model, folder = saved("qwen2_moe")
    formula, expected = LayerMath(load(folder).layer(1), "float64"), Reference(model, 1)
    x = rows().double()
    for name in ("experts.2.down", "shared.down"):
        prefix = name.removesuffix("down")
        reference = np.stack([expected.expert(expected.mlp_input(row.numpy()), prefix) for row in x])
        assert distance(formula.project(name, x), torch.from_numpy(reference)) < 1e-10


def test_the_matrix_alone_is_compared_by_feeding_both_the_same_inputs(saved: Saved) -> None:
    formula = LayerMath(load(saved("llama")[1]).layer(0), "float64")
    inputs = formula.inputs("down", rows())
    assert inputs.shape == (9, 96)
    assert torch.equal(formula.apply("down", inputs), formula.project("down", rows()))
    assert torch.equal(formula.apply("down", inputs), formula.mlp(rows()))


def test_responses_compute_what_is_asked_for_and_no_more(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load(saved("qwen3_next")[1]).layer(1)
    formula, read = LayerMath(weights), []
    original = type(weights).matrix
    monkeypatch.setattr(
        type(weights), "matrix", lambda self, name, *rest: read.append(name) or original(self, name, *rest)
    )

    def matrices(names: list[str] | None) -> list[str]:
        read.clear()
        list(formula.responses(rows(), names))
        return sorted(name for name in read if not name.endswith("norm"))

    assert matrices(None) == sorted(formula.names)
    assert matrices(["k"]) == ["k"]
    assert matrices(["o"]) == ["o", "q_gate", "v"]
    assert matrices(["down"]) == ["down", "gate", "up"]
    assert matrices(["gate", "q"]) == ["gate", "q"]


def test_responses_stay_as_they_were_given(tmp_path: Path) -> None:
    """An activation that returns its own input must not let the product with `up` be written over the gate's output."""
    variant("llama", tmp_path, hidden_act="linear")
    formula = LayerMath(load(tmp_path).layer(0))
    for response in list(formula.responses(rows())):
        assert torch.equal(response.outputs, formula.project(response.name, rows())), response.name


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3"])
def test_matrices_cast_in_pieces_are_multiplied_whole(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_PIECE", 10 * 64 + 5)
    tiny(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights = load(tmp_path).layer(1)
    for response in LayerMath(weights, "float64").responses(rows()):
        matrix, bias = (get(response.name, torch.float64) for get in (weights.matrix, weights.bias))
        expected = response.inputs @ matrix.T + (0 if bias is None else bias)
        assert distance(response.outputs, expected) < 1e-14, response.name


def test_what_cannot_be_computed_is_refused(saved: Saved) -> None:
    formula = LayerMath(load(saved("qwen3_next")[1]).layer(0))
    with pytest.raises(
        InputError, match=r"matrix 'linear.o' reads a mixture of tokens; directions can be sent through"
    ):
        formula.project("linear.o", rows())
    with pytest.raises(InputError, match="matrix 'up' does not exist"):
        list(LayerMath(load(saved("qwen3_moe")[1]).layer(1)).responses(rows(), ["up"]))
    with pytest.raises(InputError, match=r"rows of shape \(9, 32\) for layer 0; \[n, 64\] is expected"):
        formula.mlp(rows()[:, :32])
    with pytest.raises(InputError, match=r"rows of shape \(64,\)"):
        formula.mlp(rows()[0])
    with pytest.raises(InputError, match="computed in float32 or float64, not in bfloat16"):
        LayerMath(load(saved("llama")[1]).layer(0), torch.bfloat16)
