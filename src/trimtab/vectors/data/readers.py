"""Readers of contrast data: JSONL, Parquet, `datasets`, persona instructions, concept prompts, the testbed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab._base import jsonio
from trimtab._base.optional import require
from trimtab.backends import Message
from trimtab.errors import InputError
from trimtab.vectors.data.examples import ContrastData, Example
from trimtab.vectors.data.selection import split_name

_ALIASES = {
    "text": ("text",),
    "messages": ("messages", "conversation"),
    "prompt": ("prompt",),
    "response": ("response", "completion", "answer"),
    "label": ("label",),
    "question": ("question", "question_index"),
    "score": ("score", "extract_score"),
    "positive": ("positive", "pos", "chosen"),
    "negative": ("negative", "neg", "rejected"),
}
"""What a column may be called when `columns` does not say it; the first that exists is taken."""


def load(
    source: Any,
    *,
    positive: str = "pos",
    negative: str = "neg",
    columns: Mapping[str, str] | None = None,
    n: int = 64,
    seed: int = 0,
) -> ContrastData:
    """Read contrast data.

    Args:
        source: a `.jsonl` or `.parquet` file; a directory that `datasets` saved; a `.json` file of persona
            instructions; `testbed:ATTRIBUTE`; `concepts:cat/dog,house`; each with a selection after a colon, such as
            `rows.jsonl:label=pos,score>=75`. Or ContrastData, a `datasets.Dataset`, or an iterable of mappings.
        positive: label of the examples that a vector points towards.
        negative: label of the examples that it points away from.
        columns: our name -> the source's name of a column. Ours: text, messages, prompt, response, label, question,
            score, positive, negative. A row has text, or messages, or prompt and response, and a label; or it is a
            pair and has positive and negative (texts or messages), and perhaps a prompt.
        n: pairs, for the testbed alone.
        seed: of the testbed's texts.

    Returns:
        The examples. Without a question column a conversation's question is its last user message before the answer,
        a pair's is its row, and a text's is the text itself.

    Raises:
        InputError: no such file, a column is missing, or a row cannot be read; names file, row and what there is.
        PrerequisiteError: the source needs an extra that is not installed.
    """
    if isinstance(source, ContrastData):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return from_rows(source, name="rows", positive=positive, negative=negative, columns=columns)
    name, selection = split_name(os.fspath(source))
    kind, _, rest = name.partition(":")
    if kind == "testbed" and rest:
        data = _testbed(rest, n, seed)
    elif kind == "concepts" and rest:
        data = concept_prompts(rest)
    elif name.endswith(".json"):
        data = _persona(Path(name))
    else:
        data = from_rows(_rows(Path(name)), name=name, positive=positive, negative=negative, columns=columns)
    return data if selection is None else data.select(selection)


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    positive: str = "pos",
    negative: str = "neg",
    columns: Mapping[str, str] | None = None,
) -> ContrastData:
    """Make contrast data of rows; see `load`."""
    listed = list(rows)
    if not listed:
        raise InputError(f"{name} has no rows; at least two examples were expected")
    table = _Columns(name, list(dict.fromkeys(key for row in listed for key in row)), columns or {})
    examples: list[Example] = []
    for number, row in enumerate(listed):
        examples += table.examples(row, number, positive, negative)
    return ContrastData(name=name, examples=tuple(examples), positive=positive, negative=negative)


class _Columns:
    """Which column of a source is which of ours."""

    def __init__(self, name: str, exist: Sequence[str], given: Mapping[str, str]) -> None:
        self.name, self.exist = name, exist
        unknown = sorted(set(given) - set(_ALIASES))
        if unknown:
            raise InputError(f"columns={dict(given)}: no column of ours is {unknown[0]!r}; ours: {', '.join(_ALIASES)}")
        for ours, theirs in given.items():
            if theirs not in exist:
                raise InputError(f"{name}: no column {theirs!r} for {ours}; it has: {', '.join(exist)}")
        found = {ours: next((one for one in names if one in exist), None) for ours, names in _ALIASES.items()}
        self.where = {**found, **given}
        self.paired = self._has("positive") and self._has("negative") and "label" not in given
        content = self._has("messages") or self._has("text") or (self._has("prompt") and self._has("response"))
        if not self.paired and not content:
            raise self._missing("text", "text, messages, prompt and response, or positive and negative")
        if not self.paired and not self._has("label"):
            raise self._missing("label", "label, which says on which side of the contrast a row is")

    def _has(self, ours: str) -> bool:
        return self.where[ours] is not None

    def _missing(self, ours: str, what: str) -> InputError:
        exist = ", ".join(self.exist) or "none"
        return InputError(
            f"{self.name}: no column {what}; it has: {exist}; say which it is with columns={{{ours!r}: ...}}"
        )

    def _get(self, row: Mapping[str, Any], ours: str) -> Any:
        name = self.where[ours]
        return None if name is None else row.get(name)

    def examples(self, row: Mapping[str, Any], number: int, positive: str, negative: str) -> list[Example]:
        where = f"{self.name} row {number}"
        used = {name for name in self.where.values() if name is not None}
        tags = {key: str(value) for key, value in row.items() if key not in used and _is_plain(value)}
        score, asked = self._get(row, "score"), self._get(row, "question")
        if self.paired:
            question = f"row {number}" if asked is None else str(asked)
            sides = ((positive, self._get(row, "positive")), (negative, self._get(row, "negative")))
            contents = [(label, self._join(row, content, where)) for label, content in sides]
        else:
            label = self._get(row, "label")
            if label is None:
                raise InputError(f"{where}: its label is missing; expected {positive!r} or {negative!r}")
            content = self._content(row, where)
            question = _question(content) if asked is None else str(asked)
            contents = [(str(label), content)]
        return [
            Example(
                text=content if isinstance(content, str) else "",
                messages=() if isinstance(content, str) else content,
                label=label,
                question=question,
                score=_score(score, where),
                tags=tags,
            )
            for label, content in contents
        ]

    def _content(self, row: Mapping[str, Any], where: str) -> str | tuple[Message, ...]:
        messages = self._get(row, "messages")
        if messages is not None:
            return _messages(messages, where)
        if self._get(row, "response") is not None:
            return self._join(row, self._get(row, "response"), where)
        text = self._get(row, "text")
        if not isinstance(text, str) or not text:
            raise InputError(f"{where}: its text is {text!r:.60}; a text that is not empty was expected")
        return text

    def _join(self, row: Mapping[str, Any], content: Any, where: str) -> str | tuple[Message, ...]:
        """A response with its prompt as a conversation, and anything else as it is."""
        if content is not None and not isinstance(content, str):
            return _messages(content, where)
        if not content:
            raise InputError(f"{where}: one of its texts is {content!r}; a text that is not empty was expected")
        prompt = self._get(row, "prompt")
        if prompt is None:
            return str(content)
        return (Message(role="user", content=str(prompt)), Message(role="assistant", content=content))


def concept_prompts(concepts: str) -> ContrastData:
    """Return "What is X?" for concepts against others: `cat,lion/dog,house` (before and after the slash).

    The prompts of one place on both sides are a pair; both sides need as many.

    Raises:
        InputError: one side is empty, or they differ in length.
    """
    sides = [[one.strip() for one in side.split(",") if one.strip()] for side in concepts.split("/")]
    if len(sides) != 2 or not sides[0] or len(sides[0]) != len(sides[1]):
        raise InputError(
            f"concepts {concepts!r}: write as many after the slash as before it, such as cat,lion/dog,house"
        )
    examples = [
        Example(text=f"What is {concept}?", label=label, question=f"concept {index}", tags={"concept": concept})
        for label, names in zip(("pos", "neg"), sides, strict=True)
        for index, concept in enumerate(names)
    ]
    return ContrastData(name=f"concepts:{concepts}", examples=tuple(examples))


def _testbed(attribute: str, n: int, seed: int) -> ContrastData:
    from trimtab.testbed import contrast

    found = contrast(attribute, n, seed)
    examples = [
        Example(text=text, label=label, question=f"pair {index}")
        for index, pair in enumerate(zip(found.positive, found.negative, strict=True))
        for label, text in zip(("pos", "neg"), pair, strict=True)
    ]
    return ContrastData(name=f"testbed:{attribute}", examples=tuple(examples), about={"n": n, "seed": seed})


def _persona(path: Path) -> ContrastData:
    """`{instruction: [{pos, neg}], questions, eval_prompt}`: every instruction with every question, unanswered."""
    document = jsonio.loads(_bytes(path), path)
    missing = [key for key in ("instruction", "questions") if key not in document] if isinstance(document, dict) else []
    if not isinstance(document, dict) or missing:
        has = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{path}: persona instructions need the keys instruction and questions; it has: {has}")
    examples = []
    for index, pair in enumerate(document["instruction"]):
        sides = {"pos": pair} if isinstance(pair, str) else pair
        if not isinstance(sides, dict) or not set(sides) <= {"pos", "neg"}:
            raise InputError(
                f"{path}: instruction {index} is {pair!r:.60}; a text, or one for pos and neg, was expected"
            )
        for question in document["questions"]:
            for label, instruction in sides.items():
                turns = (Message(role="system", content=instruction), Message(role="user", content=question))
                tags = {"instruction": str(index)}
                examples.append(Example(messages=turns, label=label, question=question, tags=tags))
    about = {key: value for key, value in document.items() if key not in ("instruction", "questions")}
    return ContrastData(name=path.stem, examples=tuple(examples), about=about)


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.is_dir():
        datasets = require("datasets", extra="data", feature=f"reading the directory {path}")
        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())[:160]
            raise InputError(f"{path} is no directory that datasets saved, or is damaged: {said}") from error
        if hasattr(found, "keys"):
            if list(found) != ["train"]:
                raise InputError(f"{path} holds the splits {', '.join(found)}; give the directory of one of them")
            found = found["train"]
        return list(found)
    if path.suffix == ".parquet":
        import polars

        try:
            return polars.read_parquet(_existing(path)).to_dicts()
        except polars.exceptions.PolarsError as error:
            raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error
    if path.suffix in (".jsonl", ".ndjson"):
        return _lines(path)
    raise InputError(
        f"{str(path)!r} is no contrast data; expected a .jsonl or .parquet file, a directory that datasets saved, a "
        ".json file of persona instructions, testbed:ATTRIBUTE, or concepts:A,B/C,D"
    )


def _lines(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        if line.strip():
            row = jsonio.loads(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a {type(row).__name__} stands where one object a line was expected")
            rows.append(row)
    return rows


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _bytes(path: Path) -> bytes:
    try:
        return _existing(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    try:
        turns = tuple(Message(role=str(one["role"]), content=str(one["content"])) for one in value)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{where}: its messages are {value!r:.60}; a list of {{role, content}} was expected"
        ) from error
    if not turns:
        raise InputError(f"{where}: its conversation is empty; at least one message was expected")
    return turns


def _question(content: str | tuple[Message, ...]) -> str:
    """What is asked; of a text its own digest, so that a text which occurs twice stays in one split."""
    if isinstance(content, str):
        return f"text {hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"
    asked = [turn.content for turn in content if turn.role == "user"]
    return asked[-1] if asked else json.dumps([turn.content for turn in content[:1]])


def _score(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: its score is {value!r:.40}; a number was expected") from error


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))
