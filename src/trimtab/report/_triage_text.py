"""A triage for a terminal: the answer first, then its evidence, the source and the patch."""

from __future__ import annotations

from trimtab.report import _triage
from trimtab.report._console import TextPage
from trimtab.results.triage import Triage

_TONE = {"good": "green", "bad": "red", "neutral": ""}
_STATUS = {"made": "red", "contains": "yellow", "carried": "yellow"}
_NEAR = 12


def render_triage(triage: Triage, *, width: int, color: bool) -> str:
    """Return the text form of a triage."""
    view = _triage.view(triage)
    page = TextPage(width, color)
    page.line(triage.reason, "bold")
    page.line(f"{triage.candidate} against the reference {triage.reference}. Rule: {triage.verdict}.")
    page.line("")
    for question, short, detail, tone in view.answers:
        page.item(f"{question} {short}.", detail, _TONE[tone])
    page.facts(dict(view.facts))
    page.line("")
    page.lines(f"fingerprint {kind}: {detail}, explains {share}" for kind, detail, share in view.fingerprints)
    at = next((index for index, one in enumerate(view.calls) if one.first), 0)
    near = view.calls[max(0, at - _NEAR // 2) : at + _NEAR]
    page.table(
        "Amplification",
        ("module", "class", "pass", ">error in", ">error out", ">rounding", ">times", "status"),
        ((one.name, one.module_class, one.direction, one.input_error, one.output_error, one.expected,
          one.amplification, one.status) for one in near),
        left_out=len(triage.calls) + triage.calls_left_out - len(near),
        styles=[_STATUS.get(one.status, "") for one in near],
    )  # fmt: skip
    page.table("Ruled out", ("what", "why"), ((one.what, one.why) for one in triage.ruled_out))
    page.table(
        "Settings that differ",
        ("kind", "setting", "reference", "candidate"),
        ((one.group, one.key, one.reference, one.candidate) for one in triage.manifest[:40]),
        left_out=len(triage.manifest) - 40,
    )
    _micro_batches(page, triage)
    _source(page, triage, view)
    page.lines(triage.notes)
    page.lines((f"warning: {warning}" for warning in triage.warnings), "yellow")
    return page.text()


def _micro_batches(page: TextPage, triage: Triage) -> None:
    found = triage.micro_batches
    if found is not None:
        shared = ", ".join(found.shared) or "nothing that was recorded"
        total = len(found.diverging) + len(found.agreeing)
        page.line("")
        page.line(f"{len(found.diverging)} of {total} micro-batches diverge; they alone share: {shared}.")


def _source(page: TextPage, triage: Triage, view: _triage.TriageView) -> None:
    source = triage.source
    if source is not None:
        lines = "" if source.line is None else f":{source.line}" + (f"-{source.end}" if source.end else "")
        page.line("")
        page.line(f"Source: {source.file}{lines} {source.name} (from the {source.found_by})", "bold")
        page.lines(
            f"  {one.commit[:12]} {one.summary} ({one.lines} line{'s' if one.lines != 1 else ''})"
            for one in source.blame
        )
    for where, hunk in view.hunks[:3]:
        page.line("")
        page.line(f"{hunk.file}, {where}", "bold")
        page.lines(f"  {one.kind} at line {one.line} ({one.side}): {one.code}" for one in hunk.suspicions)
        page.lines(hunk.text.splitlines(), "dim")
    if triage.transplant is not None:
        page.line("")
        page.line(f"Transplant of {triage.transplant.site}: {triage.transplant.reason}.", "bold")
    if triage.fix is not None:
        page.line("")
        page.line(f"Patch ({'proved' if triage.fix.proved else 'not proved'}): {triage.fix.why}.", "bold")
        page.verbatim(triage.fix.patch)
    if triage.next_check:
        page.line("")
        page.line(f"Next: {triage.next_check}.", "bold")
