from __future__ import annotations

from typing import Any

import pytest

from trimtab.backends import Message
from trimtab.backends._encode import encode
from trimtab.backends.mock import BOS, MockTokenizer
from trimtab.errors import InputError, PrerequisiteError
from trimtab.testing.models import tiny_tokenizer

LAST_APART = (  # a template that treats the last turn apart, as those of reasoning models do
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}now: {% endif %}{{ m['content'] }}<|end|>{% endfor %}"
)
SYSTEM_IN_USER = (  # a template that puts the system message into the first user turn
    "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}"
    "<|{{ m['role'] }}|>{% if loop.first %}{{ system }}\n{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
)


def turns(content: str = "{{ m['content'] }}") -> str:
    asks = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return "{% for m in messages %}<|{{ m['role'] }}|>" + content + "<|end|>{% endfor %}" + asks


def tokenizer(template: str | None) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def messages(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


CONVERSATION = messages(("system", "be kind"), ("user", "hi"), ("assistant", "hi"), ("user", "be kind"))


@pytest.mark.parametrize("template", [turns(), LAST_APART, SYSTEM_IN_USER])
def test_spans_hold_the_content_of_their_message(template: str) -> None:
    words = tokenizer(template)
    encoded = encode(words, CONVERSATION, 128)
    assert [(span.role, span.message) for span in encoded.spans] == [
        (message.role, index) for index, message in enumerate(CONVERSATION)
    ]
    for span, message in zip(encoded.spans, CONVERSATION, strict=True):
        assert encoded.text[span.char_start : span.char_end] == message.content
        assert words.decode(list(encoded.ids[span.start : span.end])) == message.content
    starts = [span.start for span in encoded.spans]
    assert starts == sorted(starts) and encoded.unlocated == ()


def test_trimmed_contents_are_found_and_changed_ones_are_listed() -> None:
    spoken = messages(("user", "  hi  "), ("user", "lo"))
    trimmed = encode(tokenizer(turns("{{ m['content'] | trim }}")), spoken, 128)
    assert [trimmed.text[span.char_start : span.char_end] for span in trimmed.spans] == ["hi", "lo"]
    changed = encode(tokenizer(turns("{{ m['content'] | upper }}")), spoken, 128)
    assert changed.spans == () and changed.unlocated == (0, 1)


def test_template_text_gets_no_second_special_token() -> None:
    words = tokenizer("<bos>" + turns())
    encoded = encode(words, messages(("user", "hi")), 128)
    assert encoded.ids.count(words.bos_token_id) == 1
    mock = MockTokenizer()
    assert encode(mock, "hi", 128).ids == (BOS, ord("h"), ord("i"))
    assert encode(mock, chr(BOS) + "hi", 128).ids == (BOS, ord("h"), ord("i"))


def test_an_assistant_message_at_the_end_is_continued() -> None:
    words = tokenizer(turns())
    asked = encode(words, messages(("user", "hi")), 128)
    answered = encode(words, messages(("user", "hi"), ("assistant", "well")), 128)
    assert asked.text.endswith("<|assistant|>")
    assert answered.text.endswith("<|assistant|>well")
    assert answered.spans[1].end == len(answered.ids)


def test_a_token_that_reaches_over_the_edge_belongs_to_the_span() -> None:
    class Wide(MockTokenizer):
        """Two characters per token."""

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            offsets = [(start, min(start + 2, len(text))) for start in range(0, len(text), 2)]
            return {"input_ids": [ord(text[start]) for start, _ in offsets], "offset_mapping": offsets}

    encoded = encode(Wide(), messages(("user", "abc")), 128)
    (span,) = encoded.spans
    assert (span.char_start, span.char_end) == (7, 10)
    assert (span.start, span.end) == (3, 5)


def test_an_empty_message_has_an_empty_span_in_its_place() -> None:
    encoded = encode(MockTokenizer(), messages(("user", ""), ("user", "x")), 128)
    first, second = encoded.spans
    assert first.start == first.end == first.char_start
    assert encoded.text[second.char_start] == "x"


def test_a_tokenizer_without_offsets_lists_all_messages_as_unlocated() -> None:
    class Slow(MockTokenizer):
        is_fast = False

    encoded = encode(Slow(), messages(("user", "hi")), 128)
    assert encoded.spans == () and encoded.unlocated == (0,)


def test_template_options_reach_the_template() -> None:
    words = tokenizer("{% if loud %}LOUD {% endif %}" + turns())
    turn = messages(("user", "hi"))
    assert encode(words, turn, 128, template_options={"loud": True}).text.startswith("LOUD ")
    assert not encode(words, turn, 128).text.startswith("LOUD ")


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        (messages(("user", "x")), None, "no chat template"),
        (messages(("user", "x")), "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ((Message(role="user", content="x"), "text"), turns(), "message 1 is 'text'"),
        (messages(("", "x")), turns(), "message 0"),
        ((3, "x"), None, "token ids"),
        ((3, True), None, "token ids"),
        ((3, 128), None, "ids 0 to 127"),
    ],
)
def test_prompts_that_cannot_be_encoded_are_refused(prompt: Any, template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(tokenizer(template), prompt, 128)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(PrerequisiteError, match="no tokenizer"):
        encode(None, "text", 128)
    assert encode(None, (3, 4), 128).text == ""
