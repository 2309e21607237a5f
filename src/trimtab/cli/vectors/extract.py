"""`trimtab vectors extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import Dtype, given


def extract(
    data: str,
    /,
    *,
    out: Path | None = None,
    method: Literal["mean_difference", "pca", "logistic", "mass_mean", "lda", "sae"] = "mean_difference",
    sites: Annotated[str, Parameter(alias="-s")] = "layers.*.resid_post",
    pool: Literal["assistant", "last", "all"] = "assistant",
    validation: str = "0.25",
    positive: str = "pos",
    negative: str = "neg",
    sae: Path | None = None,
    max_length: int | None = None,
    num_controls: int = 20,
    choose: Literal["steering", "auc"] = "steering",
    seed: int = 0,
    model: Annotated[str, Parameter(alias="-m")] = "testbed",
    dtype: Dtype = "float32",
    device: str | None = None,
    batch_size: int = 8,
    output: Output = Output(),
) -> int:
    """Make a steering vector at every site from contrast data, and say what each separates on held-out examples.

    Args:
        data: a .jsonl or .parquet file, a directory that datasets saved, persona instructions (.json),
            testbed:ATTRIBUTE or concepts:A,B/C,D; with a selection after a colon, such as rows.jsonl:score>=75.
        out: new directory for the vector files and the evidence.
        method: how a direction is found; pca needs pairs, sae needs --sae.
        sites: patterns such as layers.*.resid_post or "layers.{0,4}.mlp_out".
        pool: tokens that count: what the assistant says (and all of a plain text), the last one, or all.
        validation: share of the questions to hold out, data of its own, or none.
        positive: label that the vectors point towards.
        negative: label that they point away from.
        sae: file of a sparse autoencoder.
        max_length: cut examples after this many tokens.
        num_controls: control directions of each kind at every site.
        choose: the best site by what adding its vector does to held-out examples, or by what it separates.
        seed: of the split and the controls.
        model: a directory, a hub id, or "testbed" for the embedded model.
        dtype: the model's dtype.
        device: cpu, cuda, cuda:1 or mps. Default: cuda when there is one, else cpu.
        batch_size: examples of one forward pass.
    """
    options: dict[str, Any] = {
        "method": (method, "mean_difference"),
        "sites": (sites, "layers.*.resid_post"),
        "pool": (pool, "assistant"),
        "positive": (positive, "pos"),
        "negative": (negative, "neg"),
        "dtype": (dtype, "float32"),
        "batch_size": (batch_size, 8),
        "num_controls": (num_controls, 20),
        "choose": (choose, "steering"),
        "seed": (seed, 0),
    }
    kwargs = given(out=out, sae=sae, max_length=max_length, device=device)
    kwargs |= {name: value for name, (value, default) in options.items() if value != default}
    if validation != "0.25":
        kwargs["validation"] = None if validation == "none" else _share(validation)
    call = Call(function="trimtab.vectors.extract", args=(model, data), kwargs=kwargs)
    return run(call, output, summarise=lambda made: made.report, show=_table)


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _table(report: Any) -> str:
    lines = [f"{report.method} on {report.data}, {_count(report.train)}; held out: {_count(report.validation)}", ""]
    head = ("site", "norm", "median |h|", "auc", "accuracy", "separation", "effect", "controls' auc (95 %)")
    rows = [head]
    for one in report.sites:
        limits = (one.random_auc, one.covariance_auc, one.shuffled_auc)
        numbers = (one.norm, one.median_norm, one.auc, one.accuracy, one.separation, one.effect)
        rows.append((one.site, *map(_number, numbers), " ".join(map(_number, limits))))
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [*(f"note: {note}" for note in report.notes), ""]
    by = f" (by {report.chosen_by})" if report.chosen_by else ""
    lines.append(
        f"best: {report.best or 'not known, nothing was held out'}{by}" + (f"; {report.path}" * bool(report.path))
    )
    return "\n".join(lines)


def _count(part: Any) -> str:
    if part is None:
        return "nothing"
    return f"{part.positive} + {part.negative} examples of {part.questions} questions, {part.tokens} tokens"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
