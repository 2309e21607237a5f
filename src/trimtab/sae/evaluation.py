"""evaluate: autoencoders of one site on one fixed set, with and without the model around them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab._base.files import atomic_write_text
from trimtab._base.progress import progress
from trimtab.errors import InputError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.sae_evaluation import PrecisionReport, SAEEvaluation, SAEScore, Splice
from trimtab.sae._data import UNKNOWN_SITE, Data, opened
from trimtab.sae._examples import choose, examples_of
from trimtab.sae._matched import matched
from trimtab.sae._sets import EvaluationSet, ModelSet, gathered
from trimtab.sae._splice import splices
from trimtab.sae._tally import Spread, Tally, decoder_cosines
from trimtab.sae.files import load, members
from trimtab.sae.model import SAE

SUMMARY = "evaluation.json"
_WATCHED = 4096
Source = SAE | str | os.PathLike[str]


def evaluate(
    saes: Source | Sequence[Source] | Mapping[str, Source],
    data: Any = None,
    *,
    model: Any = "testbed",
    site: str | None = None,
    target_site: str | None = None,
    tokens: int = 20_000,
    max_length: int = 128,
    skip_texts: int = 0,
    splice: bool = True,
    latents: int | Sequence[int] = 12,
    examples: int = 5,
    precision: Sequence[PrecisionReport | str | os.PathLike[str]] = (),
    seed: int = 0,
    backend: str = "hf",
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 8,
    allow_fallback: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> SAEEvaluation:
    """Evaluate autoencoders of one site on one fixed set of activations.

    Every figure has one definition, whatever trained the autoencoder: the FVU has the global mean of the set in its
    denominator, L0 counts latents above 0, and tokens that begin every text are left out and counted. The model's loss
    is measured with reconstructions put in its place by an `Edit` at the site.

    Args:
        saes: autoencoders, what `load` reads, or directories of trainings, of which all are taken; with a mapping,
            name -> one autoencoder.
        data: texts (a file, a list, `datasets:NAME`), a Trace or its directory, or a tensor [rows, d_in] (a pair of
            tensors for a transcoder), or an `ActivationSource`. None: documents of the embedded model's grammar that a
            default training never saw. Of a trace every row counts: capture it from position 1 on where a token begins
            every text.
        model: what runs the texts; an open backend, or what `open_backend` takes. Not used for a trace or a tensor.
        site: where activations are taken; None: the autoencoders' own.
        target_site: where the target of a transcoder is taken; None: its own.
        tokens: rows at most.
        max_length: texts are cut after this many tokens.
        skip_texts: texts to pass over first.
        splice: measure cross entropy and KL with the reconstruction in the model, which needs texts.
        latents: how many latents to show, spread over the densities, or which.
        examples: strongest firings to show of each.
        precision: precision reports to show with it, or their JSON files.
        seed: of intervals and samples.
        backend: "hf" or "mock"; vLLM runs no `Edit`.
        dtype: of the model.
        device: of model and autoencoders.
        batch_size: texts that run together.
        allow_fallback: steer a model that is known by its structure only.
        out: directory for `evaluation.json`; None writes nothing.

    Returns:
        The evaluation.

    Raises:
        InputError: no autoencoder, no site, nothing to evaluate on, or activations that are all equal.
        VectorError: an autoencoder of another width than the site; names both.
        NonFiniteError: an activation is NaN or infinite; names text and token.

    Example:
        >>> found = evaluate("runs/sae/final", model="testbed")  # doctest: +SKIP
    """
    named, files = _named(saes)
    where, target = _sites(named, site, target_site)
    reports = tuple(map(_report, precision))
    options: dict[str, Any] = {"dtype": dtype, "device": device, "batch_size": batch_size}
    asked = Data(
        data=data,
        model=model,
        site=where,
        target=target,
        tokens=tokens,
        max_length=max_length,
        skip_texts=skip_texts,
        backend=backend,
        options=options | ({"allow_fallback": True} if allow_fallback else {}),
    )
    with opened(asked) as (rows, running):
        device = device or ("cpu" if running is None else running.info.device)
        moved = {name: one.to(device=device) for name, one in named.items()}
        spread, tallies = _measure(rows, moved, latents, examples, seed)
        spliced: dict[str, Splice] = {}
        if splice and isinstance(rows, ModelSet):
            with progress("splice", len(rows.contexts)) as bar:
                spliced = splices(rows, moved, spread.mean, seed=seed, progress=bar)
        totals, scores = spread.totals(), []
        for name, tally in tallies.items():
            shown = examples_of(tally, rows, choose(tally, latents), examples)
            scores.append(_score(name, files[name], tally, totals, spread.rows, spliced.get(name), shown, seed))
        result = SAEEvaluation(
            model="" if running is None else running.model_id,
            model_digest="" if running is None else running.info.weights_digest,
            model_dtype="" if running is None else running.info.dtype,
            site=where,
            target_site=target,
            data=rows.name,
            data_digest=rows.digest,
            texts=spread.texts,
            tokens=int(spread.rows.sum()),
            left_out=dict(rows.left_out),
            seed=seed,
            scores=tuple(scores),
            matched=matched(scores),
            precision=reports,
            path="" if out is None else str(out),
            warnings=_warnings(rows, spliced, splice),
        )
    if out is not None:
        _write(Path(out), result)
    return result


def _named(saes: Source | Sequence[Source] | Mapping[str, Source]) -> tuple[dict[str, SAE], dict[str, str]]:
    """Return name -> autoencoder, and name -> where its file is."""
    if isinstance(saes, Mapping):
        pairs = list(saes.items())
    else:
        given = [saes] if isinstance(saes, (SAE, str, os.PathLike)) else list(saes)
        listed: list[Source] = []
        for one in given:
            listed += [one] if isinstance(one, SAE) else members(one) or [one]
        pairs = [(_label(one, number), one) for number, one in enumerate(listed)]
    if not pairs:
        raise InputError("no autoencoder was given; give at least one, such as a directory of cfg.json and weights")
    named, files = {}, {}
    for name, one in pairs:
        label, number = name, 2
        while label in named:
            label, number = f"{name} ({number})", number + 1
        named[label] = load(one)
        files[label] = "" if isinstance(one, SAE) else os.fspath(one)
    widths = {(one.d_in, one.d_out) for one in named.values()}
    if len(widths) > 1:
        shown = ", ".join(f"{name}: {one.d_in} to {one.d_out}" for name, one in named.items())
        raise VectorError(f"the autoencoders have different widths ({shown}); evaluate those of one site together")
    return named, files


def _label(one: Source, number: int) -> str:
    if isinstance(one, SAE):
        return str(one.about.get("name") or f"{one.trained_as} {number}")
    path = Path(one)
    return path.parent.name if path.name in ("final", "sae") or path.suffix else path.name


def _sites(named: Mapping[str, SAE], site: str | None, target: str | None) -> tuple[str, str]:
    known = {one.site for one in named.values() if one.site}
    if site is None and len(known) > 1:
        raise InputError(f"the autoencoders are of {', '.join(sorted(known))}; evaluate those of one site together")
    where = site or next(iter(known), UNKNOWN_SITE)
    targets = {one.target_site for one in named.values() if one.target_site}
    return where, target or next(iter(targets), where)


def _measure(
    rows: EvaluationSet, saes: Mapping[str, SAE], latents: int | Sequence[int], examples: int, seed: int
) -> tuple[Spread, dict[str, Tally]]:
    spread = Spread()
    tallies = {name: Tally(one, _watched(one, latents, seed), examples) for name, one in saes.items()}
    with torch.no_grad(), progress("activations") as bar:
        for parts in gathered(rows.parts()):
            for part in parts:
                spread.add(part)
            for name, tally in tallies.items():
                _check_widths(name, tally.sae, parts[0].x, parts[0].y)
                tally.add(parts)
            bar.advance(len(parts))
    if not tallies[next(iter(tallies))].rows:
        raise InputError(f"{rows.name} has no token that counts; give other data")
    return spread, tallies


def _check_widths(name: str, sae: SAE, x: Tensor, y: Tensor) -> None:
    if (x.shape[1], y.shape[1]) != (sae.d_in, sae.d_out):
        raise VectorError(
            f"{name} maps width {sae.d_in} to {sae.d_out}, and the activations have {x.shape[1]} and {y.shape[1]}; "
            "give the site that it was trained at"
        )


def _watched(sae: SAE, latents: int | Sequence[int], seed: int) -> Tensor:
    """Latents whose firings are kept: those asked for, else all, or a sample of many."""
    if not isinstance(latents, int):
        wrong = [one for one in latents if not 0 <= one < sae.d_sae]
        if wrong:
            raise InputError(f"latent {wrong[0]} was asked for; there are 0 to {sae.d_sae - 1}")
        return torch.tensor(sorted(set(latents)), dtype=torch.int64)
    if sae.d_sae <= _WATCHED:
        return torch.arange(sae.d_sae)
    return torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))[:_WATCHED].sort().values


def _score(
    name: str,
    file: str,
    tally: Tally,
    totals: Tensor,
    rows: Tensor,
    spliced: Splice | None,
    shown: Any,
    seed: int,
) -> SAEScore:
    sae, densities = tally.sae, tally.densities()
    fvu, l0 = tally.fvu(totals, seed), tally.l0(rows, seed)
    warnings = []
    if l0.value == 0:
        warnings.append("no latent ever fires")
    if fvu.value >= 1:
        warnings.append("it explains nothing: the mean of the set is a better reconstruction")
    if densities.dead_share > 0.5:
        warnings.append(f"{densities.dead:,} of {sae.d_sae:,} latents never fire on {tally.rows:,} tokens")
    own = sae.about.get("precision")
    return SAEScore(
        name=name,
        path=file,
        family=str(sae.about.get("family") or (f"{sae.trained_as}, {own}" if own else sae.trained_as)),
        architecture=sae.trained_as,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        d_out=sae.d_out,
        fvu=fvu,
        l0=l0,
        cosine=tally.cosine,
        l2_ratio=tally.l2_ratio,
        bias=tally.bias,
        densities=densities,
        decoder=decoder_cosines(sae, seed),
        splice=spliced,
        latents=shown,
        warnings=tuple(warnings),
    )


def _report(one: PrecisionReport | str | os.PathLike[str]) -> PrecisionReport:
    if isinstance(one, PrecisionReport):
        return one
    try:
        return from_json(PrecisionReport, Path(one).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(one)} cannot be read: {error}") from error


def _warnings(rows: EvaluationSet, spliced: Mapping[str, Splice], splice: bool) -> tuple[str, ...]:
    found = []
    if splice and not spliced:
        found.append(f"cross entropy and KL were not measured: {rows.name} is no text that a model runs")
    if any(not math.isfinite(one.recovered.value) for one in spliced.values()):
        found.append("zeros at the site lose nothing, so there is no share of the loss to recover")
    return tuple(found)


def _write(folder: Path, result: SAEEvaluation) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / SUMMARY, to_json(result) + "\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
