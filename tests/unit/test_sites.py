"""The grammar of sites against itself and against a list of what must be refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SiteError
from trimtab.sites import GLOBAL_POINTS, LAYER_POINTS, Site, SitePattern, resolve_sites

LAYERS = 6


@given(st.integers(0, 500), st.sampled_from(LAYER_POINTS))
def test_a_layer_site_round_trips(layer: int, point: str) -> None:
    text = f"layers.{layer}.{point}"
    assert str(Site.parse(text)) == text
    assert Site.parse(text) == Site(point, layer)


@pytest.mark.parametrize("text", [*GLOBAL_POINTS, "module:encoder.block.3.output", "module:a.grad_input"])
def test_global_and_module_sites_round_trip(text: str) -> None:
    assert str(Site.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("layers.*.resid_post", [0, 1, 2, 3, 4, 5]),
        ("layers.1-3.resid_post", [1, 2, 3]),
        ("layers.{0,4}.resid_post", [0, 4]),
        ("layers.{0,2-3,-1}.resid_post", [0, 2, 3, 5]),
        ("layers.-1.resid_post", [5]),
        ("layers.-6.resid_post", [0]),
    ],
)
def test_patterns_select_layers(text: str, layers: list[int]) -> None:
    pattern = SitePattern.parse(text)
    assert [site.layer for site in pattern.resolve(LAYERS)] == layers
    assert str(pattern) == text


@given(st.sets(st.integers(0, 20), min_size=1, max_size=6))
def test_matches_agrees_with_resolve(chosen: set[int]) -> None:
    pattern = SitePattern.parse("layers.{" + ",".join(map(str, sorted(chosen))) + "}.q")
    for layer in range(21):
        assert pattern.matches(Site("q", layer)) == (layer in chosen)
    assert not pattern.matches(Site("k", min(chosen)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers.3.resid_pst", "nearest: resid_post"),
        ("layer.3.resid_post", "is not a site"),
        ("logit", "did you mean 'logits'"),
        ("layers.3-1.q", "runs backwards"),
        ("layers.{1,x}.q", "'x' is not a layer"),
        ("module:foo", "a module site ends in"),
        ("", "is not a site"),
    ],
)
def test_bad_text_is_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        SitePattern.parse(text)


def test_a_pattern_is_not_a_site() -> None:
    for text in ("layers.*.q", "layers.1-2.q", "layers.-1.q"):
        with pytest.raises(SiteError, match="one site was expected"):
            Site.parse(text)


@pytest.mark.parametrize("text", ["layers.6.q", "layers.-7.q", "layers.4-9.q"])
def test_a_layer_outside_the_model_names_the_range(text: str) -> None:
    with pytest.raises(SiteError, match="layers 0 to 5"):
        resolve_sites(text, LAYERS)


def test_resolve_sites_orders_as_the_forward_pass_and_drops_repeats() -> None:
    sites = resolve_sites("logits, layers.{0,1}.resid_post embed; layers.0.resid_pre layers.*.resid_post", 2)
    assert [str(site) for site in sites] == [
        "embed",
        "layers.0.resid_pre",
        "layers.0.resid_post",
        "layers.1.resid_post",
        "logits",
    ]


def test_a_star_skips_layers_without_the_point_and_a_number_does_not() -> None:
    def points(layer: int) -> tuple[str, ...]:
        return ("resid_post", "q") if layer % 2 else ("resid_post",)

    assert [site.layer for site in resolve_sites("layers.*.q", 4, points)] == [1, 3]
    with pytest.raises(SiteError, match=r"no layers\.2\.q; layer 2 has: resid_post"):
        resolve_sites("layers.2.q", 4, points)
    with pytest.raises(SiteError, match=r"no layers\.0\.k"):
        resolve_sites("layers.*.k", 4, points)


def test_nothing_is_an_error() -> None:
    with pytest.raises(SiteError, match="no site was given"):
        resolve_sites([], LAYERS)
