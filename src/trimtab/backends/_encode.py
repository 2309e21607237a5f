"""Prompts to token ids, and the spans of chat messages from the token offsets of the rendered template.

The template is rendered twice, once as it is and once with every content replaced by a sentinel. The second rendering
gives the template's own pieces, which must surround the contents in the first; token offsets of the first then give
the spans. Rendering prefixes of the conversation instead would be wrong for templates that treat the last turn apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.backends._item import check_ids
from trimtab.backends.base import EncodedPrompt, Message, Prompt, RoleSpan
from trimtab.errors import InputError, PrerequisiteError


def encode(
    tokenizer: Any,
    prompt: Prompt,
    vocabulary: int,
    *,
    template_options: dict[str, Any] | None = None,
    missing: str = "",
) -> EncodedPrompt:
    """Turn a prompt into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer; None for prompts that are token ids.
        prompt: text (special tokens are added as the tokenizer does, never twice), token ids (taken as they are), or
            messages (rendered by the chat template; an assistant message at the end is continued).
        vocabulary: how many token ids the model has.
        template_options: more variables of the chat template, such as `enable_thinking`.
        missing: why there is no tokenizer, and what to do; "": none was given.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, no chat template, or messages that it refuses.
        PrerequisiteError: text was given and there is no tokenizer.
    """
    if isinstance(prompt, tuple) and prompt and not isinstance(prompt[0], Message):
        return _from_ids(tokenizer, prompt, vocabulary)
    if tokenizer is None:
        why = f": {missing}, " if missing else "; "
        raise PrerequisiteError(
            f"the prompt is text and the model has no tokenizer{why}give token ids, or pass tokenizer="
        )
    if isinstance(prompt, str):
        encoded = EncodedPrompt(ids=_text_ids(tokenizer, prompt), text=prompt)
    else:
        encoded = _from_messages(tokenizer, prompt, template_options or {})
    if not encoded.ids:
        raise InputError(f"the prompt {encoded.text!r} has no tokens; at least one token was expected")
    check_ids(encoded.ids, vocabulary, "the prompt")
    return encoded


def _from_ids(tokenizer: Any, prompt: Sequence[Any], vocabulary: int) -> EncodedPrompt:
    wrong = [one for one in prompt if isinstance(one, bool) or not isinstance(one, int) or one < 0]
    if wrong:
        raise InputError(f"the prompt holds {wrong[0]!r}; token ids of at least 0, or Messages alone, were expected")
    check_ids(prompt, vocabulary, "the prompt")
    text = "" if tokenizer is None else tokenizer.decode(list(prompt))
    return EncodedPrompt(ids=tuple(prompt), text=text)


def _text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    begins = getattr(tokenizer, "bos_token", None)
    special = not (begins and text.startswith(begins))  # a text with its own BOS must not get a second one
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def _from_messages(tokenizer: Any, messages: Sequence[Any], options: dict[str, Any]) -> EncodedPrompt:
    for index, message in enumerate(messages):
        if not isinstance(message, Message) or not message.role:
            raise InputError(f"message {index} is {message!r}; a Message with a role and a content was expected")
    text = _render(tokenizer, [message.content for message in messages], messages, options)
    # the template writes its special tokens itself: none may be added
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=getattr(tokenizer, "is_fast", False))
    ids = tuple(tokens["input_ids"])
    places = _locate(tokenizer, text, messages, options) if "offset_mapping" in tokens else [None] * len(messages)
    spans = []
    for index, (message, place) in enumerate(zip(messages, places, strict=True)):
        if place is None:
            continue
        start, end = _token_span(tokens["offset_mapping"], *place)
        spans.append(
            RoleSpan(role=message.role, message=index, start=start, end=end, char_start=place[0], char_end=place[1])
        )
    missing = tuple(index for index, place in enumerate(places) if place is None)
    return EncodedPrompt(ids=ids, text=text, spans=tuple(spans), unlocated=missing)


def _render(tokenizer: Any, contents: Sequence[str], messages: Sequence[Message], options: dict[str, Any]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template for messages; give the prompt as text or token ids")
    turns = [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)]
    goes_on = messages[-1].role == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on, **options
        )
    except Exception as error:  # jinja raises its own tree for what a template refuses
        roles = ", ".join(message.role for message in messages)
        raise InputError(f"the chat template refuses messages of roles {roles}: {error}") from error
    return str(text)


def _locate(
    tokenizer: Any, text: str, messages: Sequence[Message], options: dict[str, Any]
) -> list[tuple[int, int] | None]:
    """Return the character range of each content in the rendered text; None where it is not verbatim."""
    marks = [f"trimtab{index}mark{index}" for index in range(len(messages))]
    try:
        skeleton = _render(tokenizer, marks, messages, options)
    except InputError:
        return [None] * len(messages)
    order = sorted((skeleton.find(mark), index) for index, mark in enumerate(marks) if mark in skeleton)
    pieces = [(skeleton[: order[0][0]] if order else skeleton)]
    for place, (begin, index) in enumerate(order):
        after = order[place + 1][0] if place + 1 < len(order) else len(skeleton)
        pieces.append(skeleton[begin + len(marks[index]) : after])
    found: list[tuple[int, int] | None] = [None] * len(messages)
    if not text.startswith(pieces[0]):
        return found
    position = len(pieces[0])
    for (_, index), piece in zip(order, pieces[1:], strict=True):
        length = _content_length(text, position, messages[index].content, piece)
        if length is None:
            return found
        found[index] = (position, position + length)
        position += length + len(piece)
    return found


def _content_length(text: str, position: int, content: str, piece: str) -> int | None:
    """Return how many characters of `text` at `position` are the content, as given or with its edges trimmed."""
    for form in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        if text.startswith(form + piece, position):
            return len(form)
    return None


def _token_span(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Return the half-open range of the tokens that overlap the characters [begin, end)."""
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > begin]
    if inside:
        return inside[0], inside[-1] + 1
    after = next((index for index, (a, _) in enumerate(offsets) if a >= end), len(offsets))
    return after, after
