"""Steps of the test on disk: one file for each block of outputs, written whole, never repeated."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_text, safe_name
from trimtab.backends import Backend, Request, Sampling
from trimtab.errors import InputError
from trimtab.evaluate import output_seed
from trimtab.evaluate.effects import MAX_RATIO, MAX_REPETITION, MIN_TOKENS, continuation_perplexities, repetition
from trimtab.evaluate.scorers import Output
from trimtab.steering import Add, Steering, SteeringVector
from trimtab.workflows.stress.sources import Attribute, contrasted

Unit = Literal["token_norm", "absolute", "vector_norm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Outputs of one vector for some seeds; grids are nested lists [strengths, prompts, seeds]."""

    strengths: list[float]
    seeds: tuple[int, int]
    delta: dict[str, list[Any]]
    """By attribute; NaN where there is none."""
    judge: dict[str, list[Any]]
    perplexity: list[Any]
    coherent: list[Any]
    texts: list[Any]
    tokens: int
    seconds: float
    ram_bytes: int
    vram_bytes: int
    reference: float
    """Median perplexity of the unsteered outputs for the same prompts and seeds."""
    about: dict[str, Any] = field(default_factory=dict)

    def grid(self, name: str, attribute: str = "") -> np.ndarray[Any, Any]:
        """Return a grid as an array [strengths, prompts, seeds]."""
        value = getattr(self, name)
        return np.asarray(value[attribute] if attribute else value)


class Blocks:
    """The blocks of a run directory."""

    def __init__(self, path: Path) -> None:
        self._path = path / "blocks"
        self._path.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, Block] = {}

    def get(self, name: str) -> Block | None:
        """Return a block that is there."""
        file = self._path / f"{safe_name(name, 'block')}.json"
        if name not in self._held and file.exists():
            document = dict(jsonio.loads(file.read_bytes(), file))
            try:
                document["seeds"] = tuple(document["seeds"])
                for key in ("delta", "judge"):
                    document[key] = {one: _numbers(grid) for one, grid in document[key].items()}
                document["perplexity"] = _numbers(document["perplexity"])
                document["reference"] = float(document["reference"])
                self._held[name] = Block(**document)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file} is damaged; delete it and go on with the run") from error
        return self._held.get(name)

    def put(self, name: str, block: Block) -> Block:
        """Keep a block."""
        atomic_write_text(self._path / f"{safe_name(name, 'block')}.json", jsonio.dumps(asdict(block)))
        self._held[name] = block
        return block

    def all(self) -> list[Block]:
        """Return every block on disk."""
        found = [self.get(file.stem) for file in sorted(self._path.glob("*.json"))]
        return [one for one in found if one is not None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """Makes blocks: all strengths, prompts and seeds of a vector are rows of one batch."""

    backend: Backend
    prompts: Sequence[str]
    max_tokens: int
    temperature: float
    seed: int
    scale: float
    unit: Unit
    ignore_eos: bool = True

    def make(
        self,
        vectors: Mapping[Any, SteeringVector] | None,
        strengths: Sequence[float],
        seeds: tuple[int, int],
        attributes: Sequence[Attribute],
        *,
        reference: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Block:
        """Generate, and score for the attributes.

        Args:
            vectors: site -> vector; None: unsteered, strength 0.
            strengths: the rows.
            seeds: first seed, and the one after the last.
            attributes: what to score.
            reference: median perplexity of the unsteered outputs; None: these are they.
            about: what else to keep.
        """
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made = self.backend.generate(list(self._requests(vectors, strengths, seeds)))
        seconds = time.perf_counter() - began
        perplexities = continuation_perplexities(
            self.backend, [one.prompt_ids for one in made], [one.token_ids for one in made]
        )
        middle = float(np.median(perplexities)) if reference is None else reference
        shape = (len(strengths), len(self.prompts), seeds[1] - seeds[0])
        outputs = [
            Output(
                question=self.prompts[one.prompt_index],
                text=one.text,
                prompt_ids=one.prompt_ids,
                token_ids=one.token_ids,
            )
            for one in made
        ]
        coherent = [
            is_coherent(one.token_ids, perplexity, middle) for one, perplexity in zip(made, perplexities, strict=True)
        ]

        def grid(values: Sequence[Any]) -> list[Any]:
            listed: list[Any] = np.array(values).reshape(shape).tolist()
            return listed

        return Block(
            strengths=list(strengths),
            seeds=seeds,
            delta={one.name: grid(contrasted(one.delta, one.name, outputs)) for one in attributes},
            judge={one.name: grid(contrasted(one.judge, one.name, outputs)) for one in attributes},
            perplexity=grid(perplexities),
            coherent=grid(coherent),
            texts=grid([one.text for one in made]),
            tokens=sum(len(one.token_ids) for one in made),
            seconds=seconds,
            ram_bytes=peak_ram(),
            vram_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            reference=middle,
            about=dict(about or {}),
        )

    def _requests(self, vectors: Any, strengths: Sequence[float], seeds: tuple[int, int]) -> Any:
        for strength in strengths:
            steering = None if vectors is None else self.steering(vectors, strength)
            for index, prompt in enumerate(self.prompts):
                for sample in range(*seeds):
                    yield Request(
                        prompt=prompt,
                        id=f"{strength:+g}/{sample}",
                        prompt_index=index,
                        steering=steering,
                        max_new_tokens=self.max_tokens,
                        ignore_eos=self.ignore_eos,
                        sampling=Sampling(temperature=self.temperature, seed=output_seed(self.seed, index, sample)),
                        logprobs=None,
                    )

    def steering(self, vectors: Mapping[Any, SteeringVector], strength: float) -> Steering:
        """Return the steering of one strength, at every site of the vectors."""
        factor = self.scale * strength

        def op(vector: SteeringVector) -> Add:
            if self.unit == "vector_norm":
                return Add(vector.direction, scale=factor * vector.norm)
            return Add(vector.direction, scale=factor, unit=self.unit)

        return Steering({str(site): [op(one)] for site, one in vectors.items()}, positions="all")


def is_coherent(ids: Sequence[int], perplexity: float, reference: float) -> bool:
    """Whether an output has at least 10 tokens, repeats at most 0.3 of its 4-grams, and is about as probable as others.

    Args:
        ids: the continuation.
        perplexity: of it, under the unsteered model; at most 1.5 times `reference`.
        reference: median perplexity of the unsteered outputs.
    """
    return len(ids) >= MIN_TOKENS and repetition(ids) <= MAX_REPETITION and perplexity <= MAX_RATIO * reference


def peak_ram() -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _numbers(value: Any) -> Any:
    """Non-finite numbers come back from JSON as text."""
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return float(value)
