"""Admission in front of vLLM's own scheduler, fed by a model that always says the same token."""

from __future__ import annotations

import importlib.util
import json
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import testbed
from trimtab.backends.vllm.admission import Admission, Counts, install
from trimtab.errors import InputError, PositionError, SiteError

moves = st.lists(st.tuples(st.sampled_from(["come", "go", "drop", "take"]), st.integers(0, 5)), max_size=60)


@given(st.integers(1, 3), moves)
@settings(max_examples=200, deadline=None)
def test_slots_are_never_exceeded_and_everyone_gets_one(slots: int, listed: list[tuple[str, int]]) -> None:
    admission, active, held = Admission(slots), dict[str, str](), list[str]()
    for number, (move, choice) in enumerate([*listed, *[("take", 0), ("go", 0)] * 60]):
        name, digest = f"r{number}", f"d{choice}"
        if move == "come" and not admission.arrive(name, digest, (name, digest)):
            held.append(name)
        elif move == "come":
            active[name] = digest
        elif move == "go" and active:
            gone = sorted(active)[choice % len(active)]
            del active[gone]
            admission.release(gone)
        elif move == "drop" and held:
            gone = held.pop(choice % len(held))
            assert [one for one, _ in admission.drop({gone, "nobody"})] == [gone]
        elif move == "take":
            for taken, its in admission.take():
                held.remove(taken)
                active[taken] = its
            if held:
                assert len(set(active.values())) == slots  # a slot is never left empty while someone waits
        assert len(set(active.values())) <= slots
        assert admission.counts() == Counts(len(set(active.values())), len(held), 0)
    assert not held


def test_the_head_of_the_queue_is_not_starved_by_requests_that_share_a_slot() -> None:
    admission = Admission(2)
    come = [("a1", True), ("b1", True), ("b2", True), ("c1", False)]  # the first letter names the steering
    come += [("b3", True)]  # passes: b keeps its slot anyway
    come += [("a2", False)]  # a has the fewest requests: its slot is the one that the head will get
    for name, through in come:
        assert admission.arrive(name, name[0], name) is through
    assert admission.take() == []
    admission.release("a1")
    assert not admission.arrive("d1", "d", "d1")  # the free slot is the head's
    assert admission.take() == ["c1"]
    assert admission.arrive("b4", "b", "b4") and not admission.arrive("c2", "c", "c2")  # now a2 waits for the slot of c
    assert admission.counts() == Counts(2, 3, 0)
    admission.release("c1")
    assert admission.take() == ["a2"]
    assert not admission.arrive("a3", "a", "a3") and admission.arrive("b5", "b", "b5")  # now d1 waits for that of a


def capture(**given: Any) -> dict[str, Any]:
    """What a request records, as it travels."""
    return {"sites": ["layers.0.resid_post"], "edit": ["after"], "positions": "all"} | given


def steering(positions: str) -> dict[str, str]:
    """What steers a request, as it travels."""
    return {"digest": "A", "ops": json.dumps([["d", positions, {"kind": "Constant", "value": "0x1p+0"}]])}


class Engine:
    """The steps of an engine core around a real scheduler; tokens come from nowhere."""

    def __init__(self, admission: Admission, *, asynchronous: bool = False, connector: Any = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
            from vllm.v1.core.sched.async_scheduler import AsyncScheduler
            from vllm.v1.core.sched.scheduler import Scheduler
            from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
            from vllm.v1.structured_output import StructuredOutputManager

            config = VllmConfig(
                model_config=ModelConfig(model=str(testbed.path()), dtype="float32", max_model_len=256),
                cache_config=CacheConfig(block_size=32),
                scheduler_config=SchedulerConfig(
                    max_num_seqs=8,
                    max_num_batched_tokens=256,
                    max_model_len=256,
                    is_encoder_decoder=False,
                    async_scheduling=asynchronous,
                ),
            )
            config.cache_config.num_gpu_blocks = 64
            spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=1, dtype=torch.float32)
            self.scheduler: Any = (AsyncScheduler if asynchronous else Scheduler)(
                vllm_config=config,
                kv_cache_config=KVCacheConfig(
                    num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
                ),
                structured_output_manager=StructuredOutputManager(config),
                block_size=32,
                log_stats=True,
            )
        install(self.scheduler, admission)
        self.admission = admission
        self.first: list[str] = []
        self.outcomes: dict[str, str] = {}

    def add(
        self,
        name: str,
        digest: str | None = None,
        *,
        tokens: int = 3,
        ops: str = "[]",
        ours: dict[str, Any] | None = None,
        **other: Any,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        if digest is not None:
            ours = {"v": 2, "id": name, "steering": {"digest": digest, "ops": ops}}
        extra = None if ours is None else {"trimtab": ours}
        request = Request(name, [1, 2, 3, 4], SamplingParams(max_tokens=tokens, extra_args=extra), None, **other)
        self.scheduler.add_request(request)
        return request

    def step(self) -> set[str]:
        """Run one step as EngineCore.step does; return the requests that ran."""
        from vllm.v1.outputs import ModelRunnerOutput

        if not self.scheduler.has_requests():
            return set()
        planned = self.scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        steerings = {self.digest(name) for name in names} - {None}
        assert len(steerings) <= self.admission.max_steering
        self.first += [name for name in names if name not in self.first]
        made = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, [[9] for _ in names])
        for outputs in self.scheduler.update_from_output(planned, made).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self.outcomes[one.request_id] = str(one.finish_reason)
        return set(names)

    def digest(self, name: str) -> str | None:
        extra = self.scheduler.requests[name].sampling_params.extra_args
        return extra["trimtab"]["steering"]["digest"] if extra else None

    def drain(self) -> None:
        for _ in range(500):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("the engine never became idle")


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test installs it"
)
both = pytest.mark.parametrize("asynchronous", [False, True])


@needs_vllm
@both
def test_a_request_beyond_the_slots_waits_and_runs_when_one_is_free(asynchronous: bool) -> None:
    engine = Engine(Admission(1), asynchronous=asynchronous)
    scheduler = engine.scheduler
    engine.add("a", "A", tokens=2)
    engine.add("b", "B")
    engine.add("plain")
    engine.add("a2", "A", tokens=2)  # would keep the slot that b waits for
    assert scheduler.get_request_counts() == (0, 4)
    assert scheduler.get_num_unfinished_requests() == 4
    assert engine.admission.counts() == Counts(1, 2, 0)
    assert engine.step() == {"a", "plain"}
    assert scheduler.make_stats().num_waiting_reqs == 2
    engine.step()
    assert engine.outcomes == {"a": "length"}
    assert engine.admission.counts() == Counts(0, 2, 0)
    assert engine.step() == {"b", "plain"}
    engine.drain()
    assert engine.first == ["a", "plain", "b", "a2"]
    assert set(engine.outcomes.values()) == {"length"} and len(engine.outcomes) == 4
    assert engine.admission.counts() == Counts(0, 0, 0)


@needs_vllm
@both
def test_random_work_never_exceeds_the_slots_and_all_of_it_ends(asynchronous: bool) -> None:
    chance = random.Random(3)
    engine = Engine(Admission(2), asynchronous=asynchronous)
    for number in range(120):
        digest = chance.choice([None, *"ABCDE"])
        engine.add(f"{number}", digest, tokens=chance.randint(1, 6))
        if chance.random() < 0.2:
            engine.scheduler.finish_requests(f"{chance.randint(0, number)}", _aborted())
        if chance.random() < 0.1:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.step()
    engine.drain()
    assert engine.admission.counts() == Counts(0, 0, 0)
    assert not engine.scheduler.requests
    assert engine.scheduler.get_num_unfinished_requests() == 0


@needs_vllm
def test_a_stream_of_one_steering_does_not_starve_another() -> None:
    engine = Engine(Admission(1))
    engine.add("b0", "A")
    engine.add("late", "B")
    for number in range(20):
        engine.add(f"a{number}", "A")
        engine.step()
    assert "late" in engine.outcomes
    engine.drain()
    assert len(engine.outcomes) == 22


@needs_vllm
def test_a_waiting_request_can_be_aborted_and_leaves_the_queue() -> None:
    engine = Engine(Admission(1))
    engine.add("a", "A", tokens=9)
    engine.add("b", "B")
    engine.add("c", "C")
    engine.step()
    ended = engine.scheduler.finish_requests(["b", "unknown"], _aborted())
    assert [one.request_id for one in ended] == ["b"]
    assert ended[0].is_finished() and "b" in engine.scheduler.finished_req_ids
    assert engine.admission.counts() == Counts(1, 1, 0)
    engine.scheduler.finish_requests("a", _aborted())
    assert engine.step() == {"c"}
    engine.drain()
    assert engine.first == ["a", "c"]


@needs_vllm
def test_the_end_of_the_engine_ends_those_who_wait() -> None:
    for policy in ("wait", "refuse"):
        engine = Engine(Admission(1, policy))  # type: ignore[arg-type]
        engine.add("a", "A")
        engine.add("b", "B")
        engine.step() if policy == "wait" else None
        ended = engine.scheduler.finish_requests(None, _aborted())
        assert {one.request_id for one in ended} == {"a", "b"}
        assert engine.scheduler.get_num_unfinished_requests() == 0
        engine.drain()
        assert engine.admission.counts()[:2] == (0, 0)


@needs_vllm
@both
def test_a_refused_request_ends_with_an_error_and_never_runs(
    asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(Admission(1, "refuse"), asynchronous=asynchronous)
    engine.add("a", "A")
    engine.add("b", "B")
    engine.add("a2", "A")
    assert "request b is refused: other steerings hold all 1 slots" in caplog.text
    assert engine.scheduler.get_num_unfinished_requests() == 3
    assert engine.step() == {"a", "a2"}
    assert engine.outcomes == {"b": "error"}
    engine.drain()
    engine.add("c", "C")
    engine.drain()
    assert engine.first == ["a", "a2", "c"]
    assert engine.admission.counts() == Counts(0, 0, 1)


@needs_vllm
@pytest.mark.parametrize("ops", ["", "[[1]]", '[["d", "nowhere", {"kind": "Constant", "value": "0x1p+0"}]]'])
def test_a_request_whose_ops_cannot_be_read_is_refused(ops: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(Admission(1))
    engine.add("a", "A", ops=ops)
    assert "request a is refused" in caplog.text
    engine.drain()
    assert engine.outcomes == {"a": "error"}
    assert engine.first == []


@needs_vllm
@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"forced": [3, 10**9]}, InputError, "forced token 1000000000: ids from 0 to "),
        ({"forced": [-1]}, InputError, "forced token -1"),
        ({"forced": ["a"]}, InputError, "forced token 'a'"),
        ({"dose": "Full"}, InputError, "dose is 'Full'"),
        ({"capture": capture(edit=["aftr"])}, InputError, "edit is"),
        ({"capture": capture(edit=[])}, InputError, "edit is"),
        ({"capture": capture(reduce="median")}, InputError, "reduce is 'median'"),
        ({"capture": capture(positions="-9:")}, PositionError, "before the prompt, which has 4 tokens"),
        ({"capture": capture(sites=["nowhere"])}, SiteError, "nowhere"),
        ({"steering": steering("-9:")}, PositionError, "before the prompt, which has 4 tokens"),
        ({"steering": steering("3:-2")}, PositionError, "are empty for a prompt of 4 tokens"),
        ({"id": ["a"]}, InputError, "the label of a request"),
        ({"v": 1}, InputError, "is not what"),
        ({"capture": {"sites": 3}}, InputError, "malformed"),
    ],
)
def test_a_request_that_no_worker_could_serve_is_refused_and_says_why(
    given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    engine = Engine(Admission(1))
    engine.add("a", ours={"v": 2, "id": "x"} | given)
    engine.add("b", "B")
    engine.drain()
    assert engine.outcomes == {"a": "error", "b": "length"}
    assert engine.first == ["b"]
    label = str(given.get("id", "x"))
    reasons = engine.admission.take_reasons(["b", label])
    assert list(reasons) == [label]
    assert type(reasons[label]) is kind
    assert said in str(reasons[label])
    assert engine.admission.take_reasons([label]) == {}


def test_why_requests_were_refused_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.backends.vllm.admission.MAX_REASONS", 2)
    admission = Admission(1, "refuse", known={"A"})
    for number in range(3):
        assert not admission.arrive(f"r{number}", "B", f"r{number}")
    assert list(admission.take_reasons(["r0", "r1", "r2"])) == ["r1", "r2"]


@needs_vllm
def test_a_preempted_request_keeps_its_slot() -> None:
    engine = Engine(Admission(1))
    engine.add("a", "A", tokens=9)
    engine.step()
    engine.add("b", "B")
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.scheduler.get_request_counts() == (0, 2)
    assert engine.admission.counts() == Counts(1, 1, 0)
    assert engine.step() == {"a"}


@needs_vllm
def test_a_pause_for_new_requests_does_not_wait_for_the_queue() -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = Engine(Admission(1))
    engine.add("a", "A", tokens=2)
    engine.step()
    engine.add("b", "B")
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.drain()
    assert engine.outcomes == {"a": "length"}
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert engine.outcomes["b"] == "length"


@needs_vllm
def test_the_parts_of_a_session_wait_together_and_stay_in_order() -> None:
    engine = Engine(Admission(1))
    engine.add("a", "A", tokens=2)
    session = engine.add("s", "S", tokens=2, resumable=True)
    engine.add("s", "S", tokens=2, resumable=True)
    engine.add("s", "S", tokens=2)  # the end of the session
    assert engine.admission.counts() == Counts(1, 1, 0)
    engine.drain()
    assert engine.first == ["a", "s"]
    assert session.num_prompt_tokens > 2 * 4  # both of its prompts, and what it said between them
    assert engine.admission.counts() == Counts(0, 0, 0)
    assert not engine.scheduler.requests


@needs_vllm
def test_requests_of_a_connector_that_ended_are_seen_behind_the_queue() -> None:
    engine = Engine(Admission(1))
    engine.add("a", "A")
    engine.add("b", "B")
    engine.scheduler.connector = SimpleNamespace()
    assert not engine.scheduler.has_finished_requests()
    engine.scheduler.requests["sending"] = engine.scheduler.requests["a"]  # ended, its blocks still being sent
    assert engine.scheduler.has_finished_requests()


@needs_vllm
@pytest.mark.parametrize("end", ["runs", "is aborted", "is refused"])
def test_a_step_of_the_scheduler_is_stocks_while_nothing_is_kept_outside(end: str) -> None:
    engine = Engine(Admission(1, "refuse" if end == "is refused" else "wait"))
    scheduler, (_, ours, stock, *_) = engine.scheduler, (None, *type(engine.scheduler).__mro__)
    per_step = ("schedule", "update_from_output", "get_request_counts", "has_finished_requests", "finish_requests")

    def overridden() -> bool:
        return any(getattr(type(scheduler), name) is not getattr(stock, name) for name in per_step)

    engine.add("a", "A", tokens=6)
    assert type(scheduler) is ours and not overridden()
    engine.add("b", "B")
    assert overridden()
    if end == "is aborted":
        scheduler.finish_requests("b", _aborted())
    engine.drain()
    assert engine.outcomes["a"] == "length"
    assert type(scheduler) is ours and not overridden()


@needs_vllm
def test_installing_twice_keeps_one_layer() -> None:
    engine = Engine(Admission(1))
    install(engine.scheduler, engine.admission)
    assert [one.__name__ for one in type(engine.scheduler).__mro__][:2] == ["AdmittingScheduler", "Scheduler"]


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
