"""Results of steering work as a run would leave them, small and complete; `text` is a name that a user chose."""

from __future__ import annotations

from trimtab.results.commits import (
    CommandRun,
    CommitLedger,
    CommitOutcome,
    CommitWalk,
    MetricChange,
    MetricTrack,
    RedFlag,
    RiskReason,
    TraceChange,
)
from trimtab.results.evaluation import (
    DosePoint,
    DoseResponse,
    Evaluation,
    Example,
    ParetoPoint,
    ScoreSummary,
    SideEffects,
    SplitHalf,
)
from trimtab.results.sae import SAECheck, SAERun, SAEWarning, TrainedSAE
from trimtab.results.vectors import ExampleCount, ExtractionReport, SiteEvidence
from trimtab.results.vectors_clean import (
    CleanedSite,
    CleanedVector,
    Cleaning,
    VectorComparison,
    VectorFacts,
    VectorPair,
)

SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)


def steering(text: str = "joy") -> Evaluation:
    """A vector that steers, and two random directions that do not."""
    groups = {text: 0.4, "random-0": 0.02, "random-1": -0.01}
    doses = tuple(
        DoseResponse(
            group=name,
            scorer="testbed:animal",
            unit="token_norm",
            points=tuple(
                DosePoint(scale=at, mean=0.3 + slope * at, low=0.25 + slope * at, high=0.35 + slope * at, count=40)
                for at in SCALES
            ),
            slope=slope,
            slope_low=slope - 0.05,
            slope_high=slope + 0.05,
            spearman=0.8 if name == text else 0.1,
            reason="",
            n=200,
        )
        for name, slope in groups.items()
    )
    variants = ["unsteered", *(f"{text}@{at:+g}" for at in SCALES if at)]
    return Evaluation(
        passed=True,
        reason="every scorer gave values",
        path="runs/joy",
        model="testbed",
        scorers=("testbed:animal",),
        count=200,
        summaries=tuple(
            ScoreSummary(
                variant=name, scorer="testbed:animal", count=40, mean=0.3 + 0.1 * at, std=0.1, low=0.25, high=0.4,
                refusals=0, missing=1, reasons=("an empty output",),
            )
            for at, name in enumerate(variants)
        ),
        effects=tuple(
            SideEffects(
                variant=name, count=40, perplexity=3.0 + at, perplexity_ratio=1 + at / 3, distinct_1=0.5,
                distinct_2=0.8, repetition_4=0.1, loops=0.02, refusal_rate=0.0, coherent=0.9, tokens=24.0, kl=0.2,
                retention=1.01,
            )
            for at, name in enumerate(variants)
        ),
        dose_responses=doses,
        examples=tuple(Example(variant=name, question=text, text=f"{text} and a fox .") for name in variants),
        pareto=tuple(
            ParetoPoint(variant=name, scorer="testbed:animal", effect=0.1 * at, damage=1 + at / 3, efficient=at != 2)
            for at, name in enumerate(variants)
        ),
        split_half=(
            SplitHalf(
                group=text, scorer="testbed:animal", chosen=0.5, stability=0.9, selected=0.2, held_out=0.18, low=0.1,
                high=0.25, splits=20, undecided=0,
            ),
        ),
        warnings=("200 of 240 outputs are there",),
    )  # fmt: skip


def walk(text: str = "Scale the loss") -> CommitWalk:
    """Three commits after a base; the second is bad."""
    return CommitWalk(
        passed=False,
        reason="the first of 2 bad commits is b",
        finished=True,
        mode="walk",
        revisions=f"{'a' * 40}..{'d' * 40}",
        repository="/repo",
        base="a" * 40,
        head="d" * 40,
        directory="runs/commits",
        plan="",
        seed=0,
        first_bad="c" * 40,
        commits=tuple(_commit(place, text) for place in range(4)),
        ledger=CommitLedger(expected=4, tested=4, kept=1),
        rules=("loss: finite",),
        warnings=("one run was kept",),
        next_command="trimtab commits a..d",
    )


def _commit(place: int, text: str) -> CommitOutcome:
    sha, bad = "abcd"[place] * 40, place >= 2
    values = tuple(2.0 / (step + 1) * (3.0 if bad else 1.0) for step in range(12))
    values = (*values[:-1], float("inf")) if place == 3 else values
    return CommitOutcome(
        commit=sha,
        subject=text,
        author="A. Author",
        date="2026-01-02T03:04:05",
        position=place,
        status="flagged" if bad else "passed",
        risk="HIGH" if bad else "LOW",
        risk_source="diff",
        risk_reasons=(RiskReason(risk="HIGH", file="train.py", line=7, what="a reduction changed"),) if bad else (),
        steps=12,
        summary="loss is higher than the base's" if bad else "",
        runs=(
            CommandRun(
                command="main", argv="python train.py", steps=12, seed=0, status="ok", exit_code=0, seconds=2.5,
                detail="", directory="runs/commits/main", trace="", kept=place == 1,
                metrics=(MetricTrack(metric="loss", steps=tuple(range(12)), values=values, count=12),),
            ),
        ),
        flags=(RedFlag(kind="diverged", rule="loss", command="main", text="loss moved by 200 %", metric="loss"),)
        if bad
        else (),
        metric_changes=(
            MetricChange(
                command="main", metric="loss", against="a" * 12, steps=12, max_abs=4.0, max_rel=2.0, at_step=0,
                noise=None,
            ),
        )
        if bad
        else (),
        trace_changes=(
            TraceChange(
                command="main", against="a" * 12, passed=not bad, pairs=100, identical=60, failing=4,
                first="layers.3.mlp_out", reason="",
            ),
        )
        if place
        else (),
    )  # fmt: skip


def vectors(text: str = "joy") -> VectorComparison:
    """Three vectors, all pairs."""
    names = (text, "anger", "calm")
    cosines = {(0, 1): -0.42, (0, 2): 0.61, (1, 2): 0.05}
    return VectorComparison(
        vectors=tuple(
            VectorFacts(
                name=name, path=f"v/{at}.safetensors", method="mean_difference", site="layers.3.resid_post", width=128,
                norm=10.0 + at, median_norm=80.0, validation_loss=1.0 if at else None,
                baseline_loss=1.2 if at else None, prompted_loss=None, digest="0" * 16,
            )
            for at, name in enumerate(names)
        ),
        pairs=tuple(
            VectorPair(a=names[i], b=names[j], cosine=value, z=value * 128**0.5, norm_ratio=1.1, same_site=True)
            for (i, j), value in cosines.items()
        ),
        directory="runs/compare",
    )  # fmt: skip


def extraction(text: str = "testbed:animal") -> ExtractionReport:
    """Two sites, one of them better than its controls."""
    return ExtractionReport(
        path="runs/vectors",
        model="testbed",
        model_digest="xxh3:full:1",
        model_dtype="float32",
        data=text,
        data_digest="xxh3:2",
        method="mean_difference",
        pool="assistant",
        train=ExampleCount(positive=90, negative=90, questions=45, tokens=4000),
        validation=ExampleCount(positive=30, negative=30, questions=15, tokens=1300),
        sites=tuple(
            SiteEvidence(
                site=f"layers.{layer}.resid_post", norm=12.5, median_norm=80.0, cosine_to_mean_difference=1.0,
                note="sign by vote", auc=auc, accuracy=0.9, separation=2.5, random_auc=0.61, covariance_auc=0.7,
                shuffled_auc=0.66, effect=effect,
            )
            for layer, auc, effect in ((2, 0.68, 0.004), (3, 0.97, 0.013))
        ),
        best="layers.3.resid_post",
        chosen_by="steering",
        pass_seconds=2.5,
        notes=("2 examples were cut",),
    )  # fmt: skip


def cleaning(text: str = "joy") -> Cleaning:
    """Two vectors cleaned of three directions."""
    return Cleaning(
        method="dual",
        model="testbed",
        blend=0.3,
        seed=0,
        directory="runs/clean",
        sites=(
            CleanedSite(
                site="layers.3.resid_post", source="neutral", n=400, k=3, share=0.62, p_values=(0.001, 0.004, 0.03),
                route="gesdd", cosine_before=0.7, cosine_after=0.1, degeneracy="the published setting removes all",
            ),
        ),
        vectors=tuple(
            CleanedVector(
                name=name, site="layers.3.resid_post", path=f"runs/clean/{at}.safetensors", norm=10.0, kept=0.8,
                cosine=0.85 - at / 10, m=2, ridge=0.0, accuracy_before=0.95, accuracy_after=0.95 - 0.08 * at,
                n_held_out=60,
            )
            for at, name in enumerate((text, "calm"))
        ),
        warnings=("few neutral states",),
    )  # fmt: skip


def sae_run(text: str = "layers.4.resid_post-512") -> SAERun:
    """Two autoencoders on one stream; one was flagged."""
    return SAERun(
        path="runs/sae",
        passed=True,
        reason="2000 steps; 1 warnings",
        steps=2000,
        total_steps=2000,
        stopped="finished",
        tokens=8_192_000,
        batch_size=4096,
        saes=tuple(
            TrainedSAE(
                name=name, architecture="jumprelu", d_in=128, d_sae=512, d_out=128, site="layers.4.resid_post",
                target="", dtype="fp32", compute="bf16", config={}, last=None,
                checks=tuple(
                    SAECheck(sae=name, step=step, tokens=8192, fvu=1 / (1 + step / 50), l0=256 / (1 + step / 100),
                             dead=0.01)
                    for step in (0, 500, 1000, 1500, 2000)
                ),
                path=f"runs/sae/{at}", monitor=("l0-peak",),
            )
            for at, name in enumerate((text, "second"))
        ),
        warnings=(
            SAEWarning(sae=text, step=40, rule="grad-norm", level="flag", metric="grad_norm", value=200.0,
                       text="the gradient norm is 200 at step 40"),
        ),
        data={},
        seconds=95.0,
        tokens_per_second=86_000.0,
        peak_memory=2**30,
        deterministic=False,
        processes=1,
        resumed=0,
        notes=("adam_trick changed nothing",),
    )  # fmt: skip
