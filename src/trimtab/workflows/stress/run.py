"""The scaling test of steering vectors: does more data steer better, how well, at what cost, and where does it end?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trimtab._base import jsonio, provenance
from trimtab._base.files import FileLock, atomic_write_text
from trimtab._base.progress import Progress, progress
from trimtab.backends import Backend, open_backend
from trimtab.directions import random_control
from trimtab.errors import InputError, RecipeError, UnfinishedError
from trimtab.evaluate.scorers import Scorer
from trimtab.results import to_dict
from trimtab.results.stress import Stress, StressPlan
from trimtab.steering import SteeringVector
from trimtab.vectors import extract
from trimtab.vectors.clean.states import pooled_states
from trimtab.vectors.data import ContrastData, Pool
from trimtab.workflows.stress import summary
from trimtab.workflows.stress.figures import f1
from trimtab.workflows.stress.outputs import Block, Blocks, Maker, Unit
from trimtab.workflows.stress.sources import (
    PROMPTS,
    TESTBED_ATTRIBUTES,
    TESTBED_DELTA,
    TESTBED_JUDGE,
    Attribute,
    file_attribute,
    testbed_attribute,
)

SIZES = (2, 4, 8, 16, 32, 64)
STRENGTHS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
PLAN = "stress.json"

Make = Callable[[Backend, ContrastData], Mapping[Any, SteeringVector]]
"""A method of one's own: (model, contrast data) -> a vector a site."""


def stress(
    model: Any = "testbed",
    attributes: Sequence[str] = (),
    *,
    out: str | Path,
    sizes: Sequence[int] = SIZES,
    strengths: Sequence[float] = STRENGTHS,
    prompts: Sequence[str] = (),
    num_prompts: int = 10,
    seeds: int = 4,
    max_seeds: int = 12,
    max_tokens: int = 50,
    temperature: float = 0.2,
    methods: Sequence[str] = ("mean_difference",),
    own_methods: Mapping[str, Make] | None = None,
    sites: str | Sequence[str] = "layers.*.resid_post",
    pool: Pool = "all",
    unit: Unit = "token_norm",
    scale: float = 0.1,
    controls: int = 20,
    data: Mapping[str, Any] | None = None,
    delta: Mapping[str, Scorer] | None = None,
    judge: Mapping[str, Scorer] | None = None,
    label_noise: float = 0.0,
    linear: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    backend: str = "hf",
    device: str | None = None,
    batch_size: int = 240,
    quick: bool = False,
) -> Stress:
    """Make vectors from more and more data, steer with them at every strength, and find where more adds nothing.

    Args:
        model: a directory, a hub id, "testbed", a module, or an open backend, which stays open.
        attributes: what to steer towards; empty: all of `data`, or the testbed's concepts and tones.
        out: directory of the run. The same call goes on where it stopped.
        sizes: examples of each label.
        strengths: multiples of `scale`.
        prompts: openings to continue; empty: ten of the testbed that are no evidence of anything.
        num_prompts: how many of them.
        seeds: outputs of each prompt and strength, to begin with.
        max_seeds: outputs that may be drawn until the knee's intervals are narrow.
        max_tokens: length of a continuation; an end-of-text token does not end it, so that all have as much room for
            evidence.
        temperature: of the sampling.
        methods: methods of `vectors.extract`, side by side.
        own_methods: name -> a function that makes vectors, beside them.
        sites: where vectors are made and added: all of these at once.
        pool: tokens whose states count: "assistant", "last" or "all".
        unit: of `scale`: "token_norm" (a part of each token's norm along the unit direction), "absolute" (hidden
            units), "vector_norm" (multiples of the vector's own length).
        scale: what strength 1 is.
        controls: random directions, steered and scored like the vectors.
        data: name -> contrast data, for other models; a quarter of the questions is held out.
        delta: name -> scorer, whose value minus the mean of the others' is delta.
        judge: name -> scorer on other evidence than delta's.
        label_noise: share of the testbed's training pairs whose labels are exchanged.
        linear: find the knee by a plain scan.
        seed: of texts, samplers, controls and intervals.
        dtype: of the model.
        backend: "hf" or "vllm".
        device: where it runs.
        batch_size: outputs that run together.
        quick: two attributes, two sizes, few outputs: shows that it runs, proves nothing.

    Returns:
        Figures, knee, controls and one sentence; also written to `out` as JSON and CSV.

    Raises:
        InputError: settings that make no sense together, or too few examples.
        RecipeError: `out` holds a run with other settings.
        UnfinishedError: interrupted; finished steps are kept and not repeated.

    Example:
        >>> stress("testbed", ["animal"], out="runs/stress", controls=0).curves[0].knee.sentence
    """
    if quick:
        sizes, num_prompts, seeds, max_seeds, max_tokens, controls = (4, 8, 16), 4, 2, 2, 30, min(controls, 4)
        attributes = tuple(attributes)[:2] or (() if data else ("animal", "cheerful"))
    given = {"dtype": dtype, "batch_size": batch_size} | ({"device": device} if device is not None else {})
    names = tuple(attributes) or tuple(data or TESTBED_ATTRIBUTES)
    texts = tuple(prompts or PROMPTS)[:num_prompts]
    _check(model, sizes, strengths, texts, seeds, max_seeds, temperature, methods, own_methods, data)
    listed = [
        testbed_attribute(name, max(sizes), seed, label_noise)
        if data is None
        else file_attribute(name, _source(data, name), seed, delta or {}, judge or {})
        for name in names
    ]
    for one in listed:
        one.first(max(sizes))  # too few examples are refused before anything runs
    with _opened(model, backend, given) as running:
        plan = StressPlan(
            model=running.model_id,
            model_digest=running.info.weights_digest,
            dtype=running.info.dtype,
            attributes=names,
            methods=(*methods, *(own_methods or {})),
            sizes=tuple(sorted(set(sizes))),
            strengths=tuple(sorted({float(one) for one in strengths})),
            prompts=texts,
            seeds=seeds,
            max_seeds=max_seeds,
            max_tokens=max_tokens,
            temperature=temperature,
            sites=(sites,) if isinstance(sites, str) else tuple(sites),
            pool=pool,
            unit=unit,
            scale=scale,
            controls=controls,
            seed=seed,
            label_noise=label_noise,
            delta=_names(delta) if data else TESTBED_DELTA,
            judge=_names(judge) if data else TESTBED_JUDGE,
        )
        path = _directory(Path(out), plan, running)
        maker = Maker(
            backend=running,
            prompts=texts,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            scale=scale,
            unit=unit,
        )
        steps = 1 + controls + len(listed) * len(plan.methods) * len(plan.sizes)
        with FileLock(path / "stress.lock"), progress("stress", steps) as bar:
            run = _Run(plan, path, maker, {one.name: one for one in listed}, dict(own_methods or {}), bar)
            try:
                run.all()
                result = summary.summarise(path, plan, run.blocks, run.series, linear=linear)
            except KeyboardInterrupt as error:
                raise UnfinishedError(f"{path} was interrupted; go on with the same command again") from error
            run.log(result.conclusion)
    summary.write(result)
    return result


@dataclass(eq=False)
class _Run:
    plan: StressPlan
    path: Path
    maker: Maker
    attributes: dict[str, Attribute]
    own: dict[str, Make]
    bar: Progress

    def __post_init__(self) -> None:
        self.blocks = Blocks(self.path)
        self.vectors: dict[tuple[str, str, int], tuple[Mapping[Any, SteeringVector], dict[str, Any]]] = {}
        self.states: dict[str, dict[bool, dict[Any, Any]]] = {}

    def all(self) -> None:
        """Do every step of the plan with its first seeds."""
        span = (0, self.plan.seeds)
        self.unsteered(span)
        self.bar.advance()
        for method in self.plan.methods:
            for name in self.plan.attributes:
                for size in self.plan.sizes:
                    self.steered(method, name, size, span)
                    self.bar.advance()
        for index in range(self.plan.controls):
            self.random(index, span)
            self.bar.advance()

    def series(self, method: str, size: int, seeds: int) -> list[summary.Parts]:
        """Return the blocks of every attribute, drawing what is missing."""
        spans = [(0, self.plan.seeds)]
        while spans[-1][1] < seeds:
            spans.append((spans[-1][1], min(2 * spans[-1][1], self.plan.max_seeds)))
        return [
            summary.Parts(name, [(self.unsteered(span), self.steered(method, name, size, span)) for span in spans])
            for name in self.plan.attributes
        ]

    def unsteered(self, span: tuple[int, int]) -> Block:
        """The outputs at strength 0, for all attributes."""
        return self._block(
            f"unsteered-{span[0]:03d}", lambda: self.maker.make(None, [0.0], span, list(self.attributes.values()))
        )

    def steered(self, method: str, name: str, size: int, span: tuple[int, int]) -> Block:
        """The outputs of one vector at the other strengths."""

        def make() -> Block:
            vectors, about = self._vectors(method, name, size)
            return self._make(vectors, span, [self.attributes[name]], about)

        return self._block(f"{method}-{name}-{size:04d}-{span[0]:03d}", make)

    def random(self, index: int, span: tuple[int, int]) -> Block:
        """The outputs of one random direction a site, scored for all attributes."""

        def make() -> Block:
            first = next(iter(self.attributes))
            like, _ = self._vectors(self.plan.methods[0], first, self.plan.sizes[-1])
            drawn = {
                site: SteeringVector.of(random_control(one, seed=self.plan.seed * 1_000_003 + 1009 * index + at).vector)
                for at, (site, one) in enumerate(like.items())
            }
            return self._make(drawn, span, list(self.attributes.values()), {})

        return self._block(f"random-{index:03d}-{span[0]:03d}", make)

    def _make(self, vectors: Any, span: tuple[int, int], scored: list[Attribute], about: Mapping[str, Any]) -> Block:
        strengths = [one for one in self.plan.strengths if one != 0]
        reference = self.unsteered(span).reference
        return self.maker.make(vectors, strengths, span, scored, reference=reference, about=about)

    def _block(self, name: str, make: Callable[[], Block]) -> Block:
        found = self.blocks.get(name)
        if found is None:
            self.bar.describe(f"stress {name}")
            found = self.blocks.put(name, make())
            coherent = float(np.mean(found.coherent))
            self.log(f"{name}: {found.tokens} tokens in {found.seconds:.1f} s, {coherent:.0%} coherent")
        return found

    def _vectors(self, method: str, name: str, size: int) -> tuple[Mapping[Any, SteeringVector], dict[str, Any]]:
        key = (method, name, size)
        if key not in self.vectors:
            data = self.attributes[name].first(size)
            began = time.perf_counter()
            if method in self.own:
                made = self.own[method](self.maker.backend, data)
            else:
                made = extract(
                    self.maker.backend,
                    data,
                    method=method,  # type: ignore[arg-type]
                    sites=self.plan.sites,
                    pool=self.plan.pool,  # type: ignore[arg-type]
                    validation=None,
                    num_controls=0,
                    seed=self.plan.seed,
                ).vectors
            seconds = time.perf_counter() - began
            self.vectors[key] = (made, {"extract_seconds": seconds, "f1": self._f1(name, made, data)})
        return self.vectors[key]

    def _f1(self, name: str, vectors: Mapping[Any, SteeringVector], data: ContrastData) -> float:
        """F1 on held-out texts: projections at all sites, each centred and scaled by the training means, and summed."""
        held = self._states(name, tuple(vectors))
        known = self._pooled(data, tuple(vectors))
        scores = {side: np.zeros(len(next(iter(states.values())))) for side, states in held.items()}
        for site, vector in vectors.items():
            unit = vector.direction.double().numpy()
            above, below = (float((known[side][site] @ unit).mean()) for side in (True, False))
            gap = abs(above - below) or 1.0
            for side, states in held.items():
                scores[side] += (states[site] @ unit - (above + below) / 2) / gap
        return f1(
            np.concatenate([scores[True], scores[False]]), [True] * len(scores[True]) + [False] * len(scores[False])
        )

    def _states(self, name: str, sites: tuple[Any, ...]) -> dict[bool, dict[Any, Any]]:
        if name not in self.states or set(self.states[name][True]) != set(sites):
            self.states[name] = self._pooled(self.attributes[name].held_out, sites)
        return self.states[name]

    def _pooled(self, data: ContrastData, sites: tuple[Any, ...]) -> dict[bool, dict[Any, Any]]:
        return {
            side: pooled_states(
                self.maker.backend,
                [one for one in data.examples if one.label == label],
                sites,
                pool=self.plan.pool,  # type: ignore[arg-type]
                what=data.name,
            )
            for side, label in ((True, data.positive), (False, data.negative))
        }

    def log(self, text: str) -> None:
        """Add a line to the log file."""
        with (self.path / "stress.log").open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")


def _check(
    model: Any,
    sizes: Sequence[int],
    strengths: Sequence[float],
    prompts: Sequence[str],
    seeds: int,
    max_seeds: int,
    temperature: float,
    methods: Sequence[str],
    own: Mapping[str, Make] | None,
    data: Mapping[str, Any] | None,
) -> None:
    if not sizes or min(sizes) < 2 or not any(2 * one in sizes for one in sizes):
        raise InputError(f"sizes {list(sizes)}: at least 2 examples a label, and a size with its double, were expected")
    if 0 not in strengths or len(set(strengths)) < 3:
        raise InputError(f"strengths {list(strengths)}: 0 and at least two others were expected")
    if not prompts or not 1 <= seeds <= max_seeds:
        raise InputError(f"{len(prompts)} prompts, {seeds} to {max_seeds} seeds: at least one of each was expected")
    if seeds > 1 and temperature == 0:
        raise InputError(f"{seeds} seeds at temperature 0 are {seeds} times the same; give a temperature, or 1 seed")
    named = [*methods, *(own or {})]
    if not named or len(set(named)) < len(named):
        raise InputError(f"methods {named}: at least one, each once, was expected")
    if data is None and model != "testbed" and not getattr(model, "model_id", "testbed").startswith("testbed"):
        raise InputError(f"model {model!r} needs contrast data and two scorers: give data=, delta= and judge=")


def _source(data: Mapping[str, Any], name: str) -> Any:
    if name not in data:
        raise InputError(f"no data for {name!r}; there is data for {', '.join(data)}")
    return data[name]


def _names(scorers: Mapping[str, Scorer] | None) -> str:
    return ", ".join(one.name for one in (scorers or {}).values())


def _directory(path: Path, plan: StressPlan, backend: Backend) -> Path:
    document = jsonio.plain(to_dict(plan))
    file = path / PLAN
    if file.exists():
        held = dict(jsonio.loads(file.read_bytes(), file)).get("plan", {})
        changed = [name for name, value in document.items() if held.get(name) != value]
        if changed:
            raise RecipeError(
                f"{path} holds a test with other settings ({', '.join(changed)} differ); use another --out"
            )
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{path} cannot be made: {error.strerror}; give another directory") from error
    record = provenance.collect(call={"function": "evaluate.stress"}, backend=backend.provenance())
    atomic_write_text(file, jsonio.dumps({"format_version": 1, "plan": document, "provenance": record}, indent=2))
    return path


@contextmanager
def _opened(model: Any, name: str, options: Mapping[str, Any]) -> Any:
    if hasattr(model, "generate") and hasattr(model, "info"):
        yield model
        return
    running = open_backend(name, model, **options)
    try:
        yield running
    finally:
        running.close()
