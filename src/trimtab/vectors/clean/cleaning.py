"""`clean`: from vector files to cleaned vector files, with what the cleaning cost."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab._base.files import atomic_write_text, safe_name
from trimtab.backends import Backend, open_backend
from trimtab.directions import check_origin, load_direction
from trimtab.errors import InputError, VectorError
from trimtab.results import to_dict, to_json
from trimtab.results.vectors_clean import CleanedSite, CleanedVector, Cleaning
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.vectors.clean.accuracy import accuracy
from trimtab.vectors.clean.config import CleanConfig
from trimtab.vectors.clean.contamination import (
    Contamination,
    from_concepts,
    from_neutral,
    keep_accurate,
    pairwise_cosines,
)
from trimtab.vectors.clean.linear import Matrix, remove
from trimtab.vectors.clean.manifold import Manifold, task_manifold
from trimtab.vectors.clean.states import pooled_states
from trimtab.vectors.data import ContrastData, Example, Pool, load, split_fractions

_LEAST_KEPT = 1e-6
_LOST = 0.05
REPORT = "cleaning.json"

States = dict[Site, Matrix]


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """Pooled states of one vector's data: each side in a part to fit on, and one that is held out."""

    fit: tuple[Matrix, Matrix]
    held: tuple[Matrix, Matrix]


def clean(
    vectors: Sequence[str | os.PathLike[str]] | Mapping[str, SteeringVector],
    *,
    out: str | os.PathLike[str] | None = None,
    model: Any = "testbed",
    neutral: Any = None,
    data: Mapping[str, Any] | None = None,
    pool: Pool = "assistant",
    backend: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Cleaning:
    """Clean steering vectors, and say what it did to them.

    Vectors keep their norm: only their direction changes, so that a strength means the same before and after.

    Args:
        vectors: files whose stems are the names, or name -> vector. All must know their site.
        out: directory for `NAME.safetensors` and `cleaning.json`; made if needed. None writes nothing.
        model: the model that the vectors are for; run only when states are needed. An open backend is used as it is.
        neutral: texts without the concepts: a .txt file (one a line), contrast data (labels are ignored), or texts.
        data: name -> contrast data of that vector, for its manifold (positive texts) and its retained accuracy.
        pool: tokens whose states are averaged.
        backend: options of the backend, such as dtype and device.
        settings: fields of CleanConfig.

    Returns:
        What was removed at each site, and each vector before and after.

    Raises:
        InputError: settings or data that do not fit; says what would.
        VectorError: a vector without a site, or one of which nothing is left.
    """
    config = CleanConfig(**settings)
    loaded = _load(vectors)
    sources = dict(data or {})
    _check(config, loaded, neutral, sources)
    sites = sorted({_site(one) for one in loaded.values()}, key=lambda site: site.sort_key)
    runs = bool(sources) or (config.has_contamination and config.source == "neutral")
    opened = _open(model, backend or {}) if runs else None
    try:
        removed, labelled, warnings = _measure(config, loaded, sites, opened, neutral, sources, pool)
        name = opened.model_id if opened is not None else ""
    finally:
        if opened is not None and opened is not model:
            opened.close()
    done: dict[str, SteeringVector] = {}
    rows: list[CleanedVector] = []
    for label, vector in loaded.items():
        cleaned, row = _clean_one(label, vector, removed.get(_site(vector)), labelled.get(label), config)
        done[label] = cleaned
        rows.append(row if out is None else replace(row, path=str(Path(out) / f"{label}.safetensors")))
    warnings += _losses(rows)
    result = Cleaning(
        method=config.method,
        model=name,
        blend=config.blend,
        seed=config.seed,
        directory="" if out is None else str(out),
        sites=tuple(_about(site, removed.get(site), loaded, done, config) for site in sites),
        vectors=tuple(rows),
        warnings=tuple(warnings),
    )
    if out is not None:
        _write(Path(out), done, result)
    return result


def clean_vector(
    vector: Matrix, contamination: Contamination | None, manifold: Manifold | None, blend: float
) -> Matrix:
    """Return a vector [d] without the contamination, projected on the manifold, blended; not scaled back.

    With v' = v - U^T U v and its projection p: `(1 - blend) p + blend v'`.
    """
    found = vector if contamination is None else remove(vector, contamination.basis)
    return found if manifold is None else (1 - blend) * manifold.project(found) + blend * found


def _load(vectors: Sequence[str | os.PathLike[str]] | Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    if isinstance(vectors, Mapping):
        found = dict(vectors)
    else:
        found = {}
        for path in vectors:
            label = Path(os.fspath(path)).stem if ":" not in os.fspath(path) else os.fspath(path).rpartition(":")[2]
            if label in found:
                raise InputError(f"two vectors are called {label!r}; the stem of a file is its name, so rename one")
            read = load_direction(path)
            found[label] = read.calibrated or SteeringVector.of(read.vector, site=read.site)
    if not found:
        raise InputError("no vector was given; give at least one file")
    for label, vector in found.items():
        safe_name(label, "name of a vector")
        if vector.site is None:
            raise VectorError(f"vector {label!r} does not say at which site it was made; extract it again")
    return found


def _site(vector: SteeringVector) -> Site:
    assert vector.site is not None, "checked when it was loaded"
    return vector.site


def _check(config: CleanConfig, loaded: Mapping[str, SteeringVector], neutral: Any, sources: Mapping[str, Any]) -> None:
    unknown = sorted(set(sources) - set(loaded))
    if unknown:
        raise InputError(f"data for {', '.join(unknown)}: no vector has that name; vectors: {', '.join(loaded)}")
    missing = [name for name in loaded if name not in sources]
    if config.has_manifold and missing:
        raise InputError(f"the manifold of {', '.join(missing)} needs texts about it; give its contrast data")
    wanted = config.has_contamination and config.source == "neutral"
    if wanted and neutral is None:
        raise InputError("contamination from neutral texts was asked for and no neutral texts were given")
    if not wanted and neutral is not None:
        raise InputError("neutral texts were given and nothing uses them; they need source='neutral'")


def _open(model: Any, options: Mapping[str, Any]) -> Backend:
    if hasattr(model, "generate") and hasattr(model, "encode") and hasattr(model, "sites"):
        found: Backend = model
        return found
    chosen = dict(options)
    return open_backend(chosen.pop("backend", "hf"), model, **chosen)


def _measure(
    config: CleanConfig,
    loaded: Mapping[str, SteeringVector],
    sites: Sequence[Site],
    backend: Backend | None,
    neutral: Any,
    sources: Mapping[str, Any],
    pool: Pool,
) -> tuple[dict[Site, Contamination], dict[str, _Labelled], list[str]]:
    """Return the subspace of each site, the states of each vector's data, and warnings."""
    removed: dict[Site, Contamination] = {}
    warnings: list[str] = []
    labelled: dict[str, _Labelled] = {}
    for name, vector in loaded.items():
        if backend is not None:
            _check_model(name, vector, backend)
    for name, source in sources.items():
        assert backend is not None
        contrast = load(source)
        labelled[name] = _label(name, contrast, loaded[name], backend, pool, config.seed)
        if contrast.digest == loaded[name].data_hash:
            warnings.append(f"{name}: its accuracy is of the texts that the vector was made from; give others")
    if config.has_contamination and config.source == "concepts":
        for site in sites:
            rows = np.stack([_array(one) for one in loaded.values() if one.site == site])
            normalise = config.normalise_rows is not False
            removed[site] = from_concepts(rows, config.k, normalise_rows=normalise, published=config.published)
    elif config.has_contamination:
        assert backend is not None
        states = pooled_states(backend, read_texts(neutral), sites, pool=pool, what="neutral texts")
        for site, found in states.items():
            here = [(_array(loaded[name]), data) for name, data in labelled.items() if loaded[name].site == site]
            removed[site], said = _neutral(found, here, config)
            warnings += [f"{site}: {said}"] if said else []
    warnings += [f"{site}: {one.degeneracy}" for site, one in removed.items() if one.degeneracy]
    return removed, labelled, warnings


def _check_model(name: str, vector: SteeringVector, backend: Backend) -> None:
    check_origin(vector.model_digest, backend.info.weights_digest, f"vector {name!r}")
    if len(vector.direction) != backend.info.hidden_size:
        raise VectorError(
            f"vector {name!r} has width {len(vector.direction)}, and the states of {backend.model_id} have width "
            f"{backend.info.hidden_size}; give the model that it was made on"
        )


def _neutral(
    states: Matrix, here: Sequence[tuple[Matrix, _Labelled]], config: CleanConfig
) -> tuple[Contamination, str]:
    """Return the subspace, no larger than the accuracies on the fitted half bear, and what there is to say of it."""
    found = from_neutral(
        states, config.k, normalise_rows=bool(config.normalise_rows), permutations=config.permutations,
        alpha=config.alpha, seed=config.seed,
    )  # fmt: skip
    if not found.k:
        return found, f"no direction of {len(states)} neutral texts is more than chance; nothing was removed"
    if config.k is not None:
        return found, ""
    if not here:
        return found, f"the permutation test chose k={found.k}, and no data were given to see what that costs"
    kept = keep_accurate(found, [(vector, data.fit) for vector, data in here], config.max_loss)
    if kept.k == found.k:
        return found, ""
    return kept, (
        f"{found.k} directions are more than chance; {kept.k} were removed, because the next one costs a vector more "
        f"than {config.max_loss:g} of its accuracy"
    )


def _label(name: str, data: ContrastData, vector: SteeringVector, backend: Backend, pool: Pool, seed: int) -> _Labelled:
    data.require_contrast()
    halves = split_fractions(data.contrast(), {"fit": 0.5, "held": 0.5}, seed=seed)
    site = _site(vector)
    parts: dict[tuple[str, str], Matrix] = {}
    for half in ("fit", "held"):
        for label in (data.positive, data.negative):
            texts = [one for one in halves[half].examples if one.label == label]
            what = f"{name}: {label} texts ({half} half)"
            parts[half, label] = pooled_states(backend, texts, [site], pool=pool, what=what)[site]
    return _Labelled(
        fit=(parts["fit", data.positive], parts["fit", data.negative]),
        held=(parts["held", data.positive], parts["held", data.negative]),
    )


def read_texts(neutral: Any) -> list[Example]:
    """Return texts of a .txt file (one a line), of a list, or of contrast data, whose labels are ignored.

    Raises:
        InputError: they cannot be read.
    """
    if isinstance(neutral, (str, os.PathLike)) and Path(neutral).suffix == ".txt":
        try:
            lines = Path(neutral).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"neutral texts {str(neutral)!r} cannot be read: {error}") from error
    elif isinstance(neutral, (list, tuple)) and all(isinstance(one, str) for one in neutral):
        lines = list(neutral)
    else:
        return list(load(neutral).examples)
    kept = [line for line in lines if line.strip()]
    return [Example(text=line, label="neutral", question=f"line {index}") for index, line in enumerate(kept)]


def _array(vector: SteeringVector) -> Matrix:
    wide: Matrix = vector.vector.double().numpy()
    return wide


def _clean_one(
    name: str,
    vector: SteeringVector,
    contamination: Contamination | None,
    labelled: _Labelled | None,
    config: CleanConfig,
) -> tuple[SteeringVector, CleanedVector]:
    raw = _array(vector)
    manifold = None
    if config.has_manifold:
        assert labelled is not None
        manifold = task_manifold(
            labelled.fit[0], f"{name} at {vector.site}", kind=config.manifold, m=config.m, ridge=config.ridge,
            seed=config.seed,
        )  # fmt: skip
    found = clean_vector(raw, contamination, manifold, config.blend)
    kept = float(np.linalg.norm(found) / np.linalg.norm(raw))
    if not kept > _LEAST_KEPT:
        raise VectorError(
            f"{name}: cleaning leaves {kept:.1e} of its norm, which is rounding noise and no direction; use a smaller "
            "k or a larger m"
        )
    cosine = float(raw @ found / (np.linalg.norm(raw) * np.linalg.norm(found)))
    recipe = {**vector.recipe, "cleaned": {**to_dict(config), "kept": kept, "cosine": cosine, "raw": vector.digest}}
    direction = torch.from_numpy(found / np.linalg.norm(found)).float()
    # the calibration of the projections was of another direction; that of the states' norms still holds
    cleaned = replace(vector, direction=direction, recipe=recipe, quantiles={})
    before = after = None
    if labelled is not None:
        before, after = (accuracy(one, labelled.fit, labelled.held) for one in (raw, found))
    row = CleanedVector(
        name=name,
        site=str(vector.site),
        path="",
        norm=vector.norm,
        kept=kept,
        cosine=cosine,
        m=None if manifold is None else manifold.m,
        ridge=None if manifold is None else manifold.ridge,
        accuracy_before=before,
        accuracy_after=after,
        n_held_out=0 if labelled is None else sum(map(len, labelled.held)),
    )
    return cleaned, row


def _losses(rows: Sequence[CleanedVector]) -> list[str]:
    said = []
    for row in rows:
        if row.accuracy_before is not None and row.accuracy_after is not None:
            lost = row.accuracy_before - row.accuracy_after
            if lost > _LOST:
                said.append(
                    f"{row.name}: cleaning cost {lost:.3f} of its accuracy ({row.accuracy_before:.3f} to "
                    f"{row.accuracy_after:.3f}): what was removed was part of the concept"
                )
    return said


def _about(
    site: Site,
    found: Contamination | None,
    loaded: Mapping[str, SteeringVector],
    done: Mapping[str, SteeringVector],
    config: CleanConfig,
) -> CleanedSite:
    groups: dict[str, list[Matrix]] = defaultdict(list)
    for name, vector in loaded.items():
        if vector.site == site:
            groups["before"].append(_array(vector))
            groups["after"].append(_array(done[name]))
    several = len(groups["before"]) > 1
    lowest = {key: float(pairwise_cosines(np.stack(rows)).min()) if several else None for key, rows in groups.items()}
    return CleanedSite(
        site=str(site),
        source="none" if found is None else config.source,
        n=0 if found is None else found.n,
        k=0 if found is None else found.k,
        share=0.0 if found is None else found.share,
        p_values=() if found is None else found.p_values,
        route="" if found is None else found.route,
        cosine_before=lowest["before"],
        cosine_after=lowest["after"],
        degeneracy="" if found is None else found.degeneracy,
    )


def _write(directory: Path, done: Mapping[str, SteeringVector], result: Cleaning) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, vector in done.items():
        vector.save(directory / f"{name}.safetensors")
    atomic_write_text(directory / REPORT, to_json(result) + "\n")
