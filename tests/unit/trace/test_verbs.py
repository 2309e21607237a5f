"""What stands behind `trimtab trace`: ls, show, verify, repair, prune, and the estimate before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.errors import InputError, TraceError, TraceLockedError
from trimtab.results import from_json, to_json
from trimtab.trace import (
    Listing,
    RecordDetail,
    Trace,
    TraceWriter,
    VerifyResult,
    estimate,
    ls,
    prune,
    repair,
    show,
    verify,
)
from trimtab.trace._store import LocalStore


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path / "run", provenance={}, plan={"steps": 3}, part_bytes=20_000) as writer:
        for step in range(3):
            for layer in range(4):
                site = f"layers.{layer}.resid_post"
                values = torch.full((100, 8), float(step + layer))
                if (step, layer) == (1, 2):
                    values[0, 0], values[0, 1] = float("nan"), -float("inf")
                writer.write(site, values, site=site, step=step)
            writer.write("loss", torch.tensor(1.0), step=step)
    return tmp_path / "run"


def test_ls_groups_what_a_run_holds(run: Path) -> None:
    listing = ls(run)
    assert (listing.records, listing.tokens, listing.ranks, listing.problems) == (15, 0, (0,), ())
    assert [group.site for group in listing.groups] == [f"layers.{layer}.resid_post" for layer in range(4)] + ["loss"]
    assert [(group.records, group.steps) for group in listing.groups] == [(3, 3)] * 5
    assert [group.nan_count for group in listing.groups] == [0, 0, 1, 0, 0]
    assert [group.inf_count for group in listing.groups] == [0, 0, 1, 0, 0]
    assert listing.groups[3].absmax == 5.0
    files = sum(one.stat().st_size for one in run.rglob("part-*"))
    assert listing.bytes == files
    assert ls(run, step=1).records == 5
    assert from_json(Listing, to_json(listing)) == listing


def test_ls_of_a_directory_of_runs_names_them(run: Path) -> None:
    with pytest.raises(TraceError, match="is no run but holds some: run; give one of them"):
        ls(run.parent)


def test_show_gives_one_record(run: Path) -> None:
    detail = show(run, 7, limit=3)
    assert (detail.columns["site"], detail.columns["shape"]) == ("layers.2.resid_post", [100, 8])
    assert str(detail.values) == "(nan, -inf, 3.0)"
    assert detail.values_left_out == 797
    assert '"nan",\n    "-inf",\n    3.0' in to_json(detail)
    assert show(run, 4).values == (1.0,)
    with pytest.raises(TraceError, match="has no record 99; trace ls lists"):
        show(run, 99)
    assert isinstance(from_json(RecordDetail, to_json(detail)), RecordDetail)


def test_show_of_complex_and_of_bits(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        writer.write("c", torch.tensor([1 + 2j]))
        writer.write("b", torch.tensor([7], dtype=torch.uint8).view(torch.bits8))
    assert show(tmp_path / "run", 0).values == ("(1+2j)",)
    assert show(tmp_path / "run", 1).values == (7,)


def test_verify_reads_every_byte(run: Path) -> None:
    result = verify(run)
    assert result == VerifyResult(
        path=str(run), records=15, checked=15, without_values=0, corrupt=(), problems=(), passed=True
    )


def test_prune_removes_values_and_keeps_what_is_known_of_them(run: Path) -> None:
    before = Trace.open(run).index
    plan = prune(run, sites="layers.{0,2}.resid_post", dry_run=True)
    assert (plan.records, plan.bytes_freed, plan.dry_run) == (6, 6 * 3200, True)
    assert Trace.open(run).index.equals(before)
    done = prune(run, sites=["layers.0.resid_post", "layers.2.resid_post"])
    assert (done.records, done.bytes_freed) == (6, 6 * 3200)
    trace = Trace.open(run, incomplete_ok=False)
    known = [name for name in before.columns if name not in ("shard", "key")]
    assert trace.index.select(known).equals(before.select(known))
    gone = trace.index.filter(trace.index["shard"].is_null())
    assert gone["site"].unique().sort().to_list() == ["layers.1.resid_post", "layers.3.resid_post"]
    assert trace.tensor(0).unique().tolist() == [0.0]
    assert trace.tensor(4).item() == 1.0  # loss has no site
    with pytest.raises(TraceError, match="were not kept"):
        trace.tensor(1)
    assert (verify(run).checked, verify(run).without_values, verify(run).passed) == (9, 6, True)
    assert prune(run, sites="layers.{0,2}.resid_post").records == 0
    assert prune(run, drop={"name": "loss", "step": [0, 1]}).records == 2
    assert prune(run, drop={"step": [0, 1, 2]}).records == 7
    assert verify(run).without_values == 15
    for part in (run / "rank-00000/records").iterdir():
        part.unlink()
    repair(run)
    assert Trace.open(run, incomplete_ok=False).index.select(known).equals(before.select(known))


def test_an_interrupted_prune_loses_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Trace.open(run).index

    def killed(store: LocalStore, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(run, drop={"step": 0})
    monkeypatch.undo()
    problems = Trace.open(run).problems
    assert len(problems) == 1
    switched = Trace.open(run).filter(step=0).index["shard"]
    assert switched.is_null().all()  # the part named the thinned shard before the old one was to go
    assert "a shard that was replaced; trace repair deletes it" in problems[0]
    assert not Trace.open(run).damaged
    assert len(repair(run).deleted) == 1
    assert Trace.open(run, incomplete_ok=False).index.drop("shard", "key").equals(before.drop("shard", "key"))
    assert verify(run).passed


def test_prune_wants_to_know_what_goes(run: Path) -> None:
    with pytest.raises(InputError, match="prune needs to know what goes"):
        prune(run)
    with pytest.raises(InputError, match=r"matches none of layers\.0\.resid_post"):
        prune(run, sites="layers.*.mlp_out")
    with pytest.raises(InputError, match="no column 'stpe': did you mean 'step'"):
        prune(run, drop={"stpe": 1})


def test_nothing_is_mended_or_removed_under_a_writer(run: Path) -> None:
    with TraceWriter(run, provenance={}, plan={"steps": 3}, resume=True):
        for verb in (lambda: repair(run), lambda: prune(run, drop={"step": 0})):
            with pytest.raises(TraceLockedError, match="is being written by process"):
                verb()


def test_the_estimate_is_close(tmp_path: Path) -> None:
    shapes: list[tuple[Any, torch.dtype]] = [((100, 8), torch.bfloat16)] * 400
    guess = estimate(tmp_path / "run", shapes)
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        for step, (shape, dtype) in enumerate(shapes):
            site = f"layers.{step % 40}.resid_post"
            writer.write(
                site, torch.randn(shape).to(dtype), site=site, step=step, prompt=0, request="r", positions=[step]
            )
    actual = ls(tmp_path / "run").bytes
    assert guess.tensor_bytes == 400 * 1600
    assert actual <= guess.total_bytes <= 1.5 * actual
    assert guess.fits
    assert estimate(tmp_path, [((1 << 30, 1 << 20), torch.float64)]).fits is False
    assert estimate("memory://x", shapes, level="statistics").free_bytes is None
