"""Tokens that took other experts, with the router's logits recorded and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.compare import Comparison, compare
from trimtab.testing.models import tiny
from trimtab.trace import Trace, TraceWriter

FAMILY = "mixtral"
LENGTH = 48


def record(path: Path, model: PreTrainedModel, ids: torch.Tensor, *, routers: bool, **plan: Any) -> Path:
    """Write the stream, the experts' output and, if asked, the router's logits of one forward pass."""
    fields = {"prompt": 0, "request": "r", "positions": list(range(ids.shape[1]))}
    plan |= {"dtype": str(model.dtype).removeprefix("torch."), "num_layers": 2}
    with TraceWriter(path, kind="generation", plan=plan, provenance={}) as writer:

        def keep(site: str) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, out: Any) -> None:
                rows = out[0] if isinstance(out, tuple) else out
                writer.write(site, rows.reshape(-1, rows.shape[-1]), site=site, **fields)

            return hook

        for number, layer in enumerate(model.model.layers):
            layer.register_forward_hook(keep(f"layers.{number}.resid_post"))
            layer.mlp.register_forward_hook(keep(f"layers.{number}.mlp_out"))
            if routers:
                layer.mlp.gate.register_forward_hook(keep(f"module:model.layers.{number}.mlp.gate.output"))
        with torch.no_grad():
            model(ids)
    return path


def selected(path: Path, layer: int) -> torch.Tensor:
    """Experts of every token, from the recorded logits and by torch's own top-k."""
    logits = Trace.open(path).rows(site=f"module:model.layers.{layer}.mlp.gate.output").values
    return logits.float().topk(2, dim=-1).indices.sort().values


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Weights alone: the rotary tables stay as they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def runs(folder: Path, seed: int, **options: Any) -> Comparison:
    ids = torch.randint(3, 120, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    paths = [
        record(folder / f"{dtype}-{seed}", cast(tiny(FAMILY, seed=0), dtype), ids, **options)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return compare(*paths)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The first prompt with a token whose top two experts differ between the two dtypes."""
    for seed in range(20):
        folder = tmp_path_factory.mktemp("runs")
        result = runs(folder, seed, routers=True, num_experts_per_tok=2)
        if any((selected(result.reference, one) != selected(result.candidate, one)).any() for one in (0, 1)):
            return result
    raise AssertionError("no prompt of 20 has a near tie")


def routers(of: Comparison, layer: int, position: int) -> tuple[torch.Tensor, set[int]]:
    """The reference's logits of one token, sorted, and the expert that only the candidate takes."""
    logits = Trace.open(of.reference).rows(site=f"module:model.layers.{layer}.mlp.gate.output").values
    ours, theirs = (set(selected(Path(path), layer)[position].tolist()) for path in (of.reference, of.candidate))
    return logits[position].double().sort(descending=True).values, theirs - ours


def test_a_flip_of_the_router_is_named_with_its_token_and_gap(flipped: Comparison) -> None:
    assert not flipped.passed and flipped.reason.startswith("differs: routing: ")
    failing = [one for one in flipped.failing() if "resid" in one.key.tensor or "mlp_out" in one.key.tensor]
    assert failing
    for one in failing:
        kind = one.fingerprints[0]
        assert kind.kind == "routing" and kind.explained == 1
        assert one.reasons[0] == kind.detail and kind.detail.startswith("differs: routing: ")
        position = int(kind.detail.split("at position ")[1].split()[0])
        layer = int(kind.detail.split("model.layers.")[1].split(".")[0])
        ranked, taken = routers(flipped, layer, position)
        assert kind.value == pytest.approx(float(ranked[1] - ranked[2]), rel=1e-9)
        assert f"takes expert {taken.pop()} in place of" in kind.detail or "ties expert" in kind.detail


def test_rows_that_took_the_same_experts_are_not_called_routing(flipped: Comparison, tmp_path: Path) -> None:
    """The same runs with one more row broken, far from any flip."""
    broken = tmp_path / "broken"
    source = Trace.open(flipped.candidate)
    moved = {int(one) for layer in (0, 1) for one in changed(flipped, layer)}
    row = next(one for one in range(LENGTH) if one < min(moved)) if min(moved) else LENGTH - 1
    with TraceWriter(broken, kind="generation", plan=source.manifest["plan"], provenance={}) as writer:
        for record in source.index.iter_rows(named=True):
            values = source.tensor(record["record_id"]).clone()
            if record["site"] == "layers.0.mlp_out":
                values[row] *= 3
            fields = {name: record[name] for name in ("site", "prompt", "request", "positions")}
            writer.write(record["site"], values, **fields)
    result = compare(flipped.reference, broken)
    one = next(one for one in result.records if one.key.site == "layers.0.mlp_out")
    assert not any(reason.startswith("differs: routing") for reason in one.reasons)
    assert all(kind.explained < 1 for kind in one.fingerprints if kind.kind == "routing")
    assert result.first_divergence is not None and result.first_divergence.position == row


def changed(of: Comparison, layer: int) -> list[int]:
    """Positions whose top two experts differ."""
    unequal = selected(Path(of.reference), layer) != selected(Path(of.candidate), layer)
    return unequal.any(-1).nonzero().flatten().tolist()


def test_without_the_routers_logits_a_warning_says_what_to_record(tmp_path: Path) -> None:
    """As the Hugging Face backend writes its manifest: sites of the model, none of neurons behind experts."""
    sites = {f"layers.{layer}.{point}": {} for layer in (0, 1) for point in ("mlp_raw", "mlp_out")}
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[20] = torch.randn(256, generator=torch.Generator().manual_seed(1))
    for name, tensor, mixture in (("a", values, True), ("b", other, True), ("c", values, False), ("d", other, False)):
        listed = sites if mixture else sites | {f"layers.{layer}.mlp_act": {} for layer in (0, 1)}
        with TraceWriter(tmp_path / name, provenance={"backend": "hf", "sites": listed}) as writer:
            writer.write("x", tensor, site="layers.1.mlp_out")
    said = [compare(tmp_path / one, tmp_path / two).warnings for one, two in (("a", "b"), ("c", "d"))]
    assert any("near tie of the router" in text for text in said[0])
    assert not any("router" in text for text in said[1])


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            [3.0, 2.0, 2.0, -1.0],
            "ties expert 2 with 1 among the first 2: its logits are 0.005 apart and moved by 0.005",
        ),
        ([3.0, 2.0, 2.01, -1.0], "takes expert 2 in place of 1 among the first 2"),
        ([3.0, -2.0, 2.0, -1.0], "more than rounding explains, so its input differed"),
        ([3.0, 2.0, 1.99, -1.0], None),
    ],
)
def test_ties_and_exchanges_are_read_off_the_logits(tmp_path: Path, theirs: list[float], said: str | None) -> None:
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[3.0, 2.0, 1.995, -1.0]]).repeat(32, 1)
    for name in ("a", "b"):
        stream, router = values.clone(), logits.clone()
        if name == "b":
            stream[9], router[9] = -stream[9], torch.tensor(theirs)
        fields = {"prompt": 0, "request": "r", "positions": list(range(32))}
        plan = {"dtype": "bfloat16", "num_experts_per_tok": 2}
        with TraceWriter(tmp_path / name, kind="generation", plan=plan, provenance={}) as writer:
            writer.write("gate", router, site="module:model.layers.0.mlp.gate.output", **fields)
            writer.write("out", stream, site="layers.0.mlp_out", **fields)
    record = compare(tmp_path / "a", tmp_path / "b").records[1]
    kinds = {one.kind: one.detail for one in record.fingerprints}
    assert record.status == "failed" and (said is None) == ("routing" not in kinds)
    assert said is None or said in kinds["routing"]
