"""The advice and its evidence, on drift whose answer is known."""

from __future__ import annotations

import random
from dataclasses import replace

from trimtab.results import ConfigRow, DriftCell, Recommendation
from trimtab.workflows._recommend import recommend
from trimtab.workflows.config import SweepConfig

CONFIGS = [SweepConfig.parse(name) for name in ("bf16", "bf16_cap_fp32", "float32")]


def row(label: str) -> ConfigRow:
    return ConfigRow(
        label=label,
        backend="hf",
        model_dtype="bfloat16",
        op_math="float32",
        is_reference=False,
        num_prompts=8,
        identical_prompts=8,
        match_ratio=0.95,
        significant_drift=False,
        first_divergence=None,
        rel_l2_mean=None,
        rel_l2_max=None,
        mae_mean=None,
        mae_max=None,
        clamp_rate=None,
        cap_delta_rms=None,
        tokens_per_second=None,
    )


def cells(label: str, shift: float, noise: float, prompts: int = 8) -> list[DriftCell]:
    rng = random.Random(label)
    return [
        DriftCell(
            config=label,
            prompt=prompt,
            step=step,
            position=step,
            layer=layer,
            mae=0.0,
            band="<0.01",
            rmse=0.0,
            rel_l2=1e-2 + (shift if layer == 1 else 5.0) + noise * rng.uniform(-1, 1),
            cosine=1.0,
            max_ulp=1,
        )
        for prompt in range(prompts)
        for step in range(4)
        for layer in range(2)
    ]


def advice(shift: float, noise: float, prompts: int = 8) -> Recommendation | None:
    drift = cells("bf16", 0.0, noise, prompts) + cells("bf16_cap_fp32", shift, noise, prompts)
    return recommend(CONFIGS, [row("bf16"), row("bf16_cap_fp32")], drift, reference="float32", op="cap")


def test_a_clear_gain_is_recommended() -> None:
    found = advice(-5e-3, 1e-4)
    assert found is not None and found.measurable and found.high < 0
    assert abs(found.estimate + 5e-3) < 2e-4
    assert "the cap's arithmetic in float32 brings it measurably nearer: use bf16_cap_fp32" in found.sentence


def test_a_loss_is_not() -> None:
    found = advice(5e-3, 1e-4)
    assert found is not None and found.measurable and found.low > 0
    assert "takes it measurably further away: stay with bf16" in found.sentence


def test_an_interval_that_holds_zero_is_no_measurable_difference() -> None:
    found = advice(0.0, 1e-3)
    assert found is not None and not found.measurable and found.low <= 0 <= found.high
    assert "no measurable difference" in found.sentence


def test_too_few_prompts_or_no_pair_give_no_advice() -> None:
    assert advice(-5e-3, 1e-4, prompts=2) is None
    assert recommend([CONFIGS[0], CONFIGS[2]], [row("bf16")], cells("bf16", 0.0, 0.0), reference="float32") is None


def test_a_drift_that_is_not_finite_gives_no_advice() -> None:
    drift = cells("bf16", 0.0, 1e-4) + cells("bf16_cap_fp32", 0.0, 1e-4)
    drift[1] = replace(drift[1], rel_l2=float("nan"))
    assert drift[1].layer == 1
    assert recommend(CONFIGS, [row("bf16"), row("bf16_cap_fp32")], drift, reference="float32") is None
