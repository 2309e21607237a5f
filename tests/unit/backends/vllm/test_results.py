"""What an engine leaves is checked before it is returned: rows that must be there, ops that must have acted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.backends import Capture, Request
from trimtab.backends.base import EncodedPrompt
from trimtab.backends.vllm import results
from trimtab.backends.vllm.counts import OpReports
from trimtab.backends.vllm.reports import CapturedRows, Report, passed_by
from trimtab.backends.vllm.results import Job
from trimtab.errors import BackendError, NonFiniteError, NotAppliedError, UnfiredError
from trimtab.sites import Site
from trimtab.steering import Add, Steering

POST, LOGITS = Site.parse("layers.0.resid_post"), Site.parse("logits")
PROMPT, TOKENS = (5, 6, 7), [8, 9, 10]


class Writer:
    """Notes which rows are written."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[int]] = {}

    def write(self, name: str, rows: torch.Tensor, *, edit: str, positions: list[int], **more: Any) -> None:
        assert len(rows) == len(positions)
        self.rows[name, edit] = positions

    def write_dose(self, rows: Any) -> None:
        raise AssertionError("no dose was measured")


def job(
    captured: dict[tuple[Site, str], list[int]], *, counts: tuple[int, int, int, int] | None = None, **report: Any
) -> Job:
    """A request of three tokens that generated three; counts: rows, clamped, non-finite, selected of its one op."""
    steering = None if counts is None else Steering({str(POST): [Add(torch.ones(4))]})
    program = None if steering is None else steering.resolve(num_layers=1, hidden_size=4, sites=[POST])
    request = Request(prompt=PROMPT, max_new_tokens=3, steering=steering)
    made = Job("a", request, EncodedPrompt(ids=PROMPT, text=""), program)
    made.tokens = list(TOKENS)
    did = OpReports((), np.empty((0, 4), dtype=np.int64))
    if counts is not None:
        did = OpReports(((str(POST), "0:add"),), np.array([counts]))
    rows = tuple(
        CapturedRows(site, edit, torch.zeros(len(where), 4), tuple(where), None, 0)
        for (site, edit), where in captured.items()
    )
    digest = None if steering is None else steering.digest
    given = {"label": "l", "request_id": "a", "digest": digest, "prompt_length": 3, "rows": 5, "cached": 0}
    made.report = Report(**(given | {"captured": rows, "ops": did, "problems": passed_by(did)} | report))
    return made


def finish(made: Job, capture: Capture, *sites: Site) -> dict[tuple[str, str], list[int]]:
    writer: Any = Writer()
    results.finish(made, sites, capture, writer, "", False, None)
    found: dict[tuple[str, str], list[int]] = writer.rows
    return found


def test_ops_that_acted_on_fewer_rows_than_they_select_are_named() -> None:
    values = {
        ("layers.0.resid_post", "0:Add"): (3, 0, 0, 3),
        ("layers.0.resid_post", "1:Cap"): (2, -1, 0, 3),
        ("layers.1.attn_raw", "0:Add"): (0, 0, 0, 39),
        ("layers.1.attn_raw", "1:Add"): (5, 0, 0, -1),  # tokens decide
        ("logits", "0:Add"): (2, 0, 0, 7),  # of some rows only there are logits
    }
    assert passed_by(OpReports(tuple(values), np.array(list(values.values())))) == (
        "1:Cap at layers.0.resid_post acted on 2 rows of the 3 that its positions select",
        "0:Add at layers.1.attn_raw acted on 0 rows of the 39 that its positions select",
    )


def test_rows_beyond_the_end_are_left_out() -> None:
    every = Capture(sites=("layers.*.resid_post", "logits"))
    made = job({(POST, "after"): [0, 1, 2, 3, 4, 5], (LOGITS, "after"): [2, 3, 4]})
    assert finish(made, every, POST, LOGITS) == {
        (str(POST), "none"): [0, 1, 2, 3, 4],
        ("logits", "none"): [2, 3, 4],
    }


@pytest.mark.parametrize(
    ("positions", "there", "lacks"),
    [
        ("all", [0, 1, 2, 3], "recorded 4 of 5 rows .*position 4 is missing"),
        ("all", [1, 2, 3, 4], "position 0"),
        ("all", [], "0 of 5 rows"),
        ("generated", [4], "1 of 2 rows .*position 3"),
        ("tokens{6,8}", [3], "position 1"),
        ("tokens{6,8}", [1], "position 3"),
        ("last_prompt", [1], "0 of 1 rows .*position 2"),
    ],
)
def test_a_row_that_was_selected_and_not_recorded_is_an_error(positions: str, there: list[int], lacks: str) -> None:
    made = job({(POST, "after"): there} if there else {})
    with pytest.raises(BackendError, match=rf"request 'a': layers.0.resid_post: .*{lacks}"):
        finish(made, Capture(sites=(str(POST),), positions=positions), POST)


def test_both_states_of_a_steered_site_must_be_there() -> None:
    capture = Capture(sites=(str(POST),), edit=("before", "after"))
    both = {(POST, "before"): [0, 1, 2, 3, 4], (POST, "after"): [0, 1, 2, 3, 4]}
    assert len(finish(job(both, counts=(5, 0, 0, 5)), capture, POST)) == 2
    del both[POST, "before"]
    with pytest.raises(BackendError, match=r"0 of 5 rows \(before\)"):
        finish(job(both, counts=(5, 0, 0, 5)), capture, POST)


def test_logits_of_the_prompt_must_be_there_where_they_were_asked_for() -> None:
    made = job({(LOGITS, "after"): [2, 3, 4]})
    with pytest.raises(BackendError, match="logits: the engine recorded 3 of 5 rows"):
        finish(made, Capture(sites=("logits",), prompt_logits=True), LOGITS)


@pytest.mark.parametrize(
    ("counts", "report", "error"),
    [
        ((3, 0, 0, 3), {"problems": ("a Patch of 2 rows for 3",)}, NotAppliedError),
        ((2, 0, 0, 3), {}, NotAppliedError),
        ((3, 0, 1, 3), {}, NonFiniteError),
        ((0, 0, 0, 0), {}, UnfiredError),
        ((3, 0, 0, 3), {"digest": None}, BackendError),
        ((3, 0, 0, 3), {"digest": "f" * 64}, BackendError),
    ],
)
def test_a_score_is_refused_where_its_steering_did_not_act(
    counts: tuple[int, int, int, int], report: dict[str, Any], error: type[Exception]
) -> None:
    output = SimpleNamespace(
        prompt_logprobs=[None, {6: SimpleNamespace(logprob=-1.0)}, {7: SimpleNamespace(logprob=-2.0)}]
    )
    good, bad = job({}, counts=(3, 0, 0, 3)), job({}, counts=counts, **report)
    for made in (good, bad):
        made.tokens, made.output = [], output
    assert results.score(good).logprobs == (-1.0, -2.0)
    with pytest.raises(error):
        results.score(bad)
