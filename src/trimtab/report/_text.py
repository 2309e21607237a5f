"""Reports for a terminal: the answer first, then the same tables as the page."""

from __future__ import annotations

from trimtab.report import _analysis, _comparison
from trimtab.report import _format as fmt
from trimtab.report._console import MAX_LINES, TextPage
from trimtab.results import Analysis, Comparison

_TONE = {"good": "green", "bad": "red", "neutral": ""}
_AGREEING = ("identical", "passed")
_PAIRS, _REASONS = 20, 5  # of a comparison: what fits a terminal with the answer still in sight
_STATUS = {"failed": "red", "corrupt": "red", "inconclusive": "yellow"}


def render_analysis(analysis: Analysis, *, width: int, color: bool) -> str:
    """Return the text form of a precision analysis."""
    view = _analysis.view(analysis)
    page = TextPage(width, color)
    page.line(fmt.visible(f"{analysis.title}: {view.headline}"), "bold")
    page.line(fmt.visible(view.subtitle))
    page.line("")
    for answer in view.answers:
        page.item(f"{answer.question} {answer.short}.", answer.detail, _TONE[answer.tone])
    page.table(
        "Configurations",
        ("config", "backend", "model", "op math", ">equal", ">identical", ">first", ">rel_l2", ">max", ">MAE", ">max",
         ">clamped"),
        ((row.label, row.backend, row.model_dtype, row.op_math,
          *(("reference", "", "") if row.is_reference else (row.match, row.identical, row.first)),
          *row.rel_l2, *row.mae, row.clamp_rate) for row in view.configs),
    )  # fmt: skip
    flagged = [row.label for row in view.configs if row.significant_drift]
    if flagged:
        page.line(f"Significant drift (under 90 % equal tokens): {', '.join(flagged)}.", "red")
    page.table(
        "First divergence",
        ("config", ">prompt", ">token", "reference", "candidate", ">equal", ">margin", ">drift before", ">length"),
        ((row.config, str(row.prompt), "never" if row.first is None else str(row.first),
          *(fmt.one_line(repr(text), 24) if row.first is not None else "" for text in (row.reference_token, row.token)),
          row.match, row.margin, row.drift_before, f"{row.length_delta:+d}") for row in view.prompts[:MAX_LINES]),
        left_out=len(view.prompts) - MAX_LINES + view.prompts_left_out,
    )  # fmt: skip
    for finding in ("drift", "cap", "logprobs", "divergence"):
        if finding in view.findings:
            page.line(view.findings[finding])
    page.line("")
    counts = ", ".join(f"{compared} of {expected} {what}" for what, expected, compared in view.counts)
    page.line(f"Compared {counts}. {'Passed' if analysis.passed else 'Not passed'}: {analysis.reason}.")
    page.lines((f"short: {problem}" for problem in analysis.ledger.problems), "yellow")
    commands = {"made by": analysis.command, "look next": analysis.next_command, "steering": analysis.steering_digest}
    page.facts(commands | analysis.environment)
    return page.text()


def render_comparison(comparison: Comparison, *, width: int, color: bool) -> str:
    """Return the text form of a comparison of two traces."""
    view = _comparison.view(comparison)
    page = TextPage(width, color)
    page.line(f"{'Passed' if comparison.passed else 'Not passed'}: {comparison.reason}", "bold")
    page.line(f"{comparison.candidate} against the reference {comparison.reference}. Rule: {comparison.verdict}.")
    page.line("")
    for question, short, detail, tone in view.answers:
        page.item(f"{question} {short}.", detail, _TONE[tone])
    if view.divergence:
        page.lines(f"  {kind}: {detail}, explains {share}" for kind, detail, share in view.divergence.fingerprints)
    page.table(
        "Verdicts",
        ("tensor", "status", ">rel_l2", ">noise", ">over limit", ">max_abs", ">ULP", "dtype"),
        ((row.name, row.status + (" (waived)" if row.waived else ""), row.rel_l2, row.ratio, row.excess, row.max_abs,
          row.ulp, row.dtypes) for row in view.verdicts[:_PAIRS]),
        left_out=len(comparison.records) - _PAIRS,
        styles=[_STATUS.get(row.status, "") for row in view.verdicts[:_PAIRS]],
    )  # fmt: skip
    page.lines(
        (
            f"{row.name}: {'; '.join((*row.reasons, *(kind for kind, _, _ in row.fingerprints)))}"
            for row in view.verdicts
            if row.reasons and row.status not in _AGREEING  # what agreeing pairs have to say is counted at the end
        ),
        most=_REASONS,
    )
    page.table(
        f"Ledger of {comparison.ledger.unit}",
        ("side", ">expected", ">found", ">compared", ">unmatched", ">skipped", ">corrupt"),
        ((side, *counts) for side, counts in view.sides),
    )
    page.line(f"{comparison.ledger.expectation}.")
    entries = [
        f"{entry.kind} ({entry.side}) {entry.name}: {entry.reason}, {entry.count:,}"
        + (f" (waived by {entry.waived_by})" if entry.waived_by else "")
        for entry in comparison.ledger.entries
    ]
    page.lines(entries, "yellow")
    page.lines(
        f"tokens part: prompt {one.prompt}, request {one.request}, position {one.position}"
        for one in comparison.token_divergences
    )
    page.lines((f"warning: {warning}" for warning in comparison.warnings), "yellow")
    return page.text()
