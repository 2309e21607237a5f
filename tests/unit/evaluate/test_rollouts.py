"""Rollouts: what every variant says, in one resumable directory."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab import testbed
from trimtab.backends import Backend, Message, Request
from trimtab.errors import InputError, RecipeError, SteeringError, UnfinishedError
from trimtab.evaluate import Rollout, Variant, load, make_variants, output_seed, rollouts
from trimtab.evaluate.variants import apply_prompt, buffers, question
from trimtab.results.evaluation import RolloutRun
from trimtab.sites import Site
from trimtab.steering import Add, Steering, SteeringVector

PROMPTS = testbed.prompts(4)
OPTIONS: dict[str, Any] = {"vectors": {"animal": "testbed:animal"}, "scales": [-0.5, 0.5], "max_tokens": 8}


class Counting:
    """The model, counting what it is asked, and interrupted at a call."""

    def __init__(self, inner: Any, stop_at: int | None = None) -> None:
        self._inner, self._stop_at, self.requests = inner, stop_at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, requests: list[Request], **more: Any) -> Any:
        if self._stop_at is not None and self.requests >= self._stop_at:
            raise KeyboardInterrupt
        self.requests += len(requests)
        return self._inner.generate(requests, **more)


def lines(path: str | Path) -> list[Rollout]:
    return [dataclasses.replace(row, seconds=0.0) for row in load(path).rows()]


def test_every_variant_continues_every_prompt(model: Backend, tmp_path: Path) -> None:
    run = rollouts(model, PROMPTS, out=tmp_path / "r", samples=2, temperature=1.0, controls=1, **OPTIONS)
    assert isinstance(run, RolloutRun) and run.finished
    names = ["unsteered", "animal@-0.5", "animal@+0.5", "random-0@-0.5", "random-0@+0.5"]
    assert [one.name for one in run.variants] == names
    assert all(one.done == one.expected == 8 for one in run.variants)
    rows = lines(run.path)
    assert len({row.key for row in rows}) == len(rows) == 40
    assert run.tokens == sum(len(row.token_ids) for row in rows) > 0
    for row in rows:
        assert row.text == model.tokenizer.decode(row.token_ids, skip_special_tokens=True)
        assert row.seed == output_seed(0, row.prompt, row.sample)
    steered = {row.text for row in rows if row.variant == "animal@+0.5"}
    assert steered != {row.text for row in rows if row.variant == "unsteered"}


def test_an_output_holds_no_word_of_its_prompt_and_batches_change_nothing(model: Backend, tmp_path: Path) -> None:
    """Prompts of unequal length share a batch: a slice by the number of real tokens would cut into padding."""
    uneven = ("the fox", " ".join(PROMPTS), PROMPTS[1])
    rows = lines(rollouts(model, uneven, out=tmp_path / "r", **OPTIONS).path)
    steerings = {one.name: one.steering for one in load(tmp_path / "r").variants}
    for row in rows:
        alone = Request(prompt=uneven[row.prompt], steering=steerings[row.variant], max_new_tokens=8)
        assert row.token_ids == model.generate([alone])[0].token_ids
        assert row.prompt_ids == model.encode(uneven[row.prompt]).ids


def test_an_interrupted_run_goes_on_and_repeats_nothing(model: Backend, tmp_path: Path) -> None:
    whole = rollouts(model, PROMPTS, out=tmp_path / "whole", samples=2, temperature=1.0, **OPTIONS)
    cut = Counting(model, stop_at=12)
    with pytest.raises(UnfinishedError, match="go on with the same command"):
        rollouts(cut, PROMPTS, out=tmp_path / "cut", samples=2, temperature=1.0, **OPTIONS)
    assert not load(tmp_path / "cut").state().finished
    file = tmp_path / "cut" / "rollouts.jsonl"
    with file.open("a") as stream:  # the process died inside a line of its next chunk
        stream.write(file.read_text().splitlines()[0] + '\n{"variant":"unst')
    again = Counting(model)
    run = rollouts(again, PROMPTS, out=tmp_path / "cut", samples=2, temperature=1.0, **OPTIONS)
    assert run.finished and again.requests == 24 - 12
    assert lines(run.path) == lines(whole.path)
    untouched = Counting(model)
    assert rollouts(untouched, PROMPTS, out=tmp_path / "cut", samples=2, temperature=1.0, **OPTIONS).finished
    assert untouched.requests == 0


def test_another_plan_in_the_same_place_is_refused(model: Backend, tmp_path: Path) -> None:
    rollouts(model, PROMPTS[:1], out=tmp_path / "r", **OPTIONS)
    with pytest.raises(RecipeError, match="seed differ"):
        rollouts(model, PROMPTS[:1], out=tmp_path / "r", seed=1, **OPTIONS)
    with pytest.raises(RecipeError, match="variants differ"):
        rollouts(model, PROMPTS[:1], out=tmp_path / "r", **OPTIONS | {"scales": [0.5]})
    with pytest.raises(RecipeError, match="already holds"):
        rollouts(model, PROMPTS[:1], out=tmp_path / "r", resume=False, **OPTIONS)


def test_the_directory_alone_says_what_was_run(model: Backend, tmp_path: Path) -> None:
    chats = [({"role": "user", "content": "the fox slept ."},), "the lamp", (5, 6, 7)]
    rollouts(model, chats, out=tmp_path / "r", **OPTIONS)
    files = load(tmp_path / "r")
    assert files.plan.prompts == ((Message(role="user", content="the fox slept ."),), "the lamp", (5, 6, 7))
    made = make_variants({"animal": "testbed:animal"}, model.info, scales=[-0.5, 0.5])
    assert [one.steering for one in files.variants] == [one.steering for one in made]


def test_the_prompted_variant_is_prompted_and_no_system_leaves_it_so() -> None:
    chat = (Message(role="system", content="be kind"), Message(role="user", content="hello"))
    plain, prompted = Variant(name="plain"), Variant(name="prompted", system="be a cat")
    assert apply_prompt(plain, chat, no_system=False) == chat
    assert apply_prompt(plain, chat, no_system=True) == chat[1:]
    assert apply_prompt(prompted, chat, no_system=True) == (Message(role="system", content="be a cat"), chat[1])
    assert apply_prompt(prompted, "hello", no_system=True) == "be a cat hello"
    with pytest.raises(InputError, match="token ids"):
        apply_prompt(prompted, (1, 2), no_system=False)
    assert question(chat) == question("hello") == "hello"


def test_matched_norms_are_of_the_unit_direction(model: Backend) -> None:
    """A raw vector of norm 117 times the learned norm 303 is not a vector of norm 303."""
    width = model.info.hidden_size
    learned = SteeringVector.of([3.0] + [0.0] * (width - 1), site=Site("resid_post", 2))
    raw = SteeringVector.of([0.0, 117.0] + [0.0] * (width - 2), site=Site("resid_post", 2))
    made = make_variants(
        {"trained": learned, "extracted": raw}, model.info, learned="trained", scales=[0.5], unit="matched_norm"
    )
    added = {}
    for one in made[1:]:
        assert one.steering is not None
        (op,) = one.steering.bound
        assert isinstance(op.op, Add)
        added[one.name] = (op.op.vector * op.op.scale)[:2].tolist()
    assert added == {
        "trained@+0.5": [1.5, 0.0],
        "trained@learned": [3.0, 0.0],
        "extracted@+0.5": [0.0, 1.5],
        "extracted@learned": [0.0, 3.0],
        "extracted@-learned": [0.0, -3.0],
    }
    assert {one.name: one.scale for one in made if one.group.endswith("@norm")} == {
        "trained@learned": 3.0,
        "extracted@learned": 3.0,
        "extracted@-learned": -3.0,
    }


def test_controls_of_a_vector_as_learned_have_its_norm(model: Backend) -> None:
    """A vector that runs only as it is has random directions beside it all the same."""
    learned = SteeringVector.of([3.0] + [0.0] * (model.info.hidden_size - 1), site=Site("resid_post", 2))
    made = make_variants({"trained": learned}, model.info, learned="trained", controls=2, seed=7)
    assert [one.name for one in made] == ["unsteered", "trained@learned", "random-0@learned", "random-1@learned"]
    added = []
    for one in made[1:]:
        assert one.steering is not None
        (op,) = one.steering.bound
        assert isinstance(op.op, Add) and str(op.pattern) == "layers.2.resid_post"
        added.append(op.op.vector * op.op.scale)
    assert [float(one.norm()) for one in added] == pytest.approx([3.0, 3.0, 3.0])
    assert all(abs(float(one @ other)) < 6 for one, other in pairwise(added))
    drawn = np.random.RandomState(7).standard_normal(model.info.hidden_size)
    assert added[1].numpy() == pytest.approx(3 * drawn / np.linalg.norm(drawn), abs=1e-6)


def test_buffers_cover_every_variant() -> None:
    two = Steering({"layers.1.mlp_out": [Add([1.0, 0.0]), Add([0.0, 1.0])]})
    one = Steering({"layers.3.resid_post": Add([1.0, 0.0])})
    found = buffers([Variant(name="a"), Variant(name="b", steering=two), Variant(name="c", steering=one)])
    assert found == {
        "sites": ("layers.1.mlp_out", "layers.3.resid_post"),
        "max_steering": 2,
        "ops_per_site": 2,
        "directions_per_op": 1,
        "keys_per_steering": 1,
    }


def test_digests_of_two_kinds_are_no_two_models(model: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """A vector made on a module in memory, or shipped with the package, steers the model that a directory holds."""
    ready = SteeringVector.load(testbed.direction("animal").file)
    assert ready.model_digest and ready.model_digest.partition(":")[0] != model.info.weights_digest.partition(":")[0]
    assert len(make_variants({"animal": ready}, model.info, scales=[0.5])) == 2
    assert "whether this is the model that it was made on cannot be told" in caplog.text


def test_what_makes_no_sense_is_refused_before_anything_is_written(model: Backend, tmp_path: Path) -> None:
    out = tmp_path / "r"
    vector = SteeringVector.of(
        [1.0] * model.info.hidden_size, site=Site("resid_post", 1), model_digest="xxh3:full:0123"
    )
    cases: list[tuple[str, dict[str, Any], type[Exception]]] = [
        ("2 times the same", {"samples": 2}, InputError),
        ("at least 1 of each", {"max_tokens": 0}, InputError),
        ("numbers other than 0", {"scales": [0.0]}, InputError),
        ("unit is 'percent'", {"unit": "percent"}, InputError),
        ("name the vector of the norm", {"unit": "matched_norm"}, InputError),
        ("hidden_size|width|128", {"vectors": {"v": SteeringVector.of([1.0, 2.0])}}, InputError),
        ("does not say its layer", {"vectors": {"v": "random:1"}}, InputError),
        ("layer 9 is outside 0 to 5", {"vectors": {"v": "random:1"}, "layer": 9}, InputError),
        (
            "made on a model of digest xxh3:full:0123, and this one has xxh3:full:",
            {"vectors": {"v": vector}},
            SteeringError,
        ),
        ("are for vllm", {"engine": {"block_size": 16}}, InputError),
        ("animal: no strength to run at; give scales", {"scales": []}, InputError),
        ("and no vector to run at them", {"vectors": {}}, InputError),
    ]
    for message, options, kind in cases:
        running: Any = "testbed" if "engine" in options else model
        with pytest.raises(kind, match=message):
            rollouts(running, PROMPTS[:1], out=out, **OPTIONS | options)
        assert not out.exists()
    with pytest.raises(InputError, match="two variants are called 'a'"):
        rollouts(model, PROMPTS, [Variant(name="a"), Variant(name="a")], out=out)
    idles: list[dict[str, Any]] = [{"scales": [0.5]}, {"learned": "a"}, {"prompted": "be kind"}, {"controls": 1}]
    for idle in idles:
        with pytest.raises(InputError, match=f"{next(iter(idle))} would do nothing to variants"):
            rollouts(model, PROMPTS, [Variant(name="a")], out=out, **idle)
    with pytest.raises(InputError, match="at least one"):
        rollouts(model, [], out=out, **OPTIONS)
    with pytest.raises(InputError, match="a list of prompts"):
        rollouts(model, "the fox", out=out, **OPTIONS)
    with pytest.raises(InputError, match="not the directory of rollouts"):
        load(tmp_path)
