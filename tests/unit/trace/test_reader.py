"""Filtering, gathering rows, merging ranks; traces behind URLs."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError, TraceCorruptError, TraceError, TraceExistsError, TraceLockedError
from trimtab.sites import Site
from trimtab.trace import RequestKey, TokenRow, Trace, TraceWriter, prune, repair, verify
from trimtab.trace._scan import scan_run
from trimtab.trace._store import RemoteStore, open_store

SITE = "layers.3.resid_post"


def open_writer(path: Path | str, **options: Any) -> TraceWriter:
    return TraceWriter(path, **{"provenance": {}, **options})


@pytest.fixture
def generation(tmp_path: Path) -> Trace:
    """Two prompts, two configurations, two sites, one edit twice; every row holds its position."""
    with open_writer(tmp_path / "run", kind="generation") as writer:
        for config in ("bf16", "fp32"):
            for prompt in (0, 1):
                for part in (range(5), range(5, 6), range(6, 7)):
                    for layer in (10, 3):
                        for edit in ("before", "after") if layer == 3 else ("none",):
                            writer.write(
                                "h",
                                torch.tensor([[position, prompt, layer] for position in part], dtype=torch.float32),
                                site=f"layers.{layer}.resid_post",
                                config=config,
                                prompt=prompt,
                                request=f"r{prompt}",
                                positions=part,
                                edit=edit,
                            )
        writer.write("embed", torch.zeros(1, 3), site="embed", positions=[0], config="bf16", prompt=0, request="r0")
        writer.write_tokens([TokenRow(config="bf16", prompt=2, request="r2", position=0, token_id=4)])
    return Trace.open(tmp_path / "run", incomplete_ok=False)


def test_rows_are_gathered_in_position_order(generation: Trace) -> None:
    rows = generation.rows(site=SITE, prompt=1, request="r1", config="fp32", edit="after")
    assert rows.positions.tolist() == list(range(7))
    assert rows.values.tolist() == [[float(position), 1.0, 3.0] for position in range(7)]
    assert len(rows.record_ids) == 3
    assert torch.equal(
        generation.rows(site=Site.parse(SITE), prompt=1, config="fp32", edit="after").values, rows.values
    )


def test_rows_that_fit_several_requests_say_which(generation: Trace) -> None:
    with pytest.raises(TraceError, match=r"fits 8 requests; say which: config: 'bf16', 'fp32'; prompt: 0, 1; request"):
        generation.rows(site=SITE)
    with pytest.raises(TraceError, match=r"fits 2 requests; say which: edit: 'before', 'after'"):
        generation.rows(site=SITE, prompt=0, config="bf16")


def test_rows_that_do_not_exist_say_what_does(generation: Trace) -> None:
    with pytest.raises(TraceError, match=r"no rows with site='layers.4.resid_post'; there are site: .*prompt: 0"):
        generation.rows(site="layers.4.resid_post")


@given(data=st.data())
def test_rows_of_any_cut_are_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 12))
    whole = torch.randn(count, 3).bfloat16()
    cuts = data.draw(st.lists(st.lists(st.integers(0, count - 1), min_size=1, unique=True), max_size=4))
    rest = sorted(set(range(count)).difference(*cuts))
    with open_writer(tmp_path_factory.mktemp("cut") / "run", kind="generation") as writer:
        for cut in (*cuts, rest):
            writer.write("h", whole[cut], site=SITE, prompt=0, request="r", positions=cut)
    rows = Trace.open(writer.path).rows(site=SITE)
    assert rows.positions.tolist() == list(range(count))
    assert torch.equal(rows.values, whole)


def test_two_records_that_disagree_about_a_position_are_both_named(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", kind="generation") as writer:
        writer.write("h", torch.tensor([[0.0], [1.0]]), site=SITE, prompt=0, positions=[0, 1])
        writer.write("other site", torch.ones(1, 1), site="embed", prompt=0, positions=[0])
        writer.write("h", torch.tensor([[-0.0], [2.0]]), site=SITE, prompt=0, positions=[0, 2])
    with pytest.raises(TraceError, match="records 0 and 2 hold different values for position 0 of one request"):
        Trace.open(tmp_path / "run").rows(site=SITE)  # -0.0 equals 0.0, but its bytes differ


def test_equal_nan_rows_count_once(tmp_path: Path) -> None:
    row = torch.tensor([[float("nan"), 1.0]])
    with open_writer(tmp_path / "run", kind="generation") as writer:
        for _ in range(2):
            writer.write("h", row, site=SITE, prompt=0, positions=[0])
    rows = Trace.open(tmp_path / "run").rows(site=SITE)
    assert (rows.positions.tolist(), rows.record_ids) == ([0], (0, 1))


def test_records_of_another_width_are_not_joined(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", kind="generation") as writer:
        writer.write("h", torch.ones(1, 3), site=SITE, prompt=0, positions=[0])
        writer.write("h", torch.ones(1, 4), site=SITE, prompt=0, positions=[1])
    with pytest.raises(TraceError, match=r"record 1 \(torch.float32 \[1, 4\], 1 positions\) does not continue"):
        Trace.open(tmp_path / "run").rows(site=SITE)


def test_what_a_trace_lists(generation: Trace) -> None:
    assert generation.sites() == ("embed", SITE, "layers.10.resid_post")
    assert generation.configs() == ("bf16", "fp32")
    assert generation.requests() == (
        RequestKey("bf16", 0, "r0"),
        RequestKey("bf16", 1, "r1"),
        RequestKey("fp32", 0, "r0"),
        RequestKey("fp32", 1, "r1"),
        RequestKey("bf16", 2, "r2"),
    )
    assert "kind='generation'" in repr(generation)


def test_filters_are_views(generation: Trace) -> None:
    view = generation.filter(config="bf16", prompt=[0, 1], edit=("after", "none"))
    expected = generation.index.filter(
        (pl.col("config") == "bf16") & pl.col("prompt").is_in([0, 1]) & pl.col("edit").is_in(["after", "none"])
    )
    assert view.index.equals(expected)
    assert view.filter(site=Site("resid_post", 3)).index["layer"].unique().to_list() == [3]
    assert generation.filter(layer=None).index["site"].to_list() == ["embed"]
    assert generation.filter(prompt=0).tokens.height == 0
    assert generation.filter(prompt=2, site="embed").tokens.height == 1  # tokens have no site
    assert view.rows(site=SITE, prompt=0).values.shape == (7, 3)
    with pytest.raises(InputError, match="no column 'promt': did you mean 'prompt'"):
        generation.filter(promt=0)


def test_unknown_and_unkept_records(tmp_path: Path, generation: Trace) -> None:
    with pytest.raises(TraceError, match="has no record 1000; it has 37 records with ids from 0 to 36"):
        generation.tensor(1000)
    with open_writer(tmp_path / "thin", level="digests") as writer:
        writer.write("x", torch.ones(1))
    with pytest.raises(TraceError, match=r"the values of record 0 were not kept \(level 'digests', or pruned\)"):
        Trace.open(tmp_path / "thin").tensor(0)
    with open_writer(tmp_path / "none"):
        pass
    with pytest.raises(TraceError, match="it has 0 records"):
        Trace.open(tmp_path / "none").tensor(0)
    assert Trace.open(tmp_path / "none").index.schema == generation.index.schema


def test_tensors_lie_in_the_mapped_file_and_writing_to_them_does_not_reach_it(generation: Trace) -> None:
    assert isinstance(generation._run.values._shard(generation.index["shard"][0])[1], mmap.mmap)
    one, again = generation.tensor(0), generation.tensor(0)
    assert one.data_ptr() == again.data_ptr()
    kept = one.clone()
    one.fill_(9)
    assert torch.equal(Trace.open(generation.path).tensor(0), kept)
    assert verify(generation.path).passed


def test_paths_with_characters_that_globs_know(tmp_path: Path) -> None:
    place = tmp_path / "a[0]*{b}? c"
    with open_writer(place / "run") as writer:
        writer.write("x", torch.ones(2))
    assert Trace.open(place / "run", incomplete_ok=False).index.height == 1


def test_ranks_merge_in_order_and_a_killed_rank_is_named(tmp_path: Path) -> None:
    for rank in (2, 0, 1):
        with open_writer(tmp_path / "run", rank=rank) as writer:
            writer.write("x", torch.tensor([rank]), tp_rank=rank)
    (tmp_path / "run/rank-00001/closed.json").unlink()
    trace = Trace.open(tmp_path / "run")
    assert trace.index["tp_rank"].to_list() == [0, 1, 2]
    assert [trace.tensor(record).item() for record in trace.index["record_id"]] == [0, 1, 2]
    assert [text.partition(":")[0] for text in trace.problems] == ["rank-00001"]


# ------------------------------------------------------------------------------------------------------- behind URLs


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.name}/run"


def test_a_url_holds_a_whole_run(url: str) -> None:
    with open_writer(url, part_bytes=2000, plan={"a": 1}) as writer:
        for step in range(5):
            writer.write("x", torch.full((100,), float(step)).bfloat16(), step=step, site=SITE, positions=[step])
        writer.write("empty", torch.ones(0, 3))
        writer.write_tokens([TokenRow(config="", prompt=0, request="r", position=0, token_id=4)])
    trace = Trace.open(url, incomplete_ok=False)
    assert trace.index["step"].to_list() == [0, 1, 2, 3, 4, 0]
    assert [trace.tensor(record).unique().tolist() for record in range(5)] == [[0], [1], [2], [3], [4]]
    assert trace.tensor(5).shape == (0, 3)
    assert trace.tokens.height == 1
    assert len(scan_run(open_store(url)).parts["records"]) > 1
    assert verify(url).checked == 6


def test_only_the_bytes_of_a_tensor_are_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(url) as writer:
        for step in range(8):
            writer.write("x", torch.full((10_000,), float(step)))
    trace = Trace.open(url)
    trace.tensor(0)
    read, sizes = RemoteStore.read, []

    def counting(store: RemoteStore, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(store, name, start, stop)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(RemoteStore, "read", counting)
    assert trace.tensor(5)[0].item() == 5
    assert sizes == [40_000]


def test_a_url_has_a_lock_resume_repair_and_prune(url: str) -> None:
    writer = open_writer(url)
    writer.write("x", torch.ones(3))
    with pytest.raises(TraceLockedError, match=r"writer.lock: process \d+ on .* writes here"):
        open_writer(url, resume=True)
    writer.flush()
    assert "still writes here" in Trace.open(url).problems[0]
    writer.close()
    with pytest.raises(TraceExistsError, match="already holds rank-00000"):
        open_writer(url)
    with open_writer(url, resume=True) as writer:
        writer.write("y", torch.ones(4), step=1)
    assert Trace.open(url, incomplete_ok=False).index["name"].to_list() == ["x", "y"]
    store = open_store(url)
    before = Trace.open(url).index
    store.delete("rank-00000/records/part-00000.parquet")
    assert repair(url).records == 1
    assert Trace.open(url, incomplete_ok=False).index.equals(before)
    assert prune(url, drop={"step": 1}).bytes_freed == 16
    assert verify(url).without_values == 1
    store.put("rank-00000/tensors/part-00000.safetensors", [b"short"])
    with pytest.raises(TraceCorruptError, match="truncated or corrupt"):
        Trace.open(url).tensor(0)


def test_a_dead_holder_on_this_machine_holds_nothing(url: str) -> None:
    open_writer(url).close()
    store = open_store(url)
    import json
    import socket

    store.put("rank-00000/writer.lock", [json.dumps({"pid": 2**22 + 5, "host": socket.gethostname()}).encode()])
    open_writer(url, resume=True).close()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match="nosuch://"):
        Trace.open("nosuch://bucket/run")
    with pytest.raises(TraceError, match=r"no trace at memory://nothing/here: it has no manifest\.json; nothing is"):
        Trace.open("memory://nothing/here")
    assert "nosuch" not in fsspec.available_protocols()
