"""`trimtab dump -- CMD`: run a program with dumping on, and say what was recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from trimtab.dump import _manifest
from trimtab.dump.config import DumpConfig
from trimtab.dump.only import diverged
from trimtab.errors import InputError, TraceError
from trimtab.results import Comparison
from trimtab.results.comparison import RecordKey
from trimtab.trace import Level, Trace

DUMP_VERSION = 1  # 1: first version
_PROOF = ("loss", "outputs")


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpCount:
    """Records of one phase in one process."""

    phase: str
    rank: int
    steps: tuple[int, ...]
    records: int
    fewest: int
    """Records of the step that has the fewest; `left` is no step of the program."""
    most: int
    left: int = 0
    """Records of the last number in `steps` when no pass ran in it: the parameters that the last update left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObserverProof:
    """Whether recording changed the run."""

    equal: bool
    losses: int
    outputs: int
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpRun:
    """What a program recorded."""

    format_version: int = DUMP_VERSION
    passed: bool
    reason: str
    out: str
    tag: str
    level: str
    returncode: int
    counts: tuple[DumpCount, ...]
    not_hooked: tuple[str, ...]
    missing: tuple[str, ...]
    """Expected names that a phase does not hold."""
    proof: ObserverProof | None = None
    finished: bool = True

    def __str__(self) -> str:
        lines = [f"{'PASSED' if self.passed else 'FAILED'}: {self.reason}", f"{self.out}: {self.tag}, {self.level}"]
        for one in self.counts:
            each = str(one.most) if one.fewest == one.most else f"{one.fewest} to {one.most}"
            ran = one.steps[:-1] if one.left else one.steps
            steps = f"steps {ran[0]} to {ran[-1]}" if len(ran) > 1 else f"step {ran[0]}"
            left = f"; {one.left} of what the last update left;" if one.left else ","
            lines.append(f"  {one.phase} rank {one.rank}: {steps}, {each} records a step{left} {one.records} in all")
        lines += [f"  missing: {text}" for text in self.missing]
        lines += [f"  not hooked: {text}" for text in self.not_hooked[:20]]
        if len(self.not_hooked) > 20:
            lines.append(f"  not hooked: {len(self.not_hooked) - 20} more, in the manifest")
        if self.proof is not None:
            lines.append(f"observer: {self.proof.detail}")
        return "\n".join(lines)


def run(
    command: Sequence[str],
    out: str | os.PathLike[str],
    *,
    tag: str | None = None,
    level: Level | None = None,
    parts: str | Iterable[str] | None = None,
    sites: str | Iterable[str] | None = None,
    depth: int | None = None,
    classes: str | Iterable[str] | None = None,
    steps: str | None = None,
    phase: str | None = None,
    ring: int | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    expect: str | Iterable[str] | None = None,
    only: Comparison | Iterable[RecordKey | str] | str | os.PathLike[str] | None = None,
    prove: bool = False,
) -> DumpRun:
    """Run a program with dumping on; its text stays as it is.

    Args:
        command: program and arguments, such as ["python", "train.py"].
        out: directory of the trace; it must not hold one.
        tag: which side of a comparison this is; "baseline" unless given.
        level: "values", "statistics" or "digests".
        parts: what is recorded, of `PARTS`.
        sites: site patterns.
        depth: modules at most so many levels below the model.
        classes: names of module classes.
        steps: steps to record, such as "0:10".
        phase: name of the phase.
        ring: keep so many steps in memory, and write them on NaN, Inf or an exception.
        max_bytes: most bytes of tensors that each process stores.
        max_seconds: most seconds that each process spends on recording.
        expect: names that each phase must hold, or "sglang" or "megatron".
        only: what a comparison found to differ, or a file of its JSON.
        prove: run the program again without the hooks, and compare losses and outputs to the bit.

    Raises:
        InputError: no command, an option in its place, or a program that cannot be started.
        TraceExistsError: `out` holds a run.
    """
    if not command:
        raise InputError(
            "no command was given; write it behind --, such as: trimtab dump --out runs/a -- python train.py"
        )
    if command[0].startswith("-"):
        raise InputError(
            f"{command[0]!r} is no option of dump; see trimtab dump --help (the program and its own options stand "
            "behind --)"
        )
    config = DumpConfig.make(
        out,
        tag=tag,
        level=level,
        parts=parts,
        sites=sites,
        depth=depth,
        classes=classes,
        steps=steps,
        phase=phase,
        ring=ring,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        expect=expect,
        only=None if only is None else diverged(_comparison(only)),
    )
    _manifest.refuse_taken(Path(config.out))
    returncode = _execute(command, config)
    result = _read(config, returncode)
    if not prove or returncode or not result.counts:
        return result
    proof = _prove(command, config)
    passed = result.passed and proof.equal
    return replace(result, proof=proof, passed=passed, reason=result.reason if proof.equal else proof.detail)


def _execute(command: Sequence[str], config: DumpConfig) -> int:
    """Run the program with the startup hook in front of its path; its output goes to standard error."""
    startup = str(Path(__file__).with_name("_startup"))
    path = os.environ.get("PYTHONPATH", "")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("TRIMTAB_DUMP")}
    environment |= {**config.to_environment(), "PYTHONPATH": f"{startup}{os.pathsep}{path}" if path else startup}
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listed:
        if config.only:
            listed.write("\n".join(config.only))
            listed.flush()
            environment["TRIMTAB_DUMP_ONLY"] = listed.name
        try:
            return subprocess.run(list(command), env=environment, stdout=sys.stderr.fileno(), check=False).returncode
        except OSError as error:
            raise InputError(f"{command[0]!r} cannot be started: {error.strerror or error}") from error


def _count(config: DumpConfig, phase: str, rank: int, steps: dict[int, int]) -> DumpCount:
    *_, before, last = (-1, *sorted(steps))
    left = 0
    if before >= 0:
        index = Trace.open(config.out).filter(phase=phase, rank=rank).index
        now, earlier = (index.filter(pl.col("step") == step) for step in (last, before))
        kinds = set(now["kind"])
        state = now["site"].is_null().all() and kinds in ({"param"}, {"param", "value"})  # buffers are values
        left = now.height if state and set(now["name"]) < set(earlier["name"]) else 0
    ran = [number for step, number in steps.items() if step != last or not left]
    return DumpCount(
        phase=phase,
        rank=rank,
        steps=tuple(sorted(steps)),
        records=sum(steps.values()),
        fewest=min(ran),
        most=max(ran),
        left=left,
    )


def _read(config: DumpConfig, returncode: int) -> DumpRun:
    plan = _manifest.read_plan(Path(config.out))
    counts = tuple(
        _count(config, phase, int(rank), {int(step): number for step, number in steps.items()})
        for phase, ranks in plan.get("counts", {}).items()
        for rank, steps in sorted(ranks.items(), key=lambda pair: int(pair[0]))
    )
    missing = _missing(config, plan) if counts else ()
    stopped = [f"rank {rank}: {text}" for rank, text in plan.get("stopped", {}).items()]
    quiet = bool(config.ring and not counts and plan.get("precision"))  # its passes were seen, and none had to be kept
    if returncode:
        reason = f"the program ended with exit code {returncode}; what it recorded is kept"
    elif quiet:
        reason = "no NaN or Inf appeared and no exception ended the run, so the ring was not written"
    elif not counts:
        why = next((entry["reason"] for entry in plan.get("not_hooked", ())), "")
        reason = f"nothing was recorded: {why or 'no model was called, or its Python has no trimtab'}"
    elif missing:
        reason = f"expected names are missing: {missing[0]}"
    else:
        reason = stopped[0] if stopped else f"{sum(one.records for one in counts)} records"
    return DumpRun(
        passed=bool(counts or quiet) and not (returncode or missing or stopped),
        finished=not (returncode or stopped),
        reason=reason,
        out=config.out,
        tag=config.tag,
        level=config.level,
        returncode=returncode,
        counts=counts,
        not_hooked=tuple(
            f"{e['module'] or '(model)'} ({e['class']}): {e['reason']}" for e in plan.get("not_hooked", ())
        ),
        missing=missing,
    )


def _missing(config: DumpConfig, plan: dict[str, Any]) -> tuple[str, ...]:
    if not config.expect:
        return ()
    index = Trace.open(config.out).scan.select("phase", "name").unique().collect()
    found = {(phase, name) for phase, name in index.iter_rows()}
    return tuple(f"{phase}: {name}" for phase in plan["counts"] for name in config.expect if (phase, name) not in found)


def _prove(command: Sequence[str], config: DumpConfig) -> ObserverProof:
    """Compare with a run in which only losses and the model's outputs are hashed; repeat that one when they differ."""
    with tempfile.TemporaryDirectory(prefix="trimtab-prove-") as folder:

        def bare(name: str) -> pl.DataFrame:
            out = str(Path(folder) / name)
            less = replace(
                config, out=out, parts=_PROOF, level="digests", depth=0, sites=(), classes=(), ring=0, only=()
            )
            if _execute(command, less):
                raise TraceError("--prove: the program failed when it was run again; it must be repeatable")
            return _digests(out)

        watched, plain = _digests(config.out), bare("a")
        if watched["key"].is_empty():
            return ObserverProof(equal=False, losses=0, outputs=0, detail="nothing to compare: add parts loss, outputs")
        differing = _difference(watched, plain)
        losses = int(watched["key"].str.starts_with("loss ").sum())
        outputs = watched.height - losses
        if not differing:
            detail = f"{losses} losses and {outputs} outputs of the model are equal to the bit without the hooks"
            return ObserverProof(equal=True, losses=losses, outputs=outputs, detail=detail)
        again = _difference(plain, bare("b"))
        why = (
            "but two runs without the hooks differ too: the program is not deterministic"
            if again
            else ("and runs without the hooks agree with each other: recording changed the run")
        )
        detail = f"{differing[0]} differs without the hooks, {why}"
        return ObserverProof(equal=False, losses=losses, outputs=outputs, detail=detail)


def _digests(path: str) -> pl.DataFrame:
    """Digests of losses and of the model's outputs, by what they are."""
    names = ("phase", "step", "micro_step", "call_index", "rank", "name")
    index = Trace.open(path).index.filter(
        (pl.col("kind") == "value")
        & pl.col("site").is_null()
        & pl.col("source_line").is_not_null().or_(pl.col("name") == "loss")
        & pl.col("name").str.contains(r"^(.+\.)?(loss$|output(\.|$))")
    )
    key = pl.format("{} {} step {} micro_step {} call {} rank {}", "name", *names[:-1])
    return index.select(key.alias("key"), "digest")


def _difference(watched: pl.DataFrame, plain: pl.DataFrame) -> list[str]:
    joined = watched.join(plain, on="key", how="full", coalesce=True, suffix="_plain", maintain_order="left_right")
    return joined.filter(pl.col("digest").ne_missing(pl.col("digest_plain")))["key"].to_list()


def _comparison(only: Any) -> Any:
    """Read a comparison from its JSON where a file was given."""
    if not isinstance(only, (str, os.PathLike)):
        return only
    from trimtab.results import from_json

    try:
        return from_json(Comparison, Path(only).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"only={str(only)!r} cannot be read: {error.strerror}") from error
