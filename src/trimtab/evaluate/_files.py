"""A rollout run on disk: its plan, the steerings, and one line per output, appended chunk by chunk.

rollouts.json          plan: model, variants, prompts, sampling, provenance; written first
steering/*.safetensors the steerings, named by their digests
rollouts.jsonl         one line per output, in the order of the plan; a chunk is written whole or is repeated
rollouts.lock          held by the process that runs it
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trimtab._base import jsonio
from trimtab._base.files import atomic_write_text
from trimtab.backends import Message, Prompt
from trimtab.errors import InputError, RecipeError
from trimtab.evaluate.variants import Variant
from trimtab.results.evaluation import RolloutRun, VariantState
from trimtab.steering import Steering

FORMAT_VERSION = 1  # 1: first version
PLAN, LINES = "rollouts.json", "rollouts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One output of one variant."""

    variant: str
    prompt: int
    """Index of the prompt in the plan."""
    sample: int
    seed: int
    """Of this output's own sampler: the same for every variant, so that variants are paired."""
    text: str
    """The continuation alone."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    stop: str
    seconds: float
    """This output's part of the time of its chunk."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from the others."""
        return (self.variant, self.prompt, self.sample)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """What a run is to do; frozen when its directory is made."""

    model: str
    model_digest: str
    backend: str
    dtype: str
    prompts: tuple[Prompt, ...]
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    no_system: bool
    ignore_eos: bool
    chunk: int

    @property
    def per_variant(self) -> int:
        """Outputs of one variant."""
        return len(self.prompts) * self.samples


@dataclass(frozen=True, slots=True)
class RolloutFiles:
    """One run directory."""

    path: Path
    plan: RolloutPlan
    variants: tuple[Variant, ...]

    @property
    def expected(self) -> int:
        """Outputs of the whole run."""
        return len(self.variants) * self.plan.per_variant

    def append(self, chunk: Sequence[Rollout]) -> None:
        """Add a chunk of outputs, durably."""
        names = [one.name for one in fields(Rollout)]  # `asdict` would copy every token
        text = "".join(jsonio.dumps({name: getattr(one, name) for name in names}) + "\n" for one in chunk)
        with (self.path / LINES).open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def rows(self) -> list[Rollout]:
        """Return the outputs so far; a last line that was cut off is passed over.

        Raises:
            InputError: a line before the last is damaged.
        """
        found, _ = self._read()
        return found

    def committed(self) -> list[Rollout]:
        """Cut off what an interrupted chunk left behind, and return the outputs of whole chunks.

        The caller holds the lock.
        """
        found, ends = self._read()
        whole = len(found)
        if whole < self.expected:
            whole -= whole % self.plan.chunk
        lines = self.path / LINES
        size = ends[whole - 1] if whole else 0
        if lines.exists() and lines.stat().st_size != size:
            os.truncate(lines, size)
        return found[:whole]

    def _read(self) -> tuple[list[Rollout], list[int]]:
        lines = self.path / LINES
        found: list[Rollout] = []
        ends: list[int] = []
        data = lines.read_bytes() if lines.exists() else b""
        position = 0
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            position += len(line)
            if not line.endswith(b"\n"):
                break
            try:
                row = dict(jsonio.loads(line))
                for name in ("prompt_ids", "token_ids"):
                    row[name] = tuple(row[name])
                found.append(Rollout(**row))
            except (InputError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{lines}: line {number} is damaged; delete it and go on with the run") from error
            ends.append(position)
        return found, ends

    def state(self) -> RolloutRun:
        """Return what the directory holds now."""
        rows = self.rows()
        counts: dict[str, int] = {}
        for row in rows:
            counts[row.variant] = counts.get(row.variant, 0) + 1
        plan = self.plan
        return RolloutRun(
            path=str(self.path),
            model=plan.model,
            backend=plan.backend,
            dtype=plan.dtype,
            seed=plan.seed,
            samples=plan.samples,
            num_prompts=len(plan.prompts),
            max_tokens=plan.max_tokens,
            temperature=plan.temperature,
            variants=tuple(_state(one, plan.per_variant, counts.get(one.name, 0)) for one in self.variants),
            tokens=sum(len(row.token_ids) for row in rows),
            seconds=sum(row.seconds for row in rows),
            finished=len(rows) == self.expected,
            next_command=f"trimtab evaluate score {self.path}",
        )


def create(
    path: Path, plan: RolloutPlan, variants: tuple[Variant, ...], provenance: dict[str, Any], *, resume: bool
) -> RolloutFiles:
    """Make the directory of a run, or take up one with the same plan.

    Raises:
        RecipeError: it holds a run with another plan, `resume` is False and it exists, or it cannot be made.
    """
    document = _document(plan, variants)
    if (path / PLAN).exists():
        held = dict(jsonio.loads((path / PLAN).read_bytes(), path / PLAN))
        changed = [name for name in ("plan", "variants") if held.get(name) != document[name]]
        if changed and held.get("plan") is not None:
            old, new = held["plan"], document["plan"]
            names = [name for name in new if new[name] != old.get(name)] or ["variants"]
            raise RecipeError(
                f"{path} holds rollouts with other settings ({', '.join(names)} differ); use another --out"
            )
        if not resume:
            raise RecipeError(f"{path} already holds these rollouts; use another --out, or leave resume on")
        return RolloutFiles(path, plan, variants)
    try:
        (path / "steering").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{path} cannot be made: {error.strerror}; give another directory") from error
    for one in variants:
        if one.steering is not None:
            one.steering.save(path / "steering" / f"{one.steering.digest}.safetensors")
    atomic_write_text(path / PLAN, jsonio.dumps({**document, "provenance": provenance}, indent=2))
    return RolloutFiles(path, plan, variants)


def load(path: str | Path) -> RolloutFiles:
    """Open the directory of a run.

    Raises:
        InputError: it holds no rollouts, or those of a newer version.
    """
    run = Path(path)
    try:
        text = (run / PLAN).read_bytes()
    except OSError as error:
        raise InputError(f"{run} is not the directory of rollouts: it has no readable {PLAN}") from error
    document = dict(jsonio.loads(text, run / PLAN))
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{run / PLAN} has format version {version}; this trimtab reads {FORMAT_VERSION}: update it")
    try:
        plan = dict(document["plan"])
        prompts = tuple(_prompt(one) for one in plan.pop("prompts"))
        variants = tuple(_variant(dict(one), run) for one in document["variants"])
        return RolloutFiles(run, RolloutPlan(prompts=prompts, **plan), variants)
    except (KeyError, TypeError) as error:
        raise InputError(f"{run / PLAN} is damaged: {error}; run the rollouts again elsewhere") from error


def _document(plan: RolloutPlan, variants: Iterable[Variant]) -> dict[str, Any]:
    described = [
        {
            "name": one.name,
            "group": one.group,
            "scale": one.scale,
            "unit": one.unit,
            "system": one.system,
            "steering": "" if one.steering is None else one.steering.digest,
        }
        for one in variants
    ]
    document = {
        "format_version": FORMAT_VERSION,
        "kind": "rollouts",
        "plan": asdict(plan),
        "variants": described,
    }
    plain: dict[str, Any] = jsonio.plain(document)
    return plain


def _variant(document: dict[str, Any], run: Path) -> Variant:
    digest = document.pop("steering")
    steering = Steering.load(run / "steering" / f"{digest}.safetensors") if digest else None
    return Variant(steering=steering, **document)


def _prompt(given: Any) -> Prompt:
    if isinstance(given, str):
        return given
    if given and isinstance(given[0], dict):
        return tuple(Message(**one) for one in given)
    return tuple(given)


def _state(variant: Variant, expected: int, done: int) -> VariantState:
    steering = variant.steering
    return VariantState(
        name=variant.name,
        group=variant.group,
        scale=variant.scale,
        unit=variant.unit,
        steering="" if steering is None else steering.describe(),
        steering_digest="" if steering is None else steering.digest,
        system=variant.system,
        expected=expected,
        done=done,
    )
