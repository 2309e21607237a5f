"""Vectors compared: cosines against a hand computation, losses from the files, matched sets, Parquet and the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars
import pytest
import torch

from trimtab import report
from trimtab.errors import InputError
from trimtab.results import from_json, to_json
from trimtab.results.vectors_clean import VectorComparison
from trimtab.steering import SteeringVector
from trimtab.vectors import compare

WIDTH, SITE = 64, "layers.3.resid_post"


def made(seed: int, norm: float = 1.0, **about: Any) -> SteeringVector:
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return SteeringVector.of(norm * drawn / drawn.norm(), site=SITE, **about)


def saved(folder: Path, **vectors: SteeringVector) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, vector in vectors.items():
        vector.save(folder / f"{name}.safetensors")
    return folder


def test_cosines_norms_and_losses(tmp_path: Path) -> None:
    a, b = made(0, 3.0, recipe={"method": "trained:lm", "validation_loss": 1.5, "unsteered_loss": 2.0}), made(1, 1.5)
    result = compare([saved(tmp_path / "v", a=a, b=b)], out=tmp_path / "out")
    (pair,) = result.pairs
    expected = float(a.vector.double() @ b.vector.double() / (a.vector.double().norm() * b.vector.double().norm()))
    assert pair.cosine == pytest.approx(expected, abs=1e-6)
    assert pair.z == pytest.approx(expected * math.sqrt(WIDTH), abs=1e-5)
    assert pair.norm_ratio == pytest.approx(2.0, rel=1e-6) and pair.same_site
    first = result.vectors[0]
    assert (first.method, first.validation_loss, first.baseline_loss) == ("trained:lm", 1.5, 2.0)
    frame = polars.read_parquet(tmp_path / "out" / "pairs.parquet")
    assert frame["cosine"].to_list() == [pair.cosine]
    assert frame["validation_loss_a"].to_list() == [1.5] and frame["validation_loss_b"].to_list() == [None]
    assert from_json(VectorComparison, (tmp_path / "out" / "comparison.json").read_text()) == result


def test_a_vector_and_itself_and_its_opposite() -> None:
    vector = made(0)
    opposite = SteeringVector.of(-vector.vector, site=SITE)
    cosines = {(one.a, one.b): one.cosine for one in compare({"v": vector, "same": vector, "minus": opposite}).pairs}
    assert cosines == {("v", "same"): 1.0, ("v", "minus"): -1.0, ("same", "minus"): -1.0}


def test_trained_against_extracted_are_matched_by_name(tmp_path: Path) -> None:
    trained = saved(tmp_path / "trained" / "animal", **{SITE: made(0)}).parent
    saved(trained / "object", **{SITE: made(1)})
    (trained / "animal" / "steering.safetensors").write_bytes(b"a whole steering, which is no vector")
    extracted = saved(tmp_path / "extracted" / "animal", **{SITE: made(2)}).parent
    saved(extracted / "person", **{SITE: made(3)})
    saved(extracted / "person" / "controls" / "random", **{SITE: made(4)})
    result = compare([trained], against=[extracted])
    assert len(result.pairs) == 4
    name = f"animal/{SITE}"
    assert [(one.a, one.b) for one in result.matched] == [(name, f"{name} (against)")]
    assert f"person/{SITE}" in result.against
    none = compare([trained / "object"], against=[extracted / "person" / f"{SITE}.safetensors"])
    assert len(none.matched) == 1  # both are called by their site
    other = compare({"x": made(0)}, against={"y": made(1)})
    assert not other.matched and any("none are matched" in text for text in other.warnings)


def test_widths_that_differ_are_left_out_and_counted() -> None:
    wide = SteeringVector.of(torch.ones(2 * WIDTH))
    result = compare({"a": made(0), "b": made(1), "wide": wide})
    assert len(result.pairs) == 1 and "2 pairs of different widths were left out" in result.warnings
    with pytest.raises(InputError, match="no two vectors to compare have the same width: a 64, wide 128"):
        compare({"a": made(0), "wide": wide})


def test_too_few_or_twice_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 vector was given; at least two"):
        compare({"a": made(0)})
    one, two = saved(tmp_path / "1", a=made(0)), saved(tmp_path / "2", a=made(1))
    with pytest.raises(InputError, match="are both called 'a'"):
        compare([one, two])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.safetensors vector"):
        compare([tmp_path / "empty", one])


def test_the_page_and_its_json(tmp_path: Path) -> None:
    nasty = "<b>&name"
    result = compare({nasty: made(0, recipe={"validation_loss": 1.0, "unsteered_loss": 2.0}), "b": made(1)})
    page = Path(report(result, tmp_path / "p.html")).read_text()
    assert "&lt;b&gt;&amp;name" in page and nasty not in page
    assert f"{result.pairs[0].cosine:.2f}" in page and "1 of 1" in page
    (tmp_path / "r.json").write_text(to_json(result))
    assert Path(report(tmp_path / "r.json", tmp_path / "q.html")).read_text() == page
    matched = report(compare({"a": made(0)}, against={"a": made(0)}), tmp_path / "m.html")
    assert "Matched vectors have a mean cosine of 1" in Path(matched).read_text()
