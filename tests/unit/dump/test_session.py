"""What a dump records of one process, and that it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab import dump
from trimtab.compare import compare
from trimtab.errors import InputError, SiteError
from trimtab.trace import Trace

from .conftest import Net, train

Make = Callable[..., Net]
Read = Callable[..., list[dict[str, Any]]]


def values(path: Path, **columns: Any) -> torch.Tensor:
    trace = Trace.open(path)
    (row,) = trace.filter(**columns).index.to_dicts()
    return trace.tensor(row["record_id"])


def test_inputs_and_outputs_are_those_of_the_modules(tmp_path: Path, net: Make) -> None:
    model, x = net(), torch.randn(5, 3)
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        result = model(x)
    hidden = model.embed(x)
    assert torch.equal(values(tmp_path / "d", name="x"), x)
    assert torch.equal(values(tmp_path / "d", site="module:embed.output"), hidden)
    assert torch.equal(values(tmp_path / "d", site="module:blocks.0.input"), hidden)
    assert torch.equal(values(tmp_path / "d", name="output.logits", kind="value"), result["logits"])
    assert torch.equal(values(tmp_path / "d", name="output.hidden", kind="value"), result["hidden"])


def test_plain_arguments_of_the_model_are_recorded_too(tmp_path: Path, net: Make) -> None:
    model = net()
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        model(torch.ones(1, 3), kind="thd")
    assert bytes(values(tmp_path / "d", name="kind").tolist()) == b"thd"


def test_records_know_their_module_and_its_source(tmp_path: Path, net: Make, records: Read) -> None:
    model = net()
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        model(torch.ones(1, 3))
    (row,) = records(tmp_path / "d", site="module:blocks.1.output")
    assert (row["module_path"], row["module_class"], row["layer"]) == ("blocks.1", "Block", 1)
    written = Path(row["source_file"]).read_text().splitlines()[row["source_line"] - 1]
    assert written == "class Block(nn.Module):"


def test_gradients_have_the_tags_of_their_forward(tmp_path: Path, net: Make, records: Read) -> None:
    model = net()
    first, second = torch.randn(5, 3), torch.randn(5, 3)
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        losses = [model(x)["logits"].square().mean() for x in (first, second)]
        losses[0].backward()  # the second forward pass has been since
        losses[1].backward()
    gradients = records(tmp_path / "d", site="module:blocks.1.grad_output")
    assert [row["micro_step"] for row in gradients] == [0, 1]
    assert all(row["kind"] == "grad" and row["layer"] == 1 for row in gradients)
    for number, x in enumerate((first, second)):
        hidden = model.blocks[0](model.embed(x))
        out = model.blocks[1](hidden)
        (expected,) = torch.autograd.grad((model.head(out) * model.scale).square().mean(), out)
        assert torch.equal(values(tmp_path / "d", site="module:blocks.1.grad_output", micro_step=number), expected)


def test_state_of_the_training_is_recorded_where_it_is_used(tmp_path: Path, net: Make, records: Read) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    before = model.head.weight.detach().clone()
    with dump.record(tmp_path / "d") as session:
        session.watch(model, optimizer)
        train(model, optimizer, 2, micro=2, session=session)
    path = tmp_path / "d"
    assert torch.equal(values(path, name="head.weight", kind="param", step=0), before)
    assert torch.equal(values(path, name="head.weight", kind="param", step=2), model.head.weight)
    assert torch.equal(values(path, name="head.weight.exp_avg", step=1), optimizer.state[model.head.weight]["exp_avg"])
    gradient = values(path, name="head.weight", kind="grad", step=0)
    assert torch.allclose(gradient * 0.1, values(path, name="head.weight.exp_avg", step=0))
    assert values(path, name="lr.0", step=1).item() == 0.25
    assert values(path, name="scale", step=1).item() == 2.0
    assert {row["micro_step"] for row in records(path, name="loss", step=1)} == {0, 1}


@pytest.mark.parametrize("seed", [1, 2])
def test_random_generators_are_recorded_once_the_run_draws_from_them(tmp_path: Path, records: Read, seed: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    random.seed(seed)  # a state that no two programs share unless they set it
    with torch.random.fork_rng(), dump.record(tmp_path / "d", parts="rng inputs") as session:
        session.watch(model)
        for step in range(3):
            if step == 2:
                random.random()
            model(torch.ones(1, 2))
            session.step()
    found = [(row["step"], row["name"]) for row in records(tmp_path / "d") if row["name"].startswith("rng.")]
    assert found == [(1, "rng.cpu"), (2, "rng.cpu"), (2, "rng.python")]


def test_a_program_that_draws_nothing_agrees_with_itself_under_another_seed(tmp_path: Path, net: Make) -> None:
    for seed in (1, 2):
        random.seed(seed)
        model = net()
        with dump.record(tmp_path / str(seed)) as session:
            session.watch(model)
            model(torch.ones(1, 3))
    assert compare(tmp_path / "1", tmp_path / "2").passed


def test_master_weights_of_an_optimizer_are_optimizer_state(tmp_path: Path, net: Make) -> None:
    model = net().bfloat16()
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(masters, momentum=0.9)
    with dump.record(tmp_path / "d") as session:
        session.watch(model, optimizer)
        model(torch.ones(1, 3).bfloat16())["logits"].float().mean().backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
    assert torch.equal(values(tmp_path / "d", name="group0.0.master", kind="optim"), masters[0])
    assert torch.equal(
        values(tmp_path / "d", name="group0.0.momentum_buffer"), optimizer.state[masters[0]]["momentum_buffer"]
    )


@pytest.mark.parametrize("checkpoint", ["non-reentrant", "reentrant"])
def test_recomputation_is_told_apart(checkpoint: str, tmp_path: Path, net: Make, records: Read) -> None:
    plain, again = net(), net(checkpoint=checkpoint)
    for name, model in (("plain", plain), ("again", again)):
        with dump.record(tmp_path / name) as session:
            session.watch(model)
            model(torch.ones(2, 3))["logits"].square().mean().backward()
    original = records(tmp_path / "again", site="module:blocks.0.up.output", recompute=False)
    repeated = records(tmp_path / "again", site="module:blocks.0.up.output", recompute=True)
    assert [row["call_index"] for row in original + repeated] == [0, 0]
    assert original[0]["digest"] == repeated[0]["digest"]
    assert not records(tmp_path / "plain", recompute=True)

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("name", "kind", "step", "micro_step", "call_index", "digest"))

    expected = {identity(row) for row in records(tmp_path / "plain")}
    assert {identity(row) for row in records(tmp_path / "again", recompute=False)} == expected


def test_recomputed_calls_are_numbered_on_their_own(tmp_path: Path, records: Read) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(2, 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda x: self.layer(torch.tanh(self.layer(x))), x, use_reentrant=False)

    model = Twice()
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        model(torch.ones(1, 2)).square().sum().backward()
    rows = records(tmp_path / "d", site="module:layer.input")
    assert [(row["recompute"], row["call_index"]) for row in rows] == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert [row["digest"] for row in rows[:2]] == [row["digest"] for row in rows[2:]]


def test_a_module_called_twice_has_two_call_indices(tmp_path: Path, records: Read) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    with dump.record(tmp_path / "d") as session:
        session.watch(model)
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    rows = records(tmp_path / "d", site="module:layer.output")
    assert [(row["micro_step"], row["call_index"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_phases_are_told_from_the_mode_or_named(tmp_path: Path, net: Make, records: Read) -> None:
    model = net()
    with dump.record(tmp_path / "d", parts="outputs") as session:
        session.watch(model)
        model(torch.ones(1, 3))
        with torch.no_grad():
            model(torch.ones(1, 3))
            model.eval()(torch.ones(1, 3))
            with session.phase("reference"):
                session.micro_step(7)
                model(torch.ones(1, 3))
    rows = records(tmp_path / "d", name="output.logits")
    assert [row["phase"] for row in rows] == ["fwd_bwd", "fwd_only", "inference", "reference"]
    assert [row["micro_step"] for row in rows] == [0, 0, 0, 7]


def test_tensors_of_the_program_are_dumped_with_their_line(tmp_path: Path, records: Read) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    dump.dump("nothing", x)  # no dump is on
    with dump.record(tmp_path / "d") as session, session.phase("fwd_bwd"):
        for layer in range(2):
            y = x * 2
            dump.dump("scores", y, dims="b s[cp:zigzag]", layer=layer)
            y.sum().backward()
    rows = records(tmp_path / "d", name="scores")
    assert [(row["kind"], row["call_index"], row["layer"]) for row in rows] == [
        ("value", 0, 0),
        ("grad", 0, 0),
        ("value", 1, 1),
        ("grad", 1, 1),
    ]
    assert {row["dims"] for row in rows} == {"b s[cp:zigzag]"}
    line = Path(rows[0]["source_file"]).read_text().splitlines()[rows[0]["source_line"] - 1]
    assert 'dump.dump("scores"' in line


def test_further_tensors_of_a_tuple_have_a_suffix(tmp_path: Path, records: Read) -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            return None, x, {"a": x + 1, "b": (x + 2,)}

    model = nn.Sequential(Pair())
    with dump.record(tmp_path / "d", parts="outputs") as session:
        session.watch(model)
        model(torch.ones(1))
    rows = records(tmp_path / "d", site="module:0.output")
    assert [row["name"] for row in rows] == ["module:0.output", "module:0.output.2.a", "module:0.output.2.b.0"]


def test_recording_changes_no_bit(tmp_path: Path, net: Make) -> None:
    plain, watched = net(checkpoint="non-reentrant"), net(checkpoint="non-reentrant")
    one, other = torch.optim.AdamW(plain.parameters()), torch.optim.AdamW(watched.parameters())
    state = torch.get_rng_state()
    train(plain, one, 3, micro=2)
    with dump.record(tmp_path / "d") as session:
        session.watch(watched, other)
        train(watched, other, 3, micro=2, session=session)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in watched.modules()]
    assert not any(hooks)


def test_modules_are_selected_by_site_depth_and_class(tmp_path: Path, net: Make, records: Read) -> None:
    model = net()

    def sites(**options: Any) -> set[str]:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        with dump.record(path, parts="outputs gradients", **options) as session:
            session.watch(model)
            model(torch.ones(1, 3))["logits"].mean().backward()
        return {row["site"] for row in records(path) if row["site"]}

    assert sites(sites="module:blocks.*.up.output") == {
        f"module:blocks.{layer}.up.{side}" for layer in (0, 1) for side in ("output", "grad_output")
    }
    assert sites(sites="module:head.grad_input module:head.input") == {"module:head.grad_input", "module:head.input"}
    assert sites(classes="Block") == {
        f"module:blocks.{layer}.{side}" for layer in (0, 1) for side in ("output", "grad_output")
    }
    assert sites(depth=1) == {
        f"module:{name}.{side}" for name in ("embed", "head") for side in ("output", "grad_output")
    }


def test_sites_of_a_known_family_are_those_of_its_table(tmp_path: Path) -> None:
    from trimtab.testing.models import tiny

    model = tiny("llama", layers=2, dtype=torch.float32, seed=0)
    ids = torch.tensor([[1, 2, 3]])
    with dump.record(tmp_path / "d", sites="layers.*.resid_post") as session:
        session.watch(model)
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    path = tmp_path / "d"
    assert torch.equal(values(path, site="layers.0.resid_post"), hidden[1])
    assert torch.equal(values(path, name="input_ids"), ids)
    assert Trace.open(path).filter(site="layers.1.resid_post").index["layer"].to_list() == [1]


def test_modules_without_records_are_listed_with_the_reason(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with dump.record(tmp_path / "d", classes="TransformerEncoderLayer,MultiheadAttention,Dropout") as session:
        session.watch(encoder)
        encoder(torch.ones(1, 2, 8))
    listed = {entry["module"]: entry["reason"] for entry in Trace.open(tmp_path / "d").manifest["plan"]["not_hooked"]}
    assert listed.keys() == {"self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"}
    assert listed["norm1"].startswith("not selected: classes=")
    with dump.record(tmp_path / "e") as session:
        session.watch(encoder)
        encoder(torch.ones(1, 2, 8))
    (entry,) = Trace.open(tmp_path / "e").manifest["plan"]["not_hooked"]
    assert entry["module"] == "self_attn.out_proj" and "never called" in entry["reason"]


def test_what_cannot_be_stored_is_noted_and_the_run_goes_on(tmp_path: Path) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    with dump.record(tmp_path / "d") as session:
        session.watch(table)
        table(torch.tensor([1])).sum().backward()
        session.step()
    unstored = Trace.open(tmp_path / "d").manifest["plan"]["unstored"]
    assert unstored.keys() == {"weight"} and "sparse" in unstored["weight"]


def test_bad_arguments_are_one_clear_line(tmp_path: Path, net: Make) -> None:
    for options, words in (
        ({"parts": "outputs,colour"}, "colour"),
        ({"steps": "1:2:3:4"}, "1:2:3:4"),
        ({"depth": -1}, "depth=-1"),
        ({"sites": "layers.x.y"}, "layers.x.y"),
        ({"coordinates": {"zp": 0}}, "zp"),
    ):
        with pytest.raises(InputError, match=words):
            dump.record(tmp_path / "d", **options)
    with pytest.raises(InputError, match="local"):
        dump.record("s3://bucket/d")
    session = dump.record(tmp_path / "d", sites="module:nowhere.output")
    with pytest.raises(SiteError, match="nowhere"):
        session.watch(net())
    with dump.record(tmp_path / "e") as session:
        session.watch(net())
        with pytest.raises(InputError, match="name="):
            session.watch(net())
        session.watch(net(), name="ref")
        with pytest.raises(InputError, match="already"):
            dump.record(tmp_path / "f").start()


def test_an_exception_leaves_an_interrupted_trace_that_says_why(tmp_path: Path, net: Make) -> None:
    with pytest.raises(ZeroDivisionError), dump.record(tmp_path / "d") as session:
        model = net()
        session.watch(model)
        model(torch.ones(1, 3))
        raise ZeroDivisionError("the loss moved")
    assert any("the loss moved" in problem for problem in Trace.open(tmp_path / "d").problems)


def test_settings_of_optimizers_and_of_precision_are_in_the_manifest(tmp_path: Path, net: Make) -> None:
    model = net()
    groups = [{"params": model.embed.parameters(), "lr": 0.5}, {"params": model.head.parameters()}]
    optimizers = (torch.optim.AdamW(groups, lr=0.25, eps=1e-6), torch.optim.AdamW(model.blocks.parameters()))
    with dump.record(tmp_path / "d", parts="loss") as session, torch.autocast("cpu", torch.bfloat16):
        session.watch(model)
        for optimizer in optimizers:
            session.watch_optimizer(optimizer)
        model(torch.ones(2, 3))["logits"].square().mean().backward()
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
    plan = Trace.open(tmp_path / "d").manifest["plan"]
    assert list(plan["optimizer"]) == ["AdamW", "AdamW_1"]
    first = plan["optimizer"]["AdamW"]
    assert [group["lr"] for group in first.values()] == [0.5, 0.25]
    assert (first["group1"]["eps"], first["group1"]["betas"]) == (1e-6, [0.9, 0.999])
    assert "params" not in first["group0"]
    assert plan["precision"]["fwd_bwd"]["autocast_cpu"] == "bfloat16"
