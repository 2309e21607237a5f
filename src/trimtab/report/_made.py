"""What the pages of an extraction, of a cleaning and of a training of autoencoders say, in the form of a training's."""

from __future__ import annotations

from trimtab.report import _format as fmt
from trimtab.report import _training
from trimtab.report._training import Table, TrainingView, panel_of
from trimtab.results.sae import SAERun
from trimtab.results.vectors import ExampleCount, ExtractionReport
from trimtab.results.vectors_clean import Cleaning

Made = ExtractionReport | Cleaning | SAERun


def view(result: Made) -> TrainingView:
    """Read a result into sentences, tables and panels."""
    if isinstance(result, ExtractionReport):
        return _extraction(result)
    return _cleaning(result) if isinstance(result, Cleaning) else _run(result)


def render(result: Made, *, width: int, color: bool) -> str:
    """Return the text form."""
    return _training.text_of(view(result), width=width, color=color)


def render_html(result: Made) -> str:
    """Return the page."""
    return _training.page_of(
        view(result), str(result.provenance.get("created", "")) if isinstance(result, SAERun) else ""
    )


def _extraction(one: ExtractionReport) -> TrainingView:
    best = next((site for site in one.sites if site.site == one.best), None)
    headline = f"{fmt.count(len(one.sites), 'vector')} by {one.method}, and none was held out against"
    answers = []
    if best is not None and best.auc is not None:
        limits = [limit for limit in (best.random_auc, best.covariance_auc, best.shuffled_auc) if limit is not None]
        beaten = bool(limits) and best.auc > max(limits)
        headline = f"{best.site} separates the labels best: AUC {fmt.number(best.auc)}"
        if one.chosen_by == "steering" and best.effect is not None:
            headline = f"{best.site} steers held-out examples most: {fmt.signed(best.effect)} nats per token"
            answers.append(("Does it steer?", f"{fmt.signed(best.effect)} nats per token",
                            "what adding it at 0.1 of each token's norm moves the two labels' log-probabilities apart",
                            "good" if best.effect > 0 else "bad"))  # fmt: skip
        answers.append(("Does it separate?", f"AUC {fmt.number(best.auc)}",
                        f"accuracy {fmt.percent(best.accuracy)}, {fmt.number(best.separation)} deviations apart",
                        "good" if beaten else "bad"))  # fmt: skip
        answers.append(("More than chance?", "Yes" if beaten else "No",
                        f"95 % of the control directions stay under AUC {fmt.number(max(limits, default=None))}",
                        "good" if beaten else "bad"))  # fmt: skip
    rows = tuple(
        (site.site, fmt.number(site.norm), fmt.number(site.median_norm), fmt.number(site.effect), fmt.number(site.auc),
         fmt.percent(site.accuracy), fmt.number(site.separation), fmt.number(site.random_auc),
         fmt.number(site.covariance_auc),
         fmt.number(site.shuffled_auc), fmt.number(site.cosine_to_mean_difference), site.note)
        for site in one.sites
    )  # fmt: skip
    heads = ("site", ">norm", ">median |h|", ">effect", ">AUC", ">accuracy", ">separation", ">random", ">covariance",
             ">shuffled", ">cosine to means", "note")  # fmt: skip
    return TrainingView(
        kicker=f"Extraction from {one.data}",
        headline=headline,
        lede=f"{one.method} over {one.pool} tokens of {one.model} ({one.model_dtype}), in {one.pass_seconds:.1f} s.",
        answers=tuple(answers),
        tables=(Table(title="Sites (AUCs of controls are 95th percentiles)", heads=heads, rows=rows),),
        panels=(),
        facts=(
            ("training data", _examples(one.train)),
            ("held out", _examples(one.validation)),
            ("kept in", one.path),
            ("digest of the data", one.data_digest),
        ),
        notes=one.notes,
    )


def _examples(part: ExampleCount | None) -> str:
    if part is None:
        return "nothing"
    return f"{part.positive:,} + {part.negative:,} of {fmt.count(part.questions, 'question')}, {part.tokens:,} tokens"


def _cleaning(one: Cleaning) -> TrainingView:
    kept = [vector.cosine for vector in one.vectors]
    removed = sum(site.k for site in one.sites)
    pairs = [(v.accuracy_before, v.accuracy_after) for v in one.vectors]
    lost = [before - after for before, after in pairs if before is not None and after is not None]
    answers = [
        ("How much was removed?", fmt.count(removed, "direction"),
         f"the least alike cleaned vector has a cosine of {fmt.number(min(kept, default=None))} with the raw one",
         "neutral"),
        ("What did it cost?", "not measured" if not lost else f"{fmt.points(-max(lost))} accuracy",
         "no held-out data were given" if not lost else "the most that a vector lost on held-out questions",
         "neutral" if not lost else "bad" if max(lost) > 0.05 else "good"),
    ]  # fmt: skip
    headline = f"{fmt.count(len(one.vectors), 'vector')} cleaned of {fmt.count(removed, 'direction')}"
    degenerate = [f"{site.site}: {site.degeneracy}" for site in one.sites if site.degeneracy]
    if degenerate:
        headline += ", and nothing tells them apart any more"
    sites = tuple(
        (site.site, site.source, f"{site.n:,}", str(site.k), fmt.percent(site.share),
         ", ".join(fmt.number(p, 2) for p in site.p_values[:6]) or "-", fmt.number(site.cosine_before),
         fmt.number(site.cosine_after))
        for site in one.sites
    )  # fmt: skip
    vectors = tuple(
        (v.name, v.site, fmt.number(v.norm), fmt.percent(v.kept), fmt.number(v.cosine),
         "-" if v.m is None else str(v.m), fmt.percent(v.accuracy_before), fmt.percent(v.accuracy_after),
         f"{v.n_held_out:,}")
        for v in one.vectors
    )  # fmt: skip
    return TrainingView(
        kicker=f"Cleaning by {one.method}",
        headline=headline,
        lede=_what(one),
        answers=tuple(answers),
        tables=(
            Table(title="Vectors", heads=("vector", "site", ">norm", ">kept", ">cosine to raw", ">manifold",
                  ">accuracy before", ">after", ">held out"), rows=vectors),
            Table(title="What was removed", heads=("site", "from", ">states", ">directions", ">variance", ">p",
                  ">closest before", ">closest after"), rows=sites),
        ),
        panels=(),
        facts=(("kept in", one.directory), ("seed", str(one.seed))),
        notes=tuple(dict.fromkeys((*one.warnings, *degenerate))),
    )  # fmt: skip


def _what(one: Cleaning) -> str:
    """Say where it happened, what was removed, and what was kept of it beside a manifold."""
    source = {"neutral": "neutral texts", "concepts": "the vectors themselves", "none": ""}
    removed = dict.fromkeys(source[site.source] for site in one.sites if source[site.source])
    parts = [f"On {one.model}"] if one.model else []
    parts += [f"contamination estimated from {' and '.join(removed)}"] if removed else []
    if one.method != "contamination":
        parts.append("projected on what texts of the concept vary along")
        parts += [f"with {fmt.percent(one.blend)} of the vector kept beside it"] if one.blend else []
    return f"{', '.join(parts) or one.method}."


def _run(run: SAERun) -> TrainingView:
    flags = sum(one.level == "flag" for one in run.warnings)
    last = [(one.name, one.checks[-1] if one.checks else None) for one in run.saes]
    rows = tuple(
        (one.name, one.architecture, one.site, f"{one.d_sae:,}", f"{one.dtype}/{one.compute}",
         fmt.number(None if check is None else check.fvu), fmt.number(None if check is None else check.l0),
         fmt.MISSING if check is None else fmt.percent(check.dead),
         fmt.number(None if one.last is None else one.last.loss))
        for one, (_, check) in zip(run.saes, last, strict=True)
    )  # fmt: skip
    known = [(name, check) for name, check in last if check is not None]
    best = min(known, key=lambda pair: pair[1].fvu, default=None)
    answers = [
        ("Did it run well?", "Yes" if run.passed and not flags else f"{fmt.count(flags, 'red flag')}",
         run.reason, "good" if run.passed and not flags else "bad"),
        ("How fast?", f"{run.tokens_per_second:,.0f} tokens/s", f"{run.tokens:,} tokens in {run.seconds:.1f} s",
         "neutral"),
    ]  # fmt: skip
    heads = ("autoencoder", "architecture", "site", ">latents", ">precision", ">FVU", ">L0", ">dead", ">last loss")
    warnings = tuple((one.sae, f"{one.step:,}", one.level, one.rule, one.text) for one in run.warnings)
    tables = [Table(title="Autoencoders, on held-out tokens", heads=heads, rows=rows)]
    if warnings:
        tables.append(
            Table(title="What the monitor saw", heads=("autoencoder", ">step", "level", "rule", "what"), rows=warnings)
        )
    panels = []
    for one in (one for one in run.saes[:4] if len(one.checks) > 1):
        steps = [float(check.step) for check in one.checks]
        for title, values in (("FVU", [check.fvu for check in one.checks]), ("L0", [check.l0 for check in one.checks])):
            name = f"{title}, {one.name}" if len(run.saes) > 1 else title
            panels.append(panel_of(name, {"other": (title, list(zip(steps, values, strict=True)))}))
    of = f" of {run.total_steps:,}" if run.steps < run.total_steps else ""
    headline = f"{fmt.count(len(run.saes), 'autoencoder')} trained for {run.steps:,}{of} steps"
    if best is not None:
        headline += f"; {best[0]} leaves {fmt.number(best[1].fvu)} of the variance unexplained"
    return TrainingView(
        kicker=f"Training of autoencoders {run.path}",
        headline=headline,
        lede=f"{fmt.count(run.processes, 'process', 'processes')}, batches of {run.batch_size:,} tokens; {run.reason}.",
        answers=tuple(answers),
        tables=tuple(tables),
        panels=tuple(panel for panel in panels if panel is not None),
        facts=(
            ("kept in", run.path),
            ("peak memory", f"{run.peak_memory / 2**20:,.0f} MiB"),
            ("deterministic", "yes" if run.deterministic else "no"),
            ("went on from a checkpoint", f"{run.resumed} times" if run.resumed else ""),
        ),
        notes=run.notes,
        keys=(("", "on held-out tokens"),),
    )
