"""What is written reads back bit for bit, through our reader and through readers that know nothing of us."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from trimtab.errors import InputError
from trimtab.trace import Trace, TraceWriter

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # said by torch, once

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    - {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4},
    key=str,
)
NATIVE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


def raw(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor, by numpy rather than by our code."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes as a tensor: NaN payloads, infinities and denormals come by themselves."""
    count = int(np.prod(shape, dtype=np.int64))
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 2 if dtype == torch.bool else 256, count * dtype.itemsize, dtype=np.uint8)
    flat = torch.from_numpy(data) if count else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = [random_tensor(shape, dtype, seed) for seed, shape in enumerate([(3, 5), (), (0, 4), (2, 3, 4), (7,)])]
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        ids = [writer.write("x", tensor) for tensor in tensors]
    trace = Trace.open(tmp_path / "run", incomplete_ok=False)
    for record, tensor in zip(ids, tensors, strict=True):
        found = trace.tensor(record)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw(found) == raw(tensor)
    assert trace.index["dtype"].to_list() == [str(dtype).removeprefix("torch.")] * 5


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    order=st.randoms(use_true_random=False),
)
def test_any_shape_stride_and_name(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    name: str,
    order: object,
) -> None:
    path = tmp_path_factory.mktemp("any") / "run"
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    tensor = random_tensor(shape, dtype, seed).permute(dims)
    with TraceWriter(path, provenance={}) as writer:
        record = writer.write(name, tensor)
    trace = Trace.open(path)
    assert raw(trace.tensor(record)) == raw(tensor.clone() if dtype.itemsize > 1 else _compact(tensor))
    assert trace.index["name"].to_list() == [name]
    assert trace.index["shape"].to_list() == [list(tensor.shape)]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).clone(memory_format=torch.contiguous_format)


def test_views_of_other_tensors_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    complex_base = torch.complex(base, -base)
    views = [base[:, ::2], base.t(), base[1:, 3:4].expand(3, 5), complex_base.conj(), complex_base.conj().imag, base[2]]
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        ids = [writer.write("view", view) for view in views]
    trace = Trace.open(tmp_path / "run")
    for record, view in zip(ids, views, strict=True):
        assert torch.equal(trace.tensor(record), view.resolve_conj().resolve_neg())


def test_a_long_name_lies_in_the_index_only(tmp_path: Path) -> None:
    names = ["n" * 100_000, "a/../b\0c\n", "", "\N{GREEK SMALL LETTER PHI}" * 300, "con", "CON", "*[x]?"]
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        for name in names:
            writer.write(name, torch.ones(2))
    assert Trace.open(tmp_path / "run").index["name"].to_list() == names
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"manifest.json", "writer.lock", "closed.json", "part-00000.parquet", "part-00000.safetensors"}


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "run", provenance={}) as writer,
        pytest.raises(InputError, match="half a surrogate pair"),
    ):
        writer.write("\ud800", torch.ones(1))


def test_the_safetensors_library_opens_our_shards(tmp_path: Path) -> None:
    tensors = {dtype: random_tensor((3, 5), dtype, 1) for dtype in NATIVE}
    odd = random_tensor((3,), torch.complex128, 2)
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        writer.write("odd bytes first", torch.ones(3, dtype=torch.uint8))
        ids = {dtype: writer.write("x", tensor) for dtype, tensor in tensors.items()}
        other = writer.write("complex", odd)
    with safe_open(tmp_path / "run/rank-00000/tensors/part-00000.safetensors", "pt") as shard:
        assert len(shard.keys()) == 6
        for dtype, record in ids.items():
            found = shard.get_tensor(str(record))
            assert found.dtype == dtype
            assert raw(found) == raw(tensors[dtype])
        assert shard.get_tensor(str(other)).dtype == torch.uint8
        assert raw(shard.get_tensor(str(other))) == raw(odd)
        identity = json.loads(shard.metadata()["trimtab"])
    assert identity["columns"]["name"] == {"each": ["odd bytes first", "x", "x", "x", "x", "complex"]}
    assert identity["columns"]["phase"] == {"all": "inference"}


def test_shard_data_is_aligned_for_every_dtype(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        for count in range(1, 8):
            for dtype in (torch.uint8, torch.float64, torch.bfloat16, torch.complex128):
                writer.write("x", random_tensor((count,), dtype, count))
    data = (tmp_path / "run/rank-00000/tensors/part-00000.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 64 == 0
    sizes = {"F64": 8, "BF16": 2, "U8": 1}
    for key, entry in header.items():
        if key != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_the_digest_is_xxh3_of_dtype_shape_and_bytes(tmp_path: Path) -> None:
    one = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).bfloat16()
    same_bytes = [one.t().contiguous().t(), one, one.reshape(3, 2), one.view(torch.int16)]
    for level in ("values", "statistics", "digests"):
        with TraceWriter(tmp_path / level, provenance={}, level=level) as writer:
            for tensor in same_bytes:
                writer.write("x", tensor)
        digests = Trace.open(tmp_path / level).index["digest"].to_list()
        expected = xxhash.xxh3_128_hexdigest(
            b"bfloat16[2, 3]\n" + one.view(torch.int16).numpy().astype("<i2").tobytes()
        )
        assert digests[:2] == [expected, expected]
        assert len(set(digests)) == 3  # another shape and another dtype are another tensor


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    values = torch.randn(1000, dtype=torch.float64) * 3 + 100
    values[5], values[6], values[7] = float("nan"), float("inf"), -float("inf")
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        writer.write("x", values)
        writer.write("empty", values[:0])
        writer.write("bits", torch.zeros(4, dtype=torch.uint8).view(torch.bits8))
    first, empty, bits = (
        Trace.open(tmp_path / "run").index.select("mean", "std", "absmax", "nan_count", "inf_count").rows()
    )
    finite = values.numpy()[np.isfinite(values.numpy())]
    # float64 sums of 997 terms: 1e-12 relative is a thousand roundings
    assert first[:3] == pytest.approx((finite.mean(), finite.std(), np.abs(finite).max()), rel=1e-12)
    assert first[3:] == (1, 2)
    assert empty == (None, None, None, 0, 0)
    assert bits == (None,) * 5


def test_the_index_is_plain_parquet_with_the_columns_of_the_format(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "run", provenance={}) as writer:
        writer.write(
            "x",
            torch.ones(2, 3),
            site="layers.7.mlp_out",
            phase="fwd_bwd",
            step=3,
            micro_step=1,
            tp_rank=2,
            call_index=4,
            edit="after",
            config="bf16",
            prompt=5,
            request="r",
            positions=[8, 9],
            dims="t h[tp]",
            kind="grad",
            source_file="model.py",
            source_line=12,
            module_path="model.layers.7.mlp",
            module_class="MLP",
            recompute=True,
        )
    row = pl.read_parquet(tmp_path / "run/rank-00000/records/part-00000.parquet").row(0, named=True)
    assert ",".join(row) == (
        "record_id,order,phase,step,micro_step,rank,tp_rank,pp_rank,cp_rank,ep_rank,dp_rank,site,layer,name,call_index,"
        "edit,config,prompt,request,positions,dims,dtype,shape,kind,source_file,source_line,module_path,module_class,"
        "recompute,digest,mean,std,absmax,nan_count,inf_count,shard,key"
    )
    assert (row["layer"], row["positions"], row["shape"], row["recompute"]) == (7, [8, 9], [2, 3], True)
    assert (row["tp_rank"], row["dp_rank"], row["rank"], row["kind"], row["mean"]) == (2, None, 0, "grad", 1.0)
