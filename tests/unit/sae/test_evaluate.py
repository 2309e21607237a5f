"""Every figure of an evaluation against its definition, written out; the splice against steering by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.sae.factory import Learned, config, sae
from trimtab.backends import Backend, Capture, Request, open_backend
from trimtab.errors import InputError, NonFiniteError, VectorError
from trimtab.results import from_json
from trimtab.results.sae_evaluation import Measured, SAEEvaluation, SAEScore
from trimtab.sae import evaluate, save
from trimtab.sae._intervals import GROUPS, ratio
from trimtab.sae._matched import matched
from trimtab.sae._sets import RowKeeper
from trimtab.sae._tally import decoder_cosines
from trimtab.sae.data import TensorSource
from trimtab.sae.model import SAE
from trimtab.steering import Edit, Steering
from trimtab.trace import Trace, TraceWriter

SITE = "layers.3.resid_post"
TEXTS = [
    "the fox rested near the tower . the cat was merry until the dog rested .",
    "behind the market stood a key . nobody forgot the lonely sparrow .",
    "today we found a goat by the garden . the baker waved .",
]


def rows(count: int = 300, shift: float = 3.0) -> Tensor:
    drawn = torch.randn(count, 12, generator=torch.Generator().manual_seed(5))
    return drawn * torch.linspace(0.2, 2, 12) + shift


@pytest.fixture(scope="module")
def backend() -> Backend:
    return open_backend("hf", "testbed", dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def states(backend: Backend) -> list[Tensor]:
    """Rows of every text at the site, the first token left out."""
    keeper = RowKeeper()
    requests = [Request(prompt=text, id=str(n), prompt_index=n, max_new_tokens=0) for n, text in enumerate(TEXTS)]
    backend.generate(requests, capture=Capture(sites=(SITE,)), writer=keeper)
    return [keeper.of(SITE, str(n))[1:] for n in range(len(TEXTS))]


@pytest.fixture(scope="module")
def coder(states: list[Tensor]) -> SAE:
    """An autoencoder of the testbed's states: a few principal axes, each in both directions."""
    x = torch.cat(states).double()
    mean = x.mean(dim=0)
    axes = torch.linalg.svd(x - mean).Vh[:8]
    both = torch.cat((axes, -axes)).float()
    tensors = {"W_enc": both.T.contiguous(), "W_dec": both, "b_dec": mean.float(), "b_enc": torch.zeros(16)}
    return SAE.of(Learned(config("standard"), tensors), site=SITE)


def test_figures_are_their_definitions() -> None:
    x = rows()
    one = sae("jumprelu")
    found = evaluate(one, x, latents=[3, 7], examples=2)
    score = found.scores[0]
    wide = one.to(dtype=torch.float64)
    z, made = wide.encode(x).numpy(), wide(x).numpy()
    y = x.double().numpy()
    error = ((y - made) ** 2).sum(axis=1)
    total = ((y - y.mean(axis=0)) ** 2).sum()
    lengths, own = np.linalg.norm(y, axis=1), np.linalg.norm(made, axis=1)
    firing = z > 0
    assert score.fvu.value == pytest.approx(error.sum() / total, rel=1e-6)
    assert score.l0.value == pytest.approx(firing.sum(axis=1).mean(), rel=1e-12)
    assert score.cosine == pytest.approx(((y * made).sum(axis=1) / (lengths * own)).mean(), rel=1e-6)
    assert score.l2_ratio == pytest.approx((own / lengths).mean(), rel=1e-6)
    assert score.bias == pytest.approx((made**2).sum() / (y * made).sum(), rel=1e-6)
    density = firing.mean(axis=0)
    assert score.densities.dead == int((density == 0).sum())
    assert score.densities.always == int((density > 0.5).sum())
    assert sum(score.densities.counts) + score.densities.dead == one.d_sae
    assert score.densities.quantiles["0.5"] == pytest.approx(np.quantile(density, 0.5))
    edges = np.array(score.densities.edges)
    counted, _ = np.histogram(np.log10(density[density > 0]), edges)
    assert counted.sum() == sum(score.densities.counts)
    assert list(counted) == list(score.densities.counts)
    for shown in score.latents:
        assert shown.density == pytest.approx(density[shown.latent])
        assert shown.max == pytest.approx(z[:, shown.latent].max(), rel=1e-6)
        assert shown.mean == pytest.approx(z[firing[:, shown.latent], shown.latent].mean(), rel=1e-6)
    assert (found.tokens, found.texts) == (300, 5)
    assert "were not measured" in found.warnings[0]


def test_the_mean_is_that_of_the_whole_set_not_of_a_batch() -> None:
    """Texts far apart: batch means would make the denominator small, and the FVU large."""
    x = torch.cat([rows(64, shift=at) for at in (-40.0, 0.0, 40.0)])
    still = replace(sae("standard"), W_dec=torch.zeros(40, 12), b_dec=x.mean(dim=0))
    assert evaluate(still, x).scores[0].fvu.value == pytest.approx(1.0, rel=1e-5)


def test_a_constant_far_from_zero_does_not_drown_the_variation() -> None:
    x = torch.randn(256, 12, generator=torch.Generator().manual_seed(1)) + 1e4
    still = replace(sae("standard"), W_dec=torch.zeros(40, 12), b_dec=x.double().mean(dim=0).float())
    assert evaluate(still, x).scores[0].fvu.value == pytest.approx(1.0, rel=1e-3)


def test_decoder_cosines_are_with_the_nearest_other_row() -> None:
    one = sae("standard")
    twin = one.W_dec.clone()
    twin[5] = -2 * twin[4]
    found = decoder_cosines(replace(one, W_dec=twin), seed=0)
    unit = twin.double() / twin.double().norm(dim=1, keepdim=True)
    gram = (unit @ unit.T).abs().fill_diagonal_(0).amax(dim=1)
    assert found.median == pytest.approx(float(gram.median()), rel=1e-2)
    assert found.p95 == pytest.approx(float(torch.quantile(gram, 0.95)), rel=1e-5)
    assert found.twins == pytest.approx(2 / 40)
    assert sum(found.counts) == found.latents == 40


def test_intervals_widen_with_what_differs_between_texts() -> None:
    below = torch.zeros(GROUPS, dtype=torch.float64)
    below[:50] = 10.0
    same, spread = below * 0.3, below.clone()
    spread[:25] *= 0.1
    spread[25:50] *= 0.5
    alike, apart = ratio(same, below, 0), ratio(spread, below, 0)
    assert (alike.value, apart.value) == (pytest.approx(0.3), pytest.approx(0.3))
    assert alike.high - alike.low < 1e-12
    # 50 texts of 0.1 or 0.5: standard error 0.2 / sqrt(50)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(50), rel=0.15)
    lone = ratio(torch.eye(1, GROUPS, dtype=torch.float64)[0], torch.eye(1, GROUPS, dtype=torch.float64)[0], 0)
    assert lone.value == 1 and math.isnan(lone.low)


def test_the_splice_is_the_model_run_on_reconstructions(backend: Backend, coder: SAE, states: list[Tensor]) -> None:
    found = evaluate(coder, TEXTS, model=backend, latents=2, examples=1)
    splice = found.scores[0].splice
    assert splice is not None
    mean = torch.cat(states).double().mean(dim=0).float()
    ways: dict[str, Any] = {
        "ce_clean": None,
        "ce_sae": lambda h: coder(h),
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda h: mean.expand_as(h),
    }
    count = sum(len(one) for one in states) - len(TEXTS)
    for name, way in ways.items():
        steering = None if way is None else Steering({SITE: Edit(way)}, positions="1:")
        scored = backend.score(TEXTS, steering=steering)
        loss = -sum(sum(one.logprobs[1:]) for one in scored) / count
        assert getattr(splice, name) == pytest.approx(loss, rel=1e-5), name
    assert splice.tokens == count
    assert splice.delta_ce.value == pytest.approx(splice.ce_sae - splice.ce_clean)
    assert splice.recovered.value == pytest.approx(
        (splice.ce_zero - splice.ce_sae) / (splice.ce_zero - splice.ce_clean)
    )
    assert splice.kl.value == pytest.approx(_kl(backend, coder), rel=1e-4)
    assert found.left_out == {"first token of a text that begins every text": 3}
    assert found.tokens == sum(len(one) for one in states)


def _kl(backend: Backend, coder: SAE) -> float:
    """KL(clean || spliced) of the rows that predict a token, by scipy on float64 probabilities."""
    from scipy.stats import entropy

    total, count = 0.0, 0
    steering = Steering({SITE: Edit(coder.forward)}, positions="1:")
    for text in TEXTS:
        keeper = RowKeeper()
        requests = [
            Request(prompt=text, id="a", max_new_tokens=0),
            Request(prompt=text, id="b", steering=steering, max_new_tokens=0),
        ]
        backend.generate(requests, capture=Capture(sites=("logits",), prompt_logits=True), writer=keeper)
        p, q = (torch.softmax(keeper.of("logits", one)[1:-1].double(), -1).numpy() for one in "ab")
        total += float(entropy(p, q, axis=1).sum())
        count += len(p)
    return total / count


def test_a_perfect_autoencoder_loses_nothing(backend: Backend) -> None:
    eye = torch.eye(128)
    both = torch.cat((eye, -eye))
    tensors = {"W_enc": both.T.contiguous(), "W_dec": both, "b_dec": torch.zeros(128), "b_enc": torch.zeros(256)}
    perfect = SAE.of(Learned(config("standard"), tensors), site=SITE)
    score = evaluate(perfect, TEXTS, model=backend, latents=0).scores[0]
    assert score.fvu.value == pytest.approx(0.0, abs=1e-12)
    assert score.splice is not None
    assert score.splice.kl.value == pytest.approx(0.0, abs=1e-9)
    assert score.splice.recovered.value == pytest.approx(1.0, abs=1e-6)
    assert score.bias == pytest.approx(1.0)


def test_a_transcoder_is_spliced_between_its_sites(backend: Backend) -> None:
    """The MLP itself as a transcoder cannot be written as one; its mean output can: that is ablation by the mean."""
    site, target = "layers.2.resid_mid", "layers.2.mlp_out"
    keeper = RowKeeper()
    requests = [Request(prompt=text, id=str(n), max_new_tokens=0) for n, text in enumerate(TEXTS)]
    backend.generate(requests, capture=Capture(sites=(target,)), writer=keeper)
    mean = torch.cat([keeper.of(target, str(n))[1:] for n in range(3)]).double().mean(dim=0).float()
    about = config("standard", d_out=128)
    tensors = {
        "W_enc": torch.zeros(128, 4),
        "b_enc": torch.ones(4),
        "W_dec": torch.zeros(4, 128),
        "b_dec": mean,
    }
    found = evaluate(SAE.of(Learned(about, tensors), site=site, target_site=target), TEXTS, model=backend, latents=0)
    score = found.scores[0]
    assert (found.site, found.target_site) == (site, target)
    assert score.fvu.value == pytest.approx(1.0, rel=1e-5)
    assert score.splice is not None
    assert score.splice.ce_sae == pytest.approx(score.splice.ce_mean, rel=1e-6)
    assert score.splice.ce_sae != pytest.approx(score.splice.ce_clean, rel=1e-3)


def test_examples_are_where_a_latent_fires_most(backend: Backend, coder: SAE, states: list[Tensor]) -> None:
    found = evaluate(coder, TEXTS, model=backend, splice=False, latents=[2, 9], examples=3)
    assert [one.latent for one in found.scores[0].latents] == [2, 9]
    for shown in found.scores[0].latents:
        values = [coder.encode(one)[:, shown.latent] for one in states]
        strongest = sorted((float(one.max()) for one in values), reverse=True)
        assert [one.activation for one in shown.examples] == pytest.approx(strongest, rel=1e-4)
        for example in shown.examples:
            ids = backend.encode(TEXTS[example.text]).ids
            assert example.tokens[example.at] == backend.tokenizer.decode([ids[example.position]])
            assert example.position == int(values[example.text].argmax()) + 1
            assert example.activations[example.at] == pytest.approx(example.activation, rel=1e-4)
            assert max(example.activations) == example.activations[example.at]


def test_a_trace_gives_the_figures_of_the_model(tmp_path: Path, backend: Backend, coder: SAE) -> None:
    with TraceWriter(tmp_path / "run", kind="generation") as writer:
        requests = [Request(prompt=text, id=str(n), prompt_index=n, max_new_tokens=0) for n, text in enumerate(TEXTS)]
        backend.generate(requests, capture=Capture(sites=(SITE,), positions="1:"), writer=writer)
    ran = evaluate(coder, TEXTS, model=backend, splice=False, latents=0).scores[0]
    for data in (tmp_path / "run", Trace.open(tmp_path / "run")):
        read = evaluate(coder, data, latents=0)
        assert read.scores[0].fvu.value == pytest.approx(ran.fvu.value, rel=1e-6)
        assert read.scores[0].l0 == ran.l0
        assert read.model == ""


def test_tokens_that_begin_a_text_do_not_count() -> None:
    x = rows(130)
    tokens = torch.arange(130)
    x[[0, 65]] = 1e3
    source = TensorSource(x, tokens=tokens, special=frozenset({0, 65}), chunk_rows=65)
    found = evaluate(sae("jumprelu"), source, latents=0)
    kept = torch.cat((x[1:65], x[66:]))
    assert found.tokens == 128
    assert found.left_out == {"token that begins or pads a text": 2}
    assert found.scores[0].fvu.value == pytest.approx(evaluate(sae("jumprelu"), kept, latents=0).scores[0].fvu.value)


def test_two_evaluations_of_one_set_have_one_digest(tmp_path: Path, backend: Backend, coder: SAE) -> None:
    first = evaluate(coder, TEXTS, model=backend, splice=False, latents=0, out=tmp_path / "o")
    again = evaluate(coder, TEXTS, model=backend, splice=False, latents=0)
    other = evaluate(coder, TEXTS[:2], model=backend, splice=False, latents=0)
    assert first.data_digest == again.data_digest != other.data_digest
    assert replace(first, path="") == again
    assert from_json(SAEEvaluation, (tmp_path / "o" / "evaluation.json").read_text()) == first


def test_unseen_text_of_the_testbed_is_the_default(coder: SAE) -> None:
    found = evaluate(coder, tokens=200, splice=False, latents=0)
    assert found.data == "testbed, from text 4096 on"
    assert found.tokens >= 200
    assert found.model == "testbed"


def test_a_directory_of_a_training_gives_all_of_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(sae("jumprelu"), tmp_path / name)
    found = evaluate(tmp_path, rows(), latents=0)
    assert [one.name for one in found.scores] == ["a", "b"]
    named = evaluate({"mine": tmp_path / "a"}, rows(), latents=0)
    assert [(one.name, one.path) for one in named.scores] == [("mine", str(tmp_path / "a"))]


def score(family: str, l0: float, fvu: float) -> SAEScore:
    made = evaluate(sae("standard"), rows(80), latents=0).scores[0]
    value, level = (Measured(value=one, low=one, high=one) for one in (fvu, l0))
    return replace(made, family=family, fvu=value, l0=level)


def test_families_are_matched_where_all_of_them_are() -> None:
    scores = [score("a", 8, 0.4), score("a", 32, 0.2), score("b", 16, 0.5), score("b", 64, 0.1)]
    found = {(one.family, one.l0): one.fvu for one in matched(scores)}
    # log-linear: 16 is halfway between 8 and 32, and 32 halfway between 16 and 64
    assert found == {
        ("a", 16.0): pytest.approx(0.3),
        ("b", 16.0): pytest.approx(0.5),
        ("a", 32.0): pytest.approx(0.2),
        ("b", 32.0): pytest.approx(0.3),
    }
    assert matched(scores[:2]) == ()
    assert matched([scores[0], scores[3]]) == (), "nothing is extrapolated"


@pytest.mark.parametrize(
    ("saes", "data", "options", "error", "message"),
    [
        ([], rows(), {}, InputError, "no autoencoder was given"),
        (sae(), rows()[:, :11], {}, VectorError, "maps width 12 to 12, and the activations have 11 and 11"),
        (sae(), torch.ones(64, 12), {}, InputError, "all 64 activations are equal"),
        (
            sae(),
            rows().index_put((torch.tensor(70), torch.tensor(3)), torch.tensor(math.nan)),
            {},
            NonFiniteError,
            "row 70",
        ),
        (sae(), torch.zeros(0, 12), {}, InputError, "is empty"),
        (sae(), rows(), {"tokens": 1}, InputError, "at least 2 were expected"),
        (sae(), rows(), {"latents": [40]}, InputError, "latent 40 was asked for; there are 0 to 39"),
        (sae(), TEXTS, {}, InputError, "does not say its site; give site="),
        (sae(), None, {"model": "other", "site": SITE}, InputError, "no data was given"),
        (sae(site=SITE), TEXTS, {"skip_texts": 3}, InputError, "no text of two tokens from number 3 on"),
        (sae(site=SITE), TEXTS, {}, VectorError, "maps width 12 to 12, and the activations have 128 and 128"),
        ("nowhere", rows(), {}, InputError, "does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_line(saes: Any, data: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluate(saes, data, **options)
    assert "\n" not in str(caught.value)


def test_autoencoders_of_two_sites_are_refused() -> None:
    with pytest.raises(InputError, match="evaluate those of one site together"):
        evaluate([sae(site=SITE), sae(site="layers.1.mlp_out")], rows())


def test_dead_and_useless_autoencoders_are_said_to_be(tmp_path: Path) -> None:
    dead = replace(sae("jumprelu"), threshold=torch.full((40,), 1e6), b_dec=torch.full((12,), 100.0))
    found = evaluate(dead, rows(), latents=4, out=tmp_path).scores[0]
    assert found.l0.value == 0
    assert found.densities.dead == 40
    assert found.densities.dead_below == pytest.approx(3 / 300)
    assert "no latent ever fires" in found.warnings
    assert any("explains nothing" in one for one in found.warnings)
    assert found.latents == ()
    assert json.loads((tmp_path / "evaluation.json").read_text())["kind"] == "sae_evaluation"
