"""The adapter of vLLM's second model runner on that runner's own class, over random schedules."""

from __future__ import annotations

import importlib.util
import inspect
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.backends.vllm.bound import Bound
from trimtab.backends.vllm.config import PluginConfig
from trimtab.backends.vllm.runners import adapter
from trimtab.backends.vllm.runners.graphs import UNTESTED
from trimtab.backends.vllm.state import WorkerState
from trimtab.backends.vllm.step import Step
from trimtab.backends.vllm.taps import Stage, Tap, VllmMap
from trimtab.backends.vllm.wire import CaptureSpec, RequestData
from trimtab.backends.vllm.worker import install
from trimtab.errors import BackendError
from trimtab.sites import Site
from trimtab.steering import Add, Positions, Steering

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
]
POST, LOGITS = Site.parse("layers.0.resid_post"), Site.parse("logits")
SELECTIONS = ("all", "generated", "last_prompt", "2:5", "tokens{3,9,17}")


@pytest.fixture(scope="module")
def second() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = importlib.util.spec_from_file_location("second_runner", Path(__file__).with_name("second_runner.py"))
        assert spec is not None
        assert spec.loader is not None
        second_runner = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(second_runner)
        with second_runner.on_the_cpu():
            yield second_runner


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNTESTED, "1")


def state_for(second: Any) -> WorkerState:
    tap = Tap("layers.0", "layers.0", "output", None, None, (Stage(POST),), "none", second.WIDTH)
    sites = VllmMap(
        family="toy",
        num_layers=1,
        layers=range(1),
        hidden_size=second.WIDTH,
        first_layer_has_residual=False,
        sites_widths={POST: second.WIDTH, LOGITS: second.VOCABULARY},
        absent={},
        every_tap=(tap,),
    )
    return WorkerState(
        PluginConfig(sites=("layers.0.resid_post", "logits"), max_steering=8),
        sites,
        max_rows=second.TOKENS,
        max_requests=second.REQUESTS,
        max_length=second.LENGTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def installed(second: Any) -> tuple[Any, WorkerState, list[Any]]:
    runner, state = second.Runner(), state_for(second)
    live = install(runner.model, state)
    adapter(runner).install(state)
    return runner, state, live


@dataclass
class Asked:
    """A request as the test knows it."""

    name: str
    prompt: list[int]
    wanted: int
    steering: Steering | None
    shift: Tensor
    push: Tensor
    """What is added to the logits of the selected rows."""
    positions: str
    forced: tuple[int, ...] | None
    tracked: bool
    whole: bool
    """Whether the logits of all prompt rows are recorded, and the full dose."""
    made: list[int] = field(default_factory=list)
    computed: int = 0
    known: bool = False
    params: Any = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.made

    def plain(self, model: Any, count: int) -> Tensor:
        """Rows after the layer without steering, from the tokens alone."""
        return torch.stack([model.row(token, place) for place, token in enumerate(self.tokens[:count])])

    @staticmethod
    def plain_logits(model: Any, rows: Tensor) -> Tensor:
        """Logits of rows, each by itself."""
        return (rows[:, :, None] * model.head).sum(1)

    def chosen(self, count: int) -> Tensor:
        """Which rows are steered."""
        if self.steering is None:
            return torch.zeros(count, dtype=torch.bool)
        ids = torch.tensor(self.tokens[:count])
        return Positions.parse(self.positions).mask(torch.arange(count), len(self.prompt), ids)

    def expected(self, model: Any, count: int) -> tuple[Tensor, Tensor]:
        """Rows after the layer, and logits of the rows from the prompt's last on."""
        rows, chosen, last = self.plain(model, count), self.chosen(count)[:, None], len(self.prompt) - 1
        rows = torch.where(chosen, rows + self.shift, rows)
        logits = self.plain_logits(model, rows[last:])
        return rows, torch.where(chosen[last:], logits + self.push, logits)


def ask(second: Any, state: WorkerState, draw: random.Random, name: str) -> Asked:
    from vllm import SamplingParams

    prompt = [draw.randrange(second.VOCABULARY) for _ in range(draw.randint(2, 9))]
    wanted, tracked = draw.randint(1, 6), draw.random() < 0.8
    positions = draw.choice(SELECTIONS)
    shift = torch.randn(second.WIDTH, generator=torch.Generator().manual_seed(draw.randrange(1000)))
    push = torch.zeros(second.VOCABULARY).index_fill_(0, torch.tensor([draw.randrange(second.VOCABULARY)]), 8.0)
    ops = {"layers.0.resid_post": [Add(shift)], "logits": [Add(push)]}
    steering = Steering(ops, positions=positions) if draw.random() < 0.7 else None
    forced = tuple(draw.randrange(second.VOCABULARY) for _ in range(wanted)) if draw.random() < 0.4 else None
    one = Asked(
        name,
        prompt,
        wanted,
        steering if tracked else None,
        shift,
        push,
        positions,
        forced,
        tracked,
        draw.random() < 0.5,
    )
    extra = None
    if tracked:
        digest = None if one.steering is None else state.register(one.steering.dumps())
        capture = CaptureSpec(sites=("layers.0.resid_post", "logits"), prompt_logits=one.whole)
        dose = "full" if one.whole else "counts"
        data = RequestData(label=name, digest=digest, capture=capture, forced=forced, dose=dose)
        extra = {"trimtab": data.to_wire()}
    one.params = SamplingParams(max_tokens=wanted, extra_args=extra)
    return one


def drive(second: Any, seed: int) -> tuple[list[Asked], WorkerState, Any, int]:
    """Run a random schedule: chunks, late arrivals, preemptions, resumes, a row too many for finished requests."""
    draw = random.Random(seed)
    runner, state, _ = installed(second)
    waiting = [ask(second, state, draw, f"r{number}") for number in range(12)]
    every, running, ended = list(waiting), list[Asked](), list[Asked]()
    preemptions = 0
    while waiting or running or ended:
        finished, preempted = {one.name for one in ended}, set[str]()
        ended = []
        for one in list(running):
            if len(running) > 1 and draw.random() < 0.12:
                running.remove(one)
                waiting.append(one)
                one.known, one.computed = False, 0
                preempted.add(one.name)
                preemptions += 1
        candidates = list(running)
        draw.shuffle(candidates)
        while waiting and len(running) < second.REQUESTS - 1 and draw.random() < 0.6:
            running.append(waiting.pop(0))
            candidates.insert(draw.randint(0, len(candidates)), running[-1])
        counts, room = dict[str, int](), second.TOKENS
        for one in candidates:
            left = len(one.tokens) - one.computed
            count = min(room, left if left == 1 else draw.randint(1, left))
            if count and (not one.known or draw.random() < 0.9):
                counts[one.name] = count
                room -= count
            elif not one.known:  # no room: it was not taken from the queue
                running.remove(one)
                waiting.insert(0, one)
        given = {one.name: one for one in running if one.name in counts}
        fresh = [second.new(n, one.prompt, one.tokens, one.params) for n, one in given.items() if not one.known]
        before = {n: one.computed for n, one in given.items() if one.known}
        tokens = runner.step(second.scheduled(counts, fresh, before, finished, preempted))
        assert not state.step.active
        for name, one in given.items():
            one.known = True
            one.computed += counts[name]
            if one.computed == len(one.tokens):
                one.made.append(tokens[name])
                if len(one.made) == one.wanted:
                    running.remove(one)
                    ended.append(one)
    return every, state, runner, preemptions


@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_random_schedule_is_that_of_its_request(second: Any, seed: int) -> None:
    every, state, runner, preemptions = drive(second, seed)
    assert preemptions > 0
    assert not state.bound
    for one in every:
        count = len(one.tokens) - 1
        if one.forced is not None and one.tracked:
            assert tuple(one.made) == one.forced
        expected, logits = one.expected(runner.model, count)
        if one.forced is None or not one.tracked:
            assert one.made == logits.argmax(-1).tolist()
        if not one.tracked:
            continue
        (left,) = state.collect([one.name])[one.name]
        rows, where = left.captured[POST, "after"]
        assert where.tolist() == list(range(count))
        assert torch.equal(rows, expected)
        rows, where = left.captured[LOGITS, "after"]
        assert where.tolist() == list(range(0 if one.whole else len(one.prompt) - 1, count))
        assert torch.equal(rows[-len(logits) :], logits)
        assert torch.equal(rows[: -len(logits)], one.plain_logits(runner.model, expected[: len(rows) - len(logits)]))
        if one.whole and one.steering is not None:
            measured = {site: part.positions.tolist() for part in left.full for site, _ in part.ops}
            chosen = one.chosen(count).nonzero()[:, 0].tolist()
            assert measured.get(str(POST), []) == chosen
            assert measured.get(str(LOGITS), []) == [place for place in chosen if place >= len(one.prompt) - 1]
        rows_steered = {"layers.0.resid_post": one.chosen(count), "logits": one.chosen(count)[len(one.prompt) - 1 :]}
        if left.counted is not None:
            acted = left.counted.values([left.counts], [left.selected])[0, :, 0]
            assert acted.tolist() == [int(rows_steered[site].sum()) for site, _ in left.counted.names]


def test_passes_that_are_not_of_requests_leave_the_tables_blank(second: Any) -> None:
    runner, state, live = installed(second)
    draw = random.Random(5)
    one = next(one for one in iter(lambda: ask(second, state, draw, "a"), None) if one.steering is not None)
    count = len(one.prompt)
    runner.step(second.scheduled({"a": count}, [second.new("a", one.prompt, one.prompt, one.params)], {}, set(), set()))
    assert state.step.rows.binding[:count].all()
    seen, calls = [], live[0].calls
    runner.model.register_forward_hook(lambda *_: seen.append((state.step.active, state.step.rows.binding.clone())))
    runner._dummy_run(4)
    assert [active for active, _ in seen] == [False]
    assert not seen[0][1].any()
    assert live[0].calls == calls
    runner.step(second.scheduled({"a": 1}, [], {"a": count}, set(), set()))
    assert state.step.rows.binding.nonzero().tolist() == [[0]]  # and the pass after fills them again
    runner.step(second.scheduled({}, [], {}, {"a"}, set()))
    runner.step(second.scheduled({"b": 2}, [second.new("b", [1, 2], [1, 2], None)], {}, set(), set()))
    assert not seen[-1][0]
    assert not seen[-1][1].any()


def test_graphs_are_captured_with_the_kernels_of_the_taps_in_them(second: Any) -> None:
    runner, state = second.Runner(), state_for(second)
    live = install(runner.model, state)
    runner.capture_model = lambda *, profile_only=False: runner.model(torch.tensor([1, 2]), torch.tensor([0, 1]))
    adapter(runner).install(state)
    h = runner.capture_model(profile_only=True)
    assert live[0].calls == 1
    assert not state.step.active
    assert torch.equal(h[0], runner.model.row(1, 0))  # no row of theirs is anybody's


def test_rows_that_were_filled_and_are_padding_now_are_nobodys() -> None:
    step = Step(8, 2, 1, torch.device("cpu"))
    bound = {"a": Bound(req_id="a", data=RequestData(label="a"), prompt_ids=[1] * 6, number=1)}
    step.begin(bound, ["a"], torch.tensor([0, 6]).numpy(), torch.tensor([0]).numpy(), None)
    assert step.rows.binding.tolist() == [1] * 6 + [0] * 2
    step.begin(bound, ["a"], torch.tensor([0, 1]).numpy(), torch.tensor([6]).numpy(), None)
    assert step.rows.binding.tolist() == [1] + [0] * 7


def test_the_runners_class_has_what_the_adapter_relies_on(second: Any) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.interface import ModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    from trimtab.backends.vllm.runners import v2

    assert list(v2.missing(second.Runner())) == []
    for name, parameters in v2.METHODS.items():  # the stock class, not the one of these tests
        assert set(parameters) <= set(inspect.signature(getattr(GPUModelRunner, name)).parameters)
    assert tuple(inspect.signature(Sampler.sample).parameters)[1 : 1 + len(v2.SAMPLE)] == v2.SAMPLE
    assert set(v2.EMBEDS) <= set(inspect.signature(ModelState.prepare_inputs_embeds).parameters)
    written = inspect.getsource(GPUModelRunner)
    for name in v2.ATTRIBUTES:
        assert f"self.{name}" in written
    assert "self.index_to_req_id" in inspect.getsource(RequestState)
    called = inspect.getsource(GPUModelRunner.execute_model)
    order = ["self.finish_requests(", "self.add_requests(", "self.prepare_inputs(", "run_fullgraph(", "self.model(**"]
    assert [called.index(one) for one in order] == sorted(called.index(one) for one in order)
    assert "self.sample(" in inspect.getsource(GPUModelRunner.sample_tokens)
    assert "self.model.compute_logits(" in inspect.getsource(GPUModelRunner.sample)
    assert "self.sample(" in inspect.getsource(Sampler.__call__)


def test_a_runner_that_lacks_something_is_refused_by_its_name(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, state = second.Runner(), state_for(second)
    runner.prepare_inputs = lambda scheduler_output: None
    del runner.batch_sharder
    monkeypatch.setattr(type(runner), "capture_model", None)
    with pytest.raises(BackendError) as refused:
        adapter(runner).install(state)
    message = str(refused.value)
    assert "\n" not in message
    for named in ("prepare_inputs(batch_desc=)", "capture_model()", "batch_sharder", "VLLM_USE_V2_MODEL_RUNNER=0"):
        assert named in message


def test_settings_that_share_rows_out_are_refused(second: Any) -> None:
    runner = second.Runner()
    runner.parallel_config.prefill_context_parallel_size = 2
    with pytest.raises(BackendError, match="prefill_context_parallel_size=1"):
        adapter(runner).install(state_for(second))
    runner = second.Runner()
    runner.batch_sharder = object()
    with pytest.raises(BackendError, match="enable_batch_sharded_sampling"):
        adapter(runner).install(state_for(second))
    from trimtab.backends.vllm.runners.v2 import rows_of

    starts = torch.tensor([0, 2, 4]).numpy()
    odd = SimpleNamespace(
        req_ids=["a"], num_reqs=2, num_tokens=4, query_start_loc_np=starts, num_computed_tokens_np=starts
    )
    with pytest.raises(BackendError, match="cannot follow"):
        rows_of(odd)
