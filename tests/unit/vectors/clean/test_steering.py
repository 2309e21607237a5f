"""Depth gain, norm limit and average over decode steps: each acts when it is on, on what the model really ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import testbed
from trimtab.backends import Backend, Capture, Request, Sampling, open_backend
from trimtab.errors import SteeringError
from trimtab.steering import SteeringVector
from trimtab.trace import Trace, TraceWriter
from trimtab.vectors.clean import depth_gain, to_steering

LAYERS, TOKENS = 6, 6


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    opened = open_backend("hf", "testbed", dtype="float32")
    yield opened
    opened.close()


def vector() -> SteeringVector:
    return SteeringVector.load(testbed.direction("animal").file)


def changes(backend: Backend, path: Path, scale: float = 0.1, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return |dh| and |h| of every row of one steered run, as they were in the model."""
    steering = to_steering(vector(), scale, **options)
    prompt = testbed.prompts(1, seed=2)[0]
    capture = Capture(sites=("layers.3.resid_post",), edit=("before", "after"))
    with TraceWriter(path, kind="generation") as writer:
        requests = [Request(prompt=prompt, steering=steering, max_new_tokens=TOKENS, ignore_eos=True)]
        backend.generate(requests, capture=capture, writer=writer)
    trace = Trace.open(path)
    (key,) = trace.requests()
    before, after = (
        trace.rows(site="layers.3.resid_post", edit=edit, **key._asdict()).values for edit in ("before", "after")
    )
    return (after - before).norm(dim=1), before.norm(dim=1)


def test_the_strength_is_a_share_of_each_tokens_norm(backend: Backend, tmp_path: Path) -> None:
    moved, norms = changes(backend, tmp_path / "t")
    assert torch.allclose(moved / norms, torch.full_like(moved, 0.1), rtol=1e-4)


def test_the_depth_gain_acts_once(backend: Backend, tmp_path: Path) -> None:
    moved, norms = changes(backend, tmp_path / "t", num_layers=LAYERS)
    assert torch.allclose(
        moved / norms, torch.full_like(moved, 0.1 * (1 - 3 / LAYERS) ** 0.5), rtol=1e-4
    )  # not squared
    assert [round(depth_gain(layer, 4), 4) for layer in range(4)] == [1.0, 0.866, 0.7071, 0.5]


def test_the_norm_limit_is_reached(backend: Backend, tmp_path: Path) -> None:
    moved, norms = changes(backend, tmp_path / "t", scale=0.5, max_ratio=0.2)
    assert torch.allclose(moved / norms, torch.full_like(moved, 0.2), rtol=1e-4)
    free, _ = changes(backend, tmp_path / "f", scale=1.0, unit="absolute")
    bound, norms = changes(backend, tmp_path / "b", scale=1.0, unit="absolute", max_ratio=0.3)
    assert (free / norms[: len(free)]).max() > 0.3
    assert (bound / norms).max() <= 0.3 * (1 + 1e-4)


def test_the_average_over_decode_steps_is_that_of_the_vector(backend: Backend, tmp_path: Path) -> None:
    a = 0.7
    moved, norms = changes(backend, tmp_path / "t", ema=a, positions="generated")
    held, expected = 0.0, []
    for _ in range(TOKENS - 1):  # the last token is never fed
        held = a * held + (1 - a) * 0.1
        expected.append(held)
    assert np.allclose((moved / norms)[-len(expected) :].numpy(), expected, rtol=1e-4)
    assert float(moved[: -len(expected)].abs().max()) == 0


def test_the_average_begins_anew_for_every_request(backend: Backend) -> None:
    steering = to_steering(vector(), 0.3, ema=0.7)
    long, short = testbed.prompts(2, seed=4)
    request = Request(prompt=short, steering=steering, max_new_tokens=TOKENS)
    alone = backend.generate([request])[0].token_ids
    after = backend.generate([Request(prompt=long, steering=steering, max_new_tokens=20), request])[1].token_ids
    assert alone == after


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)])
def test_the_baseline_is_generated_like_the_rest(backend: Backend, sampling: Sampling) -> None:
    """The published zero-strength baseline was sampled and all else greedy."""
    prompt = testbed.prompts(1, seed=2)[0]
    runs = [
        backend.generate([Request(prompt=prompt, steering=one, max_new_tokens=12, sampling=sampling)])[0].token_ids
        for one in (to_steering(None, 0.5), to_steering(vector(), 0.0), to_steering(vector(), 1e-9))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_impossible_steering_is_refused() -> None:
    bare = SteeringVector.of(torch.ones(4))
    with pytest.raises(SteeringError, match="does not say at which site it was made"):
        to_steering(bare, 1.0)
    with pytest.raises(SteeringError, match="layer 3 was given; a layer from 0 to 2"):
        to_steering(vector(), 1.0, num_layers=3)
    with pytest.raises(SteeringError, match="embed has no layer"):
        to_steering(SteeringVector.of(torch.ones(4), site="embed"), 1.0, num_layers=3)
