"""Side effects: loops, refusals, perplexity under the unsteered model, KL, retention, the automatic coefficient."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab import testbed
from trimtab.backends import Backend, Request
from trimtab.errors import InputError
from trimtab.evaluate import effects
from trimtab.steering import Add, Ramp, Steering

DIRECTION = testbed.direction("animal")


def steering(scale: float, positions: str = "all") -> Steering:
    return Steering({DIRECTION.site: Add(DIRECTION.vector, scale=scale, unit="token_norm")}, positions=positions)


def test_distinct_and_repetition() -> None:
    assert effects.distinct([1, 2, 1, 2], 1) == 0.5
    assert effects.distinct([1, 2, 1, 2], 2) == 2 / 3
    assert effects.distinct([], 1) == 0.0
    assert effects.repetition([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 - 4 / 5)
    assert effects.repetition([1, 2, 3]) == 0.0


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 8, True),
        ([7] * 5, False),
        ([1, 2, 3, *[4, 5, 6] * 3], True),
        ([*[4, 5, 6] * 3, 1, 2, 3], False),
        (list(range(30)), False),
        ([1, 2, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], False),
        ([], False),
    ],
)
def test_a_loop_is_the_end_of_a_text(ids: list[int], loops: bool) -> None:
    assert effects.is_loop(ids) is loops


def test_a_loop_is_never_coherent_however_probable_it_is() -> None:
    assert effects.is_coherent(list(range(12)), 3.0, 2.0)
    assert not effects.is_coherent(list(range(12)), 3.1, 2.0)
    assert not effects.is_coherent(list(range(9)), 1.0, 2.0)
    assert not effects.is_coherent([1, 2, 3] * 6, 1.0, 2.0)
    assert not effects.is_coherent(list(range(30)) + [5] * 8, 1.0, 2.0)  # few repeated 4-grams, and a loop


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I am not able to feel.", True),
        ("Sorry, I won't.", True),
        ("I am sorry to hear that your fox is ill.", False),
        ("The fox said: I cannot help it.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert effects.is_refusal(text) is refuses


def test_perplexity_is_of_the_continuation_alone(model: Backend) -> None:
    made = model.generate([Request(prompt=text, id=text, max_new_tokens=9) for text in testbed.prompts(3)])
    found = effects.continuation_perplexities(
        model, [*(one.prompt_ids for one in made), (1, 5)], [*(one.token_ids for one in made), ()]
    )
    wanted = [math.exp(-math.fsum(one.logprobs) / len(one.logprobs)) for one in made]
    assert found[:3] == pytest.approx(wanted, rel=1e-5)  # float32, other batches
    assert math.isnan(found[3])


@pytest.mark.parametrize("positions", ["all", "generated", "response", "prompt"])
def test_drift_is_that_of_decoding_along_the_same_tokens(model: Backend, positions: str) -> None:
    """The text runs as one prompt: positions that count from the prompt's end must still mean the same rows."""
    plain = model.generate([Request(prompt=text, id=text, max_new_tokens=9) for text in testbed.prompts(2)])
    steered = steering(0.5, positions)
    found = effects.drift(model, [steered, None], [one.prompt_ids for one in plain], [one.token_ids for one in plain])
    forced = model.generate(
        [Request(prompt=one.prompt_ids, id=one.id, forced_tokens=one.token_ids, steering=steered) for one in plain]
    )
    wanted = [
        (math.fsum(one.logprobs) - math.fsum(other.logprobs)) / len(one.logprobs)
        for one, other in zip(plain, forced, strict=True)
    ]
    assert found.ratio[0].tolist() == pytest.approx(wanted, abs=1e-5)
    assert (found.kl[0] > 1e-4).all()
    assert found.kl[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-9)


def test_kl_is_exact(model: Backend) -> None:
    ids = model.encode(testbed.prompts(1)[0]).ids
    vocabulary = model.info.vocab_size
    plain = model.generate([Request(prompt=ids, max_new_tokens=1, logprobs=vocabulary)])[0]
    logs = torch.empty(vocabulary, dtype=torch.float64)
    for token, value in plain.top[0]:
        logs[token] = value
    bias = torch.zeros(vocabulary)
    bias[plain.top[0][0][0]] = -3.0
    found = effects.drift(model, [Steering({"logits": Add(bias)})], [ids], [(7,)])
    moved = torch.log_softmax(logs + bias.double(), dim=0)
    assert found.kl[0, 0] == pytest.approx(float((moved.exp() * (moved - logs)).sum()), rel=1e-4)


def test_the_automatic_coefficient_is_the_last_within_its_budget(model: Backend) -> None:
    prompts, scales = list(testbed.prompts(3)), [0.8, 0.1, 1.6, 0.2, 0.4]
    found = effects.auto_coefficient(model, steering, prompts, scales, budget=1.1, max_tokens=12)
    ratios = {point.scale: point.perplexity_ratio for point in found.points}
    assert list(ratios) == sorted(scales)
    assert found.scale in ratios and ratios[found.scale] <= 1.1
    first = min(scale for scale, ratio in ratios.items() if ratio > 1.1)
    assert found.scale == max(scale for scale in scales if scale < first)
    tight = effects.auto_coefficient(model, steering, prompts, scales, budget=0.0, metric="kl", max_tokens=12)
    assert tight.scale == 0.0 and "0.1 is the first" in tight.reason
    for budget, metric, tried in ((0.9, "perplexity", scales), (1.1, "loss", scales), (1.1, "kl", [-1.0, 1.0])):
        with pytest.raises(InputError):
            effects.auto_coefficient(model, steering, prompts, tried, budget=budget, metric=metric)


def test_retention(model: Backend) -> None:
    texts = [" ".join(testbed.contrast("animal", 3).positive)]
    assert effects.retention(model, None, texts) == 1.0
    assert effects.retention(model, steering(0.0), texts) == pytest.approx(1.0, abs=1e-6)
    assert effects.retention(model, steering(-1.0, "generated"), texts) > 1.05
    with pytest.raises(InputError, match="counts decode steps"):
        effects.retention(model, Steering({DIRECTION.site: Add(DIRECTION.vector)}, gain=Ramp(0.9)), texts)
