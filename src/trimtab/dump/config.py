"""What a dump records: one frozen description, which also travels through environment variables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.sites import SitePattern, split_patterns
from trimtab.trace import Level

PARTS = ("inputs", "outputs", "gradients", "loss", "params", "param_grads", "optimizer", "buffers", "rng", "lr")
"""Everything that a dump can hold; `gradients` are those of activations."""
EXPECTED = {
    "sglang": ("input_ids", "positions"),
    "megatron": ("input_ids", "cu_seqlens_q", "cu_seqlens_kv", "qkv_format"),
}
"""Fields that each phase must hold, by the name of the framework."""
PREFIX = "TRIMTAB_DUMP"


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpConfig:
    """What is recorded, and where."""

    out: str
    """Directory of the trace; each process writes its own folder there."""
    tag: str = "baseline"
    """Which side of a comparison this run is."""
    level: Level = "values"
    parts: tuple[str, ...] = PARTS
    """What is recorded, of `PARTS`."""
    sites: tuple[str, ...] = ()
    """Site patterns; in `module:` sites `*` stands for any text. Empty: every module."""
    depth: int | None = None
    """Modules at most so many levels below the model; 0 is the model alone."""
    classes: tuple[str, ...] = ()
    """Names of module classes; empty: any."""
    steps: str = ""
    """Steps to record: `3`, `0:10`, `0:1000:100`, several separated by commas. Empty: all."""
    phase: str = ""
    """Name of the phase; empty: told from grad mode and train mode."""
    ring: int = 0
    """Keep so many steps in memory, and write them when a NaN or Inf appears or an exception ends the run."""
    max_bytes: int | None = None
    """Most bytes of tensors that a process stores; then it stops recording and says so."""
    max_seconds: float | None = None
    """Most seconds that a process spends on recording; then it stops recording and says so."""
    expect: tuple[str, ...] = ()
    """Names that each phase must hold, or one of `EXPECTED`."""
    only: tuple[str, ...] = ()
    """Identities of the records to keep, as `diverged` returns them. Empty: all."""

    def __post_init__(self) -> None:
        if not self.out or "://" in self.out:
            raise InputError(f"out={self.out!r}: a dump is written to a directory of a local or shared file system")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise InputError(f"parts={unknown or self.parts!r}: choose some of {', '.join(PARTS)}")
        for name in ("depth", "ring", "max_bytes", "max_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name}={value!r}: a number from 0 was expected")
        for pattern in self.sites:
            SitePattern.parse(pattern)
        StepRange.parse(self.steps)

    @classmethod
    def make(cls, out: str | os.PathLike[str], **given: Any) -> DumpConfig:
        """Build a config from what a caller writes: one text or several, None for what is left out."""
        values = {name: value for name, value in given.items() if value is not None}
        for name in ("parts", "classes", "expect"):
            if isinstance(values.get(name), str):
                values[name] = values[name].replace(",", " ").split()
        if isinstance(values.get("sites"), str):
            values["sites"] = split_patterns(values["sites"])
        steps = values.get("steps", "")
        if not isinstance(steps, str):
            values["steps"] = _steps_text(steps)
        for name in ("parts", "classes", "expect", "sites", "only"):
            if name in values:
                values[name] = tuple(str(one) for one in values[name])
        expect = values.get("expect", ())
        if len(expect) == 1 and expect[0] in EXPECTED:
            values["expect"] = EXPECTED[expect[0]]
        return cls(out=os.fspath(out), **values)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> DumpConfig | None:
        """Read `TRIMTAB_DUMP=DIR` and `TRIMTAB_DUMP_<FIELD>`; None when dumping is off.

        Raises:
            InputError: an unknown variable, or a value that cannot be read.
        """
        out = environment.get(PREFIX, "")
        if out in ("", "0"):
            return None
        known = {_variable(one.name): one.name for one in fields(cls) if one.init and one.name not in ("out", "only")}
        values: dict[str, Any] = {}
        for name, text in environment.items():
            if not name.startswith(f"{PREFIX}_") or name == f"{PREFIX}_ONLY":
                continue
            if name not in known:
                raise InputError(f"{name} is not known; there are {', '.join(known)}")
            values[known[name]] = _number(name, text) if known[name] in _NUMBERS else text
        listed = environment.get(f"{PREFIX}_ONLY")
        if listed:
            values["only"] = Path(listed).read_text(encoding="utf-8").splitlines()
        return cls.make(out, **values)

    def to_environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads; `only` is a file, which the caller writes."""
        found = {PREFIX: self.out}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.init and one.name not in ("out", "only") and value != one.default:
                found[_variable(one.name)] = " ".join(value) if isinstance(value, tuple) else str(value)
        return found


_NUMBERS: dict[str, Callable[[str], int | float]] = {"depth": int, "ring": int, "max_bytes": int, "max_seconds": float}


class StepRange:
    """Steps that are recorded."""

    def __init__(self, ranges: tuple[tuple[int, int | None, int], ...]) -> None:
        self._ranges = ranges

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """Read `3`, `0:10`, `0:1000:100`, several separated by commas; empty is every step.

        Raises:
            InputError: not such a text.
        """
        ranges: list[tuple[int, int | None, int]] = []
        for part in text.replace(" ", "").split(",") if text.strip() else ():
            pieces = part.split(":")
            try:
                first = int(pieces[0] or 0)
                last = first + 1 if len(pieces) == 1 else int(pieces[1]) if pieces[1] else None
                stride = int(pieces[2]) if len(pieces) == 3 else 1
                if len(pieces) > 3 or stride < 1 or first < 0:
                    raise ValueError
            except ValueError:
                raise InputError(f"steps={text!r}: {part!r} is no step; write 3, 0:10 or 0:1000:100") from None
            ranges.append((first, last, stride))
        return cls(tuple(ranges) or ((0, None, 1),))

    def __contains__(self, step: int) -> bool:
        return any(
            step >= first and (last is None or step < last) and not (step - first) % stride
            for first, last, stride in self._ranges
        )


def _steps_text(steps: range | int | Iterable[int]) -> str:
    if isinstance(steps, int):
        return str(steps)
    if isinstance(steps, range):
        return f"{steps.start}:{steps.stop}:{steps.step}"
    return ",".join(str(int(step)) for step in steps)


def _variable(name: str) -> str:
    return f"{PREFIX}_{name.upper()}"


def _number(name: str, text: str) -> int | float:
    kind = _NUMBERS[name.removeprefix(f"{PREFIX}_").lower()]
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: a number was expected") from None
