"""Activations as batches: what every source gives, what is left out, shuffling, memory, and going on after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import testbed
from trimtab.backends import Capture, Request, open_backend
from trimtab.errors import InputError, NonFiniteError, RecipeError
from trimtab.sae.data import (
    ActivationSource,
    Filters,
    ModelSource,
    ShuffleBuffer,
    Stream,
    StreamConfig,
    TensorSource,
    TraceSource,
    open_texts,
)
from trimtab.trace import TraceWriter

TEXTS = ("The old keeper walked home", "A quiet river sang", "The bright lantern of the tower slept near the dog")


def numbered(rows: int, width: int = 4) -> Tensor:
    """Row i is a vector of length 1, and its first element tells i."""
    x = torch.zeros(rows, width)
    x[:, 0] = torch.arange(rows) / rows
    x[:, 1] = (1 - x[:, 0].square()).sqrt()
    return x


def config(**given: Any) -> StreamConfig:
    return StreamConfig(
        **{"batch_size": 8, "buffer_rows": 32, "held_out": 0, "storage": "float32", "prefetch": 0, **given}
    )


def drawn(stream: Stream, batches: int) -> list[dict[str, Tensor]]:
    return [next(stream) for _ in range(batches)]


def rows_of(batches: list[dict[str, Tensor]], rows: int) -> list[int]:
    return [round(float(one) * rows) for batch in batches for one in batch["x"][:, 0]]


def test_every_row_comes_about_once_an_epoch_and_in_another_order() -> None:
    with Stream(TensorSource(numbered(640), chunk_rows=50), config()) as stream:
        found = rows_of(drawn(stream, 76), 640)  # 80 batches but the 4 that wait in the buffer
    assert len(set(found)) == len(found)
    assert found != sorted(found)
    # A row waits buffer / batch batches on average: 4, so 32 rows. In the order of reading it would be 0.
    late = [place - row for place, row in enumerate(found)]
    assert 16 < sum(map(abs, late)) / len(late) < 48


def test_batches_have_a_mean_squared_length_of_one() -> None:
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)) * 3.4 + 1
    with Stream(TensorSource({"a": x, "b": x * 7}), config(buffer_rows=4096, batch_size=4096)) as stream:
        batch = next(stream)
        norm = stream.measured["a"].norm
        assert norm == pytest.approx(math.sqrt(x.double().square().sum(1).mean()), rel=1e-9)
        share = float(x.double().mean(0).square().sum() / x.double().square().sum(1).mean())
        assert stream.measured["a"].centre_share == pytest.approx(share)
        assert stream.measured["b"].norm == pytest.approx(7 * norm, rel=1e-6)
    assert float(batch["a"].double().square().sum(1).mean()) == pytest.approx(1, rel=1e-6)
    assert torch.allclose(batch["a"], batch["b"], rtol=1e-5)  # the same token in the same row of each site


def test_held_out_tokens_are_never_trained_on() -> None:
    with Stream(TensorSource(numbered(100), chunk_rows=7), config(held_out=20)) as stream:
        held = rows_of([stream.held_out], 100)
        found = rows_of(drawn(stream, 100), 100)  # ten epochs
        assert stream.epoch >= 9
    assert held == [*range(20)]
    assert set(found) == {*range(20, 100)}


def test_tokens_and_outliers_are_left_out_and_counted() -> None:
    x = numbered(100)
    x[50] *= 11
    x[51] *= 9
    tokens = torch.arange(100) % 10
    source = TensorSource(x, tokens=tokens, special=frozenset({0}))
    with Stream(source, config(filters=Filters(tokens=(3,)))) as stream:
        found = {round(float(row[0] / row.norm()) * 100) for batch in drawn(stream, 30) for row in batch["x"]}
        about = stream.about()
    expected = {n for n in range(100) if n % 10 not in (0, 3)}
    assert found == expected
    assert about["left_out_by_token"] / about["tokens_read"] == pytest.approx(0.2)
    assert about["left_out_by_norm"] == 0  # row 50 is left out by its token
    json.dumps(about)
    with Stream(TensorSource(x), config()) as stream:
        drawn(stream, 8)  # 88 rows, not yet the second pass
        assert stream.about()["left_out_by_norm"] == 1
        assert stream.measured["x"].limit == pytest.approx(10)
    with Stream(TensorSource(x), config(filters=Filters(max_norm=None))) as stream:
        drawn(stream, 8)
        assert stream.about()["left_out_by_norm"] == 0


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_stream_goes_on_with_the_very_next_batch(stop: int, prefetch: int) -> None:
    x = torch.randn(210, 8, generator=torch.Generator().manual_seed(1))

    def stream() -> Stream:
        settings = config(held_out=10, prefetch=prefetch, storage="bfloat16", seed=5)
        return Stream(TensorSource({"a": x, "b": x[:, :3]}, chunk_rows=13), settings)

    with stream() as whole:
        expected = drawn(whole, 40)
        held = whole.held_out
    with stream() as first:
        found = drawn(first, stop)
        tensors, state = first.state()
        kept = {name: one.clone() for name, one in tensors.items()}
        drawn(first, 3)  # what it does afterwards is of no consequence
        about = first.about()["tokens_read"]
    with stream() as second:
        second.load_state(kept, state)
        found += drawn(second, 40 - stop)
        assert all(torch.equal(second.held_out[site], held[site]) for site in "ab")
        assert second.about()["tokens_read"] >= about - 39
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["a"], other["a"])
        assert torch.equal(one["b"], other["b"])


def test_the_order_depends_on_the_seed_alone() -> None:
    def first(seed: int, prefetch: int) -> Tensor:
        with Stream(TensorSource(numbered(300), chunk_rows=11), config(seed=seed, prefetch=prefetch)) as stream:
            return torch.cat([one["x"] for one in drawn(stream, 20)])

    assert torch.equal(first(0, 0), first(0, 4))
    assert not torch.equal(first(0, 0), first(1, 0))


def test_memory_is_the_buffer_whatever_the_data_are() -> None:
    with Stream(TensorSource(numbered(20_000)), config(storage="bfloat16")) as stream:
        drawn(stream, 2000)
        tensors, _ = stream.state()
    assert sum(one.nbytes for name, one in tensors.items() if name.startswith("block")) == 32 * 4 * 2


def test_empty_and_constant_data_are_refused() -> None:
    with pytest.raises(InputError, match="there is no activation"):
        TensorSource(torch.zeros(0, 4))
    everything = TensorSource(numbered(20), tokens=torch.zeros(20, dtype=torch.int64), special=frozenset({0}))
    for prefetch in (0, 2):
        everything.rewind()
        with (
            Stream(everything, config(prefetch=prefetch)) as stream,
            pytest.raises(InputError, match="no activation to train on: its 20 tokens were all filtered out"),
        ):
            next(stream)
    with (
        Stream(TensorSource(torch.ones(100, 4)), config()) as stream,
        pytest.raises(InputError, match=r"all 100 activations of x are the same vector \(length 2\)"),
    ):
        next(stream)
    with (
        Stream(TensorSource(torch.zeros(100, 4)), config()) as stream,
        pytest.raises(InputError, match="are the same vector"),
    ):
        next(stream)


def test_settings_are_checked() -> None:
    with pytest.raises(RecipeError, match="buffer must hold a batch"):
        StreamConfig(batch_size=10, buffer_rows=9)
    with pytest.raises(RecipeError, match="storage is 'int8'"):
        config(storage="int8")
    with pytest.raises(RecipeError, match=r"max_norm is 0\.5"):
        Filters(max_norm=0.5)
    with pytest.raises(InputError, match="a buffer of 3 rows for batches of 4"):
        ShuffleBuffer({"x": 1}, rows=3, batch_size=4, dtype=torch.float32, seed=0, refill=dict)
    with pytest.raises(InputError, match=r"the sites have \{'a': 3, 'b': 2\} rows"):
        TensorSource({"a": torch.zeros(3, 1), "b": torch.zeros(2, 1)})


def test_a_float16_store_refuses_what_it_cannot_hold() -> None:
    with (
        Stream(TensorSource(numbered(100) * 1e5), config(storage="float16")) as stream,
        pytest.raises(NonFiniteError, match="leave the range of float16"),
    ):
        next(stream)


# --- a trace ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed on three texts: two sites, all rows."""
    path = tmp_path_factory.mktemp("sae") / "run"
    backend = open_backend("hf", "testbed")
    with TraceWriter(path, kind="generation") as writer:
        backend.generate(
            [Request(prompt=text, prompt_index=n, max_new_tokens=3) for n, text in enumerate(TEXTS)],
            capture=Capture(sites=("layers.2.resid_post", "layers.2.mlp_out")),
            writer=writer,
        )
    backend.close()
    return path


SITES = ("layers.2.resid_post", "layers.2.mlp_out")


def states(texts: tuple[str, ...]) -> dict[str, Tensor]:
    """The same from the modules of transformers, text by text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(testbed.path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.path())
    kept: dict[str, list[Tensor]] = {site: [] for site in SITES}
    mlp = model.model.layers[2].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: kept[SITES[1]].append(out[0].detach()))
    with torch.no_grad():
        for text in texts:
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            kept[SITES[0]].append(output.hidden_states[3][0])
    handle.remove()
    return {site: torch.cat(parts) for site, parts in kept.items()}


def test_a_trace_gives_its_rows_and_their_tokens(recorded: Path) -> None:
    source: ActivationSource = TraceSource(recorded, SITES)
    width = source.widths
    chunks = [*source.chunks()]
    assert len(chunks) == 3
    assert chunks[0].values[SITES[1]].shape == (chunks[0].rows, width[SITES[1]])
    expected = states(TEXTS[:1])
    count = len(expected[SITES[0]])
    for site in SITES:
        assert torch.allclose(chunks[0].values[site][:count], expected[site], atol=1e-5)
    assert tuple(chunks[0].tokens[:count].tolist()) == open_backend("hf", "testbed").encode(TEXTS[0]).ids
    source.load_state({"unit": 1})
    assert torch.equal(next(source.chunks()).values[SITES[0]], chunks[1].values[SITES[0]])


def test_a_trace_without_the_site_says_what_it_holds(recorded: Path) -> None:
    with pytest.raises(InputError, match=r"holds no layers.3.attn_out; it holds .*layers.2.mlp_out"):
        TraceSource(recorded, ["layers.3.attn_out"])


def test_a_nan_in_a_trace_is_named_by_record_and_token(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    bad = x.clone()
    bad[3, 2] = torch.nan
    from trimtab.trace import TokenRow

    with TraceWriter(tmp_path / "run", kind="generation") as writer:
        for prompt, rows in enumerate((x, bad)):
            about = {"site": "layers.0.resid_post", "layer": 0, "config": "", "prompt": prompt, "request": "0"}
            writer.write("layers.0.resid_post", rows, positions=[*range(5)], edit="none", **about)  # type: ignore[arg-type]
            writer.write_tokens(
                TokenRow(config="", prompt=prompt, request="0", position=n, token_id=40 + n) for n in range(5)
            )
    source = TraceSource(tmp_path / "run", ["layers.0.resid_post"])
    chunks = source.chunks()
    assert next(chunks).tokens.tolist() == [40, 41, 42, 43, 44]
    with pytest.raises(NonFiniteError, match=r"record 1, position 3 \(token 43\) holds 1 elements that are NaN"):
        next(chunks)


def test_records_of_a_dump_are_rows_of_their_last_dimension(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 4)
    with TraceWriter(tmp_path / "run") as writer:
        for step in range(2):
            writer.write("hidden", x[step], step=step, site="layers.0.resid_post", layer=0)
            writer.write("other", x[step, ..., :2], step=step)
    source = TraceSource(tmp_path / "run", ["layers.0.resid_post", "other"])
    assert dict(source.widths) == {"layers.0.resid_post": 4, "other": 2}
    found = [*source.chunks()]
    assert torch.equal(torch.cat([one.values["layers.0.resid_post"] for one in found]), x.reshape(-1, 4))
    assert torch.equal(torch.cat([one.values["other"] for one in found]), x.reshape(-1, 4)[:, :2])


# --- a live model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf", "mock"])
def test_a_model_gives_the_rows_of_its_texts(name: str) -> None:
    sites = SITES if name == "hf" else ("layers.0.resid_post",)
    source = ModelSource(open_backend(name, "testbed"), open_texts(TEXTS), sites, batch_size=2)
    chunks = [*source.chunks()]
    assert [len(one.values) for one in chunks] == [len(sites)] * 2
    ids = [token for text in TEXTS for token in open_backend(name, "testbed").encode(text).ids]
    assert torch.cat([one.tokens for one in chunks]).tolist() == ids
    assert dict(source.widths) == {site: one.shape[1] for site, one in chunks[0].values.items()}
    if name == "hf":
        expected = states(TEXTS)
        for site in sites:
            assert torch.allclose(torch.cat([one.values[site] for one in chunks]), expected[site], atol=1e-5)
    source.close()


def test_long_texts_go_on_in_the_next_context_and_the_cursor_stands_between_any_two() -> None:
    backend = open_backend("hf", "testbed")

    def source(shard: tuple[int, int] = (0, 1)) -> ModelSource:
        return ModelSource(
            backend, open_texts(TEXTS), ["layers.0.resid_post"], context_size=4, batch_size=2, shard=shard
        )

    one = source()
    begins = next(iter(one.special & {*backend.encode(TEXTS[0]).ids}))
    found = [(chunk.tokens.tolist(), one.state()) for chunk in one.chunks()]
    whole = [token for tokens, _ in found for token in tokens if token != begins]
    ids = [token for text in TEXTS for token in backend.encode(text).ids if token != begins]
    assert whole == ids
    assert all(tokens[0] == begins for tokens, _ in found)
    for number, (_, state) in enumerate(found):
        again = source()
        again.load_state(state)
        assert [chunk.tokens.tolist() for chunk in again.chunks()] == [tokens for tokens, _ in found[number + 1 :]]
    shards = [[chunk.tokens.tolist() for chunk in source((rank, 2)).chunks()] for rank in range(2)]
    assert shards == [[tokens for tokens, _ in found][rank::2] for rank in range(2)]


def test_a_live_model_is_filtered_of_what_begins_a_text() -> None:
    source = ModelSource(open_backend("hf", "testbed"), open_texts("testbed:40"), [SITES[0]], batch_size=8)
    with Stream(source, config(storage="bfloat16", batch_size=64, buffer_rows=256, prefetch=2)) as stream:
        next(stream)
        about = stream.about()
    assert about["left_out_by_token"] >= 5  # of at least so many texts
    assert about["source"]["texts"] == "testbed:40"


def test_wrong_sizes_of_contexts_are_refused() -> None:
    backend = open_backend("mock", "testbed")
    with pytest.raises(InputError, match="at least 2 tokens, 1 context were expected"):
        ModelSource(backend, open_texts(TEXTS), ["layers.0.resid_post"], context_size=1)
    hf = open_backend("hf", "testbed")
    with pytest.raises(InputError, match="has 512 positions"):
        ModelSource(hf, open_texts(TEXTS), ["layers.0.resid_post"], context_size=1 << 20)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_of_every_kind_begin_anywhere(tmp_path: Path) -> None:
    import datasets
    import polars

    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    polars.DataFrame({"text": ["one", "two", "three"]}).write_parquet(tmp_path / "a.parquet")
    data = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    data.save_to_disk(tmp_path / "saved")
    names = [tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "saved", data]
    for source in [*names, data.to_iterable_dataset(), ["one", "two", "three"]]:
        texts = open_texts(source)
        assert [*texts.start(0)] == ["one", "two", "three"]
        assert [*texts.start(2)] == ["three"]
    drawn = [*open_texts("testbed:5").start(0)]
    assert len(drawn) == 5 == len({*drawn})
    assert [*open_texts("testbed:5").start(3)] == drawn[3:]


def test_texts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for name, words in (
        ("none.txt", "no such file"),
        ("a.csv", r"expected a \.txt file"),
        ("testbed:x", "write testbed or testbed:N"),
    ):
        with pytest.raises(InputError, match=words):
            open_texts(tmp_path / name if "." in name else name)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(InputError, match=r"a.jsonl:2: no column 'text'; it has body"):
        [*open_texts(file).start(0)]
    file.write_text('{"text": 3}\n')
    with pytest.raises(InputError, match="its text is 3"):
        [*open_texts(file).start(0)]
    with pytest.raises(InputError, match=r"expected a \.txt file"):
        open_texts([])
