"""vLLM against transformers through our two backends: every family, and every op, on equal weights.

The models are small and random; what an engine recorded is compared row by row with what our Hugging Face backend
records under the same steering along the same tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from trimtab import testbed
from trimtab.architectures import Sizes
from trimtab.backends import Capture, Request, open_backend
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.sites import Site
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    Cap,
    CapSubspace,
    Decay,
    LowRank,
    Op,
    Patch,
    Ramp,
    SetProjection,
    Steering,
)
from trimtab.testing import models
from trimtab.testing.memory import MemoryWriter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
    pytest.mark.filterwarnings("ignore"),
]
WIDTH, LAYERS, BOUND = 128, 3, 2e-5
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
PROMPTS = ((5, 17, 99, 3, 64, 28, 7), (40, 41, 42, 9, 11, 90, 77, 13, 8, 101, 60, 31) * 2)


def family_model(family: str) -> nn.Module:
    """Return a tiny model with heads of 32, the smallest that vLLM's CPU attention takes."""
    config = models.tiny(family, layers=LAYERS).config
    text: Any = config.get_text_config()
    heads = {"hidden_size": WIDTH, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    changes = {
        **heads,
        "shared_expert_intermediate_size": 64,
        "n_embd": WIDTH,
        "n_inner": 128,
        "attention_chunk_size": 64,
    }
    changes |= {"intermediate_size_mlp": 128, "query_pre_attn_scalar": 32}
    changes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "attention_chunk_size": 32}
    for name, value in changes.items():
        if name in text.__dict__:
            setattr(text, name, value)
    if text.__dict__.get("num_key_value_heads", 1) is None:
        del text.num_key_value_heads
    if family == "llama4":
        text.num_experts_per_tok = 1  # all that vLLM's experts do with a weight on their input
    if family == "qwen3_moe":
        del text.shared_expert_intermediate_size  # vLLM would make a shared expert, for which there are no weights
    if family == "qwen3_vl_moe":
        text.norm_topk_prob = True
        text.moe_intermediate_size = 96  # the two layouts of its experts are told apart by their shapes
    if "_vl" in family:
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
        vision = config.vision_config
        for name in ("out_hidden_size", "hidden_size") if family == "qwen2_vl" else ("out_hidden_size",):
            setattr(vision, name, WIDTH)
    tied = family == "gemma2"  # vLLM's class has no head of its own
    if tied:
        config.tie_word_embeddings = True
    kind = type(models.tiny(family, layers=LAYERS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: nn.Module = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                models._randomise(name, parameter)
    if tied:
        model.tie_weights()
    config.architectures = [kind.__name__]
    return model


def save(family: str, folder: Path) -> Path:
    model: Any = family_model(family)
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        _lay_experts_as_released(folder / "model.safetensors")
    return folder


def _lay_experts_as_released(path: Path) -> None:
    """Qwen's own files, the only ones that vLLM reads, hold each expert's matrices as [in, out]."""
    tensors = safetensors.torch.load_file(path)
    turned = {name: one.mT.contiguous() if ".experts." in name else one for name, one in tensors.items()}
    safetensors.torch.save_file(turned, path, metadata={"format": "pt"})


@functools.cache
def direction(seed: int, width: int = WIDTH, rows: int = 1) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return drawn[0] if rows == 1 else drawn


@dataclass(frozen=True)
class Asked:
    """One request, for both backends."""

    prompt: tuple[int, ...]
    steering: Steering | None
    sites: tuple[str, ...]
    tokens: int


class Group:
    """Engines that share a process, and the reference of each request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: list[dict[str, Any]] = []
        self.models: dict[str, tuple[Path | str, str]] = {}
        self.asked: dict[str, list[Asked]] = {}
        self.forced: dict[str, list[tuple[int, ...]] | None] = {}

    def add(
        self,
        name: str,
        model: Path,
        asked: list[Asked],
        *,
        settings: dict[str, Any],
        dtype: str = "float32",
        forced: list[tuple[int, ...]] | None = None,
        **engine: Any,
    ) -> None:
        """Plan an engine."""
        requests = []
        for number, one in enumerate(asked):
            path = None
            if one.steering is not None:
                path = self.folder / f"{name}-{number}.steering"
                one.steering.save(path)
            requests.append(
                {
                    "prompt": one.prompt,
                    "steering": None if path is None else str(path),
                    "sites": one.sites,
                    "tokens": one.tokens,
                    "forced": None if forced is None else forced[number],
                }
            )
        self.models[name], self.asked[name], self.forced[name] = (model, dtype), asked, forced
        engine = {"dtype": dtype, "enforce_eager": True, **engine}
        self.plan.append(
            {"name": name, "model": str(model), "settings": settings, "engine": engine, "requests": requests}
        )

    def run(self) -> None:
        """Run the engines, one after the other."""
        path = self.folder / "plan.json"
        path.write_text(json.dumps(self.plan))
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        if any("language_model_only" in one["engine"] for one in self.plan):
            settings["PYTHONPATH"] = str(Path(__file__).with_name("stand_ins"))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("families_engine.py")), str(path)],
            env=os.environ | settings | {"VLLM_LOGGING_LEVEL": "ERROR"},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        (self.folder / "said.txt").write_text(done.stdout + done.stderr)

    def found(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an engine made."""
        path = self.folder / f"{name}.json"
        assert path.exists(), (self.folder / "said.txt").read_text()[-3000:]
        document = json.loads(path.read_text())
        assert "error" not in document, document["error"][-3000:]
        return document, safetensors.torch.load_file(self.folder / f"{name}.safetensors")

    def reference(self, name: str, dtype: str | None = None) -> tuple[list[tuple[int, ...]], MemoryWriter]:
        """Return the tokens and rows of our Hugging Face backend, in the engine's dtype or another."""
        model, own = self.models[name]
        backend = open_backend("hf", str(model), dtype=dtype or own)
        forced = self.forced[name]
        writer = MemoryWriter()
        sites = self.asked[name][0].sites
        made = backend.generate(
            [
                Request(
                    prompt=one.prompt,
                    id=str(number),
                    steering=one.steering,
                    max_new_tokens=one.tokens,
                    forced_tokens=None if forced is None else forced[number],
                    ignore_eos=True,
                )
                for number, one in enumerate(self.asked[name])
            ],
            capture=Capture(sites=sites),
            writer=writer,
        )
        backend.close()
        return [one.token_ids for one in made], writer


def errors(rows: dict[str, Tensor], writer: MemoryWriter) -> dict[str, float]:
    """Return the largest rel_l2 of a row, per request and site."""
    found = {}
    for name, mine in rows.items():
        number, _, site = name.partition("/")
        _, theirs = writer.rows(site, number)
        assert mine.shape == theirs.shape
        ours, reference = mine.double(), theirs.double()
        found[name] = float(((ours - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)).max())
    return found


def too_far(group: Group, name: str, rows: dict[str, Tensor], writer: MemoryWriter, layers: int) -> dict[str, float]:
    """Return the errors above what is allowed, in the order of the rows.

    In float32 the stated bound. In 16 bits the table's for the site's depth, or where that is more what two independent
    roundings can differ by: twice the reference's own distance from float32, on the same tokens.
    """
    dtype, found = group.models[name][1], errors(rows, writer)
    if dtype == "float32":
        return {where: error for where, error in found.items() if not error < BOUND}
    _, exact = group.reference(name, "float32")
    rounded = {where: writer.rows(where.partition("/")[2], where.partition("/")[0])[1] for where in found}
    wrong = {}
    for where, own in errors(rounded, exact).items():
        layer = Site.parse(where.partition("/")[2]).layer
        table = engine_row_rel_l2(dtype, layers if layer is None else layer)
        if not found[where] < max(table, 2 * own):
            wrong[where] = found[where]
    return wrong


def all_sites(family: str) -> tuple[str, ...]:
    points = [point for point in POINTS if point != "resid_mid" or family != "gpt_neox"]
    return (*ENDS, *(f"layers.*.{point}" for point in points))


def ops() -> dict[str, list[Op]]:
    """Every op, and chains of them; strong enough to be seen and weak enough that the model still speaks."""
    v, w, pair = direction(11), direction(12), direction(13, rows=2)
    return {
        "Add": [Add(v, scale=0.1)],
        "Add of the median norm": [Add(v, scale=0.2, unit="median_norm", median_norm=4.0)],
        "Add of the row's norm": [Add(v, scale=-0.15, unit="token_norm")],
        "Add, bounded": [Add(v, scale=1.0, max_ratio=0.1)],
        "Cap": [Cap(v, min=-0.3, max=0.2)],
        "Ablate": [Ablate(v, keep=0.0)],
        "SetProjection": [SetProjection(v, value=0.7)],
        "AblateSubspace": [AblateSubspace(pair, keep=0.25)],
        "CapSubspace": [CapSubspace(pair, min=[-0.2, None], max=[0.2, 0.1])],
        "three ops": [Add(w, scale=0.05), Cap(v, max=0.1), Ablate(w, keep=0.5)],
        "Patch": [Patch(v, weight=0.1)],
        "LowRank": [LowRank(pair / 12, torch.tensor([0.1, -0.2]), direction(14, rows=2).T.contiguous() / 12)],
    }


OPS = tuple(ops())
HALVES = ("all", "generated")
MODELS = ("qwen3", "llama", "gemma3", "testbed")
KINDS = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},
}
FAR = {"float32": 100.0, "float16": 5.0, "bfloat16": 1.0}
"""How many times its bound a row is moved by an op: every row in float32, half of them in 16 bits."""
STEPS = 64


def steered_layers(name: str) -> tuple[int, ...]:
    """Return the first, a middle and the last layer."""
    return (0, 3, 5) if name == "testbed" else (0, 1, 2)


def ops_group(folder: Path, engines: list[tuple[str, str, str]]) -> Group:
    """Plan engines, each of a model, a dtype and a kind.

    Each runs one request per op, at three layers, every other one at all rows, the rest at those of generated tokens;
    and each of the two prompts unsteered.
    """
    group = Group(folder)
    places = {name: place_of(name, folder) for name, _, _ in engines}
    for name, dtype, kind in engines:
        place, prompts = places[name]
        layers = steered_layers(name)
        sites = (*(f"layers.{layer}.resid_post" for layer in range(layers[-1] + 1)), "final_norm")
        asked = [
            Asked(
                tuple(prompts[number // 2 % 2]),
                Steering({f"layers.{layer}.resid_post": listed for layer in layers}, positions=HALVES[number % 2]),
                sites,
                STEPS,
            )
            for number, listed in enumerate(ops().values())
        ]
        asked += [Asked(tuple(one), None, sites, STEPS) for one in prompts]
        settings = {
            "sites": ["layers.*.resid_post"],
            "capture_sites": ["final_norm"],
            "ops_per_site": 3,
            "directions_per_op": 2,
        }
        forced = None if dtype == "float32" else followed(place, asked)
        group.add(f"{name}-{dtype}-{kind}", place, asked, settings=settings, dtype=dtype, forced=forced, **KINDS[kind])
    group.run()
    return group


def place_of(name: str, folder: Path) -> tuple[Path, tuple[tuple[int, ...], ...]]:
    """Return where a model is, and two prompts for it."""
    if name != "testbed":
        return save(name, folder / f"model-{name}"), PROMPTS
    backend = open_backend("hf", "testbed")
    prompts = tuple(backend.encode(text).ids for text in testbed.prompts(2, seed=3))
    backend.close()
    return Path(testbed.path()), prompts


def followed(place: Path, asked: list[Asked]) -> list[tuple[int, ...]]:
    """Return what the model says in float32 to the prompt of each request: tokens that every dtype then follows."""
    backend = open_backend("hf", str(place), dtype="float32")
    prompts = list(dict.fromkeys(one.prompt for one in asked))
    made = backend.generate(
        [
            Request(prompt=one, id=str(number), max_new_tokens=STEPS, ignore_eos=True)
            for number, one in enumerate(prompts)
        ]
    )
    backend.close()
    said = {prompt: one.token_ids for prompt, one in zip(prompts, made, strict=True)}
    return [said[one.prompt] for one in asked]


def check_ops(group: Group, name: str) -> None:
    """Tokens, rows, counts and clamps are the reference's, and every op moves what it selects and nothing before."""
    document, rows = group.found(name)
    tokens, writer = group.reference(name)
    asked, (_, dtype) = group.asked[name], group.models[name]
    layers = 1 + steered_layers(name.partition("-")[0])[-1]
    assert [tuple(made) for made in document["tokens"]] == tokens
    assert set(rows) == {f"{number}/{site}" for number, one in enumerate(asked) for site in one.sites}
    for number, one in enumerate(asked):
        every = list(range(len(one.prompt) + STEPS - 1))
        for site in one.sites:
            assert document["positions"][number][site] == every == writer.rows(site, str(number))[0]
    assert not too_far(group, name, rows, writer, layers)
    for number, label in enumerate(OPS):
        check_counts(group, name, number, document["ops"][number], writer)
        moved, still = changes(asked, rows, number)
        bounded = any(isinstance(op, (Cap, CapSubspace)) for op in ops()[label])  # some rows keep to their bounds
        limit = BOUND if dtype == "float32" else engine_row_rel_l2(dtype, layers)
        least = moved.max() if bounded else moved.min() if dtype == "float32" else moved.median()
        assert float(least) > FAR[dtype] * limit, label
        assert float(still.max()) < limit if len(still) else HALVES[number % 2] == "all", label
    assert document["ops"][len(OPS) :] == [[], []]


def check_counts(group: Group, name: str, number: int, found: list[Any], writer: MemoryWriter) -> None:
    """Every op acts at every row that it selects, and its bounds are active where they are in the reference."""
    one, listed = group.asked[name][number], ops()[OPS[number]]
    places = [f"layers.{layer}.resid_post" for layer in steered_layers(name.partition("-")[0])]
    wanted = [(site, f"{index}:{op.kind}") for site in places for index, op in enumerate(listed)]
    assert [(op[0], op[1]) for op in found] == wanted, OPS[number]
    count = STEPS - 1 + (len(one.prompt) if HALVES[number % 2] == "all" else 0)
    assert {(op[2], op[3]) for op in found} == {(count, count)}, OPS[number]
    theirs = Counter((row.site, row.op) for row in writer.doses if row.request == str(number) and row.clamped)
    for (site, op, _, _, clamped), kind in zip(found, [type(op) for op in listed] * len(places), strict=True):
        if kind in (Patch, LowRank):
            assert clamped is None, (site, op)  # they run outside the banks, and have no bounds
        elif group.models[name][1] == "float32":
            assert clamped == theirs[site, op], (site, op)
    if any(isinstance(op, (Cap, CapSubspace)) for op in listed):
        assert sum(clamped for *_, clamped in found) > 0, OPS[number]


def changes(asked: list[Asked], rows: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Return the rel_l2 between a steered request and the unsteered one at the final norm, per row.

    Of the rows that both read the same tokens in: those that the steering selects, then those before the first of them.
    """
    length = len(asked[number].prompt)
    alone = next(index for index in range(len(OPS), len(asked)) if asked[index].prompt == asked[number].prompt)
    steered, plain = (rows[f"{which}/final_norm"][: length + 1].double() for which in (number, alone))
    found = (steered - plain).norm(dim=1) / plain.norm(dim=1)
    # tokens part only after the first steered row, which in the second half is that of the first generated token
    return (found[:length], found[:0]) if HALVES[number % 2] == "all" else (found[length:], found[:length])


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


STATED = [*((name, "float32", "eager") for name in MODELS), ("testbed", "bfloat16", "eager")]


@pytest.fixture(scope="module")
def stated(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return ops_group(tmp_path_factory.mktemp("stated"), STATED)


@pytest.mark.parametrize("name", ["-".join(one) for one in STATED])
def test_every_op_acts_as_in_the_reference(name: str, stated: Group) -> None:
    check_ops(stated, name)


FURTHER = {
    f"{dtype}-{kind}": [(name, dtype, kind) for name in MODELS if (name, dtype) != ("gemma3", "float16")]
    for dtype in ("float32", "bfloat16", "float16")
    for kind in KINDS
    if (dtype, kind) != ("float32", "eager")
}
"""vLLM refuses Gemma 3 in float16."""


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Group]:
    @functools.cache
    def run(one: str) -> Group:
        return ops_group(tmp_path_factory.mktemp(one), FURTHER[one])

    return run


@pytest.mark.full
@pytest.mark.parametrize(("one", "name"), [(one, name) for one, engines in FURTHER.items() for name, _, _ in engines])
def test_every_op_acts_as_in_the_reference_compiled_and_in_16_bits(
    one: str, name: str, further: Callable[[str], Group]
) -> None:
    check_ops(further(one), f"{name}-{one}")
