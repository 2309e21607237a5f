"""Pages of extractions, cleanings and trainings of autoencoders: what they say, in text and HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report import made_factory as factory
from trimtab.report import _made, render_html, render_text, report
from trimtab.results import to_json

HOSTILE = "<b>joy</b>"
KINDS = {"extraction": factory.extraction, "cleaning": factory.cleaning, "sae_run": factory.sae_run}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_json_makes_the_same_page_and_names_stay_text(tmp_path: Path, make: Callable[..., Any]) -> None:
    result = make(HOSTILE)
    file = tmp_path / "r.json"
    file.write_text(to_json(result))
    page = Path(report(file, tmp_path / "r.html")).read_text()
    assert page == render_html(result)
    assert report(file) == render_text(result)
    assert HOSTILE not in page and "&lt;b&gt;joy" in page


def answers(result: Any) -> dict[str, tuple[str, str, str]]:
    return {question: (short, detail, tone) for question, short, detail, tone in _made.view(result).answers}


def test_an_extraction_is_held_against_its_controls() -> None:
    seen = _made.view(factory.extraction())
    assert seen.headline == "layers.3.resid_post steers held-out examples most: +0.013 nats per token"
    found = answers(factory.extraction())
    assert found["Does it steer?"][::2] == ("+0.013 nats per token", "good")
    assert found["Does it separate?"][0] == "AUC 0.97"
    assert found["More than chance?"] == ("Yes", "95 % of the control directions stay under AUC 0.7", "good")
    effects = [row[seen.tables[0].heads.index(">effect")] for row in seen.tables[0].rows]
    assert effects == ["0.004", "0.013"]
    worse = replace(factory.extraction(), best="layers.2.resid_post")
    assert answers(worse)["More than chance?"][0] == "No"
    assert [row[0] for row in seen.tables[0].rows] == ["layers.2.resid_post", "layers.3.resid_post"]
    read = replace(factory.extraction(), chosen_by="auc")
    assert _made.view(read).headline == "layers.3.resid_post separates the labels best: AUC 0.97"
    assert "Does it steer?" not in answers(read)
    alone = replace(factory.extraction(), best=None, validation=None)
    assert _made.view(alone).answers == ()
    assert ("held out", "nothing") in _made.view(alone).facts


def test_a_cleaning_says_what_was_removed_and_what_it_cost() -> None:
    seen = _made.view(factory.cleaning())
    assert seen.headline == "2 vectors cleaned of 3 directions, and nothing tells them apart any more"
    assert seen.lede == (
        "On testbed, contamination estimated from neutral texts, projected on what texts of the concept vary along, "
        "with 30 % of the vector kept beside it."
    )
    found = answers(factory.cleaning())
    assert found["How much was removed?"][1].endswith("a cosine of 0.75 with the raw one")
    assert found["What did it cost?"] == ("-8 pp accuracy", "the most that a vector lost on held-out questions", "bad")
    assert seen.notes == ("few neutral states", "layers.3.resid_post: the published setting removes all")
    (site,) = factory.cleaning().sites
    sound = replace(factory.cleaning(), sites=(replace(site, source="concepts", degeneracy=""),), model="", blend=0.0)
    assert (
        _made.view(replace(sound, method="contamination")).lede
        == "contamination estimated from the vectors themselves."
    )
    assert _made.view(sound).headline == "2 vectors cleaned of 3 directions"
    told = replace(factory.cleaning(), warnings=seen.notes[1:])  # as `clean` warns already
    assert _made.view(told).notes == seen.notes[1:]
    blind = tuple(replace(one, accuracy_before=None, accuracy_after=None) for one in factory.cleaning().vectors)
    assert answers(replace(factory.cleaning(), vectors=blind))["What did it cost?"][0] == "not measured"


def test_a_run_of_autoencoders_shows_its_course_and_its_flags() -> None:
    seen = _made.view(factory.sae_run())
    assert seen.headline == (
        "2 autoencoders trained for 2,000 steps; layers.4.resid_post-512 leaves 0.0244 of the variance unexplained"
    )
    assert answers(factory.sae_run())["Did it run well?"][0] == "1 red flag"
    assert [panel.title for panel in seen.panels] == [
        "FVU, layers.4.resid_post-512", "L0, layers.4.resid_post-512", "FVU, second", "L0, second"
    ]  # fmt: skip
    assert [table.title for table in seen.tables] == ["Autoencoders, on held-out tokens", "What the monitor saw"]
    quiet = replace(factory.sae_run(), warnings=())
    assert len(_made.view(quiet).tables) == 1
    assert answers(quiet)["Did it run well?"][0] == "Yes"
    bare = replace(quiet, saes=tuple(replace(one, checks=()) for one in quiet.saes))
    assert _made.view(bare).panels == ()
    assert "unexplained" not in _made.view(bare).headline


def test_the_keys_of_the_curves_are_of_the_kind() -> None:
    page = render_html(factory.sae_run())
    assert "on held-out tokens" in page
    assert "unsteered model" not in page
