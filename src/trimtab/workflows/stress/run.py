"""The scaling test of steering vectors: does more data steer better, how well, at what cost, and where does it end?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trimtab._base.files import FileLock
from trimtab._base.progress import Progress, progress
from trimtab.directions import random_control
from trimtab.errors import UnfinishedError
from trimtab.evaluate.scorers import Scorer
from trimtab.results.stress import Stress, StressPlan
from trimtab.steering import SteeringVector
from trimtab.vectors.clean import read_texts
from trimtab.vectors.data import ContrastData, Pool
from trimtab.workflows.stress import begin, summary
from trimtab.workflows.stress.figures import f1
from trimtab.workflows.stress.methods import Make, Workshop, check_methods
from trimtab.workflows.stress.outputs import Block, Blocks, Maker, Unit
from trimtab.workflows.stress.sources import (
    PROMPTS,
    TESTBED_ATTRIBUTES,
    TESTBED_DELTA,
    TESTBED_JUDGE,
    Attribute,
    file_attribute,
    testbed_attribute,
    testbed_neutral,
)

SIZES = (2, 4, 8, 16, 32, 64)
STRENGTHS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)


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
    temperature: float = 0.25,
    methods: Sequence[str] = ("mean_difference",),
    own_methods: Mapping[str, Make] | None = None,
    sites: str | Sequence[str] = "layers.*.resid_post",
    pool: Pool = "all",
    unit: Unit = "token_norm",
    scale: float = 0.1,
    controls: int = 100,
    data: Mapping[str, Any] | None = None,
    delta: Mapping[str, str | Scorer] | None = None,
    judge: Mapping[str, str | Scorer] | None = None,
    judge_settings: Mapping[str, Any] | None = None,
    neutral: Any = None,
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
        methods: ways to make a vector, side by side: those of `vectors.extract`, "raw" (the mean of the positive
            states), "contamination", "manifold" and "dual" (the mean difference, cleaned), "trained" (BiPO).
        own_methods: name -> a function that makes vectors, beside them.
        sites: where vectors are made and added: all of these at once.
        pool: tokens whose states count: "assistant", "last" or "all".
        unit: of `scale`: "token_norm" (a part of each token's norm along the unit direction), "absolute" (hidden
            units), "vector_norm" (multiples of the vector's own length).
        scale: what strength 1 is.
        controls: random directions, steered and scored like the vectors.
        data: name -> contrast data, for other models; a quarter of the questions is held out.
        delta: name -> scorer, or its text as in `evaluate.score`, whose value minus the mean of the others' is delta.
        judge: name -> scorer on other evidence than delta's, likewise.
        judge_settings: of scorers that are the text "judge"; {attribute} in their rubric is the name.
        neutral: texts about nothing in particular, from which "contamination" and "dual" learn; the testbed has some.
        label_noise: share of the testbed's training pairs whose labels are exchanged, spread evenly.
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
    begin.check(model, sizes, strengths, texts, seeds, max_seeds, temperature, data)
    plain = (
        testbed_neutral(seed) if neutral is None and data is None else [] if neutral is None else read_texts(neutral)
    )
    check_methods(methods, own_methods or {}, plain)
    listed = [
        testbed_attribute(name, max(sizes), seed, label_noise)
        if data is None
        else file_attribute(name, begin.source(data, name), seed, delta or {}, judge or {})
        for name in names
    ]
    for one in listed:
        one.first(max(sizes))  # too few examples are refused before anything runs
    with begin.opened(model, backend, given) as running:
        listed = [begin.parsed(one, running, judge_settings or {}) for one in listed]
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
            delta=TESTBED_DELTA if data is None else begin.names(listed[0].delta),
            judge=TESTBED_JUDGE if data is None else begin.names(listed[0].judge),
        )
        path = begin.directory(Path(out), plan, running)
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
            own = dict(own_methods or {})
            workshop = Workshop(running, sites=plan.sites, pool=pool, seed=seed, neutral=plain, own=own)
            run = _Run(plan, path, maker, {one.name: one for one in listed}, workshop, bar)
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
    workshop: Workshop
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
            made = self.workshop.make(method, self.attributes[name], data)
            seconds = time.perf_counter() - began
            self.vectors[key] = (made, {"extract_seconds": seconds, "f1": self._f1(name, made, data)})
        return self.vectors[key]

    def _f1(self, name: str, vectors: Mapping[Any, SteeringVector], data: ContrastData) -> float:
        """F1 on held-out texts: projections at all sites, each centred and scaled by the training means, and summed."""
        held = self._states(name, tuple(vectors))
        known = self.workshop.pooled(data, tuple(vectors))
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
            self.states[name] = self.workshop.pooled(self.attributes[name].held_out, sites)
        return self.states[name]

    def log(self, text: str) -> None:
        """Add a line to the log file."""
        with (self.path / "stress.log").open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
