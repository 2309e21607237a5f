"""Runs that stop and go on, several processes, the three verbs, and what they refuse in one line."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import polars as pl
import pytest

from tests.unit.weights.weights_pairs import directions, noisy, saved_pair
from trimtab.cli import main
from trimtab.errors import InputError, RecipeError, TraceLockedError, VectorError
from trimtab.results import from_json, to_json
from trimtab.results.weights import WEIGHTS_VERSION, WeightsAnalysis
from trimtab.testing.models import tiny
from trimtab.weights import measure_attention, measure_mlp, measure_susceptibility


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_pair(tmp_path_factory.mktemp("models"), noisy)


class _Stop:
    """Stands for someone who interrupts after a number of layers."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: float = 1) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def describe(self, text: str) -> None:
        pass


def test_a_run_goes_on_where_it_stopped(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure_mlp(*models, directions(), out=tmp_path / "run", progress=_Stop(2))
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "layers").glob("*.parquet")}
    assert len(done) == 2
    run = measure_mlp(*models, directions(), out=tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in done} == done  # not measured again
    whole = measure_mlp(*models, directions(), out=tmp_path / "other")
    assert run.frame(controls=True).equals(whole.frame(controls=True))
    assert run.frame().equals(measure_mlp(*models, directions()).frame())  # nor does a directory change anything
    assert run.file is not None and to_json(run.report) == to_json(from_json(WeightsAnalysis, run.file.read_text()))
    with pytest.raises(RecipeError, match="holds a run with other directions; give another directory"):
        measure_mlp(*models, directions(), out=tmp_path / "run", seed=1, controls=64)


def test_another_plan_or_other_files_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    measure_susceptibility(*models, directions(), layers=0, out=tmp_path / "run", controls=8)
    for change, message in (
        ({"layers": 1}, r"other layers: \[0\] there, \[1\] now"),
        ({"dtype": "float64"}, "other dtype"),
        ({"controls": 9}, "other directions"),
    ):
        with pytest.raises(RecipeError, match=message):
            measure_susceptibility(
                *models, directions(), **{"layers": 0, "controls": 8, "out": tmp_path / "run", **change}
            )
    with pytest.raises(RecipeError, match="other tuned"):
        measure_susceptibility(models[0], models[0], directions(), layers=0, out=tmp_path / "run", controls=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        measure_mlp(*models, directions(), out=tmp_path / "mine")


def test_two_processes_find_what_one_finds(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert multiprocessing.current_process().name == "MainProcess"
    together = measure_attention(*models, directions(), jobs=2, out=tmp_path / "run", average_layers=True)
    alone = measure_attention(*models, directions(), average_layers=True)
    assert together.frame(controls=True).equals(alone.frame(controls=True))


def test_one_directory_has_one_writer(models: tuple[Path, Path], tmp_path: Path) -> None:
    from trimtab._base.files import FileLock

    (tmp_path / "run").mkdir()
    run = measure_mlp(*models, directions(), out=tmp_path / "run", layers=0)
    assert run.directory is not None
    with FileLock(run.directory / ".lock"), pytest.raises(TraceLockedError, match="wait for it"):
        measure_mlp(*models, directions(), out=run.directory, layers=0)


def test_the_rows_are_parquet_of_one_schema(models: tuple[Path, Path], tmp_path: Path) -> None:
    run = measure_mlp(*models, directions(), out=tmp_path / "run", layers="0-1", average_layers=True)
    rows = pl.concat([pl.read_parquet(file) for file in sorted((tmp_path / "run" / "layers").glob("*.parquet"))])
    rows = pl.concat([rows, pl.read_parquet(tmp_path / "run" / "average.parquet")])
    assert rows.equals(run.frame(controls=True))
    assert rows.schema["layer"] == pl.Int32 and rows.schema["z_error"] == pl.Float64
    assert len(rows) == run.report.num_measurements
    for file in (tmp_path / "run").rglob("*.parquet"):
        assert pl.read_parquet_metadata(file)["trimtab_weights_version"] == str(WEIGHTS_VERSION)


@pytest.mark.parametrize("verb", ["susceptibility", "mlp", "attention"])
def test_a_verb_prints_its_result(
    verb: str, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    units = directions()
    for place, name in enumerate(("a", "b")):
        np.save(tmp_path / f"{name}.npy", units.units[place].float().numpy())
    given = [str(tmp_path / f"{name}.npy") for name in ("a", "b")]
    command = ["weights", verb, *map(str, models), "--directions", *given, "--layers", "0,2", "--controls", "16"]
    assert main([*command, "--json", "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr()
    result = from_json(WeightsAnalysis, printed.out)
    assert (result.analysis, result.layers, len(result.directions)) == (verb, (0, 2), 2)
    assert result.controls[0].count == 16
    assert "report: " in printed.err and (tmp_path / "page.html").stat().st_size < 3_000_000
    assert main([*command, "--seed", "3"]) == 0
    assert "Rankings" in capsys.readouterr().out
    assert json.loads(to_json(result))["kind"] == "weights"


REFUSALS = [
    ("-d {a} -l 3", "layer 3 was asked for|outside the model, which has layers 0 to 2"),
    ("-d {a} -l 2-1", "outside the model"),
    ("-d {a} -l x", "'x' is no layer or range"),
    ("-d {a} --controls 3", "3 controls were asked for; a z-score needs at least 8"),
    ("-d {wide}", "width 9 and the model has hidden size 64"),
    ("-d {late}", "made at layer 7 and .* has layers 0 to 2"),
    ("-d {a} --control-kinds covariance", "made of states"),
    ("-d {a} --states no.npy --control-kinds covariance", "no such file"),
    ("-d {a} --jobs 0", "jobs=0"),
    ("-d {a} --jobs 2 --ray auto", "give one of them"),
    ("-d {a} --pairs some", "a number, or all"),
    ("-d missing.npy", "no such file"),
    ("", "no directions"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[options for options, _ in REFUSALS])
def test_bad_input_is_one_line(
    options: str, message: str, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    import torch

    from trimtab.sites import Site
    from trimtab.steering import SteeringVector

    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "wide", "late")}
    SteeringVector.of(torch.ones(64)).save(files["a"])
    SteeringVector.of(torch.ones(9)).save(files["wide"])
    SteeringVector.of(torch.ones(64), site=Site("resid_post", 7)).save(files["late"])
    words = options.format(**files).split()
    assert main(["weights", "mlp", *map(str, models), *words]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line) and line.count("\n") == 1


def test_models_that_cannot_be_compared_are_one_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    tiny("qwen3", layers=3).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="cannot be compared: the model types are llama and qwen3"):
        measure_mlp(models[0], tmp_path / "other", directions())
    with pytest.raises(VectorError):
        measure_mlp(*models, {"a": directions().units[0][:10]})
    with pytest.raises(InputError, match="dtype 'bfloat16'"):
        measure_mlp(*models, directions(), dtype="bfloat16")  # type: ignore[typeddict-item]
