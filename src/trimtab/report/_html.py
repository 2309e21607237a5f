"""One HTML file per result: style, scripts and data inside, a content policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from trimtab._base import jsonio
from trimtab._version import __version__
from trimtab.report import _analysis, _commits, _comparison, _payload, _triage
from trimtab.report._format import count, visible
from trimtab.results import Analysis, Comparison
from trimtab.results.commits import CommitWalk
from trimtab.results.triage import Triage

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def render_analysis(result: Analysis) -> str:
    """Return the page of a precision analysis."""
    numbers = _payload.payload(result)
    has = {
        "drift": bool(result.drift),
        "tokens": bool(result.agreements),
        "cap": bool(result.cap_steps),
        "logprobs": bool(result.logprobs),
        "divergences": bool(numbers["divergences"]),
        "explorer": bool(numbers["prompts"] and numbers["configs"]),
    }
    drawn = has["explorer"] or has["drift"]
    sections = [("answer", "Answer"), ("configs", "Configurations")]
    sections += [("explore", "Token by token")] if has["explorer"] else []
    sections += [("divergence", "Divergence")] if result.agreements else []
    sections += [("record", "Ledger"), ("environment", "Repeat")]
    return _page(
        "analysis.html.j2",
        scripts={"plotly_js": "plotly-cartesian.min.js", "analysis_js": "analysis.js"} if drawn else {},
        title=f"{result.title}: {result.model}",
        created=result.created,
        sections=sections,
        result=result,
        view=_analysis.view(result),
        bands=_analysis.BANDS,
        has=has,
        drawn=drawn,
        left_out=numbers["left_out"],
        payload=embed(numbers),
    )


def render_comparison(result: Comparison) -> str:
    """Return the page of a comparison of two traces."""
    view = _comparison.view(result)
    sections = [("answer", "Answer")]
    sections += [("divergence", "First divergence")] if view.divergence else []
    sections += [("verdicts", "Verdicts"), ("ledger", "Ledger"), ("plan", "Plan")]
    return _page(
        "comparison.html.j2",
        scripts={},
        title=f"Comparison: {result.candidate} against {result.reference}",
        created="",
        sections=sections,
        result=result,
        view=view,
    )


def render_triage(result: Triage) -> str:
    """Return the page of a triage."""
    view = _triage.view(result)
    sections = [("answer", "Answer")]
    sections += [("divergence", "Divergence")] if result.divergence else []
    sections += [("figures", "Figures")] if view.heats or view.chart or view.strips else []
    sections += [("source", "Source and fix")] if result.source or result.fix or result.transplant else []
    return _page(
        "triage.html.j2",
        scripts={},
        style=_asset("report.css") + _asset("triage.css"),
        title=f"Triage: {result.candidate} against {result.reference}",
        created="",
        sections=[*sections, ("runs", "Runs")],
        result=result,
        view=view,
    )


def render_commits(result: CommitWalk) -> str:
    """Return the page of a walk over commits."""
    view = _commits.view(result)
    sections = [("answer", "Answer"), ("commits", "Commits")]
    sections += [("metrics", "Metrics")] if view.panels else []
    sections += [("findings", "Findings")] if view.flags or view.traces or result.bisection else []
    return _page(
        "commits.html.j2",
        scripts={},
        style=_asset("report.css") + _asset("commits.css"),
        title=f"Commits {view.revisions}",
        created="",
        sections=[*sections, ("repeat", "Go on")],
        result=result,
        view=view,
    )


def embed(value: Any) -> Markup:
    """JSON that is safe inside a script element: no `<`, `>`, `&` or line separator survives unescaped."""
    text = jsonio.dumps(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _page(template: str, *, scripts: dict[str, str], style: str = "", **values: Any) -> str:
    code = {"page_js": _asset("page.js")} | {name: _asset(file) for name, file in scripts.items()}
    hashes = " ".join(_hash(text) for text in code.values())
    policy = f"{_POLICY}; script-src {hashes}"
    inline = {name: Markup(text) for name, text in code.items()}
    page = (
        _environment()
        .get_template(template)
        .render(policy=policy, css=Markup(style or _asset("report.css")), version=__version__, **inline, **values)
    )
    # A lone surrogate cannot be written as UTF-8; it becomes "?".
    return page.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


@cache
def _asset(name: str) -> str:
    return resources.files("trimtab.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trimtab.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = visible
    environment.filters["count_of"] = count
    return environment
