"""What a worker holds, without an engine: refusals at registration, slots and places, what requests leave."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.backends.vllm import state as module
from trimtab.backends.vllm.answers import answer
from trimtab.backends.vllm.client import Client
from trimtab.backends.vllm.config import PluginConfig
from trimtab.backends.vllm.counts import OpReports
from trimtab.backends.vllm.state import Left, WorkerState
from trimtab.backends.vllm.taps import Stage, Tap, VllmMap
from trimtab.backends.vllm.wire import CaptureSpec, RequestData, to_bytes
from trimtab.backends.vllm.worker import install
from trimtab.errors import BackendError, InputError, PositionError, SiteError, SteeringError, TrimtabError, VectorError
from trimtab.sites import Site
from trimtab.steering import Add, Cap, CapSubspace, Edit, LowRank, Patch, Steering

WIDTH, LAYERS, VOCABULARY = 8, 2, 16
POSTS = [Site.parse(f"layers.{layer}.resid_post") for layer in range(LAYERS)]
OUTS = [Site.parse(f"layers.{layer}.mlp_out") for layer in range(LAYERS)]


class Model(torch.nn.Module):
    """Two blocks that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.clone())
        return x


def worker(dtype: torch.dtype = torch.float32, **settings: Any) -> WorkerState:
    taps = tuple(
        Tap(f"layers.{n}", f"layers.{n}", "output", None, None, (Stage(OUTS[n]), Stage(POSTS[n])), "none", WIDTH)
        for n in range(LAYERS)
    )
    sites = VllmMap(
        family="toy",
        num_layers=LAYERS,
        layers=range(LAYERS),
        hidden_size=WIDTH,
        first_layer_has_residual=False,
        sites_widths=dict.fromkeys((*POSTS, *OUTS), WIDTH) | {Site.parse("logits"): VOCABULARY},
        absent={},
        every_tap=taps,
    )
    config = PluginConfig(**({"sites": ["layers.*.resid_post"], "max_steering": 2} | settings))
    device = torch.device("cpu")
    return WorkerState(config, sites, max_rows=32, max_requests=4, max_length=64, dtype=dtype, device=device)


def steered(**settings: Any) -> tuple[WorkerState, Model]:
    """Return a worker's state and its model with the taps in it."""
    state, model = worker(**settings), Model()
    model.live = install(model, state)  # type: ignore[assignment]
    return state, model


def vector(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def add(seed: int, layer: int = 0, **more: Any) -> Steering:
    return Steering({f"layers.{layer}.resid_post": [Add(vector(seed))]}, **more)


def doses(left: Left) -> OpReports:
    assert left.counted is not None
    return OpReports(left.counted.names, left.counted.values([left.counts], [left.selected])[0])


def bind(state: WorkerState, name: str, steering: Steering | None = None, **more: Any) -> None:
    digest = None if steering is None else state.register(steering.dumps())
    data = RequestData(label=more.pop("label", name), digest=digest, **more)
    state.bind(name, {"trimtab": data.to_wire()}, [1, 2, 3], 8)


def run(state: WorkerState, model: Model, names: list[str], counts: list[int], computed: list[int]) -> torch.Tensor:
    starts = np.cumsum([0, *counts])
    ids = torch.ones(int(starts[-1]), dtype=torch.int64)
    state.begin(names, starts, np.array(computed), ids, None, None)
    out: torch.Tensor = model(torch.arange(int(starts[-1]) * WIDTH).reshape(-1, WIDTH).to(torch.float32))
    state.step.end()
    state.doses.take(state.step)
    return out


@pytest.mark.parametrize(
    ("steering", "error", "said"),
    [
        (Steering({"layers.0.resid_post": [Add(torch.ones(WIDTH + 1))]}), VectorError, "wid"),
        (Steering({"layers.7.resid_post": [Add(torch.ones(WIDTH))]}), SiteError, "layers"),
        (Steering({"layers.0.mlp_out": [Add(torch.ones(WIDTH))]}), SiteError, "does not steer layers.0.mlp_out"),
        (Steering({"layers.0.resid_post": [Add(vector(n)) for n in range(3)]}), SteeringError, "ops_per_site=3"),
        (
            Steering({"layers.0.resid_post": [Patch(vector(n)[None]) for n in range(3)]}, positions="0:1"),
            SteeringError,
            "3 ops and the engine holds 2",
        ),
        (
            Steering({"layers.0.resid_post": [CapSubspace(torch.eye(WIDTH)[:2], max=1.0)]}),
            SteeringError,
            "directions_per_op=2",
        ),
        (
            add(1, positions="1:2") + add(2, layer=1, positions="2:3"),
            SteeringError,
            "2 different pairs .* holds 1; raise keys_per_steering",
        ),
    ],
)  # fmt: skip
def test_a_steering_that_does_not_fit_is_refused_in_one_line(
    steering: Steering, error: type[TrimtabError], said: str
) -> None:
    state = worker(keys_per_steering=1)
    with pytest.raises(error, match=said) as refused:
        state.register(steering.dumps())
    assert "\n" not in str(refused.value)
    assert state.stats()["registered"] == 0
    assert state.register(add(1).dumps())


@pytest.mark.parametrize("payload", [b"", b"{}", b"\x80\x04pickle", b"\xff" * 40, add(1).dumps()[:-3]])
def test_bytes_that_are_no_steering_are_refused(payload: bytes) -> None:
    with pytest.raises(TrimtabError):
        worker().register(payload)


def test_a_steering_over_the_limit_is_refused_by_the_worker_too() -> None:
    payload = add(1).dumps()
    assert worker(max_payload_bytes=len(payload)).register(payload)
    with pytest.raises(
        SteeringError, match=rf"takes {len(payload)} bytes .* takes {len(payload) - 1}; raise max_payload"
    ):
        worker(max_payload_bytes=len(payload) - 1).register(payload)


def test_code_cannot_be_sent() -> None:
    with pytest.raises(SteeringError, match="Edit"):
        Steering({"layers.0.resid_post": [Edit(lambda h: h)]}).dumps()


def test_a_request_for_an_unknown_steering_or_of_another_form_leaves_nothing_behind() -> None:
    state = worker()
    for extra, error in (
        (RequestData(label="a", digest="f" * 64).to_wire(), BackendError),
        ({"v": 99, "id": "a"}, InputError),
        (RequestData(label="a", capture=CaptureSpec(sites=("nowhere",))).to_wire(), TrimtabError),
        (RequestData(label="a", capture=CaptureSpec(sites=(), positions="tokens{")).to_wire(), TrimtabError),
    ):
        for _ in range(40):  # more often than there are places
            with pytest.raises(error):
                state.bind("r", {"trimtab": extra}, [1], 4)
    assert not state.bound
    bind(state, "r", add(1))
    assert state.stats()["active"] == 1


def test_places_and_slots_come_back_and_equal_steerings_share_one() -> None:
    state, model = steered()
    for number in range(30):
        bind(state, f"a{number}", add(number % 2))
        bind(state, f"b{number}", add(number % 2))
        assert state.stats()["active"] == 1
        out = run(state, model, [f"a{number}", f"b{number}"], [2, 3], [0, 0])
        plain = torch.arange(5 * WIDTH).reshape(5, WIDTH).float()
        torch.testing.assert_close(out, plain + vector(number % 2))
        state.release(f"a{number}")
        state.release(f"b{number}")
        state.release("never seen")
    stats = state.stats()
    assert (stats["registered"], stats["resident"], stats["active"], stats["tracked"]) == (2, 2, 0, 0)
    assert stats["left"] == 60
    found = state.collect([f"a{number}" for number in range(30)])
    assert [doses(one[0])[0].rows for one in found.values()] == [2] * 30
    assert [found[f"a{number}"][0].digest for number in range(30)] == [add(number % 2).digest for number in range(30)]


def test_a_module_whose_forward_is_bound_to_it_is_tapped_too() -> None:
    state, model = worker(), Model()
    first = model.layers[0]
    first.forward = MethodType(lambda self, x: x + 1, first)
    live = install(model, state)
    bind(state, "r", add(1))
    out = run(state, model, ["r"], [2], [0])
    torch.testing.assert_close(out, torch.arange(2 * WIDTH).reshape(2, WIDTH).float() + 1 + vector(1))
    assert [one.calls for one in live] == [1, 0]


def test_a_slot_that_is_taken_over_steers_by_its_new_owner_alone() -> None:
    state, model = steered(max_steering=1)
    two = Steering({"layers.*.resid_post": [Add(vector(5)), Add(vector(6))]})
    bind(state, "first", two)
    run(state, model, ["first"], [2], [0])
    state.release("first")
    bind(state, "second", add(7, layer=1))
    out = run(state, model, ["second"], [2], [0])
    torch.testing.assert_close(out, torch.arange(2 * WIDTH).reshape(2, WIDTH).float() + vector(7))
    with pytest.raises(BackendError, match="slots"):
        bind(state, "third", two)
    state.release("second")
    bind(state, "fourth", two)
    out = run(state, model, ["fourth"], [2], [0])
    torch.testing.assert_close(out, torch.arange(2 * WIDTH).reshape(2, WIDTH).float() + 2 * (vector(5) + vector(6)))


def test_sites_of_equal_ops_are_held_once() -> None:
    state, _ = steered()
    slot = state.banks[POSTS[0]].record
    for steering, records in (
        (Steering({"layers.*.resid_post": [Add(vector(1))]}), 1),
        (add(1), 1),
        (add(1) + add(2, layer=1), 2),
        (Steering({"layers.*.resid_post": [Patch(vector(1))]}), 0),
    ):
        before = state.stats()["registered_bytes"]
        digest = state.register(steering.dumps())
        assert state.bytes_of(digest) == state.stats()["registered_bytes"] - before == records * slot
    state.forget(list(state._known))
    assert state.stats()["registered_bytes"] == 0


def test_tables_of_gains_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", 200)
    state = worker()
    digest = state.register(add(1, positions="generated").dumps())
    for prompt in range(1, 25):
        state.bind("r", {"trimtab": RequestData(label=f"r{prompt}", digest=digest).to_wire()}, [1] * prompt, 8)
        keys = state._known[digest].keys
        assert keys.nbytes == sum(one.rows.nbytes for one in keys.tables.values()) <= 200
        assert (prompt, prompt + 8) in keys.tables
        state.release("r")
    assert 0 < len(keys.tables) < 24


def test_every_site_gets_what_the_steering_says_of_it() -> None:
    state, model = steered()
    bind(state, "r", add(1) + add(2, layer=1))
    out = run(state, model, ["r"], [2], [0])
    torch.testing.assert_close(out, torch.arange(2 * WIDTH).reshape(2, WIDTH).float() + vector(1) + vector(2))


def test_requests_of_equal_positions_are_steered_by_their_own_prompt_lengths() -> None:
    state, model = steered()
    for name, seed, prompt in (("long", 1, [1, 2, 3]), ("short", 2, [1]), ("again", 1, [1])):
        digest = state.register(add(seed, positions="generated").dumps())
        state.bind(name, {"trimtab": RequestData(label=name, digest=digest).to_wire()}, prompt, 8)
    out = run(state, model, ["long", "short", "again"], [2, 2, 2], [2, 0, 0])
    plain = torch.arange(6 * WIDTH).reshape(6, WIDTH).float()
    none = torch.zeros(WIDTH)
    torch.testing.assert_close(out - plain, torch.stack([none, vector(1), none, vector(2), none, vector(1)]))


def test_a_steering_in_use_is_not_forgotten() -> None:
    state = worker()
    bind(state, "r", add(1))
    with pytest.raises(BackendError, match="used by 1 running"):
        state.forget([add(1).digest])
    state.release("r")
    state.forget([add(1).digest, "unknown"])
    assert state.stats()["registered"] == 0


def test_what_nobody_collects_is_dropped_at_a_limit_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_LEFT", 3)
    state = worker()
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            bind(state, f"r{number}")
            state.release(f"r{number}")
    assert "dropped: r0" in caplog.text
    assert sorted(state.collect([f"r{number}" for number in range(5)])) == ["r2", "r3", "r4"]
    assert (state.dropped, state.stats()["left"], state.stats()["left_bytes"]) == (2, 0, 0)


def test_what_is_discarded_is_kept_neither_now_nor_later() -> None:
    state, model = steered()
    capture = CaptureSpec(sites=("layers.0.resid_post",))
    for name in ("ended", "running"):
        bind(state, name, add(1), capture=capture)
    run(state, model, ["ended", "running"], [2, 3], [0, 0])
    state.release("ended")
    assert state.stats()["left_bytes"] == 2 * WIDTH * 4
    state.discard(["ended", "running", "unknown"])
    out = run(state, model, ["running"], [1], [3])
    torch.testing.assert_close(out, torch.arange(WIDTH).reshape(1, WIDTH).float() + vector(1))  # it still acts
    state.release("running")
    bind(state, "unknown", capture=capture)  # it was let go of before it came
    run(state, model, ["unknown"], [2], [0])
    state.release("unknown")
    stats = state.stats()
    assert (stats["left"], stats["left_bytes"], stats["recorded_bytes"], stats["tracked"]) == (0, 0, 0, 0)


def test_children_of_one_request_are_kept_apart() -> None:
    state, model = steered()
    for number, count in ((0, 2), (1, 3)):
        bind(state, f"{number}_r", add(1), label="parent")
        run(state, model, [f"{number}_r"], [count], [0])
        state.release(f"{number}_r")
    (lefts,) = state.collect(["parent"]).values()
    assert [(one.req_id, one.rows, doses(one)[0].rows) for one in lefts] == [("0_r", 2, 2), ("1_r", 3, 3)]


def test_a_request_gets_the_states_it_asked_for_whatever_its_neighbour_records() -> None:
    state, model = steered()
    for name, edit in (("a", ("before",)), ("b", ("before", "after"))):
        bind(state, name, add(1), capture=CaptureSpec(sites=("layers.0.resid_post",), edit=edit))
    run(state, model, ["a", "b"], [1, 1], [0, 0])
    for name, edits in (("a", ["before"]), ("b", ["after", "before"])):
        state.release(name)
        (left,) = state.collect([name])[name]
        assert sorted(edit for _, edit in left.captured) == edits


@pytest.mark.parametrize(("positions", "computed", "said"), [("all", 0, True), ("0:1", 1, False), ("5:", 0, False)])
def test_a_site_of_which_nothing_was_recorded_is_named(positions: str, computed: int, said: bool) -> None:
    state, model = steered()
    model.layers = model.layers[:1]  # the second block never runs
    sites = ("layers.0.resid_post", "layers.1.resid_post")
    bind(state, "r", capture=CaptureSpec(sites=sites, positions=positions))
    run(state, model, ["r"], [2], [computed])
    state.release("r")
    (left,) = state.collect(["r"])["r"]
    assert [site for site, _ in left.captured] == ([POSTS[0]] if said else [])
    named = "no row of layers.1.resid_post was recorded, and the request selects some: no tap ran"
    assert left.problems == ((named,) if said else ())


def test_a_projection_on_directions_that_nobody_registered_is_a_problem_of_its_own_request() -> None:
    state, model = steered()
    capture = CaptureSpec(sites=("layers.0.resid_post",), reduce="projection", directions="f" * 64)
    bind(state, "r", capture=capture)
    run(state, model, ["r"], [2], [0])
    state.release("r")
    (left,) = state.collect(["r"])["r"]
    assert left.problems == ("the directions ffffffffffffffff were never registered with this engine",)


def test_rows_that_the_prefix_cache_gave_after_a_preemption_are_not_missed() -> None:
    state, model = steered()
    bind(state, "r", add(1))
    for count, computed in ((4, 0), (4, 16), (1, 20)):
        run(state, model, ["r"], [count], [computed])
    state.release("r")
    (left,) = state.collect(["r"])["r"]
    assert (left.rows, doses(left)[0].rows, doses(left)[0].selected) == (21, 9, 9)


def outside(steering: Steering) -> tuple[WorkerState, Model]:
    state, model = steered()
    bind(state, "special", steering, dose="full")
    bind(state, "other", add(3))
    return state, model


def test_ops_outside_the_banks_act_count_and_measure_like_the_others() -> None:
    left, right = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    op = LowRank(left, None, right.T)
    steering = Steering({"layers.0.resid_post": [op, Cap(vector(9), max=0.5)]}, positions="1:")
    state, model = outside(steering)
    states = torch.arange(5 * WIDTH).reshape(5, WIDTH).float()
    out = run(state, model, ["special", "other"], [3, 2], [0, 0])
    program = steering.resolve(num_layers=LAYERS, hidden_size=WIDTH, sites=POSTS)[POSTS[0]]
    expected = program.apply(states[:3], positions=torch.arange(3), prompt_length=3, detail="full")
    torch.testing.assert_close(out[:3], expected.h)
    torch.testing.assert_close(out[3:], states[3:] + vector(3))
    out = run(state, model, ["special", "other"], [4, 1], [0, 2])  # computed again after a preemption, and one more
    state.release("special")
    (one,) = state.collect(["special"])["special"]
    assert [dose.rows for dose in doses(one)] == [3, 3]
    assert [dose.selected for dose in doses(one)] == [3, 3]
    ((ops, positions, values),) = [(found.ops, found.positions, found.values) for found in one.full]
    assert [number for _, number in ops] == [0, 1]
    assert positions.tolist() == [1, 2, 3]
    for number, dose in enumerate(expected.dose):
        measured = torch.from_numpy(values[number, :2])
        for column, name in enumerate(("p_before", "p_after", "cap_delta", "clamped", "ratio")):
            torch.testing.assert_close(measured[:, column], getattr(dose, name).float(), rtol=1e-5, atol=1e-5)
    assert not one.problems


def test_an_op_that_cannot_act_says_so_and_leaves_the_others_alone() -> None:
    steering = Steering({"layers.0.resid_post": [Patch(torch.ones(2, WIDTH))]})  # two rows for every position
    state, model = outside(steering)
    states = torch.arange(5 * WIDTH).reshape(5, WIDTH).float()
    out = run(state, model, ["special", "other"], [3, 2], [0, 0])
    torch.testing.assert_close(out[:3], states[:3])
    torch.testing.assert_close(out[3:], states[3:] + vector(3))
    state.release("special")
    (one,) = state.collect(["special"])["special"]
    assert len(one.problems) == 1
    assert "Patch" in one.problems[0]


def attached(state: WorkerState, asked: list[str]) -> Client:
    """Return a client of one worker; `asked` notes its verbs."""
    remote: Any = SimpleNamespace(state=state, taps=[], tp_rank=0, pp_rank=0, engine=0, workers=1)

    def collective_rpc(method: str, args: tuple[str, bytes]) -> list[bytes]:
        asked.append(args[0])
        return [answer(remote, *args)]

    return Client(SimpleNamespace(collective_rpc=collective_rpc))


def test_what_several_requests_leave_comes_home_apart_and_belongs_to_nobody_else() -> None:
    state, model = steered()
    client = attached(state, [])
    sites = ["layers.0.resid_post", "layers.1.resid_post"]
    wanted = {
        "rows": client.extra_args(add(1), sites=sites, edit=("before", "after"), dose="full"),
        "later": client.extra_args(add(2), sites=sites[:1], positions="1:3", dose="full"),
        "mean": client.extra_args(add(1), sites=sites[:1], reduce="mean", dose="full"),
        "plain": client.extra_args(),
    }
    for name, extra in wanted.items():
        state.bind(name, extra, [1, 2, 3], 8)
    names = list(wanted)
    run(state, model, names, [3] * 4, [0] * 4)
    for step in range(3, 5):
        run(state, model, names, [1] * 4, [step] * 4)
    states = torch.arange(12 * WIDTH).reshape(12, WIDTH).float()
    alone = torch.arange(4 * WIDTH).reshape(4, WIDTH).float()
    state.doses.collect("nobody")
    for one in (part for parts in state.doses._kept.values() for part in parts):
        assert one.values.base is None or one.values.base.nbytes == one.values.nbytes
    for name in names:
        state.release(name)
    rows, later, mean, plain = (one for (one,) in client.collect(wanted.values()))
    own = torch.cat([states[:3], alone[:1], alone[:1]])
    found = {(str(one.site), one.edit): one for one in rows.captured}
    torch.testing.assert_close(found[sites[0], "before"].rows, own)
    torch.testing.assert_close(found[sites[1], "after"].rows, own + vector(1))
    assert found[sites[0], "after"].positions == (0, 1, 2, 3, 4)
    (part,) = later.captured
    torch.testing.assert_close(part.rows, states[4:6] + vector(2))
    assert part.positions == (1, 2)
    torch.testing.assert_close(
        mean.captured[0].rows, (torch.cat([states[6:9], alone[2:3], alone[2:3]]) + vector(1)).mean(0, keepdim=True)
    )
    assert not plain.captured
    assert len(plain.ops) == 0
    for report in (rows, later, mean):
        assert [(one.rows, one.selected) for one in report.ops] == [(5, 5)]
        ((where, measured),) = report.full.values()
        assert where == (0, 1, 2, 3, 4)
        assert measured.shape == (5, 5)
        for tensor in (measured, *(one.rows for one in report.captured)):
            assert tensor.untyped_storage().nbytes() <= 2 * 5 * WIDTH * 4
    assert rows.ops.values.base is None
    with pytest.raises(BackendError, match="no request had it"):
        client.collect(wanted.values())


def test_a_steering_is_sent_once_however_many_requests_name_it() -> None:
    state, _ = steered()
    asked: list[str] = []
    client = attached(state, asked)
    entries = [client.extra_args(add(number % 2))["trimtab"] for number in range(20)]
    assert asked == ["hello", "register", "register"]
    assert len({id(entry["steering"]["ops"]) for entry in entries}) == 2
    assert len({entry["id"] for entry in entries}) == 20
    with pytest.raises(VectorError):
        client.register(Steering({"layers.0.resid_post": [Add(torch.ones(WIDTH + 1))]}))
    assert client.stats()[0]["registered"] == 2


def test_what_device_graphs_cannot_do_is_refused() -> None:
    state = worker()
    state.graphs = True
    client = attached(state, [])
    assert client.info.graphs
    low = LowRank(torch.ones(1, WIDTH), torch.ones(1), torch.ones(WIDTH, 1))
    for op in (Patch(vector(1)), low):
        with pytest.raises(SteeringError, match=r"cannot run inside device graphs; .*enforce_eager=True"):
            client.params(Steering({"layers.0.resid_post": [op]}), max_tokens=1)
    for asked in ({"sites": ["layers.0.resid_post"]}, {"dose": "full"}):
        with pytest.raises(BackendError, match=r"out of device graphs; .*enforce_eager=True"):
            client.params(add(1), max_tokens=1, **asked)
    assert client.register(add(1))


def test_a_steering_stays_registered_while_a_request_that_names_it_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.backends.vllm.client.MAX_REGISTERED", 2)
    state, _ = steered()
    client = attached(state, [])
    client.register(add(100), "kept")
    made = [client.extra_args(add(number)) for number in range(5)]
    assert client.stats()[0]["registered"] == 6
    for number, extra in enumerate(made):
        state.bind(f"r{number}", extra, [1, 2, 3], 8)  # none of them was forgotten
        state.release(f"r{number}")
    client.collect(made[:3])
    client.discard(made[3:])
    client.extra_args(add(9))
    assert client.stats()[0]["registered"] == 2
    assert client.extra_args("kept")["trimtab"]["steering"]["digest"] == add(100).digest
    with pytest.raises(SteeringError, match="no steering is registered as 'calm'; there are: kept"):
        client.extra_args("calm")


def test_threads_may_share_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.backends.vllm.client.MAX_REGISTERED", 1)
    state, _ = steered()
    client = attached(state, [])
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: client.extra_args(add(number % 3)), range(120)))
    assert len({one["trimtab"]["id"] for one in made}) == 120
    for number, extra in enumerate(made):
        state.bind(f"r{number}", extra, [1], 8)
        state.release(f"r{number}")
    assert len(client.collect(made)) == 120


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"edit": "after"}, r"edit is the text 'after'; a tuple was expected: \('after',\)"),
        ({"edit": ("aftr",)}, "edit is .*'before'.* expected"),
        ({"edit": ()}, "edit is .* expected"),
        ({"sites": "layers.0.resid_post"}, "sites is the text 'layers.0.resid_post'"),
        ({"dose": "Full"}, "dose is 'Full'; 'counts' or 'full' was expected"),
        ({"forced": [3, VOCABULARY]}, f"forced token {VOCABULARY}: ids from 0 to {VOCABULARY - 1} were expected"),
        ({"forced": [-1]}, "forced token -1"),
        ({"sites": (), "edit": ("before",)}, "edit was given without sites"),
        ({"sites": (), "positions": "generated"}, "positions was given without sites"),
        ({"sites": (), "prompt_logits": True}, "prompt_logits was given without sites"),
        ({"sites": (), "reduce": "mean"}, "reduce was given without sites"),
        ({"sites": (), "reduce": torch.eye(WIDTH)}, "reduce was given without sites"),
    ],
)
def test_what_a_request_cannot_ask_is_refused_where_it_is_made(given: dict[str, Any], said: str) -> None:
    state, _ = steered()
    client = attached(state, [])
    with pytest.raises(InputError, match=said):
        client.extra_args(add(1), **({"sites": ["layers.0.resid_post"]} | given))


def test_why_a_request_was_refused_comes_home_and_so_do_the_others() -> None:
    state, _ = steered()
    client = attached(state, [])
    made = [client.extra_args(add(number)) for number in range(3)]
    for number in (0, 2):
        state.bind(f"r{number}", made[number], [1], 8)
        state.release(f"r{number}")
    refused = made[1]["trimtab"]["id"]
    answered = client._engine.collective_rpc
    also = [{"refused": {refused: ["PositionError", "positions '-9:' begin before the prompt"]}}]
    client._engine.collective_rpc = lambda method, args: [*answered(method, args), *map(to_bytes, also)]
    with pytest.raises(PositionError, match=r"request 2 of 3 was refused: positions '-9:'"):
        client.collect(made)
    client._engine.collective_rpc = answered
    assert len(client.collect([made[0], made[2]])) == 2
    client._engine.collective_rpc = lambda method, args: [
        *answered(method, args),
        to_bytes({"error": "BackendError", "message": "request r3 is still running"}),
    ]
    last = client.extra_args(add(1))
    state.bind("r3", last, [1], 8)
    state.release("r3")
    with pytest.raises(BackendError, match="r3 is still running"):
        client.collect([last, client.extra_args(add(1))])
    client._engine.collective_rpc = answered
    assert len(client.collect([last])) == 1  # one engine's no does not lose what another gave


def test_a_dose_names_the_steering_that_the_tables_pointed_at() -> None:
    state, model = steered()
    for name, number in (("one", 1), ("two", 2)):
        bind(state, name, add(number))
    bind(state, "plain")
    run(state, model, ["one", "two", "plain"], [2, 2, 2], [0, 0, 0])
    state.step.slot_of(state.bound["one"].number, state.bound["two"].slot)  # as a mistake in the tables would
    for name in ("one", "two", "plain"):
        state.release(name)
    found = state.collect(["one", "two", "plain"])
    assert [found[name][0].digest for name in ("one", "two", "plain")] == [add(2).digest, add(2).digest, None]


def test_an_engine_whose_workers_lack_the_plugin_is_told_of() -> None:
    def collective_rpc(method: str, args: tuple[str, bytes]) -> list[bytes]:
        raise NotImplementedError(f"Method {method!r} is not implemented")

    with pytest.raises(BackendError, match=r"did not answer hello: Method 'trimtab' is not .*VLLM_PLUGINS") as said:
        Client(SimpleNamespace(collective_rpc=collective_rpc))
    assert "\n" not in str(said.value)
