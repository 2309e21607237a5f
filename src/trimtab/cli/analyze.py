"""`trimtab analyze`."""

from __future__ import annotations

from pathlib import Path

from trimtab.cli._call import Call, LineOutput, run
from trimtab.cli._options import given


def analyze(
    run_a: Path,
    run_b: Path | None = None,
    /,
    *,
    prompt_idx: int | None = None,
    config: str | None = None,
    reference_config: str | None = None,
    html: Path | None = None,
    output: LineOutput = LineOutput(),
) -> int:
    """Read a sweep, or two runs: token agreement, first divergence, drift, cap deltas.

    Args:
        run_a: directory of a sweep.
        run_b: a second sweep; its --config is compared with --reference-config of the first.
        prompt_idx: this prompt only, counted from 0.
        config: this configuration only.
        reference_config: compare with this configuration instead of the sweep's own reference.
        html: also write the report there.
    """
    kwargs = given(run_b=run_b, prompt_idx=prompt_idx, config=config, reference_config=reference_config)
    return run(Call(function="trimtab.analyze", args=(run_a,), kwargs=kwargs), output, html=html)
