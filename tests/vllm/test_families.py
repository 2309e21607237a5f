"""vLLM against transformers through our two backends: every family and every site, on equal weights.

The models are small and random; what an engine recorded is compared row by row with what our Hugging Face backend
records under the same steering along the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.vllm import _engine
from tests.vllm._planned import BOUND, KINDS, LAYERS, PROMPTS, WIDTH, Asked, Group, direction, save, too_far
from trimtab.architectures import Sizes
from trimtab.steering import (
    Add,
    Cap,
    Decay,
    Ramp,
    Steering,
)

pytestmark = _engine.MARKS
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ENDS = ("embed", "final_norm", "logits")

SMALL = ("qwen3", "llama", "gemma3", "gpt_neox")
"""Families of an ordinary test run: sequential, sandwich norms, parallel block."""
MORE = (
    "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "qwen3_next", "llama4", "gemma", "gemma2", "mistral", "phi3",
    "olmo2", "gpt2", "gpt_neox_sequential",
)  # fmt: skip
"""The first must hold experts: vLLM makes their process group when it starts, or never."""
MULTIMODAL = ("qwen3_vl_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3_multimodal")
"""Their text models; their modules import torchvision, for which `stand_ins` has an empty one."""
TEXT_ONLY = {"language_model_only": True}
ENGINE: dict[str, dict[str, Any]] = {
    "llama4": {"block_size": 32},
    "qwen3_next": {"dtype": "bfloat16"},
    **dict.fromkeys(MULTIMODAL, TEXT_ONLY),
}
"""What vLLM asks for: a chunk of attention is whole blocks; linear attention on the CPU is in bfloat16."""
FOLLOWED = (88, 3, 64, 21, 5, 99, 100, 14, 7, 56, 31, 12, 77, 43, 2, 9)
"""Tokens that both engines follow where greedy ones would part by rounding."""


def all_sites(family: str) -> tuple[str, ...]:
    points = [point for point in POINTS if point != "resid_mid" or family != "gpt_neox"]
    return (*ENDS, *(f"layers.*.{point}" for point in points))


def family_group(folder: Path, families: tuple[str, ...]) -> Group:
    group = Group(folder)
    steering = Steering(
        {
            "layers.1.resid_post": [Add(direction(1), scale=0.4)],
            "layers.2.attn_out": [Cap(direction(2), min=-0.05, max=0.05)],
        }
    )
    for family in families:
        sites = all_sites(family)
        asked = [Asked(prompt, one, sites, 16) for prompt in PROMPTS for one in (steering, None)]
        settings = {"sites": ["layers.1.resid_post", "layers.2.attn_out"], "capture_sites": list(sites)}
        given = ENGINE.get(family, {})
        forced = [FOLLOWED] * 4 if "dtype" in given else None
        group.add(family, save(family, folder / f"model-{family}"), asked, settings=settings, forced=forced, **given)
    group.run()
    return group


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return family_group(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return family_group(tmp_path_factory.mktemp("more"), MORE)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return family_group(tmp_path_factory.mktemp("multimodal"), MULTIMODAL)


def check_family(group: Group, family: str) -> None:
    document, rows = group.found(family)
    tokens, writer = group.reference(family)
    assert [tuple(one) for one in document["tokens"]] == tokens
    wanted = {f"{number}/{record.site}" for number in range(4) for record in writer.records}
    assert set(rows) == wanted
    assert not too_far(group, family, rows, writer, LAYERS)
    for number, asked in enumerate(group.asked[family]):
        count = len(asked.prompt) + asked.tokens - 1
        for site, positions in document["positions"][number].items():
            first = len(asked.prompt) - 1 if site == "logits" else 0
            assert positions == list(range(first, count))
        assert [op[2] for op in document["ops"][number]] == ([count] * 2 if asked.steering else [])
    for steered, plain, prompt in ((0, 1, PROMPTS[0]), (2, 3, PROMPTS[1])):
        moved = rows[f"{steered}/final_norm"][: len(prompt)] - rows[f"{plain}/final_norm"][: len(prompt)]
        assert float(moved.norm(dim=1).min()) > 0.1  # the steering is seen


@pytest.mark.parametrize("family", SMALL)
def test_a_family_runs_as_in_transformers(family: str, small: Group) -> None:
    check_family(small, family)


@pytest.mark.full
@pytest.mark.parametrize("family", MORE)
def test_a_further_family_runs_as_in_transformers(family: str, more: Group) -> None:
    check_family(more, family)


def test_a_text_model_in_a_multimodal_one_runs_as_in_transformers(tmp_path: Path) -> None:
    check_family(family_group(tmp_path, ("qwen3_vl",)), "qwen3_vl")


@pytest.mark.full
@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_multimodal_text_model_runs_as_in_transformers(family: str, multimodal: Group) -> None:
    check_family(multimodal, family)


POINTS_OF_BLOCKS = (
    "resid_pre", "q", "k", "v", "attn_z", "attn_raw", "attn_out", "resid_mid", "mlp_act", "mlp_raw", "mlp_out",
    "resid_post",
)  # fmt: skip
EVERY_SITE = (
    "embed",
    "layers.0.resid_pre",
    *(f"layers.1.{point}" for point in POINTS_OF_BLOCKS),
    "final_norm",
    "logits",
)
GAINS = (Ramp(0.7), Decay(0.6))


def sites_group(folder: Path, engines: tuple[tuple[str, str], ...]) -> Group:
    """Plan engines, each of a family and a kind; a request steers each site, then one with each gain; all record."""
    group = Group(folder)
    for family, kind in engines:
        place = save(family, folder / f"model-{family}-{kind}")
        sizes = Sizes.of(AutoConfig.from_pretrained(place))
        heads, shared = (sizes.head_dim * count for count in (sizes.heads, sizes.kv_heads))
        inner = {"q": heads, "k": shared, "v": shared, "attn_z": heads, "mlp_act": 128}
        widths = {**inner, "logits": sizes.vocab}

        def steering(number: int, site: str, widths: dict[str, int] = widths, **more: Any) -> Steering:
            width = widths.get(site.rpartition(".")[2], WIDTH)
            ops = [Add(direction(30 + number, width), scale=0.3), Cap(direction(60 + number, width), max=0.1)]
            return Steering({site: ops}, **more)

        given = [steering(number, site) for number, site in enumerate(EVERY_SITE)]
        given += [steering(number, "layers.1.resid_post", gain=gain) for number, gain in enumerate(GAINS)]
        asked = [Asked(PROMPTS[number % 2], one, EVERY_SITE, 16) for number, one in enumerate([*given, None, None])]
        settings = {"sites": list(EVERY_SITE), "max_steering": len(asked)}
        group.add(f"{family}-{kind}", place, asked, settings=settings, **KINDS[kind])
    group.run()
    return group


@pytest.mark.parametrize("kind", ["eager", pytest.param("compiled", marks=pytest.mark.full)])
def test_every_site_is_steered_and_recorded_as_in_the_reference(kind: str, tmp_path: Path) -> None:
    # the head of the second is its embedding: one tensor in two places; the others are fused where they are compiled
    families = ("qwen3", "gemma2") if kind == "eager" else ("qwen3", "gemma2", "gpt2", "olmo2")
    group = sites_group(tmp_path, tuple((family, kind) for family in families))
    for family in families:
        check_sites(group, f"{family}-{kind}")


def check_sites(group: Group, name: str) -> None:
    """Tokens, rows and counts are the reference's, and what is steered moves the logits."""
    document, rows = group.found(name)
    tokens, writer = group.reference(name)
    asked = group.asked[name]
    assert [tuple(made) for made in document["tokens"]] == tokens
    assert set(rows) == {f"{number}/{site}" for number in range(len(asked)) for site in EVERY_SITE}
    assert not too_far(group, name, rows, writer, LAYERS)
    for number, one in enumerate(asked[:-2]):
        count = len(one.prompt) + one.tokens - 1
        site = EVERY_SITE[number] if number < len(EVERY_SITE) else "layers.1.resid_post"
        acted = one.tokens if site == "logits" else count  # there are logits where a token is drawn
        assert [op[:3] for op in document["ops"][number]] == [[site, f"{at}", acted] for at in ("0:Add", "1:Cap")]
        plain = len(asked) - 2 + (len(asked) - 2 + number) % 2
        assert asked[plain].prompt == one.prompt
        moved = (rows[f"{number}/logits"][0] - rows[f"{plain}/logits"][0]).norm() / rows[f"{plain}/logits"][0].norm()
        # one shift of every key leaves all attention weights as they are, where keys do not turn with their positions
        assert float(moved) > 50 * BOUND or (site, name) == ("layers.1.k", "gpt2-compiled"), site
