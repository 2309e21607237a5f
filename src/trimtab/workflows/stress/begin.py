"""Beginning a scaling test: settings that make sense, scorers, the model, and the directory of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab._base import jsonio, provenance
from trimtab._base.files import atomic_write_text
from trimtab.backends import Backend, open_backend
from trimtab.errors import InputError, RecipeError
from trimtab.evaluate.scorers import Scorer
from trimtab.evaluate.scorers.parse import parse_scorer
from trimtab.results import to_dict
from trimtab.results.stress import StressPlan
from trimtab.workflows.stress.sources import Attribute

PLAN = "stress.json"


def check(
    model: Any,
    sizes: Sequence[int],
    strengths: Sequence[float],
    prompts: Sequence[str],
    seeds: int,
    max_seeds: int,
    temperature: float,
    data: Mapping[str, Any] | None,
) -> None:
    """Refuse settings that make no sense together.

    Raises:
        InputError: which, and what would.
    """
    if not sizes or min(sizes) < 2 or not any(2 * one in sizes for one in sizes):
        raise InputError(f"sizes {list(sizes)}: at least 2 examples a label, and a size with its double, were expected")
    if 0 not in strengths or len(set(strengths)) < 3:
        raise InputError(f"strengths {list(strengths)}: 0 and at least two others were expected")
    if not prompts or not 1 <= seeds <= max_seeds:
        raise InputError(f"{len(prompts)} prompts, {seeds} to {max_seeds} seeds: at least one of each was expected")
    if seeds > 1 and temperature == 0:
        raise InputError(f"{seeds} seeds at temperature 0 are {seeds} times the same; give a temperature, or 1 seed")
    name = str(getattr(model, "model_id", model))
    if data is None and not name.startswith("testbed"):
        raise InputError(f"model {name!r} needs contrast data and two scorers: give data=, delta= and judge=")


def source(data: Mapping[str, Any], name: str) -> Any:
    """Return the data of an attribute.

    Raises:
        InputError: there are none.
    """
    if name not in data:
        raise InputError(f"no data for {name!r}; there is data for {', '.join(data)}")
    return data[name]


def parsed(one: Attribute, backend: Backend, settings: Mapping[str, Any]) -> Attribute:
    """Return the attribute with scorers where it had their texts."""

    def parse(scorers: Mapping[str, str | Scorer]) -> dict[str, Scorer]:
        return {
            name: parse_scorer(text, lambda: backend, _filled(settings, name)) if isinstance(text, str) else text
            for name, text in scorers.items()
        }

    return replace(one, delta=parse(one.delta), judge=parse(one.judge))


def _filled(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    rubric = settings.get("rubric")
    return {**settings, "rubric": rubric.replace("{attribute}", name)} if isinstance(rubric, str) else dict(settings)


def names(scorers: Mapping[str, Scorer]) -> str:
    """Return what scores which attribute."""
    return ", ".join(f"{name}: {one.name}" for name, one in scorers.items())


def directory(path: Path, plan: StressPlan, backend: Backend) -> Path:
    """Make the directory of a run, or find it with the same plan.

    Raises:
        RecipeError: it cannot be made, or holds another plan.
    """
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
def opened(model: Any, name: str, options: Mapping[str, Any]) -> Iterator[Backend]:
    """Give the backend, closed afterwards when it was opened here."""
    if hasattr(model, "generate") and hasattr(model, "info"):
        yield model
        return
    running = open_backend(name, model, **options)
    try:
        yield running
    finally:
        running.close()
