"""Contrast data to training data: split by question, encoded, with and without the prompt that is to be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.backends import Message
from trimtab.errors import InputError
from trimtab.vectors.data import ContrastData, Encoder, Example, load, split_fractions, split_tokens
from trimtab.vectors.train.config import TrainingConfig
from trimtab.vectors.train.engine import Engine
from trimtab.vectors.train.sequences import Item, Preference, TokenSequence, TrainingData

_LABEL = "pair"


def prepare(engine: Engine, data: Any, config: TrainingConfig) -> TrainingData:
    """Make training data.

    The likelihood loss reads the positive examples, BiPO pairs of a positive and a negative one. System messages are
    left out, so that the vector has to supply what they said; the prompted model gets them.

    Args:
        engine: the model, for its tokenizer and template.
        data: training data (returned as it is), contrast data, or what `trimtab.vectors.load` reads.
        config: the settings.

    Raises:
        InputError: data that cannot be read, no positive example or pair, or too few questions for the splits.
    """
    if isinstance(data, TrainingData):
        return data
    found = data if isinstance(data, ContrastData) else load(data)
    encoder = Encoder(tokenizer=engine.tokenizer, closing=True)
    if config.loss == "bipo":
        return _preferences(found, encoder, config)
    wanted = tuple(one for one in found.examples if one.label == found.positive)
    if not wanted:
        raise InputError(f"{found.name}: no example has the label {found.positive!r}; labels: {found.counts}")
    parts = _split(replace(found, examples=wanted), encoder, config)
    splits = {name: [_encode(encoder, one) for one in part.examples] for name, part in parts.items()}
    return TrainingData(
        name=found.name,
        train=tuple(splits["train"]),
        validation=tuple(splits.get("validation", ())),
        test=tuple(splits.get("test", ())),
        prompted=_prompted(encoder, parts.get("validation"), config),
    )


def _preferences(found: ContrastData, encoder: Encoder, config: TrainingConfig) -> TrainingData:
    found.require_contrast()
    pairs = found.pairs()
    if not pairs:
        raise InputError(f"{found.name}: no question has a {found.positive!r} and a {found.negative!r} answer to pair")
    parts = _split(replace(found, examples=tuple(chosen for chosen, _ in pairs)), encoder, config)
    partners: dict[int, Example] = {id(chosen): rejected for chosen, rejected in pairs}

    def items(name: str) -> tuple[Item, ...]:
        chosen = parts[name].examples if name in parts else ()
        return tuple(
            Preference(chosen=_encode(encoder, one), rejected=_encode(encoder, partners[id(one)])) for one in chosen
        )

    return TrainingData(
        name=found.name,
        train=items("train"),
        validation=items("validation"),
        test=items("test"),
        prompted=_prompted(encoder, parts.get("validation"), config),
    )


def _split(data: ContrastData, encoder: Encoder, config: TrainingConfig) -> dict[str, ContrastData]:
    budgets = {"validation": config.validation_tokens, "test": config.test_tokens, "train": config.train_tokens}
    if not any(budgets.values()):
        return dict(split_fractions(data, {"train": 0.8, "validation": 0.2}, seed=config.seed).parts)
    asked = {name: budget for name, budget in budgets.items() if budget is not None}
    if config.train_tokens is None:  # what the others leave
        asked["train"] = sum(_count(encoder, one) for one in data.examples)
    return dict(split_tokens(data, asked, lambda one: _count(encoder, one), seed=config.seed).parts)


def _count(encoder: Encoder, example: Example) -> int:
    return _encode(encoder, example).num_targets


def _encode(encoder: Encoder, example: Example, system: Sequence[Message] = ()) -> TokenSequence:
    turns = example.messages
    if turns:
        turns = (*system, *(one for one in turns if one.role != "system"))
    made = encoder(replace(example, messages=turns))
    return TokenSequence(ids=made.ids, targets=(False, *made.mask[1:]), question=example.question)


def _prompted(encoder: Encoder, part: ContrastData | None, config: TrainingConfig) -> tuple[TokenSequence, ...]:
    """The validation under its prompt; nothing where one of its examples has none."""
    found: list[TokenSequence] = []
    for one in () if part is None else part.examples:
        own = tuple(turn for turn in one.messages if turn.role == "system")
        if one.messages and (config.prompt or own):
            system = (Message(role="system", content=config.prompt),) if config.prompt else own
            found.append(_encode(encoder, one, system))
        elif one.text and config.prompt:
            found.append(_begun(encoder, one, config.prompt))
        else:
            return ()
    return tuple(found)


def _begun(encoder: Encoder, example: Example, prompt: str) -> TokenSequence:
    """A plain text after another: the tokens of both, of which those of the text count."""
    first = encoder(Example(text=prompt, label=_LABEL, question=example.question))
    second = encoder(example)
    start = second.mask.index(True)  # what stands before, such as a beginning-of-text token, stays in front
    targets = (False, *second.mask[1:])  # the same as without the prompt, where nothing predicts the first token
    return TokenSequence(
        ids=(*first.ids, *second.ids[start:]),
        targets=(*(False for _ in first.ids), *targets[start:]),
        question=example.question,
    )
