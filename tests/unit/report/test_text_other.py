from __future__ import annotations

import dataclasses

from tests.unit.report.factory import SWEEP
from trimtab.report import render_text
from trimtab.results import (
    DecodeComparison,
    DecodeStep,
    DoctorReport,
    DoseSummary,
    Finding,
    GeneratedText,
    GenerationRun,
)

STEP = DecodeStep(
    step=0,
    position=9,
    reference_token=" fox",
    token=" fox",
    same_token=True,
    reference_margin=0.25,
    max_abs_before=0.1,
    mean_abs_before=0.02,
    rmse_before=0.03,
    max_abs_after=0.2,
    mean_abs_after=0.04,
    rmse_after=0.05,
    rel_l2_after=float("inf"),
    max_ulp_after=None,
    cap_delta=-1.5,
    reference_cap_delta=-1.25,
    clamped=True,
    reference_clamped=True,
    delta_top_logprob=-0.001,
    max_delta_logprob=0.002,
    shared_top=4,
    num_top=5,
)


def row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_step_table_shows_each_step_once() -> None:
    other = dataclasses.replace(STEP, step=1, token=" dog", same_token=False, clamped=False)
    text = render_text(
        DecodeComparison(
            passed=False,
            reason="token 1 differs",
            model="testbed",
            prompt="a\x1b[2J",
            site="layers.2.resid_post",
            steering="Cap max 5.0",
            label="bfloat16",
            reference_label="float32",
            text=" fox dog",
            reference_text=" fox fox",
            match_ratio=0.5,
            first_divergence=1,
            steps=(STEP, other),
        ),
        width=160,
    )
    assert text.startswith("Different tokens: token 1 differs")
    assert row(text, "0 ") == [
        "0",
        "9",
        "'",
        "fox'",
        "same",
        "0.25",
        "0.03",
        "0.05",
        "inf",
        "-",
        "-1.5",
        "-1.25",
        "yes",
        "0.002",
        "4/5",
    ]
    assert "reference only" in text
    assert "' dog'" in text
    assert "\x1b" not in text


def test_generation_shows_text_and_dose() -> None:
    dose = DoseSummary(
        site="layers.2.resid_post",
        op="0:Cap",
        rows=7,
        clamped=3,
        mean_projection_before=5.5,
        mean_projection_after=5.0,
        max_ratio=0.1,
    )
    none = dataclasses.replace(dose, rows=0, clamped=0, reason="never matched")
    text = render_text(
        GenerationRun(
            model="testbed",
            backend="hf",
            dtype="float32",
            steering="Cap",
            steering_digest="00",
            texts=(
                GeneratedText(
                    prompt="The fox",
                    text=" ran away",
                    token_ids=(1, 2),
                    prompt_tokens=2,
                    stop="eos",
                    mean_logprob=-1.0,
                    doses=(dose, none),
                ),
            ),
        )
    )
    assert "The fox" in text
    assert " ran away" in text
    assert "2 tokens, stopped by eos" in text
    assert "7 rows, 3 clamped" in text
    assert "no row: never matched" in text


def test_any_other_result_shows_its_fields() -> None:
    text = render_text(SWEEP)
    assert row(text, "bf16") == ["bf16", "hf", "bfloat16", "bfloat16", "done", "partial"]
    assert row(text, "num prompts") == ["num", "prompts", "2"]
    assert row(text, "finished") == ["finished", "no"]


def test_doctor_names_what_mends() -> None:
    text = render_text(
        DoctorReport(
            passed=False,
            findings=(
                Finding(name="torch", state="ok", detail="2.13.0"),
                Finding(name="chromium", state="missing", detail="browser tests", mend="apt-get install chromium"),
            ),
            environment={"python": "3.11"},
        )
    )
    assert text.startswith("Not passed\n")
    assert "apt-get install chromium" in row(text, "chromium")[-1] or "apt-get install chromium" in text
    assert row(text, "python") == ["python", "3.11"]
