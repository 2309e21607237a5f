from __future__ import annotations

import pytest
import torch

from trimtab.backends import Sampling
from trimtab.backends._sampling import LogProbs, Sampler
from trimtab.errors import InputError

LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])


def draw(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling)
    return torch.bincount(torch.tensor([sampler.draw(LOGITS) for _ in range(count)]), minlength=5) / count


def test_tokens_are_drawn_with_their_probabilities() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(LOGITS / temperature, 0)
        # three standard deviations of a share of 4000 draws are below 0.024
        assert (draw(Sampling(temperature=temperature, seed=3)) - expected).abs().max() < 0.024


def test_top_k_keeps_the_most_likely_and_top_p_the_smallest_set() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    kept = draw(Sampling(temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [True, False, False, False, True]
    shares = draw(Sampling(temperature=1.0, top_k=2))
    assert shares[0] == pytest.approx(float(probabilities[0] / (probabilities[0] + probabilities[4])), abs=0.024)
    # the best token alone has 0.46, the best two 0.74, the best three 0.91
    for top_p, count in ((0.3, 1), (0.6, 2), (0.8, 3), (1.0, 5)):
        assert int((draw(Sampling(temperature=1.0, top_p=top_p)) > 0).sum()) == count


def test_a_seed_fixes_the_draws_and_greedy_takes_the_best() -> None:
    runs = []
    for seed in (5, 5, 6):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        runs.append([sampler.draw(LOGITS) for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]
    assert Sampler(Sampling()).draw(LOGITS) == 0


def test_logprobs_are_the_log_softmax_in_float32() -> None:
    logits = (torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 30).to(torch.bfloat16)
    expected = torch.log_softmax(logits.double(), -1)
    shares = LogProbs(logits)
    tokens = torch.arange(6) * 7
    torch.testing.assert_close(shares.of(tokens).double(), expected[torch.arange(6), tokens], rtol=1e-6, atol=1e-5)
    best, ids = shares.top(4)
    torch.testing.assert_close(best.double(), expected.topk(4).values, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(expected.gather(1, ids), expected.topk(4).values)
    assert LogProbs(logits).top(1000)[0].shape == (6, 300)


def test_equal_probabilities_are_listed_by_id() -> None:
    _, ids = LogProbs(torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])).top(3)
    assert ids.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
