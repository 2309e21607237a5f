"""Which adapter a model runner gets, and what is said when it gets none."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.backends.vllm import op
from trimtab.backends.vllm.runners import adapter
from trimtab.backends.vllm.runners.graphs import UNTESTED
from trimtab.backends.vllm.runners.v1 import RunnerV1
from trimtab.backends.vllm.sampled import LOGITS
from trimtab.backends.vllm.step import Step
from trimtab.errors import BackendError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"),
]


def bare(module: str) -> Any:
    """A runner of vLLM's own class that was never made ready."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls: Any = importlib.import_module(module).GPUModelRunner
    return cls.__new__(cls)


def test_each_runner_gets_its_own_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNTESTED, "1")
    assert type(adapter(bare("vllm.v1.worker.gpu_model_runner"))).__name__ == "RunnerV1"
    assert type(adapter(bare("vllm.v1.worker.gpu.model_runner"))).__name__ == "RunnerV2"


@pytest.mark.parametrize("given", [None, "0", "yes"])
def test_the_second_runner_is_refused_until_it_is_allowed(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(UNTESTED, raising=False)
    if given is not None:
        monkeypatch.setenv(UNTESTED, given)
    with pytest.raises(BackendError) as refused:
        adapter(bare("vllm.v1.worker.gpu.model_runner"))
    message = str(refused.value)
    assert "\n" not in message
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in message
    assert f"{UNTESTED}=1" in message


def test_an_unknown_runner_is_refused_with_the_setting_that_selects_the_first() -> None:
    class Third:
        pass

    with pytest.raises(BackendError, match=r"Third.*VLLM_USE_V2_MODEL_RUNNER=0"):
        adapter(Third())


def test_the_setting_that_is_named_selects_the_first_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.config import VllmConfig

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert envs.VLLM_USE_V2_MODEL_RUNNER is False
    decides = VllmConfig.use_v2_model_runner
    assert isinstance(decides, property)
    config = VllmConfig.__new__(VllmConfig)
    config.attention_config = type("Attention", (), {"hisparse_config": None})()
    config.watermark_config = None
    assert decides.fget is not None
    assert decides.fget(config) is False
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert decides.fget(config) is True
    assert "use_v2_model_runner" in inspect.getsource(importlib.import_module("vllm.v1.worker.gpu_worker"))


class Graphed:
    """What the first runner has that graphs go through."""

    def __init__(self) -> None:
        self.input_batch = self.sampler = self.model = SimpleNamespace(
            compute_logits=lambda hidden: hidden,
            sample=lambda logits: (logits, logits),
            num_reqs=0,
            req_ids=[],
            num_computed_tokens_cpu=np.zeros(0),
        )
        self.query_start_loc = SimpleNamespace(np=np.zeros(1))
        self.input_ids = SimpleNamespace(gpu=torch.zeros(0))
        self.seen: list[tuple[str, bool, int]] = []
        self.step: Any = None

    def note(self, name: str) -> None:
        self.seen.append((name, self.step.active, int(self.step.rows.binding.sum())))

    def capture_model(self) -> None:
        self.note("capture")

    def _dummy_run(self, count: int) -> None:
        self.note("dummy")

    def _model_forward(self, *args: Any, **kwargs: Any) -> None:
        self.note("forward")

    def _update_states(self, scheduler_output: Any) -> None:
        self.note("update")


def state_of(step: Step, **settings: Any) -> Any:
    """What an adapter asks of a worker's state."""
    bound: dict[str, None] = {}
    usual = {
        "bind": lambda req_id, *asked: bound.update({req_id: None}),
        "release": lambda req_id: bound.pop(req_id, None),
        "config": SimpleNamespace(keys_per_steering=1),
    }
    usual |= {
        "graphs": False,
        "recorded": (),
        "banks": {},
        "nonfinite_logits": None,
        "residual": None,
        "begins": False,
        "table": None,
    }
    return SimpleNamespace(step=step, bound=bound, **usual | settings)


def plan(*, new: str = "", finished: str = "", rows: int = 0, computed: int = 0) -> Any:
    """What the scheduler says of a pass: a steered request comes, or ends; rows, and those computed before."""
    request = SimpleNamespace(
        req_id=new, prompt_token_ids=[1], sampling_params=SimpleNamespace(extra_args={"a": 1}, max_tokens=2)
    )
    return SimpleNamespace(
        finished_req_ids={finished} if finished else set(),
        scheduled_new_reqs=[request] if new else [],
        total_num_scheduled_tokens=rows,
        scheduled_cached_reqs=SimpleNamespace(num_computed_tokens=[computed]),
    )


def test_device_graphs_of_the_first_runner_are_refused_until_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, step = Graphed(), Step(4, 4, 1, torch.device("cpu"))
    state = state_of(step, graphs=True, begin=lambda *batch: None)
    runner.step = step
    monkeypatch.delenv(UNTESTED, raising=False)
    with pytest.raises(
        BackendError, match=rf"device graphs yet; start the engine with enforce_eager=True, .*{UNTESTED}=1"
    ):
        RunnerV1(runner).install(state)
    monkeypatch.setenv(UNTESTED, "1")
    RunnerV1(runner).install(state)
    runner._update_states(plan(new="a"))
    runner.seen.clear()
    ended = plan(finished="a")
    for run in (runner.capture_model, lambda: runner._dummy_run(3), lambda: runner._update_states(ended)):
        step.rows.binding[:2], step._filled = 1, 2  # what the pass before has left
        run()
    runner._model_forward()
    assert runner.seen == [("capture", True, 0), ("dummy", False, 0), ("update", False, 0), ("forward", False, 0)]
    assert not step.active


def test_a_pass_that_fails_leaves_the_taps_at_rest() -> None:
    runner, step = Graphed(), Step(4, 4, 1, torch.device("cpu"))
    begun: list[bool] = []

    def begin(*batch: Any) -> None:
        step.active = True
        begun.append(True)

    runner.step, state = step, state_of(step, begin=begin)
    runner._model_forward = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign]
    RunnerV1(runner).install(state)
    runner._update_states(plan(new="a"))
    with pytest.raises(ZeroDivisionError):
        runner._model_forward(torch.zeros(0))
    assert begun
    assert not step.active


def test_samples_go_through_us_only_while_a_request_needs_it() -> None:
    runner, step = Graphed(), Step(4, 4, 1, torch.device("cpu"))
    stock, needs = runner.sampler.sample, ["", "forced", "check_logits", ""]
    runner.step = step

    def begin(*batch: Any) -> None:
        step.forced, step.check_logits = needs[0] == "forced", needs[0] == "check_logits"

    state = state_of(step, begin=begin)
    RunnerV1(runner).install(state)
    runner._update_states(plan(new="a"))
    while needs:
        runner._model_forward(torch.zeros(0))
        assert (runner.sampler.sample is stock) == (not needs.pop(0))


def test_passes_go_through_us_only_while_there_are_tracked_requests() -> None:
    runner, step, begun = Graphed(), Step(4, 4, 1, torch.device("cpu")), list[int]()
    runner.step = step

    def begin(*batch: Any) -> None:
        begun.append(len(state.bound))
        step.active = True

    state, stock = state_of(step, begin=begin), runner._model_forward
    RunnerV1(runner).install(state)
    told = [plan(), plan(new="a"), plan(), plan(new="b", finished="a"), plan(finished="b"), plan(), plan(new="c")]
    ours = []
    for each in told:
        runner._update_states(each)
        ours.append(runner._model_forward != stock)
        runner._model_forward(torch.zeros(0))
    assert ours == [False, True, True, True, False, False, True]
    assert begun == [1, 1, 1, 1]
    runner._update_states(plan(finished="c"))
    assert step._id not in op.passes  # compiled graphs leave the taps out again


TABLE = torch.zeros(1)


class Going:
    """A runner with one request, all of whose passes but the first go on from the one before."""

    def __init__(self, **settings: Any) -> None:
        self.runner, self.step = Graphed(), Step(4, 4, 1, torch.device("cpu"))
        self.runner.step, self.stock = self.step, self.runner._model_forward
        self.begun, self.streams, self.computed = 0, 0, 1
        self.table = TABLE
        usual = {"residual": TABLE, "begins": True, "table": lambda: self.table, "begin_stream": self.stream}
        self.state = state_of(self.step, begin=self.begin, **usual | settings)
        self.runner.input_batch.req_ids = ["a"]
        RunnerV1(self.runner).install(self.state)

    def begin(self, *batch: Any) -> None:
        step = self.step
        step._steady, step._batch, step._computed, step.native = True, ["a"], self.computed + 1, True
        step.busy = step.active = True
        step.table = self.table
        self.begun += 1

    def stream(self, *given: Any) -> None:
        self.step.table = self.table if self.step.table is not None else None
        self.streams += 1

    def go(self, given: Any = None, embeds: Any = None) -> bool:
        """Run a pass; return whether the forward pass was stock's, and the taps were to act in it."""
        self.runner.seen.clear()
        self.runner._update_states(given or plan(rows=1, computed=self.computed))
        alone = self.runner._model_forward == self.stock
        self.runner._model_forward(torch.zeros(0), inputs_embeds=embeds)
        assert self.runner.seen[-1][:2] == ("forward", True)
        self.step.end()  # as the last tap does, in the kernel
        self.computed += 1
        return alone


def test_passes_that_go_on_are_the_kernels_alone() -> None:
    going = Going()
    assert [going.go(each) for each in (plan(new="a"), None, None)] == [False, True, True]
    assert (going.begun, going.step.shift) == (1, 2)
    going.table = torch.ones(1)  # the weights are others
    assert [going.go(), going.go()] == [False, True]
    assert (going.begun, going.streams, going.step.shift) == (1, 1, 4)
    going.computed += 1  # not the pass that was to come
    assert [going.go(), going.go()] == [False, True]
    assert going.begun == 2
    going.runner._dummy_run(3)
    assert going.runner.seen[-1][:2] == ("dummy", False)
    assert [going.go(), going.go()] == [False, True]
    assert going.begun == 3
    going.runner._update_states(plan(finished="a"))
    assert going.runner._model_forward == going.stock
    assert going.step._id not in op.passes


@pytest.mark.parametrize("why", ["a tap", "the prompt", "a dose", "no kernel", "no table", "embeds", "logits"])
def test_passes_that_need_python_go_through_us(why: str) -> None:
    going = Going(recorded=(LOGITS,) if why == "logits" else ())
    going.state.doses = SimpleNamespace(take=lambda step: None)
    begin = going.begin

    def differently(*batch: Any) -> None:
        begin()
        step = going.step
        step._asked, step.prompt_logits = {0} if why == "a tap" else set(), why == "the prompt"
        step.native, step.measured = why != "no kernel", object() if why == "a dose" else None  # type: ignore[assignment]
        if why == "no table":
            step.table = None

    going.state.begin = differently
    embeds = TABLE if why == "embeds" else None
    assert not any([going.go(each, embeds) for each in (plan(new="a"), None, None)])
    assert going.begun == 1
    going.step.blank()


def test_tables_without_anything_to_do_need_no_kernel() -> None:
    step = Step(4, 4, 1, torch.device("cpu"))
    assert not step.quiet
    step._steady = True
    assert step.quiet
    step.busy = True
    assert not step.quiet
