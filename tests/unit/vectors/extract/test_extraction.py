"""Extraction on the embedded model: against states computed one text at a time, its evidence, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trimtab
from trimtab import testbed
from trimtab.backends import Message, Request, Sampling, open_backend
from trimtab.cli import main
from trimtab.directions import load_direction
from trimtab.errors import InputError, NonFiniteError, NotAppliedError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.vectors import ExtractionReport
from trimtab.sites import Site
from trimtab.steering import Add, Steering, SteeringVector
from trimtab.vectors.data import ContrastData, Example, load
from trimtab.vectors.extract import METHODS, extract

SITE = Site.parse("layers.3.resid_post")


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    opened = open_backend("hf", "testbed", dtype="float32", batch_size=128)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def animal() -> ContrastData:
    return load("testbed:animal", n=24)


def uneven() -> ContrastData:
    """Texts whose lengths differ between the labels, so that padding falls on one label more than on the other."""
    long = testbed.contrast("animal", 12, seed=1, sentences=4).positive
    short = testbed.contrast("animal", 12, seed=2, sentences=1).negative
    examples = [
        Example(text=text, label=label, question=f"q{index}")
        for label, texts in (("pos", long), ("neg", short))
        for index, text in enumerate(texts)
    ]
    return ContrastData(name="uneven", examples=tuple(examples))


def states(backend: Any, text: str, layer: int) -> torch.Tensor:
    """What block `layer` returns for one text alone, without the beginning token, by a hook of this test's own."""
    ids = backend.tokenizer(text, return_tensors="pt")["input_ids"]
    held: list[torch.Tensor] = []
    handle = backend.model.model.layers[layer].register_forward_hook(lambda module, args, out: held.append(out))
    with torch.no_grad():
        backend.model(ids)
    handle.remove()
    return held[0][0, 1:].double()


@pytest.mark.parametrize("pool", ["assistant", "all", "last"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_a_padded_batch_gives_the_means_of_texts_alone(backend: Any, pool: str, batch_size: int) -> None:
    """Padding is neither averaged nor read as a last token, on whichever side it lies."""
    data = uneven()
    found = extract(backend, data, pool=pool, batch_size=batch_size, validation=None, num_controls=0, sites=str(SITE))  # type: ignore[arg-type]
    means = {}
    for label in ("pos", "neg"):
        rows = [states(backend, one.text, 3) for one in data.examples if one.label == label]
        means[label] = torch.stack([one[-1] if pool == "last" else one.mean(dim=0) for one in rows]).mean(dim=0)
    expected = means["pos"] - means["neg"]
    error = (found.vectors[SITE].vector.double() - expected).norm() / expected.norm()
    assert error < 2e-6 * 2.7 * 4  # float32 between engines at layer 3; a difference is shorter than its terms


def test_what_the_user_says_does_not_count(backend: Any) -> None:
    """The user's turn comes first, so the states of the answer may see it; its own states are left out."""
    turns = [(pair[-1]["content"], answer) for pair, answer in zip(testbed.chat(8), testbed.prompts(8), strict=True)]
    examples = [
        Example(
            messages=(Message(role="user", content=asked), Message(role="assistant", content=answer)),
            label="pos" if index % 2 else "neg",
            question=f"q{index}",
        )
        for index, (asked, answer) in enumerate(turns)
    ]
    data = ContrastData(name="chats", examples=tuple(examples))
    found = extract(backend, data, validation=None)
    assert found.report.train.tokens == sum(len(backend.tokenizer(answer)["input_ids"]) - 1 for _, answer in turns)
    assert found.report.best is None
    with pytest.raises(InputError, match="6 sites and no held-out examples"):
        _ = found.best


@pytest.mark.parametrize("method", METHODS)
def test_every_method_separates_held_out_texts_and_controls_do_not(
    method: str, backend: Any, animal: ContrastData
) -> None:
    held = load("testbed:animal", n=32, seed=9)
    found = extract(backend, animal, method=method, sites="layers.2-4.resid_post", validation=held)  # type: ignore[arg-type]
    for one in found.report.sites:
        assert one.auc is not None and one.random_auc is not None
        assert one.auc > (0.8 if method == "mass_mean" else 0.9)  # mass_mean whitens 48 texts in 128 dimensions
    assert found.report.train.questions == 24
    assert found.report.validation is not None and found.report.validation.questions == 32
    assert found.report.best in {one.site for one in found.report.sites}
    assert found.best.recipe["method"] == method and found.best.recipe["evidence"]["auc"] is not None
    for kind in ("random", "covariance", "shuffled"):
        assert found.controls[kind][SITE].norm == pytest.approx(found.vectors[SITE].norm, rel=1e-5)
        assert abs(float(found.controls[kind][SITE].direction @ found.vectors[SITE].direction)) < 0.8


def test_shuffled_labels_fool_nobody(backend: Any) -> None:
    """Labels without meaning: held-out auc stays at chance, within what the controls reach."""
    plain = load("testbed:animal", n=48)
    mixed = [replace(one, label="pos" if int(one.question[5:]) % 2 else "neg") for one in plain.examples]
    found = extract(backend, replace(plain, examples=tuple(mixed)), sites=str(SITE), validation=0.5)
    one = found.report.sites[0]
    assert one.auc is not None and one.auc < 0.75


def test_median_norm_and_quantiles_are_of_the_tokens(backend: Any, animal: ContrastData) -> None:
    held = load("testbed:animal", n=24, seed=9)
    found = extract(backend, animal, validation=held, sites=str(SITE)).vectors[SITE]
    lengths = torch.cat([states(backend, one.text, 3) for one in animal.examples]).norm(dim=1)
    assert found.median_norm == pytest.approx(float(lengths.median()), rel=0.01)
    along = torch.cat([states(backend, one.text, 3) for one in held.examples]) @ found.direction.double()
    for fraction in (0.05, 0.5, 0.95):
        assert found.quantile(fraction) == pytest.approx(float(along.quantile(fraction)), rel=0.02, abs=0.05)


def test_labels_that_swap_turn_the_vector(backend: Any, animal: ContrastData) -> None:
    swapped = replace(animal, positive="neg", negative="pos")
    one, two = (extract(backend, data, method="pca", sites=str(SITE)).vectors[SITE] for data in (animal, swapped))
    assert float(one.direction @ two.direction) == pytest.approx(-1, abs=1e-5)


def test_module_sites(backend: Any, animal: ContrastData) -> None:
    found = extract(backend, animal, sites="module:model.layers.3.output layers.3.resid_post")
    one, two = found.vectors.values()
    assert torch.equal(one.direction, two.direction)


def test_the_latent_of_an_autoencoder(backend: Any, animal: ContrastData, tmp_path: Path) -> None:
    planted = extract(backend, animal, sites=str(SITE)).vectors[SITE]
    decoder = torch.nn.functional.normalize(torch.randn(20, 128), dim=1)
    decoder[13] = planted.direction
    tensors = {"W_dec": decoder, "W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(20), "b_dec": torch.zeros(128)}
    save_file(tensors, tmp_path / "sae.safetensors")
    found = extract(backend, animal, method="sae", sae=tmp_path / "sae.safetensors", sites=str(SITE))
    assert float(found.best.direction @ planted.direction) == pytest.approx(1, abs=1e-5)
    assert "latent 13 of sae.safetensors" in found.report.sites[0].note
    with pytest.raises(InputError, match="belongs to one site and 6 were asked for"):
        extract(backend, animal, method="sae", sae=tmp_path / "sae.safetensors")
    save_file({**tensors, "W_enc": torch.zeros(64, 20)}, tmp_path / "narrow.safetensors")
    with pytest.raises(VectorError, match=r"W_enc is \[64, 20\].* \[128, latents\]"):
        extract(backend, animal, method="sae", sae=tmp_path / "narrow.safetensors", sites=str(SITE))
    save_file({"W_dec": decoder}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="no tensor 'W_enc'; it has: W_dec"):
        extract(backend, animal, method="sae", sae=tmp_path / "part.safetensors", sites=str(SITE))


def test_files_and_report_round_trip(backend: Any, animal: ContrastData, tmp_path: Path) -> None:
    found = extract(backend, animal, sites="layers.{2,3}.resid_post", out=tmp_path / "v")
    read = SteeringVector.load(tmp_path / "v" / "layers.3.resid_post.safetensors")
    assert read == found.vectors[SITE] and read.model_digest == backend.info.weights_digest
    assert load_direction(tmp_path / "v" / "layers.3.resid_post.safetensors").site == SITE
    assert SteeringVector.load(tmp_path / "v" / "controls" / "shuffled" / "layers.3.resid_post.safetensors").norm > 0
    assert from_json(ExtractionReport, (tmp_path / "v" / "extraction.json").read_text()) == found.report
    assert json.loads(to_json(found.report))["kind"] == "extraction"
    (evidence,) = [one for one in found.report.sites if one.site == str(SITE)]
    assert read.recipe["evidence"]["effect"] == evidence.effect and read.recipe["evidence"]["auc"] == evidence.auc
    with pytest.raises(InputError, match="holds an extraction already"):  # before the model is opened
        extract("no-such-model", animal, out=tmp_path / "v")


@pytest.mark.parametrize("choose", ["steering", "auc"])
def test_every_pass_counts_towards_what_was_announced(
    backend: Any, animal: ContrastData, choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float]] = []
    done: list[float] = []

    class Counting:
        def advance(self, steps: float = 1) -> None:
            done.append(steps)

        def describe(self, text: str) -> None: ...

    @contextmanager
    def bar(description: str, total: float) -> Iterator[Counting]:
        told.append((description, total))
        yield Counting()

    monkeypatch.setattr("trimtab._base.progress.progress", bar)
    extract(backend, animal, sites="layers.1-2.resid_post", num_controls=0, choose=choose)
    assert told == [(f"extract {animal.name}", 48 + (2 * 12 if choose == "steering" else 0))]
    assert sum(done) == told[0][1] and len(done) > 2


def shares(backend: Any, attribute: str, steerings: list[Steering | None], prompts: int) -> list[float]:
    """Mean share of the attribute in sampled continuations under each steering, the prompts not counted."""
    texts = testbed.prompts(prompts, seed=7)
    requests = [
        Request(prompt=text, steering=steering, max_new_tokens=28, sampling=Sampling(temperature=1.0, seed=index))
        for steering in steerings
        for index, text in enumerate(texts)
    ]
    made = [one.text for one in backend.generate(requests)]
    scores = [
        testbed.score(one, after=text).share(attribute) for one, text in zip(made, texts * len(steerings), strict=True)
    ]
    return [sum(scores[start : start + prompts]) / prompts for start in range(0, len(scores), prompts)]


@pytest.mark.parametrize("attribute", [*testbed.CONCEPTS, *testbed.TONES])
def test_vectors_steer(attribute: str, backend: Any) -> None:
    """The exact scorer's share rises along the vector and falls against it, more than along a random direction."""
    found = extract(backend, f"testbed:{attribute}", sites=str(SITE), batch_size=32)

    def added(vector: SteeringVector, scale: float) -> Steering:
        return Steering({str(SITE): [Add(vector, scale=scale, unit="token_norm")]})

    control = found.controls["random"][SITE]
    steerings = [None, added(found.best, 0.6), added(found.best, -0.6), added(control, 0.6), added(control, -0.6)]
    base, up, down, *random = shares(backend, attribute, steerings, 28)
    assert up > base + 0.05
    assert up > down + 0.15
    assert up - down > abs(random[0] - random[1])


@pytest.mark.parametrize(
    ("method", "pairs", "message"),
    [
        ("lda", 2, r"method 'lda' needs at least 3 examples of each label to train on; label 'pos' has 2"),
        ("logistic", 1, r"needs at least 2 examples of each label to train on; label 'pos' has 1"),
        ("pca", 1, r"needs at least 2 pairs .* to train on; there are 1"),
    ],
)
def test_too_few_examples_say_how_many(method: Any, pairs: int, message: str, backend: Any) -> None:
    with pytest.raises(InputError, match=message):
        extract(backend, load("testbed:animal", n=pairs), method=method, validation=None)


def test_refusals(backend: Any, animal: ContrastData, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no example has the negative label 'neg'.*labels that exist: pos"):
        extract(backend, animal.select("label=pos"))
    unpaired = replace(animal, examples=tuple(replace(one, question=one.text) for one in animal.examples))
    with pytest.raises(InputError, match="there are 0"):
        extract(backend, unpaired, method="pca")
    with pytest.raises(InputError, match="are among the validation examples"):
        extract(backend, animal, validation=animal)
    with pytest.raises(InputError, match="a share between 0 and 1"):
        extract(backend, animal, validation=1.5)
    with pytest.raises(InputError, match="expected one of mean_difference, pca"):
        extract(backend, animal, method="magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method 'sae' needs sae=FILE"):
        extract(backend, animal, method="sae")
    with pytest.raises(InputError, match="nothing can be held out"):
        extract(backend, load("testbed:animal", n=1))
    with pytest.raises(InputError, match="layers"):
        extract(backend, animal, sites="layers.9.resid_post")
    with pytest.raises(InputError, match="runs elsewhere"):
        extract(open_backend("mock", "testbed"), animal)
    same = [replace(one, text="the fox slept.") for one in animal.examples]
    with pytest.raises(InputError, match=r"layers\.0\.resid_post: the labels of testbed:animal have equal means"):
        extract(backend, replace(animal, examples=tuple(same)), validation=None)
    monkeypatch.setattr(type(backend.model.model.layers[3]), "__call__", lambda self, x, **rest: x)
    with pytest.raises(NotAppliedError, match=r"layers\.0\.resid_post ran 0 times"):
        extract(backend, animal)


def test_conversations_of_one_question_in_both_parts_are_refused(backend: Any) -> None:
    def chats(answers: tuple[str, str]) -> ContrastData:
        return load(
            [{"prompt": "who?", "response": a, "label": b} for a, b in zip(answers, ("pos", "neg"), strict=True)]
        )

    with pytest.raises(InputError, match="1 questions are in the training and the validation examples, such as 'who"):
        extract(backend, chats(("the fox", "the box")), validation=chats(("a fox", "a box")))


def test_overflow_names_site_and_token(animal: ContrastData) -> None:
    half = open_backend("hf", "testbed", dtype="float16", verify=False)
    half.model.model.layers[4].mlp.down_proj.weight.data *= 30_000  # type: ignore[attr-defined]
    with pytest.raises(
        NonFiniteError, match=r"layers\.4\.resid_post: the state of token \d+ '.+' \(id \d+\) of example"
    ):
        extract(half, animal)
    half.close()


def test_the_model_is_left_as_it_was(backend: Any, animal: ContrastData) -> None:
    backend.model.train()
    try:
        extract(backend, animal, sites=str(SITE))
        assert all(module.training for module in backend.model.modules())
        assert not any(module._forward_hooks for module in backend.model.modules())
    finally:
        backend.model.eval()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vectors", "extract", "testbed:calm", "--out", str(tmp_path / "v"), "-s", str(SITE)]
    if "calm" not in testbed.TONES:
        command[2] = f"testbed:{testbed.TONES[0]}"
    assert main([*command, "--print-python"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("trimtab.vectors.extract('testbed', 'testbed:")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "layers.3.resid_post" in shown and f"best: {SITE} (by steering); {tmp_path / 'v'}" in shown
    assert main([*command, "--json"]) == 2
    assert "holds an extraction already" in capsys.readouterr().err
    assert trimtab.vectors.extract is extract


def test_the_site_that_steers_is_chosen_and_not_the_one_that_is_read_best(backend: Any) -> None:
    """What is generated decides: the share of animals that the chosen site's vector moves, against that of block 0."""
    held = load("testbed:animal", n=48, seed=9)
    read, steers = (
        extract(backend, "testbed:animal", validation=held, num_controls=0, choose=choose)  # type: ignore[arg-type]
        for choose in ("auc", "steering")
    )
    assert (read.report.chosen_by, steers.report.chosen_by) == ("auc", "steering")
    assert read.report.sites[0].effect is None
    effects = {one.site: one.effect for one in steers.report.sites}
    assert steers.report.best == max(effects, key=lambda site: effects[site] or 0.0)
    assert all(value is not None and value > 0 for value in effects.values())
    first = Site.parse("layers.0.resid_post")
    assert read.report.best == str(first) != steers.report.best
    prompts = testbed.prompts(8, seed=3)

    def moved(vector: SteeringVector) -> float:
        shares = []
        for sign in (1, -1):
            op = Add(vector.direction, scale=0.3 * sign, unit="token_norm")
            wanted = [
                Request(
                    prompt=text,
                    id=f"{sample}",
                    prompt_index=index,
                    steering=Steering({str(vector.site): op}),
                    max_new_tokens=40,
                    ignore_eos=True,
                    sampling=Sampling(temperature=0.7, seed=10 * index + sample),
                )
                for index, text in enumerate(prompts)
                for sample in range(3)
            ]
            made = backend.generate(wanted)
            shares.append(sum(testbed.score(one.text).share("animal") for one in made) / len(made))
        return shares[0] - shares[1]

    assert moved(steers.best) > moved(read.best) + 0.1


def test_the_effect_is_what_the_likelihoods_say(backend: Any, animal: ContrastData) -> None:
    """Against logits taken one text at a time through a hook of this test's own."""
    held = load("testbed:animal", n=4, seed=9)
    found = extract(backend, animal, validation=held, sites=str(SITE), num_controls=0)
    unit = found.vectors[SITE].direction
    sides: dict[str, list[float]] = {"pos": [], "neg": []}
    for one in held.examples:
        ids = backend.tokenizer(one.text, return_tensors="pt")["input_ids"]
        means = []
        for sign in (1, -1):

            def add(module: Any, args: Any, out: torch.Tensor, sign: int = sign) -> torch.Tensor:
                return out + sign * 0.1 * out.norm(dim=-1, keepdim=True) * unit

            handle = backend.model.model.layers[3].register_forward_hook(add)
            with torch.no_grad():
                logits = backend.model(ids).logits[0, :-1].double()
            handle.remove()
            means.append(float(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).mean()))
        sides[one.label].append((means[0] - means[1]) / 2)
    expected = sum(sides["pos"]) / 4 - sum(sides["neg"]) / 4
    assert found.report.sites[0].effect == pytest.approx(expected, rel=1e-3)


def test_where_no_steering_can_be_tried_the_site_is_chosen_by_auc_and_it_is_said(
    backend: Any, animal: ContrastData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise InputError("this family is not known")

    monkeypatch.setattr(backend, "score", refuse)
    found = extract(backend, animal, sites="layers.1-2.resid_post", num_controls=0)
    assert found.report.chosen_by == "auc"
    assert any("this family is not known; the site was chosen by auc" in note for note in found.report.notes)
    with pytest.raises(InputError, match="one of steering, auc"):
        extract(backend, animal, choose="loss")  # type: ignore[arg-type]
