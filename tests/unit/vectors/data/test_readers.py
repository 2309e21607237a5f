"""Reading contrast data: every source, and one line for what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars
import pytest

from trimtab.errors import InputError
from trimtab.vectors.data import ContrastData, Example, load

ROWS: list[dict[str, Any]] = [
    {"text": "good day", "label": "pos", "question": "q1", "score": 80, "role": "baker"},
    {"text": "go away", "label": "neg", "question": "q1", "score": 20, "role": "baker"},
    {"text": "very good", "label": "pos", "question": "q2", "score": 60, "role": "pilot"},
    {"text": "not graded", "label": "pos", "question": "q3", "score": None, "role": "pilot"},
]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_and_parquet_and_rows_give_the_same_data(tmp_path: Path) -> None:
    lines = load(write(tmp_path / "a.jsonl", ROWS))
    polars.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    table, given = load(tmp_path / "a.parquet"), load(ROWS)
    assert lines.examples == table.examples == given.examples
    assert lines.digest == table.digest == given.digest
    assert lines.counts == {"neg": 1, "pos": 3} and lines.questions == ("q1", "q2", "q3")
    assert lines.examples[0].tags == {"role": "baker"}


def test_conversations_have_their_last_question_as_question() -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    data = load([{"messages": turns, "label": "pos"}, {"prompt": "who?", "response": "you", "label": "neg"}])
    assert [one.question for one in data.examples] == ["who?", "who?"]
    assert [turn.content for turn in data.examples[1].messages] == ["who?", "you"]


def test_rows_with_both_sides_are_pairs() -> None:
    data = load([{"positive": "yes", "negative": "no"}, {"positive": "aye", "negative": "nay"}])
    assert [(a.text, b.text) for a, b in data.pairs()] == [("yes", "no"), ("aye", "nay")]


def test_a_text_that_occurs_twice_is_one_question() -> None:
    data = load([{"text": "same", "label": "pos"}, {"text": "same", "label": "neg"}, {"text": "else", "label": "neg"}])
    assert len(data.questions) == 2


def test_columns_by_other_names() -> None:
    data = load(
        [{"body": "a", "kind": "role"}, {"body": "b", "kind": "default"}], columns={"text": "body", "label": "kind"}
    )
    assert data.counts == {"default": 1, "role": 1}


def test_the_testbed_and_concepts() -> None:
    data = load("testbed:animal", n=5, seed=3)
    assert data.counts == {"neg": 5, "pos": 5} and len(data.pairs()) == 5
    words = load("concepts:cat,lion/dog,house")
    assert [(a.text, b.text) for a, b in words.pairs()] == [
        ("What is cat?", "What is dog?"),
        ("What is lion?", "What is house?"),
    ]


def test_persona_instructions_are_asked_every_question(tmp_path: Path) -> None:
    document = {"instruction": [{"pos": "be kind", "neg": "be rude"}, {"pos": "kind!", "neg": "rude!"}]}
    document |= {"questions": ["why?", "how?"], "eval_prompt": "grade {answer}"}
    (tmp_path / "kind.json").write_text(json.dumps(document))
    data = load(tmp_path / "kind.json")
    assert data.counts == {"neg": 4, "pos": 4} and data.questions == ("why?", "how?")
    assert data.about["eval_prompt"] == "grade {answer}"
    assert [turn.role for turn in data.examples[0].messages] == ["system", "user"]
    assert data.select("instruction=1").counts == {"neg": 2, "pos": 2}


def test_selection_by_label_and_score(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    assert [one.text for one in load(f"{path}:label=pos,score>=75").examples] == ["good day"]
    assert [one.text for one in load(f"{path}:score<75").examples] == ["go away", "very good"]
    assert [one.text for one in load(f"{path}:role!=baker").examples] == ["very good", "not graded"]
    found = load(path).select("score>0")
    assert len(found) == 3 and found.about["rejected"] == {"score>0": 1}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("rank>3", "no column 'rank' .*it has: label, question, score, role"),
        ("score>=high", "'high' is not a number"),
        ("label", "'label' is no condition"),
        ("label=none", "none of 4 examples meets 'label=none'"),
    ],
)
def test_selections_that_cannot_be(selection: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(ROWS).select(selection)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"txt": "a", "label": "pos"}], "rows: no column text, .*; it has: txt, label; say which it is"),
        ([{"text": "a", "kind": "pos"}], "rows: no column label, .*; it has: text, kind"),
        ([{"text": "a", "label": "pos"}, {"text": "", "label": "neg"}], "rows row 1: its text is ''"),
        ([{"text": "a", "label": None}], "rows row 0: its label is missing"),
        ([{"text": "a", "label": "pos", "score": "best"}], "rows row 0: its score is 'best'"),
        ([{"messages": "hi", "label": "pos"}], "rows row 0: its messages are 'hi'"),
        ([{"messages": [], "label": "pos"}], "rows row 0: its conversation is empty"),
        ([], "rows has no rows"),
    ],
)
def test_rows_that_cannot_be_read(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(rows)


def test_columns_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="no column 'body' for text; it has: text, label"):
        load([{"text": "a", "label": "pos"}], columns={"text": "body"})
    with pytest.raises(InputError, match="no column of ours is 'txt'"):
        load([{"text": "a", "label": "pos"}], columns={"txt": "text"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 1}\n{oops', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a list stands"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.json", '{"questions": []}', "need the keys instruction and questions; it has: questions"),
        ("a.json", '{"instruction": [3], "questions": []}', "instruction 0 is 3"),
        ("a.csv", "", "is no contrast data"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


def test_missing_files_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="as many after the slash"):
        load("concepts:a,b/c")
    with pytest.raises(InputError, match="anger"):
        load("testbed:anger")


def test_one_label_alone_names_what_exists() -> None:
    data = load([{"text": "a", "label": "role"}, {"text": "b", "label": "default"}])
    with pytest.raises(InputError, match=r"positive label 'pos'.*labels that exist: default \(1\), role \(1\)"):
        data.require_contrast()


def test_an_example_has_one_content() -> None:
    with pytest.raises(InputError, match="neither text nor messages"):
        Example(label="pos", question="q")
    assert len(ContrastData(name="x", examples=()).pairs()) == 0


def test_directories_that_datasets_saved_are_the_same_data(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "split"))
    expected = load(ROWS)
    for found in (load(tmp_path / "rows"), load(tmp_path / "split"), load(table)):
        assert found.examples == expected.examples and found.digest == expected.digest
    chosen = load(f"{tmp_path / 'rows'}:label=pos,score>=75")
    assert [one.text for one in chosen.examples] == ["good day"]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match="holds the splits train, test; give the directory of one of them"):
        load(tmp_path / "two")
    assert load(tmp_path / "two" / "test").digest == expected.digest
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none is no directory that datasets saved"):
        load(tmp_path / "none")
