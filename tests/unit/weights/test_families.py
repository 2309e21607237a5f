"""The formulas of every family against the model's own modules and against an independent numpy reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.weights.numpy_reference import Reference
from tests.unit.weights.watching import watch
from trimtab.weights import LayerMath, load

Saved = Callable[..., tuple[nn.Module, Path]]
# Of the largest value. The modules run in float32 and cast their norms to it, so no closer agreement exists.
OWN = 5e-6
# Of the largest value, between two float64 computations.
NUMPY = 1e-10


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows of a stream: directions of several lengths, because a family without an input norm feels the length."""
    x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.3, 4, x[..., 0].numel()).view(*shape, 1)


def distance(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    one, other = (torch.as_tensor(part).to(torch.float64) for part in (actual, expected))
    assert one.shape == other.shape
    assert other.abs().max() > 1e-3
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("original", [True, False])
def test_matrices_are_the_modules_own_bit_for_bit(family: str, original: bool, saved: Saved) -> None:
    model, folder = saved(family, original)
    with load(folder) as checkpoint:
        for layer in range(2):
            weights, expected = checkpoint.layer(layer), Reference(model, layer)
            assert set(weights.names) == set(expected.matrices)
            for name, matrix in expected.matrices.items():
                assert np.array_equal(weights.matrix(name, torch.float64).numpy(), matrix), name
                assert weights.shape(name) == matrix.shape
                bias = weights.bias(name, torch.float64)
                assert (bias is not None) == (name in expected.biases)
                assert bias is None or np.array_equal(bias.numpy(), expected.biases[name])
        assert torch.equal(checkpoint.embedding(), model.get_input_embeddings().weight)
        assert torch.equal(checkpoint.head(), model.get_output_embeddings().weight)


def test_the_mlp_is_the_models_own(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    for layer in range(2):
        seen = watch(model, layer, rows(7, 2))
        entered = seen.get("resid_mid", rows(7, 2)).flatten(0, 1)
        actual = LayerMath(checkpoint.layer(layer), "float32").mlp(entered)
        assert actual.dtype == torch.float32
        assert distance(actual, seen["mlp_out"].flatten(0, 1)) < OWN


def test_attention_logits_of_two_tokens_are_the_models_own(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    for layer in range(2):
        weights = checkpoint.layer(layer)
        if not weights.attention:
            continue
        keys, queries = rows(5, seed=1), rows(5, seed=2)
        logits = watch(model, layer, torch.stack((keys, queries), dim=1))["logits"]
        assert logits.shape == (5, checkpoint.sizes.heads, 2, 2)
        formula = LayerMath(weights, "float32")
        for offset, (query, key), (x, y) in (
            (1, (1, 0), (queries, keys)),
            (0, (0, 0), (keys, keys)),
            (0, (1, 1), (queries, queries)),
        ):
            actual = formula.qk(x, y, offset).diagonal(dim1=1, dim2=2).T
            assert distance(actual, logits[:, :, query, key]) < OWN


def test_attention_logits_further_apart_are_the_models_own(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    tokens = rows(6)
    for layer in range(2):
        weights = checkpoint.layer(layer)
        if weights.attention:
            logits = watch(model, layer, tokens[None])["logits"][0]
            formula = LayerMath(weights, "float32")
            for offset in range(6):
                actual = formula.qk(tokens, tokens, offset).diagonal(-offset, dim1=1, dim2=2)
                assert distance(actual, logits.diagonal(-offset, dim1=1, dim2=2)) < OWN


def test_value_output_is_attention_to_one_token_and_its_heads_add_up(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    for layer in range(2):
        weights = checkpoint.layer(layer)
        if not weights.attention:
            continue
        x = rows(6)
        out = LayerMath(weights, "float32").vo(x)
        assert out.heads.shape == (checkpoint.sizes.heads, 6, 64)
        assert distance(out.total, watch(model, layer, x[:, None])["attn_out"][:, 0]) < OWN
        assert distance(out.heads.sum(0) + out.rest, out.total) < OWN


def test_projections_are_what_the_modules_gave(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    for layer in range(2):
        weights = checkpoint.layer(layer)
        x = rows(6)
        seen = {name: value[:, 0] for name, value in watch(model, layer, x[:, None]).items() if value.ndim == 3}
        formula = LayerMath(weights, "float32")
        if weights.attention:
            for name, site in {"q": "q", "k": "k", "v": "v", "o": "attn_raw"}.items():
                assert distance(formula.project(name, x), seen[site]) < OWN
            assert distance(formula.inputs("o", x), seen["attn_z"]) < OWN
        if "down" in weights:
            entered = seen.get("resid_mid", x)
            assert distance(formula.inputs("down", entered), seen["mlp_act"]) < OWN
            assert distance(formula.project("down", entered), seen["mlp_raw"]) < OWN


def test_formulas_equal_the_numpy_reference(family: str, saved: Saved) -> None:
    model, folder = saved(family)
    checkpoint = load(folder)
    x = rows(4).to(torch.float64)
    for layer in range(2):
        weights, expected = checkpoint.layer(layer), Reference(model, layer)
        formula = LayerMath(weights, "float64")
        assert distance(formula.mlp(x), np.stack([expected.mlp(row.numpy()) for row in x])) < NUMPY
        for response in formula.responses(x):
            reference = np.stack([expected.project(response.name, row.numpy()) for row in x])
            assert distance(response.outputs, reference) < NUMPY, response.name
            assert torch.equal(formula.project(response.name, x), response.outputs)
            assert torch.equal(formula.inputs(response.name, x), response.inputs)
        assert {response.name for response in formula.responses(x)} == set(weights.names) - {"linear.o"}
        if weights.attention:
            heads, totals = zip(*(expected.vo(row.numpy()) for row in x), strict=True)
            out = formula.vo(x)
            assert distance(out.heads, np.stack(heads, axis=1)) < NUMPY
            assert distance(out.total, np.stack(totals)) < NUMPY
            for offset in (0, 1, 9):
                logits = [[expected.qk(query.numpy(), key.numpy(), offset) for key in x[1:]] for query in x]
                assert distance(formula.qk(x, x[1:], offset), np.transpose(logits, (2, 0, 1))) < NUMPY
