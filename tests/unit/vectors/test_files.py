"""Random controls, conversion and listing of vector files, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.cli import main
from trimtab.directions import load_direction, read_gguf
from trimtab.steering import SteeringVector

SITE = "layers.3.resid_post"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "v.safetensors"
    SteeringVector.of(3.0 * drawn, site=SITE, median_norm=7.0, recipe={"method": "mean_difference"}).save(path)
    return path


def ran(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["vectors", *map(str, argv), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("kind", ["--orthogonal", "--permuted", None])
def test_a_control_has_the_norm_and_another_direction(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str | None
) -> None:
    out = tmp_path / "c.safetensors"
    ran(capsys, "random", file, "--out", out, "--seed", 3, *([kind] if kind else []))
    vector, control = SteeringVector.load(file), SteeringVector.load(out)
    assert control.norm == pytest.approx(vector.norm, rel=1e-6)
    assert str(control.site) == SITE and control.median_norm == 7.0
    cosine = float(control.direction.double() @ vector.direction.double())
    assert abs(cosine) < (1e-6 if kind == "--orthogonal" else 0.7)
    if kind == "--permuted":
        assert torch.allclose(control.vector.sort().values, vector.vector.sort().values, atol=1e-6)


@pytest.mark.parametrize("suffix", ["npy", "pt", "gguf", "safetensors"])
def test_a_converted_vector_is_the_same(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    out = tmp_path / f"out.{suffix}"
    hint = ["--model-hint", "qwen3"] if suffix == "gguf" else []
    ran(capsys, "convert", file, out, *hint)
    assert torch.equal(load_direction(out).vector, load_direction(file).vector)
    if suffix == "gguf":
        assert list(read_gguf(out).directions) == [3]
    back = tmp_path / "back.safetensors"
    ran(capsys, "convert", out, back, "--site", SITE)
    assert torch.equal(SteeringVector.load(back).direction, SteeringVector.load(file).direction)


def test_what_a_file_holds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ran(capsys, "show", file)
    assert (shown["site"], shown["width"], shown["median_norm"]) == (SITE, 32, 7.0)
    assert shown["norm"] == pytest.approx(SteeringVector.load(file).norm)
    assert shown["recipe"] == [["method", "mean_difference"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("random {v} --out {t}/x.safetensors --orthogonal --permuted", "orthogonal or permuted, not both"),
        ("convert {v} {t}/x.csv", "ends in '.csv'; .safetensors, .npy, .pt, .gguf was expected"),
        ("convert {v} {t}/x.gguf", "give model_hint, such as qwen3"),
        ("convert {v} {v}", "exists already"),
        ("convert {v} {t}/x.npy --site layers.2.resid_post", "was made at layers.3.resid_post"),
        ("show {t}/none.pt", "no such file"),
        ("clean {v} --out {t}/o --data animal", "write NAME=SOURCE"),
        ("clean {v} --out {t}/o", "no neutral texts were given"),
        ("compare {v}", "at least two are needed"),
    ],
)
def test_bad_input_is_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(["vectors", *words.format(v=file, t=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_printed_program_is_the_call(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.vectors

    words = f"clean {file} --out o --source concepts --published --k 2 --data v=testbed:animal --dtype bfloat16"
    assert main(["vectors", *words.split(), "--print-python"]) == 0
    printed = capsys.readouterr().out
    calls: list[Any] = []
    monkeypatch.setitem(vars(trimtab.vectors), "clean", lambda *args, **kwargs: calls.append((args, kwargs)))
    exec(compile(printed, "<printed>", "exec"), {})
    assert calls == [
        (
            ([str(file)],),
            {
                "out": "o",
                "model": "testbed",
                "backend": {"dtype": "bfloat16"},
                "k": 2,
                "published": True,
                "data": {"v": "testbed:animal"},
                "source": "concepts",
            },
        )
    ]
