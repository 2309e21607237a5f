"""What triage says of small traces, each written so that the right answer is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.report import triage_factory
from tests.unit.workflows import planted
from trimtab.cli import main
from trimtab.compare.rounding import expected_error
from trimtab.errors import InputError
from trimtab.report import render_html, render_text, report
from trimtab.results import from_json, to_json
from trimtab.results.triage import Triage
from trimtab.trace import TraceWriter
from trimtab.workflows.triage import triage

Record = tuple[str, Tensor, Mapping[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, records: Iterable[Record], *, rank: int = 0, **options: Any) -> Path:
        with TraceWriter(tmp_path / name, rank=rank, **{"provenance": {}, **options}) as writer:
            for record, tensor, fields in records:
                writer.write(record, tensor, **fields)
        return tmp_path / name

    return make


def module(path: str, side: str, tensor: Tensor, **fields: Any) -> Record:
    site = f"module:{path}.{side}"
    kind = "grad" if side.startswith("grad") else "value"
    return (site, tensor, {"site": site, "module_path": path, "kind": kind, "phase": "fwd_only", **fields})


def noisy(tensor: Tensor, times: float, expected: float, seed: int = 0) -> Tensor:
    """A copy whose rows are off by so many times the expected error."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise *= times * expected * tensor.double().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return (tensor.double() + noise).to(tensor.dtype)


def chain(x: Tensor, *outputs: Tensor, **fields: Any) -> list[Record]:
    """Modules a, b, c, ... that each take what the one before returns."""
    records = []
    for name, out in zip("abcdef", outputs, strict=False):
        records += [module(name, "input", x, **fields), module(name, "output", out, **fields)]
        x = out
    return records


X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5))


def test_equal_runs_pass(write: Write) -> None:
    result = triage(write("a", chain(X, X + 1)), write("b", chain(X, X + 1)))
    assert result.passed and result.divergence is None and result.exit_code == 0
    assert "nothing diverges" in result.reason


def test_other_inputs_are_said_and_nothing_behind_is_judged(write: Write) -> None:
    ids = torch.arange(20).view(2, 10)
    other = ids.clone()
    other[1, 4] = 7
    sides = [
        write(name, [("input_ids", given, {"phase": "fwd_only"}), *chain(X, X * factor)])
        for name, given, factor in (("a", ids, 2), ("b", other, 3))
    ]
    result = triage(*sides)
    assert result.divergence is not None and result.divergence.origin == "inputs"
    assert "input_ids" in result.reason and result.exit_code == 1
    assert result.source is None and result.strips == () and result.fix is None
    assert "same inputs" in result.next_check


def test_the_module_that_made_the_error_is_named_not_the_ones_that_carry_it(write: Write) -> None:
    ours = chain(X, X * 2, X * 3, X * 4)
    theirs = chain(X, X * 2, X * 3.3, X * 4.4)
    found = triage(write("a", ours), write("b", theirs)).divergence
    assert found is not None
    assert (found.module_path, found.origin, found.direction) == ("b", "module", "forward")
    assert found.amplification > 1000 and found.input_error == 0
    assert "module:b.input" in found.after or "module:a.output" in found.after
    assert found.fingerprints[0].kind == "scale"


def test_an_error_made_below_the_limit_is_traced_back(write: Write) -> None:
    e = expected_error(torch.float32, blocks=None, width=32).error
    ours = chain(X, X * 2, X * 3)
    theirs = chain(X, noisy(X * 2, 3.6, e), noisy(X * 3, 9, e))
    result = triage(write("a", ours), write("b", theirs))
    assert result.divergence is not None
    assert result.divergence.module_path == "a"
    assert "module:b.output" in result.divergence.first_shown


def test_a_wrong_input_between_agreeing_modules_is_the_caller_s(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        return [
            module("block", "input", X), module("block.a", "input", X), module("block.a", "output", X * 2),
            module("block.b", "input", X * 2 * factor), module("block.b", "output", X * 3 * factor),
            module("block", "output", X * 3 * factor),
        ]  # fmt: skip

    found = triage(write("a", run(1.0)), write("b", run(1.5))).divergence
    assert found is not None
    assert (found.module_path, found.origin) == ("block", "between")
    assert found.key.tensor == "module:block.b.input"
    assert "before block.b" in found.sentence


def test_a_gradient_that_two_modules_share_was_made_outside_of_both(write: Write) -> None:
    """The gradient of a block's branch is also that of the branch's last module, whose hook comes first."""

    def run(factor: float) -> list[Record]:
        forward = [
            record for path in ("block.attn.o", "block.attn", "block")
            for record in (module(path, "input", X), module(path, "output", X * 2))
        ]  # fmt: skip
        behind = [module(path, "grad_output", X * 3 * factor) for path in ("block.attn.o", "block.attn")]
        return [*forward, module("block", "grad_output", X), *behind, module("block", "grad_input", X * 4 * factor)]

    found = triage(write("a", run(1.0)), write("b", run(0.5))).divergence
    assert found is not None
    assert (found.module_path, found.origin, found.direction) == ("block", "between", "backward")
    assert found.fingerprints[0].kind == "missing_reduction"


def test_a_sum_of_cancelling_terms_is_not_trusted(write: Write) -> None:
    """The bias's gradient is rounding of terms a million times larger; the head's weight gradient is wrong."""

    def run(bias: float, factor: float) -> list[Record]:
        calls = [record for path in ("k", "head") for record in (module(path, "input", X), module(path, "output", X))]
        back = [module(path, "grad_output", X) for path in ("head", "k")]
        gradients = [("k.bias", X[0, 0] * bias), ("head.weight", X[1] * factor)]
        fields = {"kind": "grad", "phase": "fwd_only"}
        return [*calls, *back, *((name, tensor, fields) for name, tensor in gradients)]

    found = triage(write("a", run(1e-8, 1.0)), write("b", run(-1.3e-8, 1.5))).divergence
    assert found is not None
    assert (found.module_path, found.origin) == ("head", "parameter_gradient")


def test_phases_come_in_causal_order_whatever_was_written_first(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        return [*chain(X, X * 2 * factor, phase="fwd_bwd"), *chain(X, X * 5 * factor, phase="inference")]

    found = triage(write("a", run(1.0)), write("b", run(1.5))).divergence
    assert found is not None and found.key.phase == "inference"


def test_the_rank_that_made_the_error_is_named(write: Write) -> None:
    for name, factor in (("a", 1.0), ("b", 1.5)):
        plan: dict[str, Any] = {"plan": {"world": 2}}
        write(name, chain(X, X * 2, X * 3 * factor), rank=0, **plan)
        write(name, chain(X, X * 2 * factor, X * 3 * factor), rank=1, **plan)
        root = write(name, [], rank=2, **plan)
    found = triage(root.parent / "a", root.parent / "b").divergence
    assert found is not None
    assert (found.module_path, found.ranks, found.ranks_agreeing) == ("a", (1,), (0,))
    assert "rank 1 of 2" in found.sentence


def test_rows_are_named_as_tokens_of_sequences(write: Write) -> None:
    wrong = X * 2
    wrong = wrong.clone()
    wrong[1, 5:8] = 0
    found = triage(write("a", chain(X, X * 2)), write("b", chain(X, wrong))).divergence
    assert found is not None and found.where is not None
    assert (found.where.rows, found.where.text) == (3, "tokens 5-7 of sequence 1")
    assert found.fingerprints[0].kind == "zero_rows"


def test_all_parameter_gradients_doubled_is_no_module_s_fault(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        names = [f"{path}.weight" for path in "abcd"]
        weights = [(name, X[0], {"kind": "param", "phase": "fwd_bwd"}) for name in names]
        gradients = [(name, X[1] * factor, {"kind": "grad", "phase": "fwd_bwd"}) for name in names]
        return [*weights, *chain(X, X * 2, phase="fwd_bwd"), *gradients]

    found = triage(write("a", run(1.0)), write("b", run(2.0))).divergence
    assert found is not None
    assert (found.origin, found.module_path) == ("parameter_gradient", "")
    assert "all parameter gradients" in found.sentence and found.fingerprints[0].kind == "double_reduction"


def test_other_weights_are_said_before_what_they_cause(write: Write) -> None:
    def run(weight: Tensor, factor: float) -> list[Record]:
        return [("a.weight", weight, {"kind": "param", "phase": "fwd_only"}), *chain(X, X * factor)]

    found = triage(write("a", run(X[0], 1.0)), write("b", run(X[0] * 1.01, 1.01))).divergence
    assert found is not None and (found.origin, found.module_path) == ("weights", "a")


def test_settings_of_the_optimizer_explain_its_update_before_any_fingerprint(write: Write) -> None:
    def run(name: str, factor: float, beta: float) -> Path:
        records = [*chain(X, X), ("a.weight.exp_avg_sq", X[0] * factor, {"kind": "optim", "phase": "fwd_only"})]
        return write(name, records, plan={"optimizer": {"AdamW": {"group0": {"betas": [0.9, beta]}}}})

    result = triage(run("a", 1.0, 0.999), run("b", 10.0, 0.99))
    assert result.divergence is not None and result.divergence.origin == "optimizer"
    assert result.divergence.fingerprints
    assert result.likely_cause == "the runs differ in optimizer.AdamW.group0.betas ([0.9,0.999] against [0.9,0.99])"


def experts(ids: list[list[int]], logits: Tensor | None = None) -> list[Record]:
    fields = {"phase": "fwd_only", "layer": 0}
    routed = [("mlp.topk_ids", torch.tensor(ids), fields)]
    return ([("mlp.router_logits", logits, fields)] if logits is not None else []) + routed


def test_experts_in_another_order_are_the_same_set(write: Write) -> None:
    ours, theirs = experts([[0, 1], [2, 3], [1, 2]]), experts([[1, 0], [2, 3], [2, 1]])
    result = triage(write("a", ours), write("b", theirs))
    assert result.divergence is None
    assert any("in another order" in note for note in result.notes)


def test_other_experts_come_with_the_margin_of_the_tie(write: Write) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.99, 0.0], [4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    ours, theirs = experts([[0, 1], [0, 1], [3, 2]], logits), experts([[0, 2], [0, 1], [2, 3]], logits)
    result = triage(write("a", ours), write("b", theirs))
    note = next(note for note in result.notes if "topk_ids" in note)
    assert "1 of 3 tokens take other experts" in note and "at most 0.01" in note


def test_packed_lengths_are_checked(write: Write) -> None:
    def run(lengths: list[int]) -> list[Record]:
        fields = {"phase": "fwd_only"}
        return [("input_ids", torch.arange(12), fields), ("cu_seqlens_q", torch.tensor(lengths), fields)]

    result = triage(write("a", run([0, 5, 12])), write("b", run([0, 6, 11])))
    assert any("ends with 11 and the batch has 12 tokens" in note for note in result.notes)
    assert result.divergence is not None and "cu_seqlens_q" in result.divergence.sentence


def test_diverging_micro_batches_share_their_padding(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        records = []
        for micro in range(4):
            mask = torch.ones(2, 16, dtype=torch.int64)
            mask[1, 12:] = micro % 2 == 0
            fields = {"phase": "fwd_only", "micro_step": micro}
            records.append(("attention_mask", mask, fields))
            records += chain(X, X * (factor if micro % 2 else 1), **fields)
        return records

    found = triage(write("a", run(1.0)), write("b", run(1.5))).micro_batches
    assert found is not None
    assert len(found.diverging) == len(found.agreeing) == 2
    assert found.shared == ("padding",)


def test_manifests_are_compared_numerics_first(write: Write) -> None:
    ours = {"argv": ["t.py"], "packages": {"torch": "1"}, "torch_settings": {"deterministic_algorithms": True}}
    theirs = {"argv": ["t.py", "-x"], "packages": {"torch": "2"}, "torch_settings": {"deterministic_algorithms": False}}
    theirs |= {"optimizer": {"betas": [0.9, 0.95]}, "created": "now"}
    sides = [write(name, chain(X, X), provenance=given) for name, given in (("a", ours), ("b", theirs))]
    groups = [one.group for one in triage(*sides).manifest]
    assert groups == ["precision", "optimizer", "versions", "arguments"]


def test_settings_that_only_say_what_is_recorded_are_none_of_the_run(write: Write) -> None:
    def provenance(out: str, threads: str) -> dict[str, Any]:
        return {"environment": {"TRIMTAB_DUMP": out, "TRIMTAB_WORKTREE": out, "OMP_NUM_THREADS": threads}}

    sides = [
        write(name, chain(X, X), provenance=provenance(name, threads)) for name, threads in (("a", "1"), ("b", "2"))
    ]
    assert [one.key for one in triage(*sides).manifest] == ["environment.OMP_NUM_THREADS"]


def test_settings_that_no_manifest_names_are_not_ruled_out(write: Write) -> None:
    def ruled_out(**plan: Any) -> set[str]:
        sides = [
            write(f"{name}{len(plan)}", chain(X, X * factor), plan=plan) for name, factor in (("a", 1.0), ("b", 1.3))
        ]
        return {one.what for one in triage(*sides).ruled_out}

    assert "optimizer settings" not in ruled_out()
    assert "optimizer settings" in ruled_out(optimizer={"AdamW": {"group0": {"eps": 1e-8}}})


def test_digests_alone_name_the_first_that_differs(write: Write) -> None:
    sides = [
        write(name, chain(X, X * 2, X * 3 * factor, X * 4 * factor), level="digests")
        for name, factor in (("a", 1.0), ("b", 1.5))
    ]
    result = triage(*sides)
    assert result.divergence is None and not result.passed
    assert "the first in execution order is module:b.output" in result.notes[0]
    assert "again, with their values" in result.next_check


def test_generations_are_triaged_by_position(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        rows = torch.arange(10)
        return [
            (site, X[0, :10] * factor ** (layer > 0), {"site": site, "prompt": 0, "request": "r", "positions": rows})
            for layer in range(3)
            for site in (f"layers.{layer}.attn_out", f"layers.{layer}.resid_post")
        ]

    result = triage(write("a", run(1.0), kind="generation"), write("b", run(1.3), kind="generation"))
    assert result.divergence is not None and result.divergence.key.site == "layers.1.attn_out"
    assert result.divergence.where is not None and result.divergence.where.text == "positions 0-9"
    assert "layers.1.attn_out" in render_html(result)


def test_traces_without_a_record_in_common(write: Write) -> None:
    result = triage(write("a", chain(X, X)), write("b", [("other", X, {})]))
    assert not result.passed and result.divergence is None and "nothing was compared" in result.reason


@pytest.mark.parametrize("revisions", ["", "..HEAD", "a..", "-x", "a..-x"])
def test_revisions_that_cannot_be_read(write: Write, revisions: str) -> None:
    path = write("a", chain(X, X))
    with pytest.raises(InputError, match=r"BASE\.\.HEAD"):
        triage(path, path, revisions=revisions)


def test_the_result_goes_through_json_text_and_html(write: Write, tmp_path: Path) -> None:
    result = triage(write("a", chain(X, X * 2, X * 3)), write("b", chain(X, X * 2, X * 3.3)))
    assert from_json(Triage, to_json(result)) == result
    saved = report(result, tmp_path / "triage.json")
    page = report(saved, tmp_path / "triage.html")
    assert Path(page).read_text() == render_html(result)
    assert "b makes the error" in render_text(result)


def test_two_micro_batches_of_the_planted_model(tmp_path: Path) -> None:
    """A real model, two batches of which only the second has a wrong row."""
    torch.manual_seed(0)
    ids = [torch.randint(0, planted.VOCABULARY, (2, length)) for length in (12, 8)]
    reference, candidate = planted.make_model(1), planted.make_model(1)
    norm = candidate.layers[2].norm2
    forward = norm.forward
    norm.forward = lambda x: forward(x) * (1.25 if x.shape[1] == 8 else 1.0)
    result = triage(planted.record(tmp_path / "a", reference, ids), planted.record(tmp_path / "b", candidate, ids))
    assert result.divergence is not None and result.divergence.module_path == "layers.2.norm2"
    assert result.divergence.key.micro_step == 1
    assert result.micro_batches is not None and "length 8" in result.micro_batches.shared
    statuses = {one.module_path: one.status for one in result.calls}
    assert statuses["layers.2.norm2"] == "made" and statuses["layers.2"] == "contains"
    assert statuses["layers.3"] == "carried" and statuses["layers.1"] == "agrees"


def test_the_command_line(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ours, theirs = write("a", chain(X, X * 2)), write("b", chain(X, X * 3))
    page = tmp_path / "t.html"
    assert main(["triage", str(ours), str(theirs), "--json", "--html", str(page)]) == 1
    assert from_json(Triage, capsys.readouterr().out).reason.startswith("a makes the error")
    assert page.stat().st_size > 10_000
    assert main(["triage", str(ours), str(ours)]) == 0
    assert main(["triage", str(ours), str(theirs), "--revisions", "x.."]) == 2
    assert "BASE..HEAD" in capsys.readouterr().err


def test_options_of_a_comparison_are_passed_on(write: Write) -> None:
    ours, theirs = write("a", chain(X, X * 2)), write("b", chain(X, X * 2.2))
    assert triage(ours, theirs, rules=[".*: rel_l2 < 0.5"]).passed
    with pytest.raises(InputError, match="configuration 'nothing'"):
        triage(ours, theirs, config="nothing")
    with pytest.raises(InputError, match="no option 'verdicts'; of a comparison it takes verdict, rules"):
        triage(ours, theirs, verdicts="x")


def test_a_tensor_dumped_by_name_is_named_with_its_layer(write: Write) -> None:
    def run(factor: float) -> list[Record]:
        return [("attn_out", X * factor ** (layer > 1), {"layer": layer}) for layer in range(4)]

    found = triage(write("a", run(1.0)), write("b", run(1.2))).divergence
    assert found is not None and found.origin == "tensor"
    assert found.sentence.startswith("attn_out of layer 2 is the first to differ") and found.amplification > 1000


def test_the_shard_that_differs_is_that_rank_s(write: Write) -> None:
    """One process against two that share the channels out: rank 1's half is wrong."""
    whole = write("a", chain(X, X * 2, dims="b s h"))
    halves = X.chunk(2, dim=-1)
    for rank, half in enumerate(halves):
        factor = 1.5 if rank else 1.0
        fields = {"dims": "b s h[tp]", "tp_rank": rank}
        root = write("b", chain(half, half * 2 * factor, **fields), rank=rank, plan={"world": 2})
    found = triage(whole, root).divergence
    assert found is not None
    assert (found.module_path, found.ranks, found.ranks_agreeing) == ("a", (1,), (0,))
    assert "rank 1 of 2" in found.sentence


def test_a_patch_is_printed_unbroken() -> None:
    long = "x" * 200
    made = triage_factory.triage(long)
    assert f"softmax(-1){long}" in render_text(made, width=80)
