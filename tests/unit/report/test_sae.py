"""What the pages and texts of an evaluation of autoencoders and of a precision report say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.report import sae_factory as factory
from trimtab.report import _precision, _sae, render_html, render_text, report
from trimtab.results import to_json
from trimtab.results.sae_evaluation import Measured


def test_the_headline_is_of_equal_l0_where_there_is_one() -> None:
    seen = _sae.view(factory.evaluation())
    assert seen.headline == "At L0 20.8 jumprelu, fp32/bf16 leaves 0.0179 unexplained; topk 0.0185"
    without = _sae.view(replace(factory.evaluation(), matched=()))
    assert without.headline == "jump-40 explains most: 98.5 % of the variance with 41.6 latents a token"
    assert _sae.view(factory.bare()).headline == "only explains 95 % of the variance with 30 latents a token"


def test_the_answers_are_of_the_best_one() -> None:
    answers = {
        question: (short, detail, tone) for question, short, detail, tone in _sae.view(factory.evaluation()).answers
    }
    assert answers["What is left unexplained?"][:2] == ("FVU 0.0145", "jump-40: 0.0138 to 0.0152, at L0 41.6")
    assert answers["What does the model lose?"][0] == "+0.00363 nats"
    assert answers["Are its latents alive?"][0] == "6.2 % dead"
    assert "32 of 512 never fire, so their densities are under 5e-4" in answers["Are its latents alive?"][1]
    assert answers["Does it shrink?"][0] == "bias 0.9987"


def test_curves_stand_where_their_values_are() -> None:
    panels = {panel.title: panel for panel in _sae.view(factory.evaluation()).panels}
    assert list(panels) == ["FVU", "delta CE", "KL", "CE recovered"]
    fvu = panels["FVU"]
    assert [curve.name for curve in fvu.curves] == ["topk", "jumprelu, fp32/bf16"]
    dots = [dot for curve in fvu.curves for dot in curve.dots]
    # L0 16 to 41.6, in log; FVU from the lowest end 0.0145 * 0.95 to the highest 0.02 * 1.05
    low, high = 0.0145 * 0.95, 0.02 * 1.05
    for (x, y, top, bottom, _), (l0, value) in zip(
        dots, [(16, 0.02), (32, 0.016), (20.8, 0.0179), (41.6, 0.0145)], strict=True
    ):
        assert x == pytest.approx(300 * math.log(l0 / 16) / math.log(41.6 / 16), abs=0.06)
        for at, drawn in ((value, y), (value * 1.05, top), (value * 0.95, bottom)):
            assert drawn == pytest.approx(150 * (high - at) / (high - low), abs=0.06)


def test_one_autoencoder_has_no_curve_and_no_latents() -> None:
    seen = _sae.view(factory.bare())
    assert seen.panels == () and seen.matched == () and seen.latents == () and seen.splices == ()
    page = render_html(factory.bare())
    assert 'id="curves"' not in page and 'id="latents"' not in page and 'id="precision"' not in page


def test_histograms_hold_every_latent() -> None:
    (name, (density, cosine)), *_ = _sae.view(factory.evaluation()).histograms
    assert name == "top-16"
    assert density.note == "share of tokens, log axis; 32 dead (6.2 %)"
    tallest = max(density.bars, key=lambda bar: bar[2])
    assert tallest[2] == 90 and tallest[3].startswith("120 latents, 1e-2.25 to 1e-2")
    assert cosine.peak == "125"


def test_an_interval_that_is_not_known_is_a_dash() -> None:
    lone = replace(factory.bare().scores[0], fvu=Measured(value=0.05, low=math.nan, high=math.nan))
    seen = _sae.view(replace(factory.bare(), scores=(lone,)))
    assert seen.answers[0][2] == "-, at L0 30"
    assert seen.scores[0][6] == "-"


def test_tokens_with_their_own_spaces_get_no_more() -> None:
    one = factory.latents()[0]
    spaced = replace(one, examples=tuple(replace(e, tokens=("the", " fox", " rested", ".")) for e in one.examples))
    kept = replace(factory.bare().scores[0], latents=(one, spaced))
    (_, views), *_ = _sae.view(replace(factory.bare(), scores=(kept,))).latents
    assert [view.separator for view in views] == [" ", ""]
    assert "the[ fox] rested." in render_text(replace(factory.bare(), scores=(kept,)))


def test_the_shade_of_a_token_is_its_share_of_the_largest() -> None:
    (_, (latent, silent)), *_ = _sae.view(factory.evaluation()).latents
    _, tokens = latent.examples[1]
    assert [token.share for token in tokens] == [0, 94, 11, 0]
    assert [token.is_at for token in tokens] == [False, True, False, False]
    assert silent.examples == ()


def test_the_text_has_every_table() -> None:
    text = render_text(factory.evaluation())
    for part in ("Autoencoders", "At equal L0", "Cross entropy", "Latents of top-16", "note: one thing to know"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_hostile_names_stay_text() -> None:
    page = render_html(factory.evaluation(factory.HOSTILE))
    assert "<img" not in page
    assert "&lt;img" in page


@pytest.mark.parametrize("make", [factory.evaluation, factory.bare, factory.precision])
def test_a_page_is_made_of_the_json(tmp_path: Path, make: object) -> None:
    result = make()  # type: ignore[operator]
    file = tmp_path / "result.json"
    file.write_text(to_json(result))
    assert Path(report(file, tmp_path / "r.html")).read_text() == render_html(result)
    assert report(file) == render_text(result)


def test_a_precision_report_names_what_breaks() -> None:
    seen = _precision.precision_view(factory.precision())
    assert seen.headline == "float16 stored, float16 computed: does not fit"
    assert seen.lede == "Grad b_dec overflows. 4 batches of 4,096 activations."
    short = {question: short for question, short, _, _ in seen.answers}
    assert short["Does anything overflow?"] == "1 of 4 tensors"
    assert short["What underflows?"] == "14.6 % of v W_enc"
    assert short["Which gradient scale?"] == "2^6 (64)"
    assert [bar.tone for bar in seen.bars] == ["good", "good", "bad", "warn"]
    assert seen.bars[1].width == 0


@pytest.mark.parametrize(("dtype", "marks"), [("float16", 3), ("bfloat16", 0), ("float32", 0)])
def test_limits_of_the_dtype_are_drawn_where_they_are_in_view(dtype: str, marks: int) -> None:
    seen = _precision.precision_view(factory.precision(dtype))
    assert len(seen.marks) == marks
    if marks:
        assert seen.marks[2][0] == pytest.approx((math.log10(65504) + 12) / 18 * 420, abs=0.1)


def test_drawings_are_well_formed() -> None:
    page = render_html(factory.evaluation())
    for drawing in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
