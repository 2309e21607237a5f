"""Cleaning on the embedded model: directions change and norms do not, costs are measured, every option acts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import testbed
from trimtab.backends import Backend, open_backend
from trimtab.errors import InputError, RecipeError, SteeringError, VectorError
from trimtab.results import from_json
from trimtab.results.vectors_clean import Cleaning
from trimtab.sites import Site
from trimtab.steering import Add, Steering, SteeringVector
from trimtab.vectors.clean import CleanConfig, clean, pooled_states
from trimtab.vectors.data import Example, load

SITE = Site("resid_post", 3)
DATA = 24


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    opened = open_backend("hf", "testbed", dtype="float32")
    yield opened
    opened.close()


def vectors(*names: str) -> dict[str, SteeringVector]:
    return {name: SteeringVector.load(testbed.direction(name).file) for name in names}


def data(*names: str) -> dict[str, Any]:
    return {name: load(f"testbed:{name}", n=DATA, seed=5) for name in names}


def cosine(a: SteeringVector, b: SteeringVector) -> float:
    return float(a.direction.double() @ b.direction.double())


def neutral(count: int = 32) -> list[str]:
    return list(testbed.prompts(count, seed=3))


def test_states_are_means_over_the_tokens_of_each_text(backend: Backend) -> None:
    texts = list(testbed.prompts(3, seed=1))
    examples = [Example(text=text, label="x", question=text) for text in texts]
    together = pooled_states(backend, examples, [SITE])[SITE]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(testbed.path(), dtype=torch.float32)
    for row, text in zip(together, texts, strict=True):
        ids = torch.tensor([backend.encode(text).ids])
        with torch.no_grad():  # hidden_states[l + 1] is the output of block l
            states = model(ids, output_hidden_states=True).hidden_states[SITE.layer + 1][0]
        assert np.allclose(row, states[1:].double().mean(0).numpy(), atol=1e-4)  # the first token is that of every text


def test_states_at_a_site_are_those_after_its_steering(backend: Backend) -> None:
    """A hook that is registered before the steering sees the state without it."""
    examples = [Example(text=text, label="x", question=text) for text in neutral(4)]
    push = 5.0 * torch.eye(128)[7]
    plain = pooled_states(backend, examples, [SITE])[SITE]
    steered = pooled_states(backend, examples, [SITE], steering=Steering({str(SITE): Add(push)}))[SITE]
    assert np.allclose(steered - plain, push.numpy(), atol=1e-5)


def test_one_text_is_too_few_and_says_whose(backend: Backend) -> None:
    with pytest.raises(InputError, match="animal: 1 texts were given; at least two activations"):
        pooled_states(backend, [Example(text="a", label="x", question="q")], [SITE], what="animal")


def test_neutral_texts_cost_no_more_than_was_allowed(backend: Backend, tmp_path: Path) -> None:
    raw = vectors("animal", "object")
    done = clean(raw, out=tmp_path, model=backend, neutral=neutral(64), data=data(*raw), permutations=19)
    (site,) = done.sites
    assert site.source == "neutral" and site.n == 64
    assert all(p <= 0.05 for p in site.p_values[: site.k])
    free = clean(raw, model=backend, neutral=neutral(64), data=data(*raw), permutations=19, max_loss=1.0)
    assert free.sites[0].k == 8 > site.k  # all that the test accepts; the cost is why fewer were removed
    assert any("were removed, because the next one costs" in text for text in done.warnings)
    for row in done.vectors:
        saved = SteeringVector.load(row.path)
        assert saved.norm == raw[row.name].norm == row.norm
        assert cosine(saved, raw[row.name]) == pytest.approx(row.cosine, abs=1e-6)
        assert saved.quantiles == {} and saved.median_norm == raw[row.name].median_norm
        assert row.n_held_out == DATA and row.accuracy_after is not None
        assert saved.recipe["cleaned"]["raw"] == raw[row.name].digest
    assert from_json(Cleaning, (tmp_path / "cleaning.json").read_text()) == done


def test_a_k_that_was_given_is_the_one_that_is_removed(backend: Backend) -> None:
    raw = vectors("animal")
    few, many = (clean(raw, model=backend, neutral=neutral(), k=k) for k in (1, 4))
    assert [(one.sites[0].k, one.sites[0].p_values) for one in (few, many)] == [(1, ()), (4, ())]
    assert many.vectors[0].kept < few.vectors[0].kept < 1


def test_the_published_setting_makes_all_vectors_the_same_and_says_so(tmp_path: Path) -> None:
    raw = vectors(*testbed.CONCEPTS)
    done = clean(raw, out=tmp_path, source="concepts", published=True)
    assert done.sites[0].cosine_after == pytest.approx(1.0, abs=1e-6)
    assert "all of them steer alike" in done.sites[0].degeneracy
    assert any("all of them steer alike" in text for text in done.warnings)
    with pytest.raises(InputError, match="k <= 3 was expected, or the published setting"):
        clean(raw, source="concepts", k=4)
    assert clean(raw, source="concepts", k=3).sites[0].degeneracy == ""


def test_what_is_left_of_rounding_is_no_vector() -> None:
    width = 16
    axis = torch.eye(width)
    rows = {f"v{i}": SteeringVector.of(axis[i] - axis[:4].mean(0), site=SITE) for i in range(4)}
    with pytest.raises(VectorError, match=r"v0: cleaning leaves .* which is rounding noise"):
        clean(rows, source="concepts", published=True)


@pytest.mark.parametrize("kind", ["ridge", "hard"])
def test_the_blend_goes_from_the_manifold_to_the_vector(backend: Backend, kind: str) -> None:
    raw = vectors("animal")
    options: dict[str, Any] = {"model": backend, "data": data("animal"), "method": "manifold", "manifold": kind}
    rows = [clean(raw, blend=blend, m=4, **options).vectors[0] for blend in (0.0, 0.5, 1.0)]
    assert rows[0].cosine < rows[1].cosine < rows[2].cosine == pytest.approx(1.0, abs=1e-9)
    assert rows[2].kept == pytest.approx(1.0) and rows[0].kept < 0.95
    assert rows[0].m == 4 and (rows[0].ridge == 0) == (kind == "hard")


def test_dual_is_the_manifold_of_what_contamination_left(backend: Backend, tmp_path: Path) -> None:
    raw, given = vectors("animal"), data("animal")
    options: dict[str, Any] = {"model": backend, "data": given}
    clean(raw, out=tmp_path / "dual", neutral=neutral(), k=3, method="dual", m=2, **options)
    clean(raw, out=tmp_path / "one", neutral=neutral(), k=3, **options)
    clean([tmp_path / "one" / "animal.safetensors"], out=tmp_path / "two", method="manifold", m=2, **options)
    dual, two = (SteeringVector.load(tmp_path / name / "animal.safetensors") for name in ("dual", "two"))
    assert cosine(dual, two) == pytest.approx(1.0, abs=1e-6)
    assert cosine(dual, SteeringVector.load(tmp_path / "one" / "animal.safetensors")) < 0.9


def test_accuracy_of_the_texts_that_made_the_vector_is_marked(backend: Backend) -> None:
    given = data("animal")
    raw = {"animal": replace(vectors("animal")["animal"], data_hash=given["animal"].digest)}
    done = clean(raw, model=backend, neutral=neutral(), k=1, data=given)
    assert any("its accuracy is of the texts that the vector was made from" in text for text in done.warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"published": True}, "published=True changes nothing here: it needs source='concepts'"),
        ({"blend": 0.5}, "blend=0.5 changes nothing here: it needs method='manifold' or 'dual'"),
        ({"method": "manifold", "k": 2}, "k=2 changes nothing here"),
        ({"method": "manifold", "manifold": "hard", "ridge": 1.0}, "ridge=1.0 changes nothing here"),
        ({"m": 3}, "m=3 changes nothing here"),
        ({"blend": 2.0}, "blend is 2.0; a share from 0 to 1"),
        ({"method": "best"}, "method is 'best'; one of contamination, manifold, dual"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CleanConfig(**settings)


def test_bad_input() -> None:
    raw = vectors("animal")
    with pytest.raises(InputError, match="no neutral texts were given"):
        clean(raw)
    with pytest.raises(InputError, match="the manifold of animal needs texts about it"):
        clean(raw, method="manifold")
    with pytest.raises(InputError, match="data for lion: no vector has that name; vectors: animal"):
        clean(raw, neutral=neutral(), data={"lion": "testbed:animal"})
    with pytest.raises(InputError, match="neutral texts were given and nothing uses them"):
        clean(raw, neutral=neutral(), source="concepts")
    with pytest.raises(VectorError, match="does not say at which site"):
        clean({"a": SteeringVector.of(torch.ones(4))}, source="concepts")


def test_a_vector_of_another_model_is_refused(backend: Backend) -> None:
    narrow = SteeringVector.of(torch.ones(4), site=SITE)
    with pytest.raises(VectorError, match="vector 'a' has width 4, and the states of testbed have width 128"):
        clean({"a": narrow}, model=backend, neutral=neutral())
    foreign = SteeringVector.of(torch.ones(128), site=SITE, model_digest="xxh3:full:0123")
    with pytest.raises(SteeringError, match="vector 'a' was made on a model of digest xxh3:full:0123"):
        clean({"a": foreign}, model=backend, neutral=neutral())
    assert clean({"a": foreign, "b": vectors("animal")["animal"], "c": vectors("object")["object"]}, source="concepts")


def test_a_hook_that_collects_too_little_names_site_and_concept(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that hands on the states of one text of three: which hook, which concept, how many."""
    examples = [Example(text=text, label="pos", question=text) for text in ("the fox", "the dog", "the cat")]
    site = Site.parse("layers.3.resid_post")
    generate = backend.generate

    def first_alone(requests: Any, *, writer: Any, **options: Any) -> Any:
        return generate(requests[:1], writer=writer, **options)

    monkeypatch.setattr(backend, "generate", first_alone)
    with pytest.raises(InputError, match=r"animal: 1 of 3 texts gave a state at layers\.3\.resid_post"):
        pooled_states(backend, examples, [site], what="animal")
