"""The operator in compiled graphs, and what the kernel does at the first tap of a pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from trimtab.backends.vllm import live as live_module
from trimtab.backends.vllm import op
from trimtab.backends.vllm.captured import Recorder
from trimtab.backends.vllm.doses import DoseRecorder
from trimtab.backends.vllm.kernels import native
from trimtab.backends.vllm.live import LiveTap
from trimtab.backends.vllm.step import Step
from trimtab.backends.vllm.taps import Tap

CPU = torch.device("cpu")
WIDTH = 8


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Inductor keeps graphs from run to run; what is tested here is how they are made."""
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield


class Doubling:
    """A tap that runs in Python."""

    def __init__(self, joins: bool = False) -> None:
        self.name, self.calls, self.joins = "", 0, joins
        self.before: list[Tensor | None] = []

    def __call__(self, x: Tensor, before: Tensor | None = None) -> None:
        self.calls += 1
        self.before.append(before)
        x *= 2

    def enrolled(self, name: str) -> None:
        self.name = name


@pytest.fixture
def step() -> Iterator[Step]:
    made = Step(16, 8, 2, CPU)
    yield made
    made.end()


def test_a_compiled_graph_calls_the_operator_only_while_a_pass_has_something_to_do(step: Step) -> None:
    op.adapt()
    torch.compiler.reset()
    tap = Doubling()
    name = op.enroll("tests.compiled", tap)
    weight = torch.eye(WIDTH)

    def block(x: Tensor) -> Tensor:
        y = x @ weight
        op.site_(y, name)
        return y + 1

    x = torch.arange(3.0 * WIDTH).reshape(3, WIDTH)
    compiled = torch.compile(block, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, x)
    assert code.count("if trimtab_passes: trimtab_site(") == 1
    assert torch.equal(out, x + 1)
    assert tap.calls == 0
    other = Step(16, 8, 2, CPU)
    step.active = other.active = True
    other.active = False  # another engine's pass ends; ours runs
    assert torch.equal(compiled(x), 2 * x + 1)
    step.active = False
    assert torch.equal(compiled(x), x + 1)
    assert tap.calls == 1


def test_a_compiled_graph_calls_a_tap_that_joins_the_next_one_with_it(step: Step) -> None:
    op.adapt()
    torch.compiler.reset()
    taps = [Doubling(), Doubling(joins=True), Doubling(), Doubling()]
    names = [op.enroll(f"tests.joined.{number}", tap) for number, tap in enumerate(taps)]
    weights = [torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def block(x: Tensor) -> Tensor:
        for weight, name in zip(weights, names, strict=True):
            y = x @ weight
            op.site_(y, name)
            x = x + torch.tanh(y)
        return x

    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    step.active = True
    out, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
    assert code.count("trimtab_site(") == 3
    assert [tap.calls for tap in taps] == [1, 0, 1, 1]
    (joined,) = taps[2].before
    assert joined is not None and joined.shape == x.shape
    assert taps[0].before == taps[3].before == [None]
    expected, branches = x, []
    for weight, factor in zip(weights, (2, 1, 2, 2), strict=True):  # nobody doubled the branch that joined
        branches.append(expected @ weight)
        expected = expected + torch.tanh(factor * branches[-1])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(joined, branches[1])


torch.library.define("trimtab_tests::double_", "(Tensor x, Tensor(a!) y) -> ()")
torch.library.impl("trimtab_tests::double_", "CompositeExplicitAutograd", lambda x, y: [y.mul_(2), None][1])
torch.library.register_fake("trimtab_tests::double_", lambda x, y: None)


def set_first(y: Tensor) -> Tensor:
    y[0] = 2.0
    return y


USES: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "read": (True, lambda y: torch.tanh(y)),
    "read through a view": (True, lambda y: y.view(-1).float().sum() + torch.split(y, 1)[0]),
    "read by an operator": (True, lambda y: (z := y + 1, torch.ops.trimtab_tests.double_.default(y, z))[0]),
    "written by a method": (False, lambda y: y.mul_(2)),
    "written by a function": (False, lambda y: torch.relu_(y)),
    "written as an option": (False, lambda y: torch.nn.functional.relu(y, inplace=True)),
    "written in an element": (False, set_first),
    "written in place": (False, lambda y: operator.iadd(y, 1)),
    "written by an operator": (False, lambda y: (torch.ops.trimtab_tests.double_.default(torch.ones(1), y), y + 0)[1]),
    "written through a view": (False, lambda y: y.view(-1).mul_(2).view(y.shape)),
    "written through a part": (False, lambda y: y.split(1)[0].mul_(2) + y),
}


@pytest.mark.parametrize("name", USES)
def test_a_tap_whose_tensor_is_overwritten_joins_no_other(name: str, step: Step) -> None:
    """Norms of vLLM that run as operators of its own write to the branch that they are given."""
    op.adapt()
    torch.compiler.reset()
    joined, use = USES[name]
    taps = [Doubling(joins=True), Doubling()]
    names = [op.enroll(f"tests.written.{number}", tap) for number, tap in enumerate(taps)]

    def block(x: Tensor) -> Tensor:
        y = x @ torch.eye(WIDTH)
        op.site_(y, names[0])
        z = use(y) + torch.eye(3, WIDTH)
        op.site_(z, names[1])
        return z

    step.active = True
    torch.compile(block, fullgraph=True)(torch.ones(3, WIDTH))
    assert [tap.calls for tap in taps] == [not joined, 1]
    (before,) = taps[1].before
    assert (before is not None) == joined
    assert before is None or torch.equal(before, torch.ones(3, WIDTH))


def test_a_tap_that_one_joined_joins_no_other(step: Step) -> None:
    """Blocks before the first site are only followed: all of their taps could join."""
    op.adapt()
    torch.compiler.reset()
    taps = [Doubling(joins=joins) for joins in (True, True, True, False)]
    names = [op.enroll(f"tests.chain.{number}", tap) for number, tap in enumerate(taps)]

    def blocks(x: Tensor) -> Tensor:
        for name in names:
            y = x @ torch.eye(WIDTH)
            op.site_(y, name)
            x = x + y
        return x

    x = torch.ones(2, WIDTH)
    step.active = True
    assert torch.equal(torch.compile(blocks, fullgraph=True)(x), 36 * x)  # twice what it is, three times that, ...
    assert [tap.calls for tap in taps] == [0, 1, 0, 1]
    (first,), (second,) = taps[1].before, taps[3].before
    assert first is not None
    assert second is not None
    assert torch.equal(first, x)
    assert torch.equal(second, 6 * x)


@pytest.mark.skipif(native() is None, reason="needs the kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["in the kernel", "asked by it", "asked for more dimensions", "in Python"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_tap_that_another_one_joins_does_what_both_do(
    dtype: torch.dtype, where: str, plain: bool, monkeypatch: MonkeyPatch
) -> None:
    if where == "in Python":
        monkeypatch.setattr(live_module, "native", lambda: None)
    generator = torch.Generator().manual_seed(2)
    table, *branches = (torch.randn(6, WIDTH, generator=generator).to(dtype) for _ in range(3))
    streams = []
    for joined in (False, True):
        step, stream = Step(16, 8, 2, CPU), torch.full((16, WIDTH), 3.0, dtype=dtype)
        step.rows.n = 6
        step.rows.binding[:6] = torch.tensor([1, 0, 2, 1, 1, 0])
        live = [
            LiveTap(
                Tap(f"tests.{name}", name, "output", None, None, (), "add", WIDTH, projected=True),
                (),
                step,
                stream,
                Recorder({}),
                DoseRecorder((), 16, 2, CPU),
            )
            for name in ("attn", "mlp")
        ]
        first, second = (op.enroll(one.tap.name, one) for one in live)
        step.control[1:4] = torch.tensor([6, 1, 0])
        step.active = True
        if where == "in Python":
            stream[:6] = table
        else:
            step.embed(torch.arange(6), table)
        if where == "asked for more dimensions":
            branches = [one.view(2, 3, WIDTH) for one in branches]
        if where == "asked by it":
            step._taps[1][1] = 1  # as in a pass that records rows there
        call = op.call if plain else op.site_
        if joined:
            call(branches[1], second, branches[0])
        else:
            call(branches[0], first)
            call(branches[1], second)
        assert live[1].calls == 1
        streams.append(stream)
        del live
    assert torch.equal(*streams)
    expected = table + branches[0].view(6, WIDTH) + branches[1].view(6, WIDTH)
    assert torch.equal(streams[0][[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert torch.equal(streams[0][[1, 5]], table[[1, 5]])


def test_tables_that_go_away_leave_no_pass_behind() -> None:
    before = dict(op.passes)
    step = Step(16, 8, 2, CPU)
    step.active = True
    assert len(op.passes) == len(before) + 1
    del step
    assert op.passes == before


def first_tap(step: Step, stream: Tensor) -> LiveTap:
    tap = Tap("tests.first", "layers.0.attn", "output", None, None, (), "add", WIDTH)
    live = LiveTap(tap, (), step, stream, Recorder({}), DoseRecorder((), 16, 2, CPU))
    op.enroll(tap.name, live)
    return live


@pytest.mark.skipif(native() is None, reason="needs the kernel")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_first_tap_begins_the_stream_with_the_rows_of_its_tokens(step: Step, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.full((16, WIDTH), 7.0)
    table, x = torch.randn(5, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator)
    ids = torch.tensor([4, 0, 0, 2], dtype=dtype)
    live = first_tap(step, stream)
    step.rows.binding[:4] = torch.tensor([1, 0, 2, 1])
    step.control[1:4] = torch.tensor([4, 0, 0])
    step.active = True
    step.embed(ids, table)
    op.site_(x, op.name_of(live))
    tracked = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    assert torch.equal(stream[:4], table[ids.long()] + tracked * x)
    assert torch.equal(stream[4:], torch.full((12, WIDTH), 7.0))
    step.embed(None, None)  # what the stream begins with is there already
    stream[:4] = 1.0
    op.site_(x, op.name_of(live))
    assert torch.equal(stream[:4], torch.ones(4, WIDTH))  # its last tap ended the pass
    step.active = True
    op.site_(x, op.name_of(live))
    assert torch.equal(stream[:4], 1.0 + tracked * x)


@pytest.mark.skipif(native() is None, reason="needs the kernel")
def test_what_the_stream_begins_with_is_told_again_where_it_is_other(step: Step, monkeypatch: Any) -> None:
    kernel, told = native(), []
    assert kernel is not None
    counting = kernel._replace(lookup=lambda *given: told.append(given) or kernel.lookup(*given))
    monkeypatch.setattr("trimtab.backends.vllm.step.native", lambda: counting)
    buffer, table = torch.tensor([4, 0, 1, 2]), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    other, short = table + 1, buffer.int()
    stream = torch.zeros(16, WIDTH)
    live = first_tap(step, stream)
    step.rows.binding[:4] = 1
    given = [(buffer[:2], table), (buffer, table), (buffer, other), (buffer.flip(0), other), (short, other)]
    for ids, rows in given:
        step.control[1:4] = torch.tensor([len(ids), 0, 0])
        step.active = True
        step.embed(ids, rows)
        op.site_(torch.zeros(4, WIDTH), op.name_of(live))
        assert torch.equal(stream[: len(ids)], rows[ids.long()])
    assert len(told) == len(given) - 1


@pytest.mark.skipif(native() is None, reason="needs the kernel")
def test_a_token_outside_the_table_is_refused(step: Step) -> None:
    live = first_tap(step, torch.zeros(16, WIDTH))
    step.control[1:4] = torch.tensor([2, 0, 0])
    step.active = True
    step.embed(torch.tensor([0, 5]), torch.zeros(5, WIDTH))
    with pytest.raises(RuntimeError, match="token id 5 of 5"):
        op.site_(torch.zeros(2, WIDTH), op.name_of(live))


@pytest.mark.skipif(native() is None or native().site is None, reason="needs the kernel and Python's headers")
def test_the_plain_function_does_what_the_operator_does(step: Step) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, WIDTH, generator=generator)
    streams = [torch.ones(16, WIDTH), torch.ones(16, WIDTH)]
    step.rows.binding[:4] = torch.tensor([1, 0, 2, 1])
    step.control[1:4] = torch.tensor([4, 9, 0])
    step.active = True
    for stream, call in zip(streams, (op.site_, op.call), strict=True):
        live = first_tap(step, stream)
        call(x, op.name_of(live))
        assert live.calls == 1
        del live
    assert torch.equal(*streams)
    assert not torch.equal(streams[0][:4], torch.ones(4, WIDTH))
    doubling = Doubling()
    name = op.enroll("tests.python", doubling)
    op.call(x, name)
    assert doubling.calls == 1


@pytest.mark.skipif(native() is None or native().site is None, reason="needs the kernel and Python's headers")
def test_a_name_that_was_called_before_finds_the_tap_that_has_it_now(step: Step) -> None:
    x, name = torch.ones(4, WIDTH), "tests.first"
    step.rows.binding[:4] = 1
    step.control[1:4] = torch.tensor([4, 9, 0])
    step.active = True
    for _ in range(2):
        stream = torch.ones(16, WIDTH)
        live = first_tap(step, stream)
        assert op.name_of(live) == name
        for calls in (1, 2):
            op.call(x, name)
            assert live.calls == calls
        assert torch.equal(stream[:4], torch.full((4, WIDTH), 3.0))
        del live
    op.call(x, name)  # nobody has it: nothing happens
    assert torch.equal(x, torch.ones(4, WIDTH))


@pytest.mark.skipif(native() is None or native().site is None, reason="needs the kernel and Python's headers")
def test_more_names_than_are_remembered_find_their_own_taps(step: Step) -> None:
    kernel = native()
    assert kernel is not None
    step.rows.binding[:4] = 1
    step.control[1:4] = torch.tensor([4, 9, 0])
    step.active = True
    taps = {f"tests.many.{number}": torch.zeros(2, dtype=torch.int64) for number in range(400)}
    streams = {name: torch.zeros(16, WIDTH) for name in taps}
    for name, own in taps.items():
        kernel.enroll(name, [], [step.control, own, step.rows.binding], streams[name], [0, 0, -1, 2])
    for calls in (1, 2):
        for number, (name, own) in enumerate(taps.items()):
            op.call(torch.full((4, WIDTH), float(number)), name)
            assert int(own[0]) == calls
    for number, (name, stream) in enumerate(streams.items()):
        assert torch.equal(stream[:4], torch.full((4, WIDTH), 2.0 * number))
        kernel.leave(name)


@pytest.mark.skipif(native() is None or native().site is None, reason="needs the kernel and Python's headers")
@pytest.mark.parametrize(
    "given",
    [(), (1, "tap"), (torch.zeros(1, WIDTH), 3), (torch.zeros(1, WIDTH), "tap", 1), (*[torch.zeros(1, WIDTH)] * 3, 1)],
)
def test_the_plain_function_refuses_what_is_no_tensor_and_name(given: tuple[object, ...]) -> None:
    with pytest.raises(RuntimeError, match="a tensor and a tap's name"):
        op.call(*given)


@pytest.mark.parametrize("kernel", [None, "without headers"])
def test_without_the_plain_function_graphs_call_the_operator(kernel: str | None, monkeypatch: MonkeyPatch) -> None:
    found = native()
    monkeypatch.setattr(op, "native", lambda: None if kernel is None or found is None else found._replace(site=None))
    doubling, x = Doubling(), torch.ones(2, WIDTH)
    name = op.enroll("tests.operator", doubling)
    op.call(x, name)
    assert doubling.calls == 1
    assert torch.equal(x, torch.full((2, WIDTH), 2.0))


@pytest.mark.parametrize("rows", [2, 9000])  # many rows run without the interpreter's lock
def test_what_the_plain_function_raises_in_python_arrives(rows: int) -> None:
    class Failing(Doubling):
        def __call__(self, x: Tensor, before: Tensor | None = None) -> None:
            raise ValueError("from the tap")

    failing = Failing()
    name = op.enroll("tests.failing", failing)
    with pytest.raises(ValueError, match="from the tap"):
        op.call(torch.zeros(rows, WIDTH), name)
