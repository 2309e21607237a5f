"""Examples as the model reads them: token ids, and a mark on every token that counts.

Which tokens an assistant's message became is found without generation markers in the template: the conversation is
rendered again with that message's content replaced, and what both renderings share before and after it is not the
message. So trimming, moved system messages and templates that treat the last turn apart need no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.backends import Message
from trimtab.errors import InputError, PrerequisiteError
from trimtab.vectors.data.examples import Example

Pool = Literal["assistant", "last", "all"]
_MARK = "trimtab0mark0trimtab"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One example in tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """Which tokens count."""
    truncated: int = 0
    """Tokens that were cut off the end."""

    @property
    def num_marked(self) -> int:
        """Tokens that count."""
        return sum(self.mask)

    @property
    def num_targets(self) -> int:
        """Tokens that enter a causal loss: those that count and have a token before them."""
        return sum(self.mask[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        pool: which tokens count. "assistant": what the assistant says, and all of a plain text; "last": the last token;
            "all": every token. The beginning-of-text token never counts among others: its state is the same in every
            text and many times as long.
        closing: whether the special token that ends an assistant's message counts with it (a model learns to stop by
            it; its state says little of what was said).
        max_length: cut after this many tokens; None: never.
        template_options: more variables of the chat template.
    """

    tokenizer: Any
    pool: Pool = "assistant"
    closing: bool = False
    max_length: int | None = None
    template_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise PrerequisiteError("the model has no tokenizer, and contrast data are texts; pass tokenizer=")
        if self.pool not in ("assistant", "last", "all"):
            raise InputError(f"pool={self.pool!r}; expected 'assistant', 'last' or 'all'")

    def __call__(self, example: Example) -> Encoded:
        """Encode one example.

        Raises:
            InputError: the chat template refuses it, or no token of it counts; says why.
        """
        ids, mask = self._text(example.text) if example.text else self._conversation(example)
        whole = len(ids)
        if self.max_length is not None:
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        if self.pool == "last":
            mask = [False] * (len(ids) - 1) + [True] * bool(ids)
        elif self.pool == "all":
            mask = [True] * len(ids)
        if self.pool != "last" and len(ids) > 1 and ids[0] in self._beginnings():
            mask = [False, *mask[1:]]
        if not any(mask):
            raise InputError(self._nothing(example, whole))
        return Encoded(ids=tuple(ids), mask=tuple(mask), truncated=whole - len(ids))

    def _text(self, text: str) -> tuple[list[int], list[bool]]:
        begins = getattr(self.tokenizer, "bos_token", None)
        ids = list(self.tokenizer(text, add_special_tokens=not (begins and text.startswith(begins)))["input_ids"])
        return ids, [True] * len(ids)

    def _beginnings(self) -> set[int]:
        found = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "cls_token_id"))
        return {one for one in found if one is not None}

    def _conversation(self, example: Example) -> tuple[list[int], list[bool]]:
        text = self._render(example.messages)
        if self.pool != "assistant":
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, [True] * len(ids)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("marking what the assistant says needs a fast tokenizer, which knows each token's place")
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
        mask = [False] * len(ids)
        special = set(self.tokenizer.all_special_ids)
        for number, message in enumerate(example.messages):
            if message.role == "assistant" and message.content:
                begin, end = self._place(example.messages, number, text)
                inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > begin]
                after = inside[-1] + 1 if inside else len(ids)
                if self.closing and after < len(ids) and ids[after] in special:
                    inside.append(after)
                for index in inside:
                    mask[index] = True
        return ids, mask

    def _place(self, messages: tuple[Message, ...], number: int, text: str) -> tuple[int, int]:
        """The characters of `text` that message `number` became."""
        other = [*messages]
        other[number] = Message(role=messages[number].role, content=_MARK)
        marked = self._render(tuple(other))
        begin = marked.find(_MARK)
        tail = len(marked) - begin - len(_MARK)
        end = len(text) - tail
        if begin < 0 or end < begin or text[:begin] != marked[:begin] or text[end:] != marked[len(marked) - tail :]:
            raise InputError(
                f"the chat template does not keep message {number} ({messages[number].role}) as it was said, so its "
                "tokens cannot be marked; use pool='last' or pool='all'"
            )
        return begin, end

    def _render(self, messages: tuple[Message, ...]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template for messages; give texts instead")
        turns = [{"role": one.role, "content": one.content} for one in messages]
        asks = messages[-1].role != "assistant"
        options = dict(self.template_options or {})
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks, **options))
        except Exception as error:  # jinja raises its own tree for what a template refuses
            roles = ", ".join(one.role for one in messages)
            raise InputError(f"the chat template refuses messages of roles {roles}: {error}") from error

    def _nothing(self, example: Example, whole: int) -> str:
        what = (
            f"the example {(example.text or example.messages[-1].content)[:40]!r} of question {example.question!r:.60}"
        )
        if self.max_length is not None and whole > self.max_length:
            return f"no token of {what} counts: it was cut at max_length={self.max_length} of {whole} tokens; raise it"
        if example.messages and not any(one.role == "assistant" for one in example.messages):
            return f"no token of {what} counts: the assistant says nothing in it; add responses, or use pool='last'"
        return f"no token of {what} counts: it has {whole} tokens with pool={self.pool!r}"
