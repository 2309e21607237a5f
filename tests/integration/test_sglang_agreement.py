"""Dumps that sglang 0.5.23 itself wrote are read as they were meant, and the figures agree with its own comparator.

Where the two part on purpose, the test names the number of the comparator's defect, in this list:

    1   a tensor that the target lacks is not counted            7   integers are compared as float32
    2   a tensor that the baseline lacks is skipped, exit 0      8   booleans are; of complex numbers the real part
    3   a name with / is written to a directory and never read   9   lists and dicts of tensors get no numbers
    4   a name longer than a file's is dropped                  10   fewer steps pass
    5   ___ in a name cuts it off                               12   gradients of activations lose their tags
    6   identical NaN or Inf fails, its record is unreadable    14   float16 against bfloat16 gets no second figure
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from trimtab.results.comparison import Comparison, RecordVerdict
from trimtab.trace import Trace

ORACLE = Path(sys.prefix) / "sglang-oracle"
PROGRAM = Path(__file__).with_name("sglang_oracle.py")
CASES = 6  # random pairs per dtype and kind of difference


@pytest.fixture(scope="module", autouse=True)
def oracle() -> None:
    if not (ORACLE / "sglang").is_dir():
        text = f"sglang is not in {ORACLE}; make test installs it (requirements/sglang-oracle.txt)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise RuntimeError(text)
        pytest.skip(text)


def ask(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Let sglang do some jobs; each answers one object."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(ORACLE)], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Sides:
    """Dumps of both sides, written by sglang's dumper."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[dict[str, Any]] = []

    def dump(self, name: str, calls: Sequence[Mapping[str, Any]]) -> Path:
        file = self.root / f"{name}.calls.pt"
        torch.save(list(calls), file)
        self.jobs.append({"do": "dump", "dir": str(self.root), "exp": name, "calls": str(file)})
        return self.root / name

    def compare(self, *args: str) -> tuple[Comparison, dict[str, dict[str, Any]], int]:
        """Both comparisons: ours, theirs by name, and their exit code."""
        baseline, target = str(self.root / "baseline"), str(self.root / "target")
        report = str(self.root / "report.jsonl")
        self.jobs.append({"do": "compare", "baseline": baseline, "target": target, "report": report, "args": args})
        found = ask(self.jobs)[-1]
        theirs = {one["name"]: one for one in found["records"] if one["type"].startswith("comparison_")}
        return trimtab.compare(baseline, target), theirs, found["code"]


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path)


# The differences that a dump of the other side can have, from "the same code" to "all wrong".
DIFFERENCES: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "none": lambda x, g: x.clone(),
    "one ulp": lambda x, g: x * (1 + 2.0**-23),
    "noise 1e-6": lambda x, g: x + 1e-6 * torch.randn(x.shape, generator=g),
    "noise 1e-3": lambda x, g: x + 1e-3 * torch.randn(x.shape, generator=g),
    "noise 1e-1": lambda x, g: x + 1e-1 * torch.randn(x.shape, generator=g),
    "scale 1.045": lambda x, g: x * 1.045,
    "scale 2": lambda x, g: x * 2,
    "sign": lambda x, g: -x,
    "zero row": lambda x, g: torch.cat([torch.zeros_like(x.reshape(-1)[:1]), x.reshape(-1)[1:]]).reshape(x.shape),
    "one element 100": lambda x, g: torch.cat([x.reshape(-1)[:-1], x.reshape(-1)[:1] * 0 + 100]).reshape(x.shape),
    "all zero": lambda x, g: torch.zeros_like(x),
    "random": lambda x, g: torch.randn(x.shape, generator=g),
}
SHAPES = ((), (1,), (5,), (3, 7), (64, 65), (2, 3, 4, 5), (1, 1, 9), (300, 2))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float_pairs(rounds: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(17)
    for number in range(rounds):
        for kind, change in DIFFERENCES.items():
            for dtype in FLOATS:
                shape = SHAPES[int(torch.randint(len(SHAPES), (1,), generator=generator))]
                scale = float(torch.randint(-12, 4, (1,), generator=generator))
                x = torch.randn(shape, generator=generator) * 2.0**scale
                if kind == "random" and number % 2:
                    x = x.abs() * 1e-3
                y = change(x, generator)
                other = FLOATS[number % 3] if number % 4 == 3 else dtype
                yield f"{kind.replace(' ', '_')}.{number}.{str(dtype)[6:]}", x.to(dtype), y.to(other)


def agree(ours: RecordVerdict, theirs: Mapping[str, Any], x: torch.Tensor, y: torch.Tensor) -> None:
    diff, name = theirs["diff"], ours.key.name
    metrics = ours.metrics
    if ours.status == "identical" or metrics is None:
        assert diff["max_abs_diff"] == diff["rel_diff"] == 0, name
        return
    if diff["rel_diff"] >= 1e-9:
        assert metrics.rel_diff == pytest.approx(diff["rel_diff"], rel=1e-6), name
    else:
        assert metrics.rel_diff == pytest.approx(diff["rel_diff"], abs=1e-15), name
    assert metrics.max_abs == pytest.approx(diff["max_abs_diff"], rel=1e-6, abs=0), name
    assert metrics.mae == pytest.approx(diff["mean_abs_diff"], rel=1e-5, abs=1e-45), name
    gap = (x.double() - y.double()).abs()
    if metrics.max_abs:  # up to ties: what either calls the worst is as large
        assert gap[tuple(metrics.max_abs_index)].item() == metrics.max_abs, name
        assert gap[tuple(diff["max_diff_coord"])].item() == pytest.approx(metrics.max_abs, rel=1e-6), name


def check_agreement(sides: Sides, rounds: int) -> None:
    pairs = list(float_pairs(rounds))
    sides.dump("baseline", [{"name": name, "value": x} for name, x, _ in pairs])
    sides.dump("target", [{"name": name, "value": y} for name, _, y in pairs])
    ours, theirs, _ = sides.compare()
    records = {record.key.name: record for record in ours.records}
    assert set(records) == set(theirs) == {name for name, _, _ in pairs}
    for name, x, y in pairs:
        agree(records[name], theirs[name], x, y)


def test_the_figures_agree_with_its_own_comparator(sides: Sides) -> None:
    check_agreement(sides, CASES)


@pytest.mark.full
def test_the_figures_agree_on_many_pairs(sides: Sides) -> None:
    check_agreement(sides, 100)


def test_where_its_comparator_passes_or_is_blind_ours_is_not(sides: Sides) -> None:
    """Defects 1, 2, 3, 5, 6, 7, 8, 9, 10: each exclusion from the agreement is one line here."""
    torch.manual_seed(3)
    x = torch.randn(6, 8)
    nan = x.clone()
    nan[2, 3], nan[4, 1] = math.nan, math.inf
    ids = torch.arange(2**24, 2**24 + 64)
    mask = torch.ones(4096, dtype=torch.bool)
    flipped = mask.clone()
    flipped[7] = False
    z = torch.randn(4, 4, dtype=torch.complex64)
    both = {"same": x, "six": nan, "nested": {"a": x, "b": [x, x + 1]}, "a___b": x, "a___c": x * 2, "dir/inside": x}
    baseline = {**both, "one": x, "seven": ids, "eight": mask, "imaginary": z}
    target = {**both, "two": x, "seven": ids + (ids == 2**24), "eight": flipped, "imaginary": z.real + 2j * z.imag}
    target["dir/inside"] = x * 3
    for name, values in (("baseline", baseline), ("target", target)):
        calls: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in values.items()]
        calls[-1]["step"] = True
        sides.dump(name, [*calls, {"name": "late", "value": x}] if name == "baseline" else calls)
    ours, theirs, _ = sides.compare()
    records = {record.key.name: record for record in ours.records}
    entries = {(entry.side, entry.kind, entry.name.split()[0]) for entry in ours.ledger.entries}
    names = " ".join(f"{side} {kind} {name}" for side, kind, name in entries)

    assert not ours.passed
    assert "one" not in theirs and "one" in names  # 1
    assert theirs["two"]["type"] == "comparison_skip" and "two" in names  # 2
    assert "dir/inside" not in theirs and records["dir/inside"].status == "failed"  # 3
    assert {"a___b", "a___c"} <= set(records) and "a___c" not in theirs  # 5
    assert not (theirs["six"]["diff"] or {}).get("passed", False) and records["six"].passing  # 6
    assert theirs["seven"]["diff"]["passed"] and records["seven"].status == "failed"  # 7
    assert theirs["eight"]["diff"]["passed"] and records["eight"].status == "failed"  # 8
    assert theirs["imaginary"]["diff"]["passed"] and records["imaginary"].status == "failed"  # 8
    assert theirs["nested"]["type"] == "comparison_non_tensor"  # 9
    assert {record.status for name, record in records.items() if name.startswith("nested.")} <= {"identical", "passed"}
    assert {"nested.a", "nested.b.0", "nested.b.1"} <= set(records)
    assert "late" not in theirs and "late" in names  # 10
    assert records["same"].passing and theirs["same"]["diff"]["passed"]


def test_a_name_longer_than_a_file_s_is_noticed(sides: Sides) -> None:
    """Defect 4: the dumper prints a line and goes on; the hole in its running numbers is all that is left."""
    for name in ("baseline", "target"):
        sides.dump(name, [{"name": f"{'n' * 250}{i}" if i == 1 else f"x{i}", "value": torch.ones(3)} for i in range(3)])
    ours, _, code = sides.compare()
    assert code == 0
    assert not ours.passed
    assert "dump_index 2" in ours.reason


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, oracle: None) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("trained")
    answer = ask([{"do": "train", "dir": str(root), "exp": "run", "steps": 2}])[0]
    return root / "run", answer


def test_everything_that_it_wrote_has_a_record(trained: tuple[Path, dict[str, Any]]) -> None:
    path, answer = trained
    trace = Trace.open(path)
    assert trace.problems == ()
    assert trace.manifest["plan"]["skipped"] == []
    assert trace.index.height == len(list(path.iterdir())) == 100
    assert trace.index["shard"].is_not_null().all()
    index = trace.filter(step=1).index
    assert set(index.filter(index["kind"] == "param")["name"]) == set(answer["parameters"])
    gradients = index.filter((index["kind"] == "grad") & index["name"].is_in(answer["parameters"]))
    assert set(gradients["name"]) == set(answer["parameters"])
    sites = set(index["site"].drop_nulls())
    assert {"module:layers.1.output", "module:layers.1.input", "module:layers.2.inner.grad_output"} <= sites
    assert "module:embed.grad_input" not in sites
    hidden = trace.filter(name="hidden[part=a]", kind="value").index
    assert hidden["layer"].to_list() == [0, 1, 2, 0, 1, 2]
    assert set(hidden["dims"]) == {"b s h"}


def test_gradients_get_the_layer_of_their_forward_call(trained: tuple[Path, dict[str, Any]]) -> None:
    """Defect 12: the files hold no layer; which gradient is which is known here from hooks of the program's own."""
    path, answer = trained
    trace = Trace.open(path)
    gradients = trace.filter(name="hidden[part=a]", kind="grad")
    assert set(gradients.index["dims"]) == {"b s h[tp:partial]"}
    found = {(row["step"], row["layer"]): row["record_id"] for row in gradients.index.iter_rows(named=True)}
    assert len(found) == 6
    for truth in answer["truth"]:
        total = trace.tensor(found[truth["step"], truth["layer"]]).double().sum().item()
        assert total == pytest.approx(truth["sum"], rel=1e-12)
    assert any("last in, first out" in note for note in trace.manifest["plan"]["notes"])


def test_its_own_loader_reads_what_we_export(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = trained
    result = trimtab.trace.export_dump(path, tmp_path / "ours")
    assert (result.records, result.skipped) == (100, ())
    args = {"do": "compare", "baseline": str(path), "target": str(tmp_path / "ours"), "report": str(tmp_path / "r")}
    plain = [*("--filter", "name=(hidden|param|input_ids)"), *("--grouping-skip-keys", "rank", "part", "layer_id")]
    found = ask([{**args, "args": plain}])[0]
    summary = found["records"][-1]
    assert summary["type"] == "summary" and summary["failed"] == summary["errored"] == 0, summary
    assert trimtab.compare(path, tmp_path / "ours").passed
