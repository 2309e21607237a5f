"""A fixed synthetic comparison of two generation traces: fails at layer 3, one site missing, one corrupt pair."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from trimtab.results import (
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
    SideCount,
    TokenDivergence,
)

PROMPTS = 3
LAYERS = 8


def metrics(error: float, *, nan: int = 0) -> Metrics:
    """A pair of [12, 64] whose relative error is `error`."""
    return Metrics(
        numel=768,
        rows=12,
        mae=round(0.7 * error, 9),
        rmse=round(1.1 * error, 9),
        max_abs=round(6 * error, 9),
        max_abs_index=(4, 17),
        max_abs_reference=1.25,
        max_abs_candidate=round(1.25 + 6 * error, 9),
        rel_l2=error,
        rel_diff=round(error**2 / 2, 12),
        cosine=round(1 - error**2 / 2, 9),
        cosine_min=math.nan if nan else round(1 - error**2, 9),
        slope=round(1 + error / 10, 9),
        mean_reference=0.01,
        mean_candidate=0.011,
        nan_reference=0,
        nan_candidate=nan,
        inf_reference=0,
        inf_candidate=0,
        nonfinite_match=nan == 0,
        worst_row=4,
        worst_row_error=round(2 * error, 9),
        worst_channel=17,
        worst_channel_rms=round(3 * error, 9),
    )


def calibration(ratio: float) -> Calibration:
    """A verdict whose median noise ratio is `ratio`; the other deviations are nil."""
    nil: dict[str, Any] = {one.name: 0.0 for one in dataclasses.fields(Calibration)}
    return Calibration(
        **nil
        | {
            "expected": 0.0021,
            "source": "rounding model",
            "dtype": "bfloat16",
            "blocks": 3,
            "median": ratio,
            "median_limit": 4.0,
            "worst": round(1.7 * ratio, 6),
            "worst_limit": 8.9,
            "systematic": ratio > 8,
            "excess": round(ratio / 4, 6),
        }
    )


def key(prompt: int, layer: int) -> RecordKey:
    """The identity of one request's rows at one layer."""
    return RecordKey(
        site=f"layers.{layer}.resid_post", layer=layer, phase="inference", prompt=prompt, request=f"p{prompt}"
    )


def record(prompt: int, layer: int) -> RecordVerdict:
    """Prompt 1 goes wrong at layer 3 and stays wrong; the rest is rounding."""
    order = prompt * LAYERS + layer
    common = {
        "key": key(prompt, layer),
        "order": order,
        "dtype_reference": "float32",
        "dtype_candidate": "bfloat16",
        "shape_reference": (12, 64),
        "shape_candidate": (12, 64),
        "rows": 12,
    }
    if (prompt, layer) == (2, 0):
        return RecordVerdict(**common, status="identical")
    if (prompt, layer) == (2, 7):
        return RecordVerdict(**common, status="corrupt", reasons=("candidate bytes do not match their digest",))
    if (prompt, layer) == (2, 5):
        return RecordVerdict(
            **common,
            status="inconclusive",
            metrics=metrics(0.0155),
            calibration=calibration(5.1),
            reasons=("median noise ratio 5.1 is over 4",),
            max_ulp=19,
            waived_by="layers.5.*",
        )
    if prompt == 1 and layer >= 3:
        ratio = 38.0 + layer
        return RecordVerdict(
            **common,
            status="failed",
            metrics=metrics(round(0.08 + 0.03 * (layer - 3), 6), nan=int(layer == 6)),
            calibration=calibration(ratio),
            reasons=(f"median noise ratio {ratio:g} is over 4", "systematic: slope 1.018"),
            max_ulp=411,
            quantiles=(0.01, 0.03, 0.08, 0.3),
            fingerprints=(
                Fingerprint(kind="scale", detail="candidate = 1.018 * reference", explained=0.973, value=1.018),
            )
            if layer == 3
            else (),
        )
    return RecordVerdict(
        **common,
        status="passed",
        metrics=metrics(round(0.002 * math.sqrt(1 + 2 * layer) * (1 + 0.1 * prompt), 9)),
        calibration=calibration(round(0.8 + 0.1 * layer, 6)),
    )


def side(expected: int | None, found: int, compared: int, *, unmatched: int = 0, corrupt: int = 0) -> SideCount:
    """Counts of one side."""
    return SideCount(expected=expected, found=found, compared=compared, unmatched=unmatched, skipped=0, corrupt=corrupt)


def comparison() -> Comparison:
    """The whole document."""
    records = tuple(record(prompt, layer) for prompt in range(PROMPTS) for layer in range(LAYERS))
    return Comparison(
        passed=False,
        reason="5 pairs fail, the first at layers.3.resid_post prompt=1; 12 rows are missing and 12 are corrupt",
        reference="runs/ref",
        candidate="runs/cand",
        verdict="calibrated on the rounding model",
        plan=(
            "match rows by (prompt, request, site, edit, position)",
            "24 pairs in 8 sites; judge each by calibrated rounding",
        ),
        ledger=Ledger(
            unit="rows",
            expectation="expected from the plan of the reference",
            reference=side(300, 300, 276, unmatched=12, corrupt=12),
            candidate=side(300, 288, 276, corrupt=12),
            groups=(
                LedgerGroup(
                    axis="site", value="layers.2.resid_post", reference=side(36, 36, 36), candidate=side(36, 36, 36)
                ),
                LedgerGroup(
                    axis="site",
                    value="layers.7.resid_post",
                    reference=side(36, 36, 24, corrupt=12),
                    candidate=side(36, 36, 24, corrupt=12),
                ),
            ),
            entries=(
                LedgerEntry(
                    side="candidate",
                    kind="missing",
                    name="final_norm prompt=0 request=p0",
                    count=12,
                    reason="the candidate recorded nothing at final_norm",
                ),
                LedgerEntry(
                    side="both",
                    kind="inconclusive",
                    name="layers.5.resid_post prompt=2 request=p2",
                    count=12,
                    reason="between passed and failed",
                    waived_by="layers.5.*",
                ),
            ),
        ),
        records=records,
        first_divergence=FirstDivergence(
            key=key(1, 3),
            status="failed",
            order=11,
            position=9,
            index=(17,),
            reference=1.25,
            candidate=1.73,
            row_error=0.0871,
            noise_ratio=41.5,
            reason="row error is 41.5 times what rounding explains",
        ),
        token_divergences=(
            TokenDivergence(config="", prompt=1, request="p1", position=14, reference_id=31, candidate_id=None),
        ),
        warnings=("NaN at the same places on both sides: layers.1.resid_post",),
        waivers=("layers.5.*",),
    )
