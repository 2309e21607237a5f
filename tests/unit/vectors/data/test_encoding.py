"""Which tokens count, held against transformers' own marks where a template has them, and against a real loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.backends import Message, open_backend
from trimtab.errors import InputError, PrerequisiteError
from trimtab.vectors.data import Encoder, Example

HEAD = "{{ '<s>' }}{% for m in messages %}"
TURN = "{{ '<|' + m['role'] + '|>\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
START, STOP = "{% generation %}", "{% endgeneration %}"
SYSTEM_MOVED = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<s>' }}{% for m in rest %}{{ '<|' + m['role'] + '|>\n' }}{% if loop.first %}{{ first }}{% endif %}"
)


def body(content: str) -> str:
    return (
        "{% if m['role'] == 'assistant' %}"
        + START
        + content
        + STOP
        + "{% else %}"
        + content
        + "{% endif %}{{ '<e>\n' }}"
    )


TEMPLATES = {
    "plain": HEAD + TURN + body("{{ m['content'] }}") + TAIL,
    "trims": HEAD + TURN + body("{{ m['content'] | trim }}") + TAIL,
    "system moved into the first turn": SYSTEM_MOVED + body("{{ m['content'] }}") + TAIL,
    "last turn apart": HEAD
    + TURN
    + "{% if loop.last %}{{ '<think>\n</think>\n' }}{% endif %}"
    + body("{{ m['content'].split('</t>')[-1] }}")
    + TAIL,
}
CONVERSATION = (
    Message(role="system", content="be short"),
    Message(role="user", content="who <|assistant|> are you?"),
    Message(role="assistant", content="<t>hm</t>  a fox\n"),
    Message(role="user", content="a fox\n"),
    Message(role="assistant", content="yes, a fox"),
)


def tokenizer(template: str = "") -> Any:
    """One token a byte, so that every boundary can be told."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<e>")
    made.chat_template = template or None
    return made


def example(messages: tuple[Message, ...] = CONVERSATION) -> Example:
    return Example(messages=messages, label="pos", question="q")


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_without_generation_markers_are_those_with_them(name: str) -> None:
    template = TEMPLATES[name]
    marked = tokenizer(template)
    turns = [{"role": one.role, "content": one.content} for one in CONVERSATION]
    reference = marked.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    bare = tokenizer(template.replace(START, "").replace(STOP, ""))
    assert "generation %}" not in bare.chat_template
    found = Encoder(tokenizer=bare)(example())
    assert list(found.ids) == reference["input_ids"]
    assert list(map(int, found.mask)) == reference["assistant_masks"]


def test_the_closing_token_counts_when_asked_for() -> None:
    words = tokenizer(TEMPLATES["plain"].replace(START, "").replace(STOP, ""))
    bare, closing = Encoder(tokenizer=words)(example()), Encoder(tokenizer=words, closing=True)(example())
    added = [token for token, a, b in zip(bare.ids, bare.mask, closing.mask, strict=True) if a != b]
    assert added == [words.eos_token_id] * 2


def test_counts_are_the_tokens_that_enter_the_loss() -> None:
    """The labels of a causal loss are shifted by one, and cut at the same length: a count without is off."""
    template = TEMPLATES["plain"].replace(START, "").replace(STOP, "").replace("{{ '<s>' }}", "")
    words = tokenizer(template)  # without a beginning token, so that the first token has a mark and no prediction
    for pool, limit in (("assistant", None), ("assistant", 100), ("all", None)):
        one = Encoder(tokenizer=words, pool=pool, max_length=limit, closing=True)(example())  # type: ignore[arg-type]
        labels = torch.tensor(one.ids).where(torch.tensor(one.mask), -100)
        losses = torch.nn.functional.cross_entropy(
            torch.zeros(len(labels) - 1, len(words)), labels[1:], ignore_index=-100, reduction="none"
        )
        assert one.num_targets == int((losses > 0).sum())
        assert len(one.ids) == (limit or len(one.ids))
        assert one.truncated == 0 if limit is None else one.truncated > 0


def test_the_beginning_token_never_counts_among_others() -> None:
    backend = open_backend("hf", "testbed")
    text = Example(text="the fox slept near the river.", label="pos", question="q")
    for pool, marks in (("assistant", 7), ("all", 7), ("last", 1)):
        found = Encoder(tokenizer=backend.tokenizer, pool=pool)(text)  # type: ignore[arg-type]
        assert found.ids[0] == backend.tokenizer.bos_token_id
        assert (found.mask[0], found.num_marked, found.mask[-1]) == (False, marks, True)
    backend.close()


def test_what_cannot_be_marked() -> None:
    drops = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="does not keep message 2 "):
        Encoder(tokenizer=tokenizer(drops))(example())
    with pytest.raises(InputError, match=r"the assistant says nothing in it; .*pool='last'"):
        Encoder(tokenizer=tokenizer(TEMPLATES["plain"]))(example(CONVERSATION[:2]))
    with pytest.raises(InputError, match=r"cut at max_length=10 of \d+ tokens"):
        Encoder(tokenizer=tokenizer(TEMPLATES["plain"]), max_length=10)(example())
    with pytest.raises(InputError, match="no chat template"):
        Encoder(tokenizer=tokenizer())(example())
    with pytest.raises(InputError, match="refuses messages of roles system"):
        Encoder(tokenizer=tokenizer("{{ raise_exception('no') }}"))(example())
    with pytest.raises(PrerequisiteError, match="no tokenizer"):
        Encoder(tokenizer=None)
