"""Parallel layouts against one process: put together, copies verified, the rank of a mistake named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.compare.sharing import At, share, world, write_run
from trimtab.compare import align as align_module
from trimtab.compare import compare, plan_comparison
from trimtab.compare.layout import View
from trimtab.errors import InputError
from trimtab.results.comparison import Comparison
from trimtab.trace import Trace, TraceWriter


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(4, 16, 32)
ONE: list[At] = [{"tp": 0, "cp": 0, "dp": 0, "pp": 0, "ep": 0}]
Change = Callable[[int, str, torch.Tensor], torch.Tensor | None]


def pair(
    tmp_path: Path, dims: str, ranks: list[At], change: Change | None = None, whole: torch.Tensor = X, **options: Any
) -> Comparison:
    """One process against ranks that share `h` out as dims say."""
    one = write_run(tmp_path / "one", [("h", whole, {"dims": dims})], ONE)
    many = write_run(tmp_path / "many", [("h", whole, {"dims": dims})], ranks, change=change)
    return compare(one, many, **options)


def reasons(result: Comparison) -> str:
    return " | ".join(f"{one.side} {one.kind} {one.name}: {one.reason}" for one in result.ledger.entries)


LAYOUTS = [
    ("b s h[tp]", world(tp=2)),
    ("b s[sp] h", world(tp=4)),
    ("b s[cp] h", world(cp=2)),
    ("b s[cp:zigzag] h", world(cp=4)),
    ("b[dp] s[cp:zigzag,sp] h", world(dp=2, cp=2, tp=2)),
    ("b[ep] s h[tp]", world(ep=2, tp=2)),
    ("b s h # tp:replicated", world(tp=3)),
    ("b s h[tp] # dp:replicated", world(dp=2, tp=2)),
    ("b s h # tp:partial", world(tp=2)),
    ("b s h # dp:mean", world(dp=2)),
    ("b (s*h)[tp]", world(tp=2)),
]


@pytest.mark.parametrize(("dims", "ranks"), LAYOUTS, ids=[dims for dims, _ in LAYOUTS])
def test_every_layout_passes_against_one_process(tmp_path: Path, dims: str, ranks: list[At]) -> None:
    whole = X.reshape(4, 512) if "*" in dims else X
    one = write_run(tmp_path / "one", [("h", whole, {"dims": dims.partition("#")[0]})], ONE)
    result = compare(one, write_run(tmp_path / "many", [("h", whole, {"dims": dims})], ranks))
    assert result.passed, result.reason + reasons(result)
    assert result.ledger.reference.compared == 1
    assert result.ledger.candidate.compared == result.ledger.candidate.found == len(ranks)
    (record,) = result.records
    assert record.key.rank is None and "rank" not in record.key.text
    if record.metrics is not None:
        assert record.shape_candidate == tuple(whole.shape)
        assert record.metrics.rel_l2 < (1e-6 if "partial" in dims else 1e-12)


@pytest.mark.parametrize(
    ("dims", "ranks", "bad"),
    [
        ("b s h[tp]", world(tp=4), 2),
        ("b s[sp] h", world(tp=2), 1),
        ("b s[cp:zigzag] h", world(cp=2), 0),
        ("b[dp] s h[tp]", world(dp=2, tp=2), 3),
        ("b[ep] s h", world(ep=4), 3),
    ],
)
@pytest.mark.parametrize("size", ["all of it", "one row"])
def test_a_mistake_in_one_shard_is_reported_on_its_rank(
    tmp_path: Path, dims: str, ranks: list[At], bad: int, size: str
) -> None:
    def scaled(rank: int, _: str, part: torch.Tensor) -> torch.Tensor:
        if rank == bad:
            part[(slice(None),) if size == "all of it" else (0, -1)] *= 1.05
        return part

    result = pair(tmp_path, dims, ranks, scaled)
    assert not result.passed
    (record,) = result.records
    assert record.ranks == (bad,)
    assert all(one.ranks == (bad,) for one in record.worst_elements) and len(record.worst_elements) == 3
    assert record.worst_rows[0].ranks == (bad,)
    shares = {one.ranks[0]: one.share for one in record.shards}
    assert len(shares) == len(ranks) and shares[bad] == pytest.approx(1.0)
    assert sum(one.elements for one in record.shards) == X.numel()
    assert any(f"rank {bad} of the candidate" in one for one in record.reasons)
    first = result.first_divergence
    assert first is not None and first.ranks == (bad,) and f"on rank {bad}" in first.text
    at = record.worst_elements[0]
    assert at.reference == X[at.index].item()


def test_two_layouts_that_differ_on_both_sides(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "tp", [("h", X, {"dims": "b s h[tp]"})], world(tp=2))
    theirs = write_run(tmp_path / "cp", [("h", X * (1 + 2**-23), {"dims": "b s[cp:zigzag] h"})], world(cp=2))
    result = compare(ours, theirs)
    assert result.passed and result.ledger.unit == "records"
    assert (result.ledger.reference.compared, result.ledger.candidate.compared) == (2, 2)
    assert "put together" in " ".join(result.plan)
    assert "of 2 against 2 records" in plan_comparison(ours, theirs).describe()


def test_one_layout_on_both_sides_is_identical_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        write_run(tmp_path / name, [("h", X, {"dims": "b s h[tp] # dp:replicated"})], world(dp=2, tp=2), level=level)
        for name, level in (("a", "values"), ("b", "digests"))
    ]

    def refuse(*_: object) -> None:
        raise AssertionError("equal digests need no reading")

    monkeypatch.setattr(Trace, "tensor", refuse)
    result = compare(*runs)
    assert result.passed and result.counts["identical"] == 1


def test_declared_replication_is_verified(tmp_path: Path) -> None:
    def drift(rank: int, _: str, part: torch.Tensor) -> torch.Tensor:
        if rank == 2:
            part[1, 2, 3] += 1e-6
        return part

    result = pair(tmp_path, "b s h # tp:replicated", world(tp=3), drift)
    assert not result.passed
    (entry,) = result.ledger.entries
    assert (entry.side, entry.kind, entry.name) == ("candidate", "replica", "h phase=inference step=0")
    assert entry.reason.startswith("rank 2 (tp=2) differs from rank 0 (tp=0): 1 of 2048 elements, max |difference|")
    assert entry.reason.endswith("at [1, 2, 3]")
    assert [record.status for record in result.records] == ["identical"]
    waived = compare(tmp_path / "one", tmp_path / "many", waive=["replica:h"])
    assert waived.passed


def test_what_most_copies_hold_is_right(tmp_path: Path) -> None:
    result = pair(tmp_path, "b s h # tp:replicated", world(tp=3), lambda rank, _, part: part + (rank == 0))
    assert "rank 0 (tp=0) differs from rank 1" in reasons(result)
    assert not result.passed and result.records[0].ranks == (0,)  # the copy that was compared


@pytest.mark.parametrize("level", ["statistics", "digests"])
def test_copies_without_values(tmp_path: Path, level: str) -> None:
    change: Change = lambda rank, _, part: part + (rank == 1)  # noqa: E731
    one = write_run(tmp_path / "one", [("h", X, {"dims": "b # tp:replicated"})], ONE, level=level)
    many = write_run(
        tmp_path / "many", [("h", X, {"dims": "b # tp:replicated"})], world(tp=2), change=change, level=level
    )
    assert "rank 1 (tp=1) differs from rank 0 (tp=0) by digest; values were not kept" in reasons(compare(one, many))


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    records = [(name, X, {"dims": "b s h[tp]"}) for name in ("f", "g", "h")]
    one = write_run(tmp_path / "one", records, ONE)
    lost: Change = lambda rank, name, part: None if (rank, name) in ((1, "g"), (1, "h")) else part  # noqa: E731
    many = write_run(tmp_path / "many", records, world(tp=2), change=lost)
    result = compare(one, many)
    assert not result.passed and [record.key.name for record in result.records] == ["f"]
    entries = {(one.side, one.kind): one for one in result.ledger.entries}
    missing = entries["candidate", "missing"]
    assert missing.name == "rank 1 (tp_rank=1)" and missing.count == 2
    assert "rank 1 (tp_rank=1) has no record of it (2 records of 2 tensors, such as g" in missing.reason
    assert entries["reference", "skipped"].count == 2 and result.ledger.reference.found == 3
    assert result.ledger.candidate.found == 4


def test_a_rank_that_wrote_nothing_is_named_where_the_plan_knows_it(tmp_path: Path) -> None:
    plan = {"ranks": [0, 1], "coordinates": {"0": {"tp": 0}, "1": {"tp": 1}}}
    one = write_run(tmp_path / "one", [("h", X, {"dims": "b s h[tp]"})], ONE)
    with TraceWriter(tmp_path / "many", provenance={}, plan=plan) as writer:
        writer.write("h", X[..., :16], dims="b s h[tp]", tp_rank=0)
    said = reasons(compare(one, tmp_path / "many"))
    assert "rank 1 wrote no record, and the plan names it" in said
    assert "rank 1 (tp_rank=1) has no record of it" in said


def test_a_missing_copy_fails_and_the_rest_is_compared(tmp_path: Path) -> None:
    records = [("h", X, {"dims": "b s h # tp:replicated"}), ("g", X, {"dims": "b s h[tp]"})]
    one = write_run(tmp_path / "one", records, ONE)
    lost: Change = lambda rank, name, part: None if (rank, name) == (1, "h") else part  # noqa: E731
    result = compare(one, write_run(tmp_path / "many", records, world(tp=2), change=lost))
    assert not result.passed and len(result.records) == 2
    assert [(one.kind, one.name) for one in result.ledger.entries] == [("missing", "rank 1 (tp_rank=1)")]


def test_pipeline_stages_hold_their_own_layers(tmp_path: Path) -> None:
    one = tmp_path / "one"
    with TraceWriter(one, provenance={}) as writer:
        for layer in range(4):
            writer.write("x", X + layer, site=f"layers.{layer}.resid_post")
    for stage in (0, 1):
        with TraceWriter(tmp_path / "pp", provenance={}, rank=stage) as writer:
            for layer in (2 * stage, 2 * stage + 1):
                writer.write("x", X + layer + 0.1 * (layer == 3), site=f"layers.{layer}.resid_post", pp_rank=stage)
    result = compare(one, tmp_path / "pp")
    assert [record.status for record in result.records] == ["identical", "identical", "identical", "failed"]
    assert result.records[3].ranks == (1,) and not result.ledger.entries
    ranks = {one.value: one.candidate.compared for one in result.ledger.groups if one.axis == "rank"}
    assert ranks == {"0": 2, "1": 2}


def test_what_all_ranks_hold_alike_needs_no_dims(tmp_path: Path) -> None:
    """Parameters under data parallelism: nobody declared anything, and the digests agree."""
    one = write_run(tmp_path / "one", [("w", X, {"kind": "param"})], ONE)
    same = write_run(tmp_path / "same", [("w", X, {"kind": "param"})], world(dp=2))
    assert compare(one, same).passed
    apart = write_run(tmp_path / "apart", [("w", X, {"kind": "param"})], world(dp=2), change=lambda r, _, x: x + r)
    said = reasons(compare(one, apart))
    assert "the candidate holds different values at dp=0, dp=1, and no dims say how they make one tensor" in said
    assert "dims=('w: ...',)" in said


def test_ranks_that_dims_do_not_speak_of_stay_apart(tmp_path: Path) -> None:
    dims = "b s h[tp]"
    change: Change = lambda rank, _, part: part + rank // 2  # noqa: E731
    runs = [
        write_run(tmp_path / name, [("h", X, {"dims": dims})], world(dp=2, tp=2), change=change) for name in ("a", "b")
    ]
    result = compare(*runs)
    assert result.passed and [record.key.coordinates for record in result.records] == ["dp=0", "dp=1"]
    assert "dp=1" in result.records[1].key.text
    one = write_run(tmp_path / "one", [("h", X, {"dims": dims})], ONE)
    assert f"the dims {dims!r} do not say" in reasons(compare(one, runs[0]))
    assert compare(runs[0], write_run(tmp_path / "c", [("h", X, {"dims": dims})], world(dp=2, tp=2))).passed is False


def test_dims_given_for_the_comparison(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [("h", X, {}), ("g", X, {})], ONE)
    many = tmp_path / "many"
    for rank in (0, 1):
        with TraceWriter(many, provenance={}, rank=rank) as writer:
            writer.write("h", X.chunk(2, -1)[rank], tp_rank=rank, dims="b s h")
            writer.write("g", X.chunk(2, -1)[rank].transpose(0, 1).contiguous(), tp_rank=rank)
    assert not compare(one, many).passed
    dims = ("h: b s h[tp]", "g: s b h[tp]")
    result = compare(one, many, dims=dims, reference_dims=("g: b s h",))
    assert result.passed, result.reason
    with pytest.raises(InputError, match="dims for 'nothing': no tensor has such a name"):
        compare(one, many, dims=("nothing: b",))
    with pytest.raises(InputError, match="no parallel axis 'tq'"):
        compare(one, many, dims=("h: b s h[tq]",))


def test_one_declared_axis_and_no_coordinates(tmp_path: Path) -> None:
    """Ranks of a run that recorded no coordinates are in order along the only axis that the dims know."""
    one = write_run(tmp_path / "one", [("h", X, {})], [{}])
    for rank in (0, 1):
        with TraceWriter(tmp_path / "many", provenance={}, rank=rank) as writer:
            writer.write("h", X.chunk(2)[rank])
    assert compare(one, tmp_path / "many", dims=("h: b[dp] s h",)).passed


@pytest.mark.parametrize(
    ("ours", "theirs", "turn"),
    [
        ("b s h", "s b h", lambda x: x.transpose(0, 1)),
        ("b s h", "h s b", lambda x: x.permute(2, 1, 0)),
        ("b s h", "(b*s) h", lambda x: x.reshape(64, 32)),
        ("b s h", "h (b*s)", lambda x: x.reshape(64, 32).T),
        ("b s (n*d)", "b s n d", lambda x: x.reshape(4, 16, 4, 8)),
        ("b s n d", "s b (n*d)", lambda x: x.reshape(4, 16, 32).transpose(0, 1)),
        ("b s h", "b 1 s h", lambda x: x.reshape(4, 1, 16, 32)),
        ("b s h", "b s one h", lambda x: x.reshape(4, 16, 1, 32)),
    ],
)
def test_axes_in_other_orders(
    tmp_path: Path, ours: str, theirs: str, turn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    first = X.reshape(4, 16, 4, 8) if ours == "b s n d" else X
    one = write_run(tmp_path / "one", [("h", first, {"dims": ours})], ONE)
    two = write_run(tmp_path / "two", [("h", turn(X).contiguous(), {"dims": theirs})], ONE)
    result = compare(one, two)
    assert result.passed, reasons(result)
    assert result.records[0].metrics is not None and result.records[0].metrics.max_abs == 0
    cut = theirs.replace("s)", "s)[tp]").replace("d)", "d)[tp]").replace(" d", " d[tp]").replace("s b h", "s b h[tp]")
    if cut != theirs and "[tp][tp]" not in cut:
        many = write_run(tmp_path / "many", [("h", turn(X).contiguous(), {"dims": cut})], world(tp=2))
        assert compare(one, many).passed, cut


def test_axes_that_do_not_pair_up(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [("h", X, {"dims": "b s h"}), ("g", X, {})], ONE)
    for name, dims, said in (
        ("two", "b s d", "the axes do not pair up: 'b s h' in the reference, 'b s d' in the candidate"),
        ("three", "b s", "name 2 axes"),
        ("four", "b 1 h", "call axis 1 of [4, 16, 32] a singleton"),
        ("five", "b s h[tpp]", "no parallel axis 'tpp'"),
    ):
        two = write_run(tmp_path / name, [("h", X, {}), ("g", X, {})], ONE)
        if name == "five":
            two = tmp_path / "five+"
            with TraceWriter(two, provenance={}) as writer:
                writer.write("h", X + 0, dims=dims)
                writer.write("g", X)
            result = compare(one, two)
        else:
            result = compare(one, two, dims=(f"h: {dims}",), reference_dims=("h: b s h",))
        assert said in reasons(result) and not result.passed
        assert [record.key.name for record in result.records] == ["g"]  # the rest of the work is kept


def test_dims_that_contradict_each_other(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [("h", X, {"dims": "b s h"})], ONE)
    for rank, dims in enumerate(("b s[sp] h", "b s h[tp]")):
        with TraceWriter(tmp_path / "two", provenance={}, rank=rank) as writer:
            writer.write("h", X, dims=dims, tp_rank=rank)
    assert "the dims contradict each other: 'b s[sp] h' on rank 0, 'b s h[tp]' on rank 1" in reasons(
        compare(one, tmp_path / "two")
    )


def micro_run(path: Path, steps: int, grads: str | None, bad: int | None = None) -> Path:
    with TraceWriter(path, provenance={}) as writer:
        for micro in range(steps):
            part = X.chunk(steps)[micro]
            writer.write("h", part + 0.1 * (micro == bad), dims="b s h", micro_step=micro)
            share = X.sum(0) / steps if grads == "mean" else X.chunk(steps)[micro].sum(0)
            scale = steps if grads == "mean" else 1
            writer.write("w", share * scale, dims=f"s h # micro:{grads}", kind="grad", micro_step=micro)
    return path


@pytest.mark.parametrize("grads", ["partial", "mean"])
def test_micro_batches_against_the_whole_batch(tmp_path: Path, grads: str) -> None:
    one, four = micro_run(tmp_path / "one", 1, grads), micro_run(tmp_path / "four", 4, grads)
    result = compare(one, four)
    assert result.passed, reasons(result)
    assert result.ledger.candidate.compared == 8
    bad = compare(one, micro_run(tmp_path / "bad", 4, grads, bad=2))
    record = next(one for one in bad.records if not one.passing)
    assert [one.place for one in record.shards if one.share > 0.9] == ["micro=2"]


def test_a_missing_micro_step_is_named(tmp_path: Path) -> None:
    one = micro_run(tmp_path / "one", 1, "partial")
    with TraceWriter(tmp_path / "two", provenance={}) as writer:
        for micro in (0, 2):
            writer.write("h", X.chunk(4)[micro], dims="b[micro] s h", micro_step=micro)
    assert "micro=1 has no record of it" in reasons(compare(one, tmp_path / "two"))


def test_noise_runs_of_a_parallel_layout(tmp_path: Path) -> None:
    dims = "b s h[tp]"
    noisy = X * (1 + 1e-4 * normal(4, 16, 32, seed=5))
    other = X * (1 + 1e-4 * normal(4, 16, 32, seed=6))
    one = write_run(tmp_path / "one", [("h", X, {"dims": dims})], ONE)
    again = write_run(tmp_path / "again", [("h", noisy, {"dims": dims})], ONE)
    many = write_run(tmp_path / "many", [("h", other, {"dims": dims})], world(tp=2))
    assert not compare(one, many).passed
    result = compare(one, many, noise=again)
    assert result.passed
    assert result.records[0].calibration is not None and result.records[0].calibration.source == "noise run"


@pytest.mark.parametrize("dims", ["b s h[tp]", "b s[tp:zigzag] h", "b s h # tp:partial"])
def test_what_is_put_together_is_read_in_small_stretches(
    tmp_path: Path, dims: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_run(tmp_path / "one", [("h", X, {"dims": "b s h"})], ONE)
    many = write_run(tmp_path / "many", [("h", X * 1.01, {"dims": dims})], world(tp=2))
    whole = compare(one, many)
    read: list[int] = []
    flat = View.flat

    def watched(view: View, begin: int, end: int) -> torch.Tensor:
        read.append(end - begin)
        return flat(view, begin, end)

    monkeypatch.setattr(View, "flat", watched)
    monkeypatch.setattr(align_module, "COPIED_ELEMENTS", 100)
    (measured,) = plan_comparison(one, many).matched.pairs
    aligned = align_module.Aligned(measured, Trace.open(one), Trace.open(many))
    assert sum(chunk.reference.shape[0] for chunk in aligned.chunks()) == 64
    assert max(read) <= 100 and len(read) > 20
    again = compare(one, many).records[0]
    before = whole.records[0]
    assert again.metrics is not None and before.metrics is not None
    assert again.metrics.rel_l2 == pytest.approx(before.metrics.rel_l2, rel=1e-12)
    assert (again.status, again.worst_elements, again.ranks) == (before.status, before.worst_elements, before.ranks)


def test_a_recomputed_pass_is_verified_against_the_original(tmp_path: Path) -> None:
    dims = "b s h # recompute_pseudo:replicated"
    for name, drift in (("same", 0.0), ("other", 1e-3)):
        with TraceWriter(tmp_path / name, provenance={}) as writer:
            writer.write("h", X, dims=dims)
            writer.write("h", X + drift, dims=dims, recompute=True)
    with TraceWriter(tmp_path / "one", provenance={}) as writer:
        writer.write("h", X)
    assert compare(tmp_path / "one", tmp_path / "same").passed
    (entry,) = compare(tmp_path / "one", tmp_path / "other").ledger.entries
    assert entry.kind == "replica" and entry.reason.startswith("rank 0 (recompute=1) differs from rank 0 (recompute=0)")


def write_ranks(path: Path, ranks: list[list[tuple[str, torch.Tensor, dict[str, Any]]]]) -> Path:
    for rank, records in enumerate(ranks):
        with TraceWriter(path, provenance={}, rank=rank) as writer:
            for name, tensor, fields in records:
                writer.write(name, tensor, **fields)
    return path


@pytest.mark.parametrize("dims", ["b[dp:sharded+mean] s h", "b[dp:mean+sharded] s h", "b s[dp:zigzag+mean] h"])
def test_gradients_of_shares_whose_losses_are_averaged(tmp_path: Path, dims: str) -> None:
    plain = dims.replace("+mean", "").replace("mean+", "")
    parts = [share(X, plain, at, {"dp": 4}) for at in world(dp=4)]
    kinds = (("value", 1), ("grad", 4))
    one = write_ranks(tmp_path / "one", [[("h", X, {"kind": kind, "dims": "b s h"}) for kind, _ in kinds]])
    many = [
        [("h", part * times, {"kind": kind, "dp_rank": rank}) for kind, times in kinds]
        for rank, part in enumerate(parts)
    ]
    good = compare(one, write_ranks(tmp_path / "many", many), dims=[f"h: {dims}"])
    assert good.passed and len(good.records) == 2, good.reason
    wrong = compare(one, tmp_path / "many", dims=[f"h: {plain}"])
    assert [(record.key.kind, record.status) for record in wrong.failing()] == [("grad", "failed")]
    many[2][1][1][0] *= 1.1
    (record,) = compare(one, write_ranks(tmp_path / "bad", many), dims=[f"h: {dims}"]).failing()
    assert record.key.kind == "grad" and record.ranks == (2,)


def test_dims_of_a_module_with_several_tensors(tmp_path: Path) -> None:
    site = {"site": "module:core.input", "dims": None}
    given = [("module:core.input", X), ("module:core.input.1", X + 1), ("module:core.input.2", torch.arange(16))]
    one = write_ranks(tmp_path / "one", [[(name, tensor, site) for name, tensor in given]])
    cut = ["b s[cp] h", "b s h", "s"]
    ranks = [
        [
            (name, share(x, dims, at, {"cp": 2}), site | {"cp_rank": at["cp"]})
            for (name, x), dims in zip(given, cut, strict=True)
        ]
        for at in world(cp=2)
    ]
    many = write_ranks(tmp_path / "many", ranks)
    good = compare(one, many, dims=[r"module:core\.input\.1: b s h", "module:core.*: b s[cp] h"])
    assert good.passed and len(good.records) == 3, reasons(good)
    skipped = compare(one, many, dims=["module:core.*: b s[cp] h q"])  # no tensor has four axes
    assert "name 4 axes" in reasons(skipped)


def test_what_pipeline_stages_pass_on_is_not_the_models(tmp_path: Path) -> None:
    own = {"module_path": "", "module_class": "Model"}
    ids, logits = torch.arange(4), normal(4, 8, seed=1)
    first = [("ids", ids, own | {"pp_rank": 0}), ("output", X[0, :4], own | {"pp_rank": 0})]
    last = [("ids", X[0, :4], own | {"pp_rank": 1}), ("output", logits, own | {"pp_rank": 1})]
    one = write_ranks(tmp_path / "one", [[("ids", ids, own), ("output", logits, own)]])
    good = compare(one, write_ranks(tmp_path / "many", [first, last]))
    assert good.passed and len(good.records) == 2, reasons(good)
    assert [entry.waived_by for entry in good.ledger.entries] == ["passed on between stages"] * 2
    assert good.ledger.candidate.skipped == 2
    last[1] = ("output", logits * 1.1, own | {"pp_rank": 1})
    (record,) = compare(one, write_ranks(tmp_path / "bad", [first, last])).failing()
    assert record.key.name == "output" and record.ranks == (1,)
    other = [[(name, x, {"pp_rank": at}) for name, x, _ in stage] for at, stage in enumerate((first, last))]
    assert "skipped" in reasons(compare(one, write_ranks(tmp_path / "other", other)))  # the program's own tensors


def test_an_element_of_a_vector_that_is_what_is_left_of_terms_that_cancel(tmp_path: Path) -> None:
    """The gradient of a norm's weight: one element holds the norm, another is small beside its terms."""
    total = normal(32)
    total[0], total[5] = 100.0, 0.01
    other = total.clone()
    other[5] += 1e-6  # the rounding of terms of about 10
    for side, one in (("one", total), ("two", other)):
        with TraceWriter(tmp_path / side, provenance={}) as writer:
            writer.write("blocks.1.norm.weight", one, kind="grad", layer=1)
    result = compare(tmp_path / "one", tmp_path / "two")
    assert result.passed, result.reason
