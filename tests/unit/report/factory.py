"""A fixed synthetic analysis: the same numbers on every machine, without any model."""

from __future__ import annotations

import dataclasses
import math
import random

from trimtab.results import (
    Analysis,
    AnalysisLedger,
    CapStep,
    ConfigRow,
    DriftCell,
    LogprobStep,
    PromptInfo,
    Recommendation,
    SweepConfigState,
    SweepRun,
    TokenAgreement,
)

TEXT = (
    "the keeper and her fox went down to a quiet harbour where lamps were lit , then one small boat turned into "
    "wind while rain fell on roofs of slate and every window held some light until morning came again ."
)
WORDS = TEXT.split(" ")
PROMPTS = (
    "Tell me a cheerful story about a keeper who finds a fox.",
    "Describe the harbour in winter.",
    "What changed after the storm? Answer in two sentences.",
    "user: Who lit the lamps?\nassistant:",
)
CONFIGS = ("float32", "bf16", "bf16_cap_fp32", "float16")
SITE = "layers.3.resid_post"
NUM_LAYERS = 6
STEPS = 40
SCALE = {"float32": 0.0, "bf16": 5e-3, "bf16_cap_fp32": 4.6e-3, "float16": 6.5e-4}
DIVERGES = {("bf16", 0): 17, ("bf16", 2): 29, ("bf16_cap_fp32", 0): 23, ("bf16", 3): 8, ("bf16_cap_fp32", 3): 8}

SWEEP = SweepRun(
    path="runs/one",
    model="testbed",
    reference="float32",
    steering="Cap",
    steering_digest="00ff",
    num_prompts=2,
    max_tokens=8,
    configs=(
        SweepConfigState(
            label="bf16", backend="hf", model_dtype="bfloat16", op_math="bfloat16", free="done", forced="partial"
        ),
    ),
    finished=False,
)


def token(index: int) -> str:
    """The text of token id `index`."""
    return (" " if index else "") + WORDS[index % len(WORDS)]


def margin(prompt: int, step: int) -> float:
    """The reference's top-1 minus top-2 log-probability: small where a candidate diverges."""
    if any(where == step and key[1] == prompt for key, where in DIVERGES.items()):
        return 0.004 + 0.002 * prompt
    return round(0.15 + 2.4 * abs(math.sin(1.7 * step + prompt)), 6)


def agreement(config: str, prompt: int) -> TokenAgreement:
    """Free-running tokens that part ways at the planned step."""
    start = 3 * prompt
    reference = tuple((start + step) % len(WORDS) for step in range(STEPS))
    where = DIVERGES.get((config, prompt))
    ids = reference
    if where is not None:
        tail = tuple((7 * token_id + 5) % len(WORDS) for token_id in reference[where:])
        ids = reference[:where] + tail[: len(tail) - (2 if config == "bf16" else 0)]
    matches = sum(a == b for a, b in zip(reference, ids, strict=False))
    ratio = matches / STEPS
    last = where if where is not None else STEPS - 1
    return TokenAgreement(
        config=config,
        prompt=prompt,
        reference_tokens=tuple(map(token, reference)),
        tokens=tuple(map(token, ids)),
        reference_ids=reference,
        ids=ids,
        match_ratio=ratio,
        first_divergence=where,
        length_delta=len(ids) - len(reference),
        significant_drift=ratio < 0.9,
        reference_margin=None if where is None else margin(prompt, where),
        smallest_margin=min(margin(prompt, step) for step in range(last + 1)),
        drift_before=None if where is None else round(SCALE[config] * (1.4 + 2.3 * prompt), 6),
        explanation=(
            "All tokens are equal."
            if where is None
            else f"The reference's two best tokens were {margin(prompt, where):.3g} nats apart at step {where}, less "
            f"than the candidate's log-probability error there: a near tie was broken the other way."
        ),
    )


def drift_cells() -> tuple[DriftCell, ...]:
    """Drift that grows with the layer and jumps where the cap acts; layer 0 of one row is exactly equal."""
    rng = random.Random(7)
    cells = []
    for config in CONFIGS[1:]:
        for prompt in range(len(PROMPTS)):
            for step in range(STEPS):
                for layer in range(NUM_LAYERS):
                    growth = math.sqrt(1 + 2 * layer) * (1.8 if layer >= 3 and config == "bf16" else 1.0)
                    rel = SCALE[config] * growth * math.exp(0.35 * rng.gauss(0, 1)) * (1 + step / STEPS)
                    rel = 0.0 if (layer, step % 9) == (0, 4) else rel
                    rel = math.inf if (config, prompt, step, layer) == ("float16", 2, 31, 5) else rel
                    mae = rel * (1.6 + 0.25 * layer)
                    cells.append(
                        DriftCell(
                            config=config,
                            prompt=prompt,
                            step=step,
                            position=12 + step,
                            layer=layer,
                            mae=round(mae, 9),
                            band="<0.01" if mae < 0.01 else "0.01-0.1" if mae < 0.1 else "0.1-1" if mae <= 1 else ">1",
                            rmse=round(rel * 2.7, 9),
                            rel_l2=round(rel, 9),
                            cosine=math.nan if math.isinf(rel) else round(1 - rel * rel / 2, 12),
                            max_ulp=None if math.isinf(rel) else round(rel * 900),
                        )
                    )
    return tuple(cells)


def cap_steps() -> tuple[CapStep, ...]:
    """A cap at 5.0 that clamps about half of the rows."""
    steps = []
    for config in CONFIGS:
        for prompt in range(len(PROMPTS)):
            for step in range(STEPS):
                clean = 5.0 + 1.6 * math.sin(0.45 * step + prompt)
                before = round(clean * (1 + 4 * SCALE[config] * math.cos(5 * step)), 6)
                delta = round(min(before, 5.0) - before, 6)
                steps.append(
                    CapStep(
                        config=config,
                        prompt=prompt,
                        step=step,
                        site=SITE,
                        op="0:Cap",
                        projection_before=before,
                        projection_after=min(before, 5.0),
                        cap_delta=delta,
                        cap_delta_norm=abs(delta),
                        clamped=delta != 0,
                        reference_cap_delta=round(min(clean, 5.0) - clean, 6),
                    )
                )
    return tuple(steps)


def logprob_steps() -> tuple[LogprobStep, ...]:
    """Top-5 differences that grow with the config's precision error."""
    rng = random.Random(11)
    steps = []
    for config in CONFIGS[1:]:
        for prompt in range(len(PROMPTS)):
            for step in range(STEPS):
                size = SCALE[config] * 6 * math.exp(0.5 * rng.gauss(0, 1))
                flips = DIVERGES.get((config, prompt)) == step
                size = max(size, 0.02) if flips else min(size, 0.12)
                steps.append(
                    LogprobStep(
                        config=config,
                        prompt=prompt,
                        step=step,
                        reference_top=token(3 * prompt + step),
                        top=token(3 * prompt + step + (2 if flips else 0)),
                        same_top=not flips,
                        shared=5 if size < 0.05 else 4,
                        num_top=5,
                        delta_top=round(-size / 2, 6),
                        max_delta=round(size, 6),
                        reference_margin=margin(prompt, step),
                    )
                )
    return tuple(steps)


def config_row(label: str, agreements: tuple[TokenAgreement, ...], cells: tuple[DriftCell, ...]) -> ConfigRow:
    """Sum one configuration over its prompts."""
    mine = [item for item in agreements if item.config == label]
    finite = [cell for cell in cells if cell.config == label and math.isfinite(cell.rel_l2)]
    own = [cell for cell in cells if cell.config == label]
    reference = label == "float32"
    ratio = 1.0 if reference else sum(item.match_ratio for item in mine) / len(mine)
    where = [item.first_divergence for item in mine if item.first_divergence is not None]
    return ConfigRow(
        label=label,
        backend="hf",
        model_dtype={"bf16": "bfloat16", "bf16_cap_fp32": "bfloat16"}.get(label, label),
        op_math={"bf16": "bfloat16", "float16": "float16"}.get(label, "float32"),
        is_reference=reference,
        num_prompts=len(PROMPTS),
        identical_prompts=len(PROMPTS) - len(where),
        match_ratio=ratio,
        significant_drift=ratio < 0.9,
        first_divergence=min(where, default=None),
        rel_l2_mean=None if reference else sum(cell.rel_l2 for cell in finite) / len(finite),
        rel_l2_max=None if reference else max(cell.rel_l2 for cell in own),
        mae_mean=None if reference else sum(cell.mae for cell in finite) / len(finite),
        mae_max=None if reference else max(cell.mae for cell in own),
        clamp_rate=0.525,
        cap_delta_rms=0.6713,
        tokens_per_second={"float32": 212.4, "bf16": 148.1, "bf16_cap_fp32": 141.9, "float16": 97.3}[label],
    )


def analysis() -> Analysis:
    """The whole document."""
    pairs = tuple(agreement(config, prompt) for config in CONFIGS[1:] for prompt in range(len(PROMPTS)))
    cells = drift_cells()
    return Analysis(
        passed=True,
        reason="every expected row was compared",
        title="Precision sweep",
        model="testbed",
        run="runs/demo",
        steering=f"Cap at {SITE}, max 5.0, positions generated",
        steering_digest="3f1b9d2c" * 8,
        reference="float32",
        configs=tuple(config_row(label, pairs, cells) for label in CONFIGS),
        prompts=tuple(PromptInfo(index=i, text=text, num_tokens=len(text) // 4) for i, text in enumerate(PROMPTS)),
        agreements=pairs,
        drift=cells,
        cap_steps=cap_steps(),
        logprobs=logprob_steps(),
        recommendation=Recommendation(
            sentence=(
                "bf16 does not generate the same tokens as float32 here, and doing only the cap's arithmetic in "
                "fp32 makes no measurable difference: run the reference in float32 where tokens must be equal."
            ),
            question="Would doing only the cap's arithmetic in fp32 have helped?",
            metric="match_ratio",
            baseline="bf16",
            alternative="bf16_cap_fp32",
            estimate=0.09375,
            low=-0.0125,
            high=0.2,
            confidence=0.95,
            num_pairs=4,
            measurable=False,
        ),
        ledger=AnalysisLedger(
            expected_rows=len(cells), compared_rows=len(cells), expected_prompts=4, compared_prompts=4
        ),
        num_layers=NUM_LAYERS,
        command="trimtab sweep --model testbed --layer 3 --cap 5.0 --vector random:7 --max-tokens 40 --run-id demo",
        environment={
            "trimtab": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "platform": "Linux x86_64",
            "device": "cpu",
            "seed": "0",
        },
        created="2026-01-02T03:04:05Z",
        next_command='trimtab debug-decode --prompt "Who lit the lamps?" --layer 3 --cap 5.0 --vector random:7',
    )


def bare() -> Analysis:
    """The smallest document: a reference alone, nothing compared, no ops, no recommendation."""
    whole = analysis()
    row = dataclasses.replace(whole.configs[0], clamp_rate=None, cap_delta_rms=None, tokens_per_second=None)
    return dataclasses.replace(
        whole,
        passed=False,
        reason="nothing was compared: the run holds only its reference",
        configs=(row,),
        agreements=(),
        drift=(),
        cap_steps=(),
        logprobs=(),
        recommendation=None,
        steering="none",
        steering_digest="",
        ledger=AnalysisLedger(
            expected_rows=100,
            compared_rows=0,
            expected_prompts=4,
            compared_prompts=0,
            problems=("config bf16: not finished",),
        ),
        environment={},
        command="",
        next_command="",
    )


def small() -> Analysis:
    """Two prompts, six steps, two layers: what the gold files hold."""
    whole = analysis()
    prompts = (1, 3)
    pairs = tuple(item for item in whole.agreements if item.prompt in prompts)
    cells = tuple(cell for cell in whole.drift if cell.prompt in prompts and cell.step < 6 and cell.layer < 2)
    return dataclasses.replace(
        whole,
        configs=tuple(
            dataclasses.replace(config_row(row.label, pairs, cells), num_prompts=2, identical_prompts=identical)
            for row, identical in zip(whole.configs, (2, 1, 1, 2), strict=True)
        ),
        prompts=tuple(item for item in whole.prompts if item.index in prompts),
        agreements=pairs,
        drift=cells,
        cap_steps=tuple(item for item in whole.cap_steps if item.prompt in prompts and item.step < 6),
        logprobs=tuple(item for item in whole.logprobs if item.prompt in prompts and item.step < 6),
        ledger=AnalysisLedger(
            expected_rows=len(cells), compared_rows=len(cells), expected_prompts=2, compared_prompts=2
        ),
        num_layers=2,
    )
