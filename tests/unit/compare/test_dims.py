"""The dims grammar: what it reads, and what it says of what it does not."""

from __future__ import annotations

import pytest

from trimtab.compare.dims import DimsRule, Split, parse_dims, parse_rules
from trimtab.errors import InputError


def test_a_whole_example() -> None:
    dims = parse_dims("b s[cp:zigzag,sp] (n*d)[ep] 1 # tp:replicated dp:mean a note: of mine")
    assert [axis.text for axis in dims.axes] == ["b", "s", "(n*d)", "1"]
    assert dims.axes[1].splits == (Split("cp", "zigzag"), Split("sp", "sharded"))
    assert dims.names == ("b", "s", "n", "d")
    assert dims.whole == (Split("tp", "replicated"), Split("dp", "mean"))
    assert dims.note == "a note: of mine" and dims.parallel
    assert dims.split_of("tp") == Split("sp", "sharded")  # sp has the ranks of tp, and a cut comes first
    assert dims.split_of("pp") is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("t[cp:zigzag,sp] 1 h # tp:replicated ep:replicated", ("t", "h")),
        ("t h # tp:replicated dp:=attn_dp", ("t", "h")),
        ("b s[cp:zigzag+sharded] h[tp:partial]", ("b", "s", "h")),
        ("(a * b)[tp] c", ("a", "b", "c")),
        ("t[cp:natural] num_heads[attn_tp] d", ("t", "num_heads", "d")),
        ("# dp:mean", ()),
        ("", ()),
        ("h # recompute_pseudo:replicated", ("h",)),
    ],
)
def test_reads(text: str, names: tuple[str, ...]) -> None:
    assert parse_dims(text).names == names


def test_the_group_that_takes_the_place_of_dp() -> None:
    assert parse_dims("t h # dp:=attn_dp").dp_group == "attn_dp"
    assert not parse_dims("t h # dp:=attn_dp").parallel


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("b b", "the axis 'b' is named twice"),
        ("(a*b) a", "the axis 'a' is named twice"),
        ("s[sp] h[tp]", r"sp and tp are the same ranks|tp is sharded and sharded"),
        ("h[foo]", "no parallel axis 'foo'"),
        ("h[cp:zigzig]", "no qualifier 'zigzig'; did you mean 'zigzag'"),
        ("h[cp:zigzag+partial]", "cp is zigzag and partial"),
        ("b,s", "'b,s' is no axis"),
        ("h[tp", r"'h\[tp' is no axis"),
        ("h[]", "no parallel axis ''"),
        ("1[tp]", "the singleton 1 cannot be shared out"),
        ("h[tp] # tp:replicated", "tp is sharded and replicated"),
        ("x # tp:replicatd", "'tp:replicatd' after # must be one of partial, mean, replicated"),
        ("x # cp:zigzag", "what cuts an axis stands in its brackets"),
        ("x # tpp:replicated", "no parallel axis 'tpp'; did you mean 'tp'"),
        ("x # tp:=attn_tp", "only dp takes the place of a group"),
        ("a-b", "'a-b' is no axis"),
        ("a " * 600, "at most 1000 are read"),
    ],
)
def test_refuses(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_dims(text)


def test_rules() -> None:
    rule = DimsRule.parse("module:layers.*qkv.*: t[cp:zigzag] h[tp] # dp:replicated")
    assert rule.pattern == "module:layers.*qkv.*" and rule.matches("module:layers.3.qkv.output")
    assert str(rule.dims) == "t[cp:zigzag] h[tp] # dp:replicated"
    assert parse_rules(["loss:"])[0].dims.axes == ()
    for text, said in (("b s h", "gives no dims"), ("(: b", "is not a regular expression"), ("a: b[x]", "no parallel")):
        with pytest.raises(InputError, match=said):
            DimsRule.parse(text)
    with pytest.raises(InputError, match="give a sequence"):
        parse_rules("a: b")
