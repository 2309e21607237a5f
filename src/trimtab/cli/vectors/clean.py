"""`trimtab vectors clean`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import BatchedModel, given
from trimtab.errors import InputError


def clean(
    vectors: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    out: Path,
    model: BatchedModel = BatchedModel(),
    neutral: str | None = None,
    data: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    pool: Literal["assistant", "last", "all"] = "assistant",
    method: Literal["contamination", "manifold", "dual"] = "contamination",
    source: Literal["neutral", "concepts"] = "neutral",
    k: int | None = None,
    normalise_rows: bool | None = None,
    published: Annotated[bool, Parameter(negative="")] = False,
    max_loss: float | None = None,
    permutations: int | None = None,
    manifold: Literal["ridge", "hard"] = "ridge",
    m: int | None = None,
    ridge: float | None = None,
    blend: float = 0.0,
    seed: int = 0,
    output: Output = Output(),
) -> int:
    """Remove from vectors what has nothing to do with their concepts, and measure what that costs.

    Args:
        vectors: vector files; the stem of a file is the vector's name.
        out: directory for the cleaned vectors and cleaning.json.
        neutral: texts without the concepts: a .txt file, one a line, or contrast data, whose labels are ignored.
        data: NAME=SOURCE, contrast data of a vector, for its manifold and its retained accuracy; repeat for several.
        pool: tokens whose states are averaged.
        method: remove contamination, project on the task manifold, or both.
        source: estimate contamination from neutral texts, or from the vectors themselves.
        k: directions to remove. Default: by permutation test, or 1 of the vectors themselves.
        normalise_rows: divide every centred row by its norm first.
        published: allow the published k, which makes all cleaned vectors the same, and say so.
        max_loss: accuracy that a vector may lose when the test chooses k (0.05).
        permutations: of the test (99).
        manifold: soft, or a hard projector.
        m: directions of the manifold. Default: by cross-validation.
        ridge: variance at which the soft manifold halves a direction. Default: the noise variance.
        blend: share of the vector before the manifold that is kept.
        seed: of permutations, folds and splits.
    """
    sources = {}
    for text in data:
        name, equals, where = text.partition("=")
        if not equals or not name or not where:
            raise InputError(f"--data {text!r}: write NAME=SOURCE, such as --data animal=testbed:animal")
        if name in sources:
            raise InputError(f"--data {text!r}: {name} has data already")
        sources[name] = where
    settings = {
        **given(neutral=neutral, k=k, published=published, max_loss=max_loss, permutations=permutations, m=m),
        **given(ridge=ridge, blend=blend or None, seed=seed or None, data=sources or None),
        **{
            key: value
            for key, value, default in (
                ("pool", pool, "assistant"),
                ("method", method, "contamination"),
                ("source", source, "neutral"),
                ("manifold", manifold, "ridge"),
            )
            if value != default
        },
        **({} if normalise_rows is None else {"normalise_rows": normalise_rows}),
    }
    options = {"out": out, "model": model.model, **({"backend": model.kwargs()} if model.kwargs() else {})}
    return run(Call(function="trimtab.vectors.clean", args=(vectors,), kwargs={**options, **settings}), output)
