"""The scaling test on the embedded model: what steers, what does not, what is kept."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab import testbed
from trimtab._base import jsonio
from trimtab.backends import open_backend
from trimtab.cli import main
from trimtab.errors import InputError, RecipeError, UnfinishedError
from trimtab.evaluate.scorers import Output, TestbedScorer
from trimtab.report import _stress as page
from trimtab.results import from_json
from trimtab.results.stress import Stress
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.testbed import CONCEPTS, TONES, lexicon
from trimtab.vectors.clean import from_neutral, keep_accurate, pooled_states, task_manifold
from trimtab.workflows.stress import stress
from trimtab.workflows.stress.methods import Workshop
from trimtab.workflows.stress.outputs import is_coherent
from trimtab.workflows.stress.sources import PROMPTS, contrasted, part_words
from trimtab.workflows.stress.sources import testbed_attribute as make_attribute
from trimtab.workflows.stress.sources import testbed_neutral as make_neutral

TINY: dict[str, Any] = {
    "sizes": (2, 4),
    "strengths": (-1, 0, 1),
    "num_prompts": 2,
    "seeds": 2,
    "max_seeds": 2,
    "max_tokens": 12,
    "controls": 1,
}


@pytest.fixture(scope="module")
def model() -> Any:
    backend = open_backend("hf", "testbed", dtype="float32", device="cpu", batch_size=240)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def tiny(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Stress:
    return stress(model, ["animal", "cheerful"], out=tmp_path_factory.mktemp("stress") / "run", **TINY)


def test_the_two_scorers_share_no_word_and_the_prompts_lean_to_nothing() -> None:
    for name in (*CONCEPTS, *TONES):
        parts = [part_words(name, part) for part in (0, 1)]
        assert not parts[0] & parts[1]
        expected = frozenset(lexicon.VERBS.get(name, ())) | lexicon.evidence_words(name)  # type: ignore[call-overload]
        assert parts[0] | parts[1] == expected
        if name in CONCEPTS:
            assert all(expected.isdisjoint(lexicon.tokenize(one)) for one in PROMPTS)
    for tone in TONES:  # as much of one as of the other, in the ten that are used as in all
        words = lexicon.evidence_words(tone)
        found = [len(words & set(lexicon.tokenize(one))) for one in PROMPTS]
        assert (sum(found[:10]), sum(found)) == (5, 6)
    assert part_words("cheerful", 0) & frozenset(lexicon.ADVERBS["cheerful"])
    assert part_words("cheerful", 1) & frozenset(lexicon.ADVERBS["cheerful"])


def test_delta_is_the_share_less_the_mean_share_of_the_others_on_the_continuation_alone() -> None:
    one = make_attribute("animal", 2, 0)
    texts = ("the fox.", "the lamp", "it slept", "it fell", "the river", "the fox vanished and the lamp vanished")
    outputs = [Output(question="the fox slept", text=text) for text in texts]
    assert contrasted(one.delta, "animal", outputs) == pytest.approx([1.0, -0.25, 0.0, 0.0, 0.0, 0.375])
    assert contrasted(one.judge, "animal", outputs) == pytest.approx([0.0, 0.0, 1.0, -0.25, 0.0, -0.25])


def test_coherent_as_defined() -> None:
    varied = list(range(20))
    assert is_coherent(varied, 1.5, 1.0)
    assert not is_coherent(varied, 1.51, 1.0)
    assert not is_coherent(varied[:9], 1.0, 1.0)
    assert not is_coherent([1, 2, 3, 4] * 5, 1.0, 1.0)


def test_held_out_texts_are_not_those_of_training_and_labels_are_exchanged() -> None:
    plain, noisy = make_attribute("gloomy", 40, 3), make_attribute("gloomy", 40, 3, 0.4)
    assert {one.text for one in plain.train.examples}.isdisjoint(one.text for one in plain.held_out.examples)
    exchanged = [a.text != b.text for a, b in zip(plain.train.examples, noisy.train.examples, strict=True)]
    found = {size: sum(exchanged[: 2 * size : 2]) for size in (5, 10, 20, 40)}
    assert found == {5: 2, 10: 4, 20: 8, 40: 16}  # every size has its share
    assert [one.text for one in plain.first(4).examples] == [one.text for one in plain.first(8).examples][:4] + [
        one.text for one in plain.first(8).examples
    ][8:12]


def test_the_run_says_everything_and_keeps_it(tiny: Stress) -> None:
    path = Path(tiny.path)
    assert from_json(Stress, (path / "result.json").read_text()) == tiny
    assert len(list(csv.DictReader((path / "points.csv").read_text().splitlines()))) == 4
    assert len(list(csv.DictReader((path / "strengths.csv").read_text().splitlines()))) == 12
    assert "unsteered-000" in (path / "stress.log").read_text()
    assert all(one.effectiveness.n == 12 and one.f1 > 0.5 for one in tiny.points)
    assert all(one.ram_bytes > 0 and one.generate_seconds > 0 for one in tiny.points)
    assert tiny.outputs == 4 + 5 * 8
    assert "95th percentile of 1 random direction" in tiny.conclusion
    assert tiny.curves[0].knee.status == "undecided"


def test_a_finished_run_is_not_repeated_and_another_is_refused(tiny: Stress, model: Any) -> None:
    path = Path(tiny.path)
    before = {one: one.stat().st_mtime_ns for one in (path / "blocks").iterdir()}
    again = stress(model, ["animal", "cheerful"], out=path, **TINY)
    assert again.points == tiny.points
    assert before == {one: one.stat().st_mtime_ns for one in (path / "blocks").iterdir()}
    with pytest.raises(RecipeError, match="max_tokens"):
        stress(model, ["animal", "cheerful"], out=path, **{**TINY, "max_tokens": 13})


def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny: Stress, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = model.generate, []

    def stopping(requests: Any, **options: Any) -> Any:
        if requests[0].max_new_tokens:
            calls.append(len(requests))
            if len(calls) == 3:
                raise KeyboardInterrupt
        return generate(requests, **options)

    monkeypatch.setattr(model, "generate", stopping)
    with pytest.raises(UnfinishedError, match="go on with the same command"):
        stress(model, ["animal", "cheerful"], out=tmp_path / "run", **TINY)
    resumed = stress(model, ["animal", "cheerful"], out=tmp_path / "run", **TINY)
    assert len(calls) == 7  # six blocks, and the one that was interrupted
    assert [one.effectiveness for one in resumed.points] == [one.effectiveness for one in tiny.points]


def test_the_page_and_the_text_say_the_conclusion(tiny: Stress) -> None:
    html = page.render(tiny)
    assert "Delta against strength" in html and "Training curve" in html and "Memory" in html
    assert "examples a label (lowest" in html
    assert "nan" not in html.split("<main")[1]
    assert "Random directions" in page.render_text(tiny, width=100, color=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (2, 5)}, "with its double"),
        ({"strengths": (0.5, 1, 2)}, "0 and at least two others"),
        ({"temperature": 0.0}, "2 times the same"),
        ({"methods": ()}, "at least one"),
        ({"max_seeds": 1}, "at least one of each"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        stress(model, ["animal"], out=tmp_path / "run", **{**TINY, **change})
    assert not (tmp_path / "run").exists()


def test_unknown_attributes_and_other_models_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cheerful"):
        stress(model, ["unicorn"], out=tmp_path / "run", **TINY)
    with pytest.raises(InputError, match="no delta scorer"):
        stress(model, out=tmp_path / "run", data={"a": "testbed:animal"}, **TINY)


def test_methods_stand_side_by_side(model: Any, tmp_path: Path) -> None:
    methods = ("raw", "contrastive", "contamination", "manifold", "dual", "trained")
    small = {**TINY, "sizes": (4, 8), "controls": 0, "sites": "layers.3.resid_post", "scale": 0.5}
    found = stress(model, ["animal"], out=tmp_path / "run", methods=methods, **small)
    assert tuple(one.method for one in found.curves) == methods
    blocks = {one.stem: jsonio.loads(one.read_bytes())["texts"] for one in (tmp_path / "run" / "blocks").iterdir()}
    texts = [str(blocks[f"{one}-animal-0008-000"]) for one in methods]
    assert len(set(texts)) == len(methods)  # every method does something of its own
    f1 = {one.method: one.f1 for one in found.points if one.size == 8}
    assert f1["contrastive"] > 0.9 and f1["trained"] > 0.8
    page.render(found)


def test_raw_vectors_of_all_concepts_are_nearly_one(model: Any) -> None:
    """Without a contrast the mean state dominates: the trap of vectors that are made from one prompt a concept."""
    made = {
        method: [_vector(model, method, name) for name in ("animal", "object")] for method in ("raw", "contrastive")
    }
    assert float(made["raw"][0].direction @ made["raw"][1].direction) > 0.8
    assert float(made["contrastive"][0].direction @ made["contrastive"][1].direction) < 0.3


def test_cleaned_vectors_lie_where_cleaning_puts_them(model: Any) -> None:
    """Each against its subspace, learned here anew."""
    attribute = make_attribute("animal", 8, 0)
    site, data = Site.parse("layers.3.resid_post"), attribute.first(8)
    shop = _workshop(model)
    raw = shop.make("contrastive", attribute, data)[site]
    neutral = pooled_states(model, make_neutral(0), [site], pool="all")[site]
    sides = shop.pooled(attribute.about, [site])
    wide = raw.vector.double().numpy()
    states = (sides[True][site], sides[False][site])
    removed = keep_accurate(from_neutral(neutral), [(wide, states)], 0.05)
    assert 0 < removed.k < from_neutral(neutral).k
    without = shop.make("contamination", attribute, data)[site]
    assert np.abs(removed.basis @ without.direction.double().numpy()).max() < 1e-6
    assert without.norm == pytest.approx(raw.norm, rel=1e-5)
    manifold = task_manifold(states[0], "here")
    within = shop.make("manifold", attribute, data)[site].direction.double().numpy()
    expected = manifold.project(wide)
    assert within @ expected / np.linalg.norm(expected) == pytest.approx(1, abs=1e-6)


def _workshop(model: Any) -> Workshop:
    sites = ("layers.3.resid_post",)
    return Workshop(model, sites=sites, pool="all", seed=0, neutral=make_neutral(0), own={})


def _vector(model: Any, method: str, name: str) -> SteeringVector:
    attribute = make_attribute(name, 8, 0)
    (found,) = _workshop(model).make(method, attribute, attribute.first(8)).values()
    return found


def test_methods_that_do_not_exist_or_lack_something_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no method 'magic'; there are mean_difference, contrastive, raw"):
        stress(model, ["animal"], out=tmp_path / "run", methods=("magic",), **TINY)
    scorers = {"a": TestbedScorer(attribute="animal")}
    with pytest.raises(InputError, match="method 'dual' needs texts about nothing in particular"):
        stress(
            model, out=tmp_path / "run", data={"a": "testbed:animal"}, delta=scorers, judge=scorers, methods=("dual",),
            **TINY,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_model_in_any_precision_by_the_command_line(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(testbed.path(), tmp_path / "mine")
    made = testbed.contrast("animal", 24, seed=5)
    sides = zip(made.positive, made.negative, strict=True)
    rows = [{"positive": above, "negative": below} for above, below in sides]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "stress", "--out", str(tmp_path / "run"), "--model", str(tmp_path / "mine")]
    command += ["--data", f"animal={tmp_path / 'rows.jsonl'}", "--delta", "animal=testbed:animal"]
    command += ["--judge", "animal=vector:testbed:animal", "--dtype", dtype, "--device", "cpu", "--prompt", "the"]
    command += ["--size", "2", "--size", "4", "--seeds", "2", "--max-seeds", "2", "--max-tokens", "12"]
    command += ["--controls", "1", "--num-prompts", "1", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["dtype"] == dtype and said["plan"]["delta"] == "animal: testbed:animal"
    assert said["plan"]["judge"] == "animal: vector:testbed:animal"
    assert all(np.isfinite(one["effectiveness"]["se"]) and one["f1"] > 0.5 for one in said["points"])
    bare = ["evaluate", "stress", "--out", str(tmp_path / "other"), "--model", str(tmp_path / "mine")]
    assert main(bare) == 2  # no data: one line says what is needed
    assert "needs contrast data and two scorers" in capsys.readouterr().err


def test_mean_difference_steers_and_random_directions_do_not(model: Any, tmp_path: Path) -> None:
    found = stress(model, ["animal"], out=tmp_path / "run", sizes=(8, 16), max_seeds=4, controls=4)
    at = next(one for one in found.points if one.size == 16)
    assert at.effectiveness.n == 280
    assert at.effectiveness.se >= 0.7
    assert at.f1 > 0.9
    assert found.controls[0].p95 < 0.2


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("seed", "outputs", "controls"), [(0, 4, 100), (1, 8, 0), (2, 8, 0)])
def test_every_attribute_steers_at_16_examples(
    seed: int, outputs: int, controls: int, model: Any, tmp_path: Path
) -> None:
    """The default size with its random directions; other texts with twice the outputs, whose se is less by chance."""
    found = stress(
        model, out=tmp_path / "run", sizes=(8, 16), seeds=outputs, max_seeds=outputs, controls=controls,
        methods=("mean_difference", "trained"), seed=seed,
    )  # fmt: skip
    at = [one for one in found.points if one.size == 16]
    assert len(at) == 14
    for one in at:
        assert one.effectiveness.se >= 0.7, one
    for band in found.controls:
        assert band.p95 < 0.2, band
        assert band.p99 < min(one.effectiveness.se for one in at if one.attribute == band.attribute)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_four_of_five_seeds_agree_on_the_knee(model: Any, tmp_path: Path) -> None:
    knees = [
        stress(model, out=tmp_path / f"{seed}", sizes=(2, 4, 8, 16, 32), controls=0, seed=seed).curves[0].knee.size
        for seed in range(5)
    ]
    sizes = [one for one in knees if one is not None]
    assert any(sum(low <= one <= 2 * low for one in sizes) >= 4 for low in sizes), knees


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_label_noise_moves_the_knee_to_larger_sizes(model: Any, tmp_path: Path) -> None:
    """Three of eight pairs the wrong way leave a quarter of the difference: 16 times the pairs make up for it."""
    names = ["animal", "person", "cheerful"]
    clean, noisy = (
        stress(model, names, out=tmp_path / f"{noise}", label_noise=noise, controls=0) for noise in (0.0, 3 / 8)
    )
    early, late = (one.curves[0].knee.size or 128 for one in (clean, noisy))
    assert late > early
