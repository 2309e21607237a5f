"""vLLM against transformers through our two backends: every op, on equal weights.

What an engine recorded is compared row by row with what our Hugging Face backend records under the same steering along
the same tokens.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vllm import _engine
from tests.vllm._planned import BOUND, KINDS, PROMPTS, Asked, Group, direction, save, too_far
from trimtab import testbed
from trimtab.backends import Request, open_backend
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.steering import (
    Ablate,
    AblateSubspace,
    Add,
    Cap,
    CapSubspace,
    LowRank,
    Op,
    Patch,
    SetProjection,
    Steering,
)
from trimtab.testing.memory import MemoryWriter

pytestmark = _engine.MARKS


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
