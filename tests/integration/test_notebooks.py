"""The example notebooks run from the first cell to the last on a tiny pair of models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.unit.weights.weights_pairs import noisy, saved_pair, vectors

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


def test_there_are_three() -> None:
    assert [one.stem for one in NOTEBOOKS] == ["attention", "mlp", "susceptibility"]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny pair, and two roles and two traits as persona work lays them out."""
    for place, vector in enumerate(vectors(4)):
        kind, key = (("roles", "pos_3"), ("traits", "pos_neg_50"))[place % 2]
        (tmp_path / "personas" / kind).mkdir(parents=True, exist_ok=True)
        torch.save({key: torch.stack([vector, -vector])}, tmp_path / "personas" / kind / f"d{place}.pt")
    torch.save({"default_1": torch.zeros(2, 64)}, tmp_path / "personas" / "default_vectors.pt")
    return saved_pair(tmp_path, noisy, "qwen3", 2)


def test_the_notebooks_run(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one kernel, which starts once; each sets every name that it uses."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    whole = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        parameters = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(parameters) == 1
        assert sum("measure_" in cell.source for cell in book.cells) == 1  # computed once
        names = {line.partition(" = ")[0] for line in parameters[0].source.splitlines() if " = " in line}
        given = {
            "BASE": str(models[0]),
            "TUNED": str(models[1]),
            "DIRECTIONS": [str(tmp_path / "personas")],
            "VECTOR_LAYER": 1,
            "LAYERS": "0-1",
            "CONTROLS": 8,
            "OUT": str(tmp_path / path.stem),
            "OFFSET": 1,
        }
        assert names <= given.keys()
        parameters[0].source = "\n".join(f"{name} = {value!r}" for name, value in given.items() if name in names)
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *book.cells]
    client = nbclient.NotebookClient(
        whole, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, "PYTHONWARNINGS": "default"})
    for path in NOTEBOOKS:
        assert (tmp_path / path.stem / "report.html").stat().st_size > 1_000_000
    shown = [output for cell in whole.cells for output in cell.get("outputs", [])]
    assert len(shown) >= 18 and not [one for one in shown if one.output_type == "error"]
