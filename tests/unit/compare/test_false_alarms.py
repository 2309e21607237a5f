"""The measurement of the verdict's false alarms: what it prints, and how it decides."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scipy.stats import binomtest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def printed() -> dict[str, object]:
    command = [sys.executable, "false_alarms.py", "--json", "--pairs", "12", "--faults", "13", "--seed", "7"]
    done = subprocess.run(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 1  # too few repetitions hold nothing
    return json.loads(done.stdout)


def test_every_claim_is_printed_with_the_exact_interval_of_its_share(printed: dict[str, object]) -> None:
    listed = tomllib.loads((BENCHMARKS / "claims.toml").read_text())["claim"]
    names = [one["name"] for one in listed if one["file"] == "false_alarms.py"]
    assert [one["name"] for one in printed["claims"]] == names and len(names) == 5
    for one in printed["claims"]:
        count, total = sum(one["samples"]), len(one["samples"])
        exact = binomtest(count, total).proportion_ci(method="exact")
        assert one["value"] == pytest.approx(count / total)
        assert one["interval"] == pytest.approx([exact.low, exact.high])
        assert not one["holds"] and one["state"] == "too few repetitions"
    assert {len(one["samples"]) for one in printed["claims"][:3]} == {12}
    assert printed["machine"]["cores"] >= 1


def test_the_whole_interval_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import false_alarms

    claim = {"name": "x", "unit": "share", "direction": "at_most", "bound": 0.01, "repetitions": 100}
    for samples, state in (
        ([False] * 1000, "yes"),
        ([False] * 200, "undecided"),
        ([True] * 50 + [False] * 950, "no"),
        ([False] * 99, "too few repetitions"),
    ):
        found = false_alarms.evaluate(claim, samples)
        assert found["state"] == state and found["holds"] == (state == "yes")
    found = false_alarms.evaluate({**claim, "direction": "at_least", "bound": 0.95}, [True] * 1000)
    assert found["holds"] and found["interval"][1] == 1.0
