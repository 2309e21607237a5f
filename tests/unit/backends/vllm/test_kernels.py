"""The two kernels against each other, to the bit; conversions exhaustively; independence of rows; the build."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from trimtab.backends.vllm import op as _op  # noqa: F401 - defines the operator
from trimtab.backends.vllm.bank import SiteBank, StepRows, update_residual_
from trimtab.backends.vllm.kernels import _build, _form, native
from trimtab.sites import Site
from trimtab.steering import Ablate, AblateSubspace, Add, Cap, CapSubspace, SetProjection, Steering

SITE = Site.parse("layers.0.resid_post")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
compiled = pytest.mark.skipif(native() is None, reason="steer.cpp cannot be built here")


def bits(x):
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def program(ops, width):
    return Steering({"layers.0.resid_post": ops}).resolve(num_layers=1, hidden_size=width, sites=[SITE])[SITE]


def bank(kernel, width, dtype, programs, *, ops=3, each=3, storage=torch.float32, device="cpu"):
    made = SiteBank(
        SITE, width, max_steering=3, ops_per_site=ops, max_directions=ops * each, max_bound=4, device=device,
        model_dtype=dtype, storage=storage, kernel=kernel,
    )  # fmt: skip
    for slot, one in enumerate(programs, 1):
        made.put(slot, made.pack(one, {step.key: index % 2 for index, step in enumerate(one.steps)}))
    return made


@st.composite
def an_op(draw, width):
    seed = draw(st.integers(0, 2**31))
    v = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    options = {
        "math": draw(st.sampled_from(["float32", "bfloat16", "float16", "model"])),
        "max_ratio": draw(st.sampled_from([None, None, 0.05, 3.0])),
    }
    strength = draw(st.sampled_from([0.0, 0.02, -1.5, 300.0]))
    low, high = sorted([draw(st.floats(-4, 4)), draw(st.floats(-4, 4))])
    several = v[: min(draw(st.integers(1, 3)), width)]
    return draw(
        st.sampled_from(
            [
                Add(v[0], strength, **options),
                Add(v[0], strength, "token_norm", **options),
                Cap(v[0], low, high, **options),
                Cap(v[0], min=high, **options),
                Ablate(v[0], strength, **options),
                SetProjection(v[0], strength, **options),
                AblateSubspace(several, strength, **options),
                CapSubspace(several, max=high, **options),
            ]
        )
    )


@st.composite
def a_step(draw):
    width = draw(st.sampled_from([1, 2, 3, 7, 16, 32, 33, 48, 64, 96, 128, 160]))
    n = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    programs = [
        program([draw(an_op(width)) for _ in range(draw(st.integers(1, 3)))], width)
        for _ in range(draw(st.integers(1, 3)))
    ]
    scale = draw(st.sampled_from([1e-5, 1.0, 1.0, 30000.0]))
    gain = torch.rand(n, 2, generator=generator) * 2
    gain[torch.rand(n, 2, generator=generator) < 0.3] = float("nan")
    gain[torch.rand(n, 2, generator=generator) < 0.2] = 1.0
    rows = StepRows(
        n,
        torch.randint(0, 5, (n,), generator=generator, dtype=torch.int32),
        torch.tensor([0, *draw(st.permutations([0, 1, 2, 3]))], dtype=torch.int32),
        gain,
    )
    dtype = draw(st.sampled_from(DTYPES))
    x = (torch.randn(n, width, generator=generator) * scale).to(dtype)
    x[torch.rand(n, width, generator=generator) < 0.1] = -0.0
    residual = (torch.randn(n, width, generator=generator) * scale).to(dtype) if draw(st.booleans()) else None
    storage = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return programs, rows, x, residual, storage, draw(st.booleans())


@compiled
@given(a_step())
@settings(max_examples=300)
def test_both_kernels_agree_to_the_bit(step):
    programs, rows, x, residual, storage, full = step
    results = []
    for kernel in ("auto", "torch"):
        made = bank(kernel, x.shape[1], x.dtype, programs, storage=storage)
        got = x.clone()
        dose = torch.full((rows.n, 3, 5), -7.0) if full else None
        made.apply_(got, residual, rows, dose)
        results.append((got, made.counts, dose))
    (a, counts_a, dose_a), (b, counts_b, dose_b) = results
    assert torch.equal(bits(a), bits(b))
    assert torch.equal(counts_a, counts_b)
    if full:
        assert torch.equal(dose_a.nan_to_num(-9.0), dose_b.nan_to_num(-9.0))


@compiled
@pytest.mark.parametrize("math", ["float32", "bfloat16", "model"])
@pytest.mark.parametrize("width", [32, 33, 40, 64, 128, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_and_a_projection_are_the_same_in_both_kernels(dtype, width, math):
    generator = torch.Generator().manual_seed(width)
    u, v, x, residual = torch.randn(4, 12, width, generator=generator)
    add, cap, ablate = Add(v[0], 0.3, math=math), Cap(u[0], -0.5, 0.5, math=math), Ablate(u[1], 0.0, math=math)
    everything = [[add], [cap], [ablate], [add, cap], [add, ablate], [cap, add], [add, add, cap], [add, cap, ablate]]
    gain = torch.ones(12, 2)
    gain[5, 0] = gain[7, 1] = float("nan")
    rows = StepRows(
        12,
        torch.arange(12, dtype=torch.int32) % 4,
        torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32),
        gain,
    )
    x = x.to(dtype)
    x[:6, ::3] = -0.0
    x[9], x[10, 0] = torch.finfo(dtype).max, float("inf")
    for ops, stream, full in itertools.product(everything, (None, residual.to(dtype)), (False, True)):
        results = []
        for kernel in ("auto", "torch"):
            made = bank(kernel, width, dtype, [program(ops, width)])
            got, dose = x.clone(), torch.full((12, 3, 5), -7.0)
            made.apply_(got, stream, rows, dose if full else None)
            results.append((got, made.counts, dose.nan_to_num(-9.0)))
        (a, counts_a, dose_a), (b, counts_b, dose_b) = results
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(counts_a, counts_b)
        assert torch.equal(dose_a, dose_b)
        assert not torch.equal(bits(a), bits(x))
        assert full == bool((dose_a != -7.0).any())


def tap_of(kernel, banks, rows, x, stream, before, after, full):
    """What a tap of two sites, the first of the tensor itself and the second over the stream, makes of everything."""
    got, r = x.clone(), stream.clone()
    doses = [torch.full((rows.n, 3, 5), -7.0) for _ in banks]
    if kernel == "auto":
        control, own = torch.tensor([1, rows.n, 0, int(full), 0, 0, 0, 0]), torch.zeros(2, dtype=torch.int64)
        states = zip(banks, (None, r), doses, strict=True)
        handles = [number for one, state, dose in states for number in one.handles(rows, state, dose)]
        place = [0, 0, -1, ("none", "set", "add").index(after)]
        native().enroll("tests.whole", handles, [control, own, rows.binding], r, place)
        torch.ops.trimtab.site_.default(got, "tests.whole", before)
        native().leave("tests.whole")
        assert own.tolist() == [1, 0]
        assert control[0] == 0
    else:
        if before is not None:
            _form.update(r, before, rows.binding, True)
        for one, state, dose in zip(banks, (None, r), doses, strict=True):
            one.apply_(got, state, rows, dose if full else None)
        if after != "none":
            _form.update(r, got, rows.binding, after == "add")
    return got, r, *(one.counts for one in banks), *(dose.nan_to_num(-9.0) for dose in doses)


def assert_taps_agree(programs, rows, x, stream, before, after, full, storage=torch.float32):
    results = []
    for kernel in ("auto", "torch"):
        banks = [bank(kernel, x.shape[1], x.dtype, each, storage=storage) for each in programs]
        results.append(tap_of(kernel, banks, rows, x, stream, before, after, full))
    (a, ra, *others_a), (b, rb, *others_b) = results
    assert torch.equal(bits(a), bits(b))
    assert torch.equal(ra.isnan(), rb.isnan())
    numbers = [r.nan_to_num(0.0, float("inf"), float("-inf")) for r in (ra, rb)]
    assert torch.equal(*map(bits, numbers))
    assert all(map(torch.equal, others_a, others_b))


@compiled
@given(a_step(), st.booleans(), st.sampled_from(["none", "set", "add"]), st.sampled_from([1, 2, 300]))
@settings(max_examples=100)
def test_a_whole_tap_is_what_its_parts_are_one_after_the_other(step, joined, after, times):
    """The branch before, two sites, and what becomes of the stream; many rows run in several blocks."""
    programs, rows, x, stream, storage, full = step
    n = rows.n * times
    rows = StepRows(n, rows.binding.repeat(times), rows.slot_of, rows.gain.repeat(times, 1))
    x = x.repeat(times, 1)
    stream = x.roll(1, 0) * 3 if stream is None else stream.repeat(times, 1)
    before = x.flip(0).contiguous() if joined else None
    assert_taps_agree((programs[:1], programs), rows, x, stream, before, after, full, storage)


@compiled
@pytest.mark.parametrize("width", [33, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [False, True])
def test_the_stream_is_brought_up_to_date_with_what_was_steered(joined, dtype, width):
    generator = torch.Generator().manual_seed(width)
    u, v, x, stream, before = (one.to(dtype) for one in torch.randn(5, 20, width, generator=generator))
    add, cap, far = Add(v[0].float(), 0.3), Cap(u[0].float(), -0.5, 0.5), Add(u[1].float() / u[1].float().norm(), 300.0)
    x[:6, ::3] = stream[2:8, ::2] = -0.0
    x[9], stream[9, :7] = torch.finfo(dtype).max, torch.finfo(dtype).max  # the steered sum leaves the range
    x[10, 0], stream[11, 1] = float("inf"), float("nan")
    x[12] = x[13] = x[14] = -torch.finfo(dtype).max
    x[14], stream[13], stream[14] = -x[14], -0.9 * x[13], 0.9 * x[14]  # x leaves the range, and the state does not
    rows = StepRows(
        20,
        torch.arange(20, dtype=torch.int32) % 4,
        torch.tensor([0, 1, 2, 3, 0], dtype=torch.int32),
        torch.ones(20, 2),
    )
    nothing = [program([Add(v[1].float(), 1.0)], width)]
    for ops in ([[add, cap], [far], [cap]], [[far, cap], [cap, add], [add]]):
        for after in ("none", "set", "add"):
            for full in (False, True):
                programs = [program(one, width) for one in ops]
                taken = before if joined else None
                assert_taps_agree(([*nothing], programs), rows, x, stream, taken, after, full)


@compiled
def test_rows_that_are_looked_at_together_keep_their_own_directions():
    """Those stored in 16 bits are widened into rooms; a program with several of them needs the room of several."""
    generator = torch.Generator().manual_seed(0)
    v, x = torch.randn(4, 32, generator=generator), torch.randn(8, 32, generator=generator)
    programs = [program([one], 32) for one in (AblateSubspace(v[:3], 0.5), Add(v[3], 2.0), Cap(v[2], max=-1.0))]
    binding = torch.tensor([1, 2, 3, 1, 3, 1, 2, 3], dtype=torch.int32)
    rows = StepRows(8, binding, torch.tensor([0, 1, 2, 3, 0], dtype=torch.int32), torch.ones(8, 2))
    results = []
    for kernel in ("auto", "torch"):
        got = x.clone()
        bank(kernel, 32, x.dtype, programs, storage=torch.bfloat16).apply_(got, None, rows)
        results.append(got)
    assert torch.equal(*results)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("width", [40, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype, width, kernel):
    n = 400 if width == 1000 and kernel == "auto" else 9  # enough rows for several threads
    ops = [Cap(torch.randn(width), -1.0, 1.0), Add(torch.randn(width), 0.1, "token_norm", max_ratio=0.05)]
    made = bank(kernel, width, dtype, [program(ops, width)])
    x, residual = torch.randn(n, width).to(dtype), torch.randn(n, width).to(dtype)
    owner = torch.ones(n, dtype=torch.int32)
    slots = torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)
    together = x.clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        made.apply_(together, residual, StepRows(n, owner, slots, torch.ones(n, 2)))
    finally:
        torch.set_num_threads(threads)
    assert made.counts[1, :2, 0].tolist() == [n, n]
    for i in range(0, n, max(1, n // 9)):
        alone = x[i : i + 1].clone()
        one = StepRows(1, owner[:1], slots, torch.ones(1, 2))
        made.apply_(alone, residual[i : i + 1], one)
        assert torch.equal(bits(alone[0]), bits(together[i]))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_rounded_and_written_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rows = StepRows(1, torch.ones(1, dtype=torch.int32), torch.ones(2, dtype=torch.int32), torch.ones(1, 1))
    for other in (0.0, 1.0, -3e-8, 1e-5, 60000.0, float("-inf")):
        x = torch.full_like(every, other)[None]
        got = every[None].clone()
        update_residual_(got, x, rows, "add")
        want = every[None] + x
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(
            bits(got.nan_to_num(0.0, float("inf"), float("-inf"))),
            bits(want.nan_to_num(0.0, float("inf"), float("-inf"))),
        )


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("math", ["bfloat16", "float16"])
def test_every_number_of_the_math_dtype_is_multiplied_as_torch_does(math, kernel):
    dtype = getattr(torch, math)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every) & (every != 0) & (every.abs() < 1e30)]
    width = every.shape[0]
    made = bank(kernel, width, torch.float32, [program([Add(every.float(), 1.0, math=math)], width)], ops=1, each=1)
    for gain in (0.3, 1e-3, 1.7):
        got = torch.zeros(1, width)
        one = torch.ones(1, dtype=torch.int32)
        made.apply_(
            got, None, StepRows(1, one, torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32), torch.full((1, 2), gain))
        )
        want = (every * torch.tensor(gain).to(dtype)).float()
        held = torch.isfinite(want)
        assert torch.equal(got[0][held], want[held])
        assert bool((got[0][~held].abs() == torch.finfo(torch.float32).max).all())


def test_the_torch_form_never_looks_at_its_data():
    """A fake tensor has no numbers: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        tables = _form.Tables(
            torch.zeros(4, 2, 8, dtype=torch.int32),
            torch.zeros(4, 2, 4),
            torch.zeros(4, 2, 2, 24),
            torch.zeros(4, 2, 2, 4),
            torch.zeros(5, 2, 3, dtype=torch.int64),
        )
        x = torch.zeros(6, 24, dtype=torch.bfloat16)
        binding, slots = torch.zeros(6, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
        _form.steer(tables, x, x.clone(), torch.zeros(6, 2, 5), binding, slots, torch.zeros(6, 3), sweeps=3)
        _form.update(x, x.clone(), binding, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_graph_follows_the_tables(dtype):
    width, n = 96, 8
    programs = [program([Cap(torch.randn(width), -0.1, 0.1), Add(torch.randn(width), 0.3)], width)]
    programs.append(program([AblateSubspace(torch.randn(2, width), 0.0, math="bfloat16")], width))
    x, residual = torch.randn(n, width).to(dtype), torch.randn(n, width).to(dtype)
    rows = StepRows(
        n, torch.zeros(n, dtype=torch.int32), torch.tensor([0, 1, 2, 0, 0], dtype=torch.int32),
        torch.ones(n, 2),
    )  # fmt: skip
    there = StepRows(n, *(one.cuda() for one in (rows.binding, rows.slot_of, rows.gain)))
    made = bank("auto", width, dtype, [], device="cuda", each=2)
    got, stream, start = x.cuda(), residual.cuda(), x.cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made.apply_(got, stream, there)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.copy_(start)
        made.apply_(got, stream, there)
    for slot, one in enumerate(programs, 1):
        made.put(slot, made.pack(one, {step.key: index % 2 for index, step in enumerate(one.steps)}))
    rows.binding.copy_(torch.tensor([1, 2, 0, 1, 3, 2, 1, 0]))
    there.binding.copy_(rows.binding)
    graph.replay()
    torch.cuda.synchronize()
    want = x.clone()
    here = bank("auto", width, dtype, programs, each=2)
    here.apply_(want, residual, rows)
    assert torch.equal(bits(got.cpu()), bits(want))
    assert torch.equal(made.counts.cpu(), here.counts)


@pytest.fixture
def toolchain(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that copies a library that exists; returns the log of its calls."""
    if shutil.which("sh") is None or native() is None:
        pytest.skip("needs a shell and a built library")
    built = _build.cache_folder() / f"steer-{_build.digest()}.so"
    if not built.is_file():
        pytest.skip("the library lies in no cache")
    log = tmp_path / "calls"
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho call >> {log}\nwhile [ "$1" != "-o" ]; do shift; done\ncp {built} "$2"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return log


def test_a_library_is_built_once_and_whole(toolchain, tmp_path):
    first = _build._library(tmp_path)
    assert _build._library(tmp_path) == first
    assert toolchain.read_text().count("call") == 1
    assert [one.name for one in first.parent.iterdir()] == [first.name]
    first.unlink()
    found = []
    workers = [threading.Thread(target=lambda: found.append(_build._library(tmp_path))) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert found == [first] * 4
    assert [one.name for one in first.parent.iterdir()] == [first.name]


@pytest.mark.skipif(native() is None, reason="needs the kernel")
@pytest.mark.parametrize("strided", ["binding", "slot_of", "gain"])
def test_tables_with_gaps_are_refused(strided):
    made = bank("auto", 64, torch.float32, [])
    rows = {"binding": torch.zeros(8, dtype=torch.int32), "slot_of": torch.zeros(5, dtype=torch.int32),
            "gain": torch.ones(8, 2)}  # fmt: skip
    rows[strided] = torch.stack([rows[strided]] * 2, -1)[..., 0]
    with pytest.raises(RuntimeError, match="has strides"):
        made.handles(StepRows(8, *rows.values()), None, torch.zeros(8, 2, 5))


def test_the_library_asks_for_slots_before_their_turn():
    """GCC leaves out calls of functions that it takes for functions without effects: it did so here."""
    disassembler = shutil.which("objdump")
    library = _build.cache_folder() / f"steer-{_build.digest()}.so"
    if disassembler is None or native() is None or not library.is_file():
        pytest.skip("needs a compiler, its objdump and a cache that can be written")
    read = subprocess.run([disassembler, "-d", str(library)], capture_output=True, text=True, check=True, timeout=60)
    assert re.search(r"\s(prefetcht0|prfm\s+pld)", read.stdout)  # those of the stream are asked for to be written


def test_headers_that_cannot_be_compiled_are_done_without(toolchain, tmp_path):
    if not _build._headers():
        pytest.skip("needs Python's headers")
    script = Path(_build.compiler())
    refuse = 'case "$*" in *TRIMTAB_PYTHON*) exit 1;; esac'
    script.write_text(script.read_text().replace("while", f"{refuse}\nwhile"))
    assert _build._library(tmp_path).is_file()
    assert toolchain.read_text().count("call") == 2
    script.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        _build._compile(tmp_path / "never.so")


def test_another_source_header_or_compiler_is_another_library(toolchain, tmp_path, monkeypatch):
    first = _build.digest()
    source = tmp_path / "other.cpp"
    source.write_text(_build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(_build, "SOURCE", source)
    second = _build.digest()
    monkeypatch.setattr(_build, "FLAGS", (*_build.FLAGS, "-g"))
    third = _build.digest()
    monkeypatch.setenv("CXX", "another")
    fourth = _build.digest()
    header = tmp_path / "other.h"
    header.write_text(_build.HEADERS[0].read_text() + "\n")
    monkeypatch.setattr(_build, "HEADERS", (header, *_build.HEADERS[1:]))
    assert len({first, second, third, fourth, _build.digest()}) == 5


def test_every_file_that_the_kernel_includes_names_its_build():
    included = re.findall(r'#include "(.*)"', "".join(one.read_text() for one in (_build.SOURCE, *_build.HEADERS)))
    assert set(included) == {one.name for one in _build.HEADERS}


def test_without_pythons_headers_the_library_is_another_one_and_has_no_plain_function(monkeypatch):
    with_headers = _build.digest()
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: "/nowhere")
    assert _build._headers() == ""
    assert _build.digest() != with_headers
    assert _build._plain(str(Path(torch.__file__).parent / "lib" / "libc10.so")) is None


def test_a_cache_that_cannot_be_written_is_done_without(toolchain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    private = tmp_path / "private"
    private.mkdir()
    assert _build._library(private).parent == private


def test_without_a_compiler_the_torch_form_runs_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "trimtab"):
        assert _build.native.__wrapped__() is None
    (record,) = caplog.records
    assert "no-such-compiler" in record.getMessage()
    assert list(Path(tmp_path).rglob("*.so")) == []
    monkeypatch.setattr("trimtab.backends.vllm.bank.native", lambda: None)
    x = torch.zeros(2, 4)
    rows = StepRows(2, torch.ones(2, dtype=torch.int32), torch.tensor([0, 1]), torch.ones(2, 2))
    bank("auto", 4, torch.float32, [program([Add(torch.ones(4), 2.0)], 4)]).apply_(x, None, rows)
    r = torch.ones(2, 4)
    update_residual_(r, x, rows, "add")
    assert bool((r == 3.0).all())
