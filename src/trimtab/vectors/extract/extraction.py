"""`extract`: one pass over the training examples, every site's vector, and what each separates on held-out ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from trimtab._base import progress as bars
from trimtab._base import provenance
from trimtab._base.files import atomic_write_text
from trimtab.backends import open_backend
from trimtab.errors import InputError
from trimtab.results import to_json
from trimtab.results.vectors import ExtractionReport, SiteEvidence
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.vectors.data import ContrastData, Encoder, Pool, load, split_fractions
from trimtab.vectors.extract.effect import num_texts
from trimtab.vectors.extract.methods import METHODS, Method
from trimtab.vectors.extract.run import Run
from trimtab.vectors.extract.sae import SAE
from trimtab.vectors.extract.stream import Stream, quiet

Choice = Literal["steering", "auc"]
MethodName = Literal["mean_difference", "pca", "logistic", "mass_mean", "lda", "sae"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """Vectors, their controls, and the evidence."""

    vectors: Mapping[Site, SteeringVector]
    """A vector a site, in the order of the forward pass. Its recipe says how it was made and what it separates."""
    controls: Mapping[str, Mapping[Site, SteeringVector]]
    """"random", "covariance" and "shuffled": one vector a site each, as long as the site's own."""
    report: ExtractionReport
    directory: Path | None = field(default=None)

    @property
    def best(self) -> SteeringVector:
        """The vector of the best site.

        Raises:
            InputError: there was nothing to choose by.
        """
        if self.report.best is None:
            raise InputError(
                f"{len(self.vectors)} sites and no held-out examples to choose by; give validation=, or one site"
            )
        return self.vectors[Site.parse(self.report.best)]

    def save(self, directory: str | os.PathLike[str]) -> Extraction:
        """Write `<site>.safetensors` a site, `controls/<kind>/<site>.safetensors`, and `extraction.json`, last.

        Raises:
            InputError: the directory holds an extraction already.
        """
        target = Path(directory)
        _require_free(target)
        for folder, vectors in {
            "": self.vectors,
            **{f"controls/{kind}": one for kind, one in self.controls.items()},
        }.items():
            (target / folder).mkdir(parents=True, exist_ok=True)
            for site, vector in vectors.items():
                vector.save(target / folder / f"{_file_name(site)}.safetensors")
        report = replace(self.report, path=str(target))
        atomic_write_text(target / "extraction.json", to_json(report))
        return replace(self, report=report, directory=target)


def extract(
    model: Any,
    data: Any,
    *,
    method: MethodName = "mean_difference",
    sites: str | Sequence[str] = "layers.*.resid_post",
    pool: Pool = "assistant",
    validation: Any = 0.25,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    num_controls: int = 20,
    choose: Choice = "steering",
    sae: str | os.PathLike[str] | None = None,
    positive: str = "pos",
    negative: str = "neg",
    seed: int = 0,
    progress: bars.Progress | None = None,
) -> Extraction:
    """Make a steering vector at every site from contrast data, and say what each separates.

    Args:
        model: a directory, a hub id, "testbed", a module, or an open Hugging Face backend, which stays open.
        data: contrast data, or what `vectors.load` reads.
        method: how a direction is found; "pca" needs pairs (a positive and a negative of one question), "sae" a file.
        sites: site patterns.
        pool: tokens that count: "assistant" (what the assistant says, and all of a plain text), "last" or "all".
        validation: held-out examples to choose the site by: a share of the questions, contrast data, or None.
        out: directory of the vector files; None writes none.
        dtype: what the model is loaded in; None: float32, or the module's own.
        device: None: the accelerator where there is one.
        batch_size: examples of one forward pass.
        max_length: cut examples after this many tokens.
        num_controls: control directions of each kind, at every site.
        choose: how the best site is found on the held-out examples: "steering", by what adding the vector does to their
            likelihoods (two more passes a site), or "auc", by what the vector separates.
        sae: safetensors file with W_enc [D, latents], b_enc, W_dec [latents, D] and b_dec (and threshold), for "sae".
        positive: label that vectors point towards, when `data` is yet to be read.
        negative: label that they point away from, likewise.
        seed: of the split and the controls.
        progress: told of each finished example; None shows a bar on a terminal.

    Returns:
        Vectors, controls and evidence. All vectors have the length of the labels' distance along them.

    Raises:
        InputError: too few examples for the method (says how many), one label alone, questions in both parts.
        NonFiniteError: a state is not finite; names site and token.
        NotAppliedError: fewer than two activations came from a site.
    """
    chosen = _method(method, sae)
    if choose not in get_args(Choice):
        raise InputError(f"choose is {choose!r}; one of {', '.join(get_args(Choice))} was expected")
    if out is not None:
        _require_free(Path(out))
    everything = load(data, positive=positive, negative=negative).contrast()
    everything.require_contrast()
    train, held_out = _parts(everything, validation, seed, positive, negative)
    _require_enough(train, method, chosen)
    tried = held_out if choose == "steering" else None
    with _opened(model, dtype, device) as backend, ExitStack() as stack:
        stream = Stream(backend, sites, batch_size=batch_size)
        stack.enter_context(quiet(stream.model))
        if progress is None:
            progress = stack.enter_context(
                bars.progress(f"extract {everything.name}", _steps(train, held_out, tried, stream))
            )
        encoder = Encoder(tokenizer=backend.tokenizer, pool=pool, max_length=max_length)
        run = Run(stream, encoder, chosen, sae, num_controls, seed, progress)
        began = time.perf_counter()
        count = run.learn(train)
        seconds = time.perf_counter() - began
        readings, held_count = run.judge(held_out) if held_out is not None else ({}, None)
        effects, why = run.effects(tried) if tried is not None else ({}, "")
        evidence = run.evidence(readings, effects)
        recipe = {"method": method, "pool": pool, "positive": train.positive, "negative": train.negative, "seed": seed}
        about = {
            "model_digest": backend.info.weights_digest,
            "data_hash": train.digest,
            "provenance": provenance.collect(model=backend.model_id, data=train.name, model_dtype=backend.info.dtype),
        }
        best, chosen_by = _best(evidence)
        report = ExtractionReport(
            model=backend.model_id,
            model_digest=backend.info.weights_digest,
            model_dtype=backend.info.dtype,
            data=everything.name,
            data_digest=train.digest,
            method=method,
            pool=pool,
            train=count,
            validation=held_count,
            sites=tuple(evidence.values()),
            best=best,
            chosen_by=chosen_by,
            pass_seconds=seconds,
            notes=(*run.notes(), *([f"{why}; the site was chosen by auc"] if why else [])),
        )
        vectors, controls = run.vectors(evidence, recipe, about), run.controls(recipe, about)
    extraction = Extraction(vectors=vectors, controls=controls, report=report)
    return extraction if out is None else extraction.save(out)


def _require_free(directory: Path) -> None:
    if (directory / "extraction.json").exists():
        raise InputError(f"{directory} holds an extraction already; give another directory, or delete it")


def _steps(train: ContrastData, held_out: ContrastData | None, tried: ContrastData | None, stream: Stream) -> int:
    """Examples that run through the model, those that are steered once a site."""
    read = len(train.examples) + (0 if held_out is None else len(held_out.examples))
    return read + (0 if tried is None else num_texts(tried) * len(stream.sites))


def _method(name: str, sae: Any) -> Method:
    known = {**METHODS, "sae": SAE}
    if name not in known:
        raise InputError(f"method={name!r}; expected one of {', '.join(known)}")
    if (name == "sae") != (sae is not None):
        raise InputError("method 'sae' needs sae=FILE, and the other methods take none")
    return known[name]


def _parts(
    data: ContrastData, validation: Any, seed: int, positive: str, negative: str
) -> tuple[ContrastData, ContrastData | None]:
    """Training and held-out examples, which share no question."""
    if validation is None:
        return data, None
    if isinstance(validation, (int, float)):
        if not 0 < validation < 1:
            raise InputError(f"validation={validation}; a share between 0 and 1, contrast data, or None was expected")
        if len(data.questions) < 2:
            raise InputError(
                f"{data.name} has {len(data.questions)} question, so nothing can be held out; give validation=None, or "
                "contrast data of other questions"
            )
        parts = split_fractions(data, {"train": 1 - validation, "validation": validation}, seed=seed)
        train, held = parts["train"], parts["validation"]
    else:
        train, held = data, load(validation, positive=positive, negative=negative).contrast()
        shared = set(train.questions) & set(held.questions)
        texts = {(one.text, one.messages) for one in train.examples}
        if any((one.text, one.messages) in texts for one in held.examples):
            raise InputError(f"{held.name}: examples of {train.name} are among the validation examples; hold them out")
        if shared and any(one.messages for one in held.examples):
            raise InputError(
                f"{len(shared)} questions are in the training and the validation examples, such as "
                f"{min(shared)!r:.60}; split by question"
            )
    for part in (train, held):
        part.require_contrast()
    return train, held


def _require_enough(data: ContrastData, name: str, method: Method) -> None:
    counts = data.counts
    if method.needs.pairs:
        pairs = len(data.pairs())
        if pairs < method.least:
            raise InputError(
                f"{data.name}: method {name!r} needs at least {method.least} pairs (a {data.positive!r} and a "
                f"{data.negative!r} of one question) to train on; there are {pairs}"
            )
    for label in (data.positive, data.negative):
        if counts.get(label, 0) < method.least:
            raise InputError(
                f"{data.name}: method {name!r} needs at least {method.least} examples of each label to train on; label "
                f"{label!r} has {counts.get(label, 0)}"
            )


def _best(evidence: Mapping[Site, SiteEvidence]) -> tuple[str | None, Literal["steering", "auc", ""]]:
    """The best site, and what it is best by."""
    listed = list(evidence.values())
    if all(one.effect is not None for one in listed):
        return max(listed, key=lambda one: one.effect or 0.0).site, "steering"
    scored = [(one.auc, one.separation or 0.0, one.site) for one in listed if one.auc is not None]
    if scored:
        return max(scored, key=lambda one: one[:2])[2], "auc"
    return (listed[0].site if len(listed) == 1 else None), ""


def _file_name(site: Site) -> str:
    return str(site).replace(":", "_").replace("/", "_")


@contextmanager
def _opened(model: Any, dtype: str | None, device: str | None) -> Iterator[Any]:
    """The backend, closed afterwards when it was opened here."""
    if hasattr(model, "generate") and hasattr(model, "info") and not isinstance(model, nn.Module):
        yield model
        return
    backend = open_backend("hf", model, dtype=dtype, device=device)
    try:
        yield backend
    finally:
        backend.close()
