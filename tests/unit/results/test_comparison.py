from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from trimtab.results import from_json, schema, to_json
from trimtab.results.comparison import (
    Calibration,
    Comparison,
    Fingerprint,
    FirstDivergence,
    Ledger,
    LedgerEntry,
    LedgerGroup,
    Metrics,
    RecordKey,
    RecordVerdict,
    RowSeries,
    SideCount,
    TokenDivergence,
    summarise,
)

KEY = RecordKey(name="h<b>", layer=2, phase="fwd_bwd", step=3, rank=0)
METRICS = Metrics(
    numel=4, rows=2, mae=0.1, rmse=0.2, max_abs=0.5, max_abs_index=(1, 0), max_abs_reference=2**62,
    max_abs_candidate=2**62 + 1, rel_l2=math.inf, rel_diff=1.0, cosine=math.nan,
    cosine_min=-1.0, slope=1.0, mean_reference=0.0, mean_candidate=0.0,
    nan_reference=0, nan_candidate=1, inf_reference=0, inf_candidate=0, nonfinite_match=False, worst_row=1,
    worst_row_error=math.inf, worst_channel=0, worst_channel_rms=0.3, differing=2,
)  # fmt: skip
CALIBRATION = Calibration(
    expected=1e-3, source="rounding model", dtype="bfloat16", blocks=9, median=5.0, median_limit=4.0,
    worst=9.0, worst_limit=11.0, slope_deviation=0.1, slope_limit=0.2, mean_deviation=0.0, mean_limit=0.2, element=1.0,
    element_limit=30.0, channel=0.0, channel_limit=10.0, systematic=False, excess=1.25,
)  # fmt: skip
COUNT = SideCount(expected=None, found=3, compared=2, unmatched=1, skipped=0, corrupt=0)


def comparison(**changes: object) -> Comparison:
    failed = RecordVerdict(
        key=KEY,
        status="failed",
        order=4,
        reasons=("too far",),
        metrics=METRICS,
        calibration=CALIBRATION,
        fingerprints=(Fingerprint(kind="scale", detail="twice", explained=1.0, value=2.0),),
        series=RowSeries(positions=(0, 1), error=(0.0, math.inf), norm=(1.0, 0.0)),
    )
    same = RecordVerdict(key=dataclasses.replace(KEY, name="ids"), status="identical", order=0)
    ledger = Ledger(
        unit="records",
        expectation="nobody said what to expect",
        reference=COUNT,
        candidate=COUNT,
        groups=(LedgerGroup(axis="step", value="3", reference=COUNT, candidate=COUNT),),
        entries=(LedgerEntry(side="reference", kind="unmatched", name="g", count=1, reason="absent", waived_by="g"),),
    )
    first = FirstDivergence(
        key=KEY, status="failed", order=4, position=None, index=(1, 0), reference=2**62, candidate=2**62 + 1,
        row_error=math.inf, noise_ratio=None, reason="too far",
    )  # fmt: skip
    base = Comparison(
        passed=False,
        reason="1 of 2 pairs do not pass",
        reference="a",
        candidate="b",
        verdict="calibrated",
        plan=("line",),
        ledger=ledger,
        records=(same, failed),
        first_divergence=first,
        token_divergences=(
            TokenDivergence(config="", prompt=0, request="r", position=7, reference_id=1, candidate_id=None),
        ),
        warnings=("careful",),
        waivers=("g",),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_json_round_trip_keeps_integers_and_non_finite_numbers() -> None:
    whole = comparison()
    text = to_json(whole)
    again = from_json(Comparison, text)
    assert to_json(again) == text
    assert again.first_divergence is not None and again.first_divergence.candidate == 2**62 + 1
    assert again.records[1].metrics is not None and again.records[1].metrics.rel_l2 == math.inf
    assert math.isnan(again.records[1].metrics.cosine)
    assert schema(Comparison)["type"] == "object"


def test_counts_exit_code_and_failing() -> None:
    whole = comparison()
    assert whole.counts == {"identical": 1, "passed": 0, "inconclusive": 0, "failed": 1, "corrupt": 0}
    assert whole.exit_code == 1 and comparison(passed=True).exit_code == 0
    assert [record.key.name for record in whole.failing()] == ["h<b>"]
    assert whole.ledger.complete
    short = dataclasses.replace(whole.ledger.entries[0], waived_by=None)
    assert not dataclasses.replace(whole.ledger, entries=(short,)).complete


def test_the_summary_says_what_matters() -> None:
    text = summarise(comparison())
    for part in (
        "FAILED: 1 of 2 pairs do not pass",
        "1 identical, 1 failed",
        "expected unknown, found 3, compared 2, unmatched 1",
        "first divergence: h<b> layer=2 phase=fwd_bwd step=3 rank=0 at [1, 0]",
        "tokens diverge: prompt 0 request r at position 7 (1 against None)",
        "[scale: twice]",
        "[waived by 'g']",
        "warning: careful",
    ):
        assert part in text
    assert summarise(comparison(passed=True)).startswith("PASSED")


def test_long_summaries_are_cut_and_counted() -> None:
    many = comparison(records=comparison().records[1:] * 30)
    assert summarise(many, limit=3).count("failed h<b>") == 3
    assert "... 27 more pairs" in summarise(many, limit=3)


def test_html_is_escaped() -> None:
    page = comparison()._repr_html_()
    assert "h&lt;b&gt;" in page and "<b>" not in page


def test_the_frame_has_one_row_per_pair() -> None:
    frame = comparison().to_frame()
    assert frame["status"].to_list() == ["identical", "failed"]
    assert frame["rel_l2"].to_list() == [0.0, math.inf]
    assert frame["noise_ratio"].to_list() == [0.0, 5.0]
    assert frame["fingerprints"].to_list() == [[], ["scale"]]
    assert comparison(records=()).to_frame().height == 0


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (RecordKey(name="h"), "h phase= step=0"),
        (RecordKey(site="layers.1.q", layer=1, prompt=2, request="r", edit="after"),
         "layers.1.q prompt=2 request=r edit=after"),
        (RecordKey(name="w", kind="grad", phase="p", step=1, micro_step=2, rank=3, call_index=4, recompute=True,
                   occurrence=1),
         "w phase=p step=1 micro_step=2 rank=3 kind=grad call=4 recompute occurrence=1"),
    ],
)  # fmt: skip
def test_keys_name_their_record(key: RecordKey, text: str) -> None:
    assert key.text == text


def test_reading_a_result_needs_no_torch() -> None:
    code = "import sys; import trimtab.results.comparison; assert not {'torch', 'polars'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
