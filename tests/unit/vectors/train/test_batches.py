"""Batches, packing, splits and counts; each test names the mistake of earlier systems that it would catch."""

from __future__ import annotations

import pytest
import torch

from trimtab.backends import Message
from trimtab.errors import InputError, RecipeError
from trimtab.vectors.data import Encoder, Example, from_rows
from trimtab.vectors.train import Engine, Preference, TokenSequence, TrainingConfig, TrainingData, prepare
from trimtab.vectors.train._batched import Batched
from trimtab.vectors.train._batches import make_batches
from trimtab.vectors.train._loss import sequence_logprobs
from trimtab.vectors.train._maps import make_map
from trimtab.vectors.train._model import Cache, SteeredModel, packing_works
from trimtab.vectors.train.config import rate_factor

CPU = torch.device("cpu")
SITE = "layers.3.resid_post"


def sequence(length: int, *, first: int = 5, prompt: int = 1, question: str = "") -> TokenSequence:
    """Token ids that count up; targets after the prompt."""
    ids = tuple(first + number for number in range(length))
    return TokenSequence(ids=ids, targets=tuple(i >= prompt for i in range(length)), question=question)


def plain(engine: Engine, **settings: object) -> SteeredModel:
    config = TrainingConfig(sites=(SITE,), **settings)  # type: ignore[arg-type]
    (site,) = engine.sites(config.sites)
    maps = {site: make_map(128, config, 0)}
    return SteeredModel(engine, maps, positions=config.positions, cache=Cache(0), checkpointing=False)


@pytest.mark.parametrize("packing", [False, True])
def test_a_sequence_counts_the_same_in_a_batch_and_alone(engine: Engine, packing: bool) -> None:
    """Padding on the wrong side, a mask that leaks between packed texts, or labels off by one all show here."""
    items = [sequence(7), sequence(15, first=9, prompt=4), sequence(4, first=3), sequence(8, first=30)]
    (batch,) = make_batches(items, size=4, packing=packing, device=CPU, name="b")
    assert batch.packed is packing and batch.ids.shape[0] == (3 if packing else 4)
    model = plain(engine)
    with model.attached(), torch.no_grad():
        together = sequence_logprobs(model.logits(batch, steered=False), batch)
    for number, item in enumerate(items):
        (score,) = engine._backend.score([item.ids])
        wanted = sum(p for p, target in zip(score.logprobs, item.targets[1:], strict=True) if target)
        assert float(together[number]) == pytest.approx(wanted, abs=2e-4)


def test_padding_is_neither_steered_nor_a_target() -> None:
    (batch,) = make_batches([sequence(6, prompt=2), sequence(3)], size=2, packing=False, device=CPU, name="b")
    for positions in ("prompt", "generated", "response"):
        rows = batch.rows(positions)  # type: ignore[arg-type]
        assert rows is not None and not rows[1, 3:].any()
    assert not batch.targets[1, 3:].any()
    assert batch.rows("response")[0].tolist() == [False, True, True, True, True, True]  # type: ignore[index]
    assert batch.rows("generated")[0].tolist() == [False, False, True, True, True, True]  # type: ignore[index]
    assert batch.rows("prompt")[0].tolist() == [True, True, False, False, False, False]  # type: ignore[index]


def test_packing_wastes_no_row_that_two_sequences_could_share() -> None:
    items = [sequence(n) for n in (10, 6, 4, 5, 5, 3)]
    (batch,) = make_batches(items, size=6, packing=True, device=CPU, name="b")
    assert batch.ids.shape == (4, 10)
    assert batch.num_targets == sum(one.num_targets for one in items) == int(batch.targets.sum())


def test_the_first_token_of_a_packed_sequence_is_nobodys_target() -> None:
    whole = [TokenSequence(ids=(7, 8, 9), targets=(True, True, True)), sequence(6)]
    (batch,) = make_batches([*whole, whole[0]], size=3, packing=True, device=CPU, name="b")
    assert batch.packed and batch.num_targets == sum(one.num_targets for one in whole) + 2
    assert not batch.targets[batch.positions == 0].any()


def test_a_model_that_mixes_packed_sequences_is_found_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing_works(engine)
    forward = engine.model.forward

    def deaf(*args: object, position_ids: object = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", deaf)
    assert not packing_works(engine)
    data = TrainingData(name="d", train=(sequence(5), sequence(4)))
    batched = Batched.of(engine, data, TrainingConfig(sites=(SITE,)))
    assert not batched.train[0].packed
    assert "padded, not packed" in batched.notes[0]


def test_the_count_reported_is_the_number_of_labels_in_the_loss(engine: Engine) -> None:
    """Lengths that are counted at one limit and cut at another would differ here."""
    data = TrainingData(
        name="d", train=(sequence(30), sequence(9), sequence(40, prompt=35)), validation=(sequence(25),)
    )
    batched = Batched.of(engine, data, TrainingConfig(sites=(SITE,), max_length=20, batch_size=2))
    counts = batched.counts
    assert counts.targets == sum(int(one.targets.sum()) for one in batched.train) == 19 + 8
    assert counts.tokens == 29 and counts.sequences == 2
    assert counts.validation_targets == 19
    assert (counts.cut, counts.dropped) == (2, 1)
    assert max(one.ids.shape[1] for one in batched.train) <= 20


def test_nothing_left_to_train_on(engine: Engine) -> None:
    data = TrainingData(name="d", train=(sequence(40, prompt=35),))
    with pytest.raises(InputError, match="no target is left of 1 sequences cut at 20 tokens; raise max_length"):
        Batched.of(engine, data, TrainingConfig(sites=(SITE,), max_length=20))


def test_splits_that_share_a_question_are_refused() -> None:
    with pytest.raises(InputError, match="the question 'q1' is in train and in validation; split by question"):
        TrainingData(name="d", train=(sequence(5, question="q1"),), validation=(sequence(6, question="q1"),))


def test_rows_of_one_question_stay_in_one_split(engine: Engine) -> None:
    rows = [
        {"prompt": f"why {q} ?", "response": f"the fox slept near the river {s} .", "label": "pos", "question": str(q)}
        for q in range(10)
        for s in range(4)
    ]
    data = prepare(engine, from_rows(rows, name="r"), TrainingConfig(sites=(SITE,)))
    train, validation = ({one.question for one in part} for part in (data.train, data.validation))
    assert len(train) == 8 and len(validation) == 2 and not train & validation


def test_only_what_the_assistant_says_counts_and_the_system_message_is_what_the_vector_replaces(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = "{% for one in messages %}{{ one['content'] }} {% endfor %}"  # the testbed's own has no system messages
    monkeypatch.setattr(engine.tokenizer, "chat_template", plainly)
    turns = [
        {"role": "system", "content": "the wolf is bold ."},
        {"role": "user", "content": "what do you see ?"},
        {"role": "assistant", "content": "the fox slept near the river ."},
    ]
    rows = [{"messages": turns, "label": "pos", "question": str(q)} for q in range(5)]
    data = prepare(engine, from_rows(rows, name="r"), TrainingConfig(sites=(SITE,)))
    one, prompted = data.validation[0], data.prompted[0]
    assert isinstance(one, TokenSequence)
    words = engine.tokenizer.convert_ids_to_tokens
    assert "wolf" not in words(list(one.ids)) and "wolf" in words(list(prompted.ids))
    said = [word for word, target in zip(words(list(one.ids)), one.targets, strict=True) if target]
    assert said[:3] == ["the", "fox", "slept"] and "see" not in said
    assert one.num_targets == prompted.num_targets < len(one.ids) - 1


def test_the_prompted_model_gets_the_prompt_before_a_plain_text(engine: Engine) -> None:
    config = TrainingConfig(sites=(SITE,), prompt="the wolf slept .")
    data = prepare(engine, "testbed:animal", config)
    one, prompted = data.validation[0], data.prompted[0]
    assert isinstance(one, TokenSequence)
    head = Encoder(tokenizer=engine.tokenizer)(Example(text="the wolf slept .", label="x", question="q")).ids
    assert prompted.ids[: len(head)] == head
    assert prompted.num_targets == one.num_targets


def test_prompted_sequences_with_other_answers_are_refused() -> None:
    with pytest.raises(InputError, match="same answers under the other prompt"):
        TrainingData(name="d", train=(sequence(5),), validation=(sequence(6),), prompted=(sequence(6, first=20),))


def test_bad_data() -> None:
    with pytest.raises(InputError, match="no training sequence"):
        TrainingData(name="d", train=())
    with pytest.raises(InputError, match="mixed"):
        TrainingData(name="d", train=(sequence(5), Preference(chosen=sequence(4), rejected=sequence(4))))
    with pytest.raises(InputError, match="no token of a sequence of 3 would enter the loss"):
        TokenSequence(ids=(1, 2, 3), targets=(True, False, False))
    with pytest.raises(InputError, match="3 tokens and 2 targets"):
        TokenSequence(ids=(1, 2, 3), targets=(True, True))


def test_tokens_outside_the_vocabulary_are_named(engine: Engine) -> None:
    data = TrainingData(name="d", train=(sequence(5, first=10**6),))
    with pytest.raises(InputError, match="token 1000004 is outside the model's vocabulary"):
        Batched.of(engine, data, TrainingConfig(sites=(SITE,)))


def test_the_loss_must_fit_the_data(engine: Engine) -> None:
    data = TrainingData(name="d", train=(sequence(5),))
    with pytest.raises(InputError, match="d holds sequences; loss='lm' was expected"):
        Batched.of(engine, data, TrainingConfig(sites=(SITE,), loss="bipo"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "a tuple of site patterns"),
        ({"sites": "layers.3.resid_post"}, "a tuple of site patterns"),
        ({"kind": "matrix"}, "kind is 'matrix'; one of vector, low_rank"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"epochs": 0}, "epochs is 0; at least 1"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"patience": -1}, "patience is -1"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainingConfig(**{"sites": (SITE,), **settings})  # type: ignore[arg-type]


def test_unknown_settings_are_named() -> None:
    with pytest.raises(RecipeError, match="no setting 'lr'; there are sites, kind"):
        TrainingConfig.of({"sites": [SITE], "lr": 0.1})
    with pytest.raises(RecipeError, match="no site was given"):
        TrainingConfig.of({})


def test_schedules() -> None:
    total = 20
    cosine, linear, constant = (
        [rate_factor(kind, step, total, 0.2) for step in range(total)]  # type: ignore[arg-type]
        for kind in ("cosine", "linear", "constant")
    )
    for values in (cosine, linear, constant):
        assert 0 < values[0] < values[1] < values[3] < values[4] == 1.0  # the warm-up, and never a step of rate 0
    assert constant[4:] == [1.0] * 16
    assert linear[12] == pytest.approx(0.5) and cosine[12] == pytest.approx(0.5)
    assert cosine[5] > linear[5] and cosine[-1] < linear[-1] < 0.1
    assert rate_factor("linear", 0, 1, 0.0) == 1.0


def test_messages_are_encoded_with_the_token_that_ends_them(engine: Engine) -> None:
    turns = (Message(role="user", content="what do you see ?"), Message(role="assistant", content="the fox slept ."))
    made = Encoder(tokenizer=engine.tokenizer, closing=True)(Example(messages=turns, label="pos", question="q"))
    assert made.num_targets == 5
