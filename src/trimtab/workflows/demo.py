"""The main job on the embedded model: a precision sweep of capped steering."""

from __future__ import annotations

from pathlib import Path

from trimtab import testbed
from trimtab.results import Analysis
from trimtab.sites import Site
from trimtab.workflows._arguments import checked
from trimtab.workflows.analyze import analyze
from trimtab.workflows.config import Steer
from trimtab.workflows.sweep import sweep

ATTRIBUTE = "animal"
NUM_PROMPTS, MAX_TOKENS = 12, 48


@checked
def demo(out: str | Path = "runs/demo", *, quick: bool = False) -> Analysis:
    """Cap a direction of the embedded model and ask what precision does to it.

    Sweeps bf16, bf16 with the cap's arithmetic in float32, float16 and float32 over prompts of the testbed's grammar,
    then analyses the run. A finished or interrupted run in `out` is used again.

    Args:
        out: directory of the run.
        quick: two prompts and 8 tokens.

    Returns:
        The analysis; `tt.report(analysis, "report.html")` draws it.
    """
    direction = testbed.direction(ATTRIBUTE)
    cap = Steer(vector=f"testbed:{ATTRIBUTE}", layer=Site.parse(direction.site).layer, cap=direction.cap)
    place = Path(out)
    sweep(
        "testbed",
        testbed.prompts(NUM_PROMPTS, seed=0),
        steering=cap,
        max_tokens=MAX_TOKENS,
        out=place.parent,
        run_id=place.name,
        quick=quick,
    )
    return analyze(place)
