"""`compare`: vectors side by side, within one set or one set against another."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab._base.files import atomic_write_bytes, atomic_write_text
from trimtab.directions import load_direction
from trimtab.errors import InputError
from trimtab.results import to_json
from trimtab.results.vectors_clean import VectorComparison, VectorFacts, VectorPair
from trimtab.steering import SteeringVector

PARQUET, REPORT = "pairs.parquet", "comparison.json"
_WHOLE = "steering.safetensors"  # a training's steering, whose vectors lie beside it
_CONTROLS = "controls"

Given = str | os.PathLike[str]


def compare(
    vectors: Sequence[Given] | Mapping[str, SteeringVector],
    *,
    against: Sequence[Given] | Mapping[str, SteeringVector] = (),
    out: Given | None = None,
) -> VectorComparison:
    """Compare steering vectors: cosines, norms, validation losses.

    Args:
        vectors: files; folders of `.safetensors` vectors, such as those of trainings, which are named by their place in
            the folder (its `controls` are left out); or name -> vector.
        against: a second set, such as the extracted ones of what was trained; every vector is then compared with those
            of the other set, and vectors of one name are matched.
        out: directory for `pairs.parquet` and `comparison.json`; made if needed.

    Raises:
        InputError: fewer than two vectors, two of one name in a set, or none of a width in common.
        VectorError: a file that is not a vector.
    """
    first, second = _read(vectors, "vectors"), _read(against, "against") if against else {}
    if len(first) + len(second) < 2:
        raise InputError(f"{len(first)} vector was given; at least two are needed, or a second set (against)")
    left = [(name, path, vector) for name, (path, vector) in first.items()]
    right = [(name, path, vector) for name, (path, vector) in second.items()]
    labels = _labels([one[0] for one in left], [one[0] for one in right])
    both = [*left, *right]
    split = len(left) if right else 0
    couples = (
        [(a, b) for a in range(split) for b in range(split, len(both))]
        if right
        else [(a, b) for a in range(len(both)) for b in range(a + 1, len(both))]
    )
    fitting = [(a, b) for a, b in couples if both[a][2].direction.shape == both[b][2].direction.shape]
    if not fitting:
        widths = ", ".join(f"{name} {len(vector.direction)}" for name, _, vector in both)
        raise InputError(f"no two vectors to compare have the same width: {widths}")
    pairs = {(a, b): _pair(labels[a], both[a][2], labels[b], both[b][2]) for a, b in fitting}
    matched = tuple(pair for (a, b), pair in pairs.items() if right and both[a][0] == both[b][0])
    warnings = []
    if len(fitting) < len(couples):
        warnings.append(f"{len(couples) - len(fitting)} pairs of different widths were left out")
    if right and not matched:
        warnings.append("no vector of the one set has the name of one of the other, so none are matched")
    result = VectorComparison(
        vectors=tuple(_facts(label, path, vector) for label, (_, path, vector) in zip(labels, both, strict=True)),
        pairs=tuple(pairs.values()),
        against=tuple(labels[len(left) :]),
        matched=matched,
        directory="" if out is None else str(out),
        warnings=tuple(warnings),
    )
    if out is not None:
        _write(Path(out), result)
    return result


def _read(given: Sequence[Given] | Mapping[str, SteeringVector], what: str) -> dict[str, tuple[str, SteeringVector]]:
    if isinstance(given, Mapping):
        return {name: ("", vector) for name, vector in given.items()}
    found: dict[str, tuple[str, SteeringVector]] = {}
    for one in given:
        for name, path in _files(one):
            if name in found:
                raise InputError(f"{what}: {found[name][0]} and {path} are both called {name!r}; give one of them")
            read = load_direction(path)
            found[name] = (path, read.calibrated or SteeringVector.of(read.vector, site=read.site))
    return found


def _files(given: Given) -> list[tuple[str, str]]:
    """Return (name, path) of one file, or of all vectors in a folder, named by their place in it."""
    folder = Path(given)
    if not folder.is_dir() or (folder / "steering_vector.pt").is_file():
        text = os.fspath(given)
        return [(text.rpartition(":")[2] if text.startswith("testbed:") else folder.stem, text)]
    every = [path for path in sorted(folder.rglob("*.safetensors")) if path.name != _WHOLE]
    files = [path for path in every if _CONTROLS not in path.relative_to(folder).parts]
    if not files:
        raise InputError(f"{folder} holds no .safetensors vector; give files, or a folder of them")
    return [(path.relative_to(folder).with_suffix("").as_posix(), str(path)) for path in files]


def _labels(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Names that are in both sets are told apart by the set."""
    twice = set(left) & set(right)
    return [*left, *(f"{name} (against)" if name in twice else name for name in right)]


def _pair(a: str, first: SteeringVector, b: str, second: SteeringVector) -> VectorPair:
    one, other = first.direction.double(), second.direction.double()
    cosine = max(-1.0, min(1.0, float(one @ other / (one.norm() * other.norm()))))
    return VectorPair(
        a=a,
        b=b,
        cosine=cosine,
        z=cosine * math.sqrt(len(one)),
        norm_ratio=first.norm / second.norm,
        same_site=first.site is not None and first.site == second.site,
    )


def _facts(name: str, path: str, vector: SteeringVector) -> VectorFacts:
    about = {**vector.provenance, **vector.recipe}
    return VectorFacts(
        name=name,
        path=path,
        method=str(about.get("method", "")),
        site="" if vector.site is None else str(vector.site),
        width=len(vector.direction),
        norm=vector.norm,
        median_norm=vector.median_norm,
        validation_loss=_number(about, "validation_loss"),
        baseline_loss=_number(about, "baseline_loss", "unsteered_loss"),
        prompted_loss=_number(about, "prompted_loss"),
        digest=vector.digest,
    )


def _number(about: Mapping[str, Any], *names: str) -> float | None:
    """A number under one of the names, at the top or one level down (such as under "evidence")."""
    inner = [value for value in about.values() if isinstance(value, Mapping)]
    for place in (about, *inner):
        for name in names:
            value = place.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
    return None


def _write(directory: Path, result: VectorComparison) -> None:
    import io

    import polars

    directory.mkdir(parents=True, exist_ok=True)
    facts = {one.name: one for one in result.vectors}
    rows = [
        {
            **asdict(pair),
            **{
                f"{field}_{side}": getattr(facts[name], field)
                for side, name in (("a", pair.a), ("b", pair.b))
                for field in ("site", "method", "norm", "validation_loss", "baseline_loss", "prompted_loss", "digest")
            },
            "matched": pair in result.matched,
        }
        for pair in result.pairs
    ]
    numbers = [f"{name}_loss_{side}" for name in ("validation", "baseline", "prompted") for side in "ab"]
    frame = polars.DataFrame(rows, schema_overrides=dict.fromkeys(numbers, polars.Float64), infer_schema_length=None)
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    atomic_write_bytes(directory / PARQUET, buffer.getvalue())
    atomic_write_text(directory / REPORT, to_json(result) + "\n")
