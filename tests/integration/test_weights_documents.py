"""The commands and the program on weights in the README and the documentation run as written, on a tiny pair."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.unit.weights.weights_pairs import WIDTH, noisy, saved_pair, vectors
from trimtab.cli import main
from trimtab.results import from_json
from trimtab.results.weights import WeightsAnalysis

ROOT = Path(__file__).parents[2]
BLOCKS = {
    name: re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    for name in ("README.md", "docs/weights.md")
}
LAYERS = 25
NAMES = ("pirate", "calm", "lawyer", "curious", "curious", "rude")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, the personas and the components that the documents name."""
    decomposition, preprocessing = (
        pytest.importorskip(f"sklearn.{name}") for name in ("decomposition", "preprocessing")
    )
    folder = tmp_path_factory.mktemp("documents")
    base, tuned = saved_pair(folder, noisy, "qwen3", LAYERS)
    (folder / "BASE").symlink_to(base)
    (folder / "TUNED").symlink_to(tuned)
    personas = folder / "personas" / "qwen3"
    for number, vector in enumerate(vectors(6)):
        kind, key = (("roles", "pos_3"), ("traits", "pos_neg_50"))[number % 2]
        (personas / kind).mkdir(parents=True, exist_ok=True)
        torch.save({key: vector.expand(LAYERS + 1, WIDTH).clone()}, personas / kind / f"{NAMES[number]}.pt")
    torch.save({"default_1": torch.zeros(LAYERS + 1, WIDTH)}, personas / "default_vectors.pt")
    states = np.random.default_rng(0).normal(size=(80, WIDTH))
    scaler = preprocessing.StandardScaler().fit(states)
    pca = {"layer": 16, "pca": decomposition.PCA().fit(scaler.transform(states)), "scaler": scaler}
    for name in ("pca.pt", "layer16_pos3.pt"):
        torch.save({**pca, "roles": {"pos_3": ["x"]}}, folder / name)
    return folder


@pytest.mark.parametrize("name", BLOCKS)
def test_the_commands_run(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        line for _, text in BLOCKS[name] for line in text.splitlines() if line.startswith("trimtab weights ")
    ]  # fmt: skip
    assert [line.split()[2] for line in lines] == ["susceptibility", "mlp", "attention"]
    monkeypatch.chdir(place)
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, "--json"]) == 0, f"{line}: {capsys.readouterr().err}"
        report = from_json(WeightsAnalysis, capsys.readouterr().out)
        assert len(report.directions) == (14 if "#PC1-PC8" in line else 6)
        assert len(report.layers) == (17 if "8-24" in line else LAYERS)
        for option in ("--out", "--html"):
            if option in words:
                assert Path(words[words.index(option) + 1]).exists()


def test_the_program_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [text for kind, text in BLOCKS["docs/weights.md"] if kind == "python"]
    assert len(programs) == 1
    for one in ("base", "tuned", "personas"):
        (tmp_path / one).symlink_to(place / one)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(programs[0], found)
    assert isinstance(frame := found["run"].frame(), pl.DataFrame) and len(frame) > 0  # type: ignore[attr-defined]
    assert Path("runs/mlp/report.html").stat().st_size > 1_000_000
