"""The tables of a pass against rows told one by one, over random schedules."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.backends.vllm.bound import Bound, GainTable
from trimtab.backends.vllm.counts import Counted
from trimtab.backends.vllm.step import Step
from trimtab.backends.vllm.wire import RequestData
from trimtab.sites import Site
from trimtab.steering import Positions
from trimtab.steering.gains import Constant, Decay, Ramp

A, B = Site.parse("layers.0.resid_post"), Site.parse("layers.1.resid_post")
TAPS = {A: 0, B: 1}
KEYS, ROWS, PLACES, VOCABULARY = 3, 64, 40, 12
SELECTIONS = ("all", "prompt", "generated", "last_prompt", "2:5", "-3:", "4:9", "tokens{3,5,9}", "all,!2:4")
GAINS = (Constant(1.0), Constant(0.5), Ramp(0.5), Decay(0.7))
CPU = torch.device("cpu")


@dataclass
class Known:
    """A request as the test knows it: its rows are looked at one by one."""

    name: str
    prompt: list[int]
    made: list[int]
    keys: list[tuple[str, Any]]
    capture: str | None
    sites: frozenset[Site]
    full: bool
    tracked: bool
    wanted: int
    bound: Bound | None = None
    computed: int = 0
    first: int | None = None
    seen: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.made

    def selected(self, text: str, position: int) -> bool:
        found = Positions.parse(text).mask(
            torch.tensor([position]), len(self.prompt), torch.tensor([self.tokens[position]])
        )
        return bool(found)

    def gains(self, position: int) -> list[float]:
        step = torch.tensor([max(position - len(self.prompt), 0)])
        found = [float(gain.at(step)) if self.selected(text, position) else float("nan") for text, gain in self.keys]
        return found + [float("nan")] * (KEYS - len(found))


def draw_request(draw: random.Random, name: str, numbers: list[int], calm: bool) -> Known:
    length, wanted = draw.randint(1, 9), draw.randint(12, 30) if calm else draw.randint(1, 12)
    selections, gains = (SELECTIONS[:5], GAINS[:2]) if calm else (SELECTIONS, GAINS)
    one = Known(
        name=name,
        prompt=[draw.randrange(VOCABULARY) for _ in range(length)],
        made=[],
        keys=[(draw.choice(selections), draw.choice(gains)) for _ in range(draw.randint(0, KEYS))],
        capture=draw.choice((None, *selections)),
        sites=frozenset(draw.choice(((A,), (A, B), (B,)))),
        full=draw.random() < 0.3,
        tracked=draw.random() < 0.85,
        wanted=wanted,
    )
    if one.tracked:
        one.bound = bind(one, numbers)
    return one


def bind(one: Known, numbers: list[int]) -> Bound:
    keys = tuple((Positions.parse(text), gain) for text, gain in one.keys)
    data = RequestData(label=one.name, digest=one.name if keys else None, dose="full" if one.full else "counts")
    made = Bound(req_id=one.name, data=data, prompt_ids=one.prompt, number=numbers.pop())
    if keys:
        made.slot, made.counted_ops, made.reach = 1, Counted(()), TAPS[A]
        made.table = GainTable.of(keys, one.prompt, len(one.prompt) + one.wanted, KEYS)
    if one.capture is not None:
        made.captured, made.capture_sites, made.edits = Positions.parse(one.capture), one.sites, ("after",)
    return made


class Driver:
    """Runs a random schedule: chunks, late arrivals, cached prefixes, preemptions, resumes, changes of order."""

    def __init__(self, seed: int, calm: bool) -> None:
        self.draw, self.calm = random.Random(seed), calm
        self.numbers = list(range(PLACES // 2, 0, -1))
        self.step = Step(ROWS, PLACES, KEYS, CPU)
        for site in (A, B):
            self.step.join([site])
        self.bound: dict[str, Bound] = {}
        self.waiting = [draw_request(self.draw, f"r{n}", self.numbers, calm) for n in range(8)]
        self.running: list[Known] = []
        self.steady = self.shadows = 0

    def chance(self, often: float) -> bool:
        return self.draw.random() < (often / 20 if self.calm else often)

    def run(self) -> None:
        while self.waiting or self.running:
            self.leave()
            batch = self.choose()
            if batch:
                self.one_pass(batch)

    def leave(self) -> None:
        for one in list(self.running):
            if len(one.made) == one.wanted or self.chance(0.04):  # at its end, or aborted
                self.running.remove(one)
                if self.bound.pop(one.name, None) is not None:
                    self.step.forget()
            elif len(self.running) > 1 and self.chance(0.1):  # preempted
                self.running.remove(one)
                self.waiting.append(one)
                one.computed = 0

    def choose(self) -> list[tuple[Known, int]]:
        while self.waiting and self.draw.random() < 0.5:
            one = self.waiting.pop(0)
            one.computed = self.draw.choice((0, 0, self.draw.randrange(len(one.tokens))))  # what a cache gives it
            self.running.append(one)
            if one.bound is not None:
                self.bound[one.name] = one.bound
        if self.chance(0.3):
            self.draw.shuffle(self.running)
        batch, room = [], ROWS
        for one in self.running:
            left = len(one.tokens) - one.computed
            count = min(room, left if left == 1 else self.draw.randint(1, left))
            if count and not self.chance(0.1):
                batch.append((one, count))
                room -= count
        return batch

    def one_pass(self, batch: list[tuple[Known, int]]) -> None:
        names = [one.name for one, _ in batch]
        starts = np.cumsum([0] + [count for _, count in batch]).astype(np.int32)
        computed = np.array([one.computed for one, _ in batch])
        ids = torch.tensor([one.tokens[one.computed + k] for one, count in batch for k in range(count)])
        self.step.begin(self.bound, names, starts, computed, ids)
        self.steady += self.step.shift > 0
        self.compare(batch, [int(one) for one in starts])
        self.step.end()
        assert not self.step.active
        settled = self.draw.random() < 0.3
        if settled:
            self.step.settle()
        for one, count in batch:
            one.first = one.computed if one.first is None else one.first
            one.seen |= set(range(one.computed, one.computed + count))
            one.computed += count
            if one.bound is not None:
                assert not settled or one.bound.done == max(one.seen) + 1
                assert one.bound.cached == one.first
            if one.computed == len(one.tokens):
                one.made.append(self.draw.randrange(VOCABULARY))

    def compare(self, batch: list[tuple[Known, int]], starts: list[int]) -> None:
        step, tracked = self.step, [one for one, _ in batch if one.bound is not None]
        binding, gain = step.rows.binding.tolist(), step.rows.gain
        recorded: dict[Site, list[tuple[str, int, int]]] = {A: [], B: []}
        measured = []
        assert step.rows.n == starts[-1]
        assert binding[starts[-1] :] == [0] * (ROWS - starts[-1])
        due = [(one.bound, row, n, one.computed) for (one, n), row in zip(batch, starts, strict=False) if one.bound]
        assert [(one.bound, one.first, one.length, one.start + step.shift) for one in step.spans] == due
        for (one, count), first in zip(batch, starts, strict=False):
            for k in range(count):
                row, position = first + k, one.computed + k
                if one.bound is None:
                    assert binding[row] == 0
                    continue
                again = position in one.seen or (one.first is not None and position < one.first)
                self.shadows += again
                assert binding[row] == (step.shadow(one.bound.number) if again else one.bound.number)
                torch.testing.assert_close(gain[row], torch.tensor(one.gains(position)), rtol=0, atol=0, equal_nan=True)
                for site in one.sites if one.capture is not None and one.selected(one.capture, position) else ():
                    recorded[site].append((one.name, row, position))
                if one.full and one.keys and not again:
                    measured.append((row, one.gains(position)))
        self.compare_recorded(recorded)
        self.compare_measured(measured)
        assert step.forced is False
        steered = any(one.keys for one in tracked)
        asked = [TAPS[site] for site in (A, B) if recorded[site]] + [0] * steered
        assert step.control.tolist()[:3] == [int(bool(asked)), starts[-1], max(asked, default=-1)]

    def compare_recorded(self, recorded: dict[Site, list[tuple[str, int, int]]]) -> None:
        for site, rows in recorded.items():
            wanted = self.step.wanted.get(site)
            if wanted is None:
                assert not rows
                continue
            names = [bound.req_id for bound, count in wanted.spans for _ in range(count)]
            places = (wanted.positions + self.step.shift).tolist()
            assert sorted(zip(names, wanted.rows.tolist(), places, strict=True)) == sorted(rows)
            assert wanted.edits == {"after"}

    def compare_measured(self, expected: list[tuple[int, list[float]]]) -> None:
        found = self.step.measured
        rows = [] if found is None else found.rows.tolist()
        assert rows == [row for row, _ in expected]
        if found is not None and rows:
            np.testing.assert_array_equal(found.gain, np.array([gains for _, gains in expected], np.float32))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), calm=st.booleans())
def test_every_row_of_a_random_schedule_has_what_it_is_due(seed: int, calm: bool) -> None:
    Driver(seed, calm).run()


def test_random_schedules_reach_steady_passes_and_rows_computed_again() -> None:
    drivers = [Driver(seed, calm=True) for seed in range(6)]
    for one in drivers:
        one.run()
    assert sum(one.steady for one in drivers) > 20
    assert sum(one.shadows for one in drivers) > 20


def decoding(count: int, prompt: int = 4, **more: Any) -> tuple[Step, list[Known], dict[str, Bound]]:
    """Return requests whose prompts were just computed."""
    step, numbers = Step(ROWS, PLACES, KEYS, CPU), list(range(PLACES // 2, 0, -1))
    step.join([A])
    given = {"keys": [("all", Constant(1.0))], "capture": None, "sites": frozenset({A}), "full": False, "wanted": 20}
    every = [
        Known(name=f"r{n}", prompt=[1] * prompt, made=[], tracked=True, **(given | more))  # type: ignore[arg-type]
        for n in range(count)
    ]
    bound = {}
    for one in every:
        one.bound = bound[one.name] = bind(one, numbers)
    begin(step, every, bound, [prompt] * count)
    return step, every, bound


def begin(step: Step, every: list[Known], bound: dict[str, Bound], counts: list[int]) -> None:
    starts = np.cumsum([0, *counts])
    computed = np.array([one.computed for one in every])
    step.begin(bound, [one.name for one in every], starts, computed, torch.ones(int(starts[-1]), dtype=torch.int64))
    step.end()
    for one, count in zip(every, counts, strict=True):
        one.computed += count


def test_steady_passes_touch_no_table_and_any_change_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    step, every, bound = decoding(3)
    filled = []
    fill = step._fill
    monkeypatch.setattr(step, "_fill", lambda *args: (filled.append(1), fill(*args)))
    for _ in range(4):
        begin(step, every, bound, [1, 1, 1])
    assert (len(filled), step.shift) == (1, 3)
    step.settle()
    assert [one.done for one in bound.values()] == [8, 8, 8]
    every.reverse()  # the order of the rows
    begin(step, every, bound, [1, 1, 1])
    assert (len(filled), step.shift) == (2, 0)
    assert step.rows.binding[:3].tolist() == [bound[one.name].number for one in every]
    begin(step, every, bound, [1, 1, 1])
    assert step.shift == 1
    begin(step, every[:2], bound, [1, 1])  # one is left out
    assert (len(filled), step.shift) == (3, 0)
    step.slot_of(bound["r0"].number, 2)  # a slot changes
    number = bound["r0"].number
    assert step.rows.slot_of[[number, step.shadow(number)]].tolist() == [2, 2]  # rows computed again are steered too
    begin(step, every[:2], bound, [1, 1])
    assert (len(filled), step.shift) == (4, 0)
    every[0].computed, every[1].computed = 2, every[1].computed  # starts over, in the place where it was
    begin(step, every[:2], bound, [1, 1])
    assert (len(filled), step.shift) == (5, 0)
    assert int(step.rows.binding[0]) == step.shadow(every[0].bound.number)  # type: ignore[union-attr]


def test_a_steady_pass_never_hides_a_change_of_gain_or_selection() -> None:
    for keys, capture in (
        ([("all", Decay(0.5))], None),
        ([("tokens{1}", Constant(1.0))], None),
        ([("6:8", Constant(1.0))], None),
        ([], "6:8"),
        ([], "tokens{1}"),
    ):
        step, every, bound = decoding(2, keys=keys, capture=capture, wanted=6)
        for _ in range(5):
            begin(step, every, bound, [1, 1])
            for row, one in enumerate(every):
                position = one.computed - 1
                one.made = [1] * (one.computed - 3)
                expected = torch.tensor(one.gains(position))
                torch.testing.assert_close(step.rows.gain[row], expected, rtol=0, atol=0, equal_nan=True)
                recorded = capture is not None and one.selected(capture, position)
                assert (A in step.wanted) == recorded, (keys, capture, position)


def test_the_last_rows_of_a_batch_are_told_as_their_requests_stand() -> None:
    draw = random.Random(3)
    for _ in range(40):
        step, every, bound = decoding(3, prompt=5, keys=[(draw.choice(SELECTIONS), Ramp(0.3))], full=True)
        again = draw.randrange(3)
        every[again].computed = 0  # preempted
        every[again].made = [4]
        for one in every:
            one.made = one.made or [draw.randrange(VOCABULARY)]
        counts = [len(one.tokens) - one.computed for one in every]
        begin(step, every, bound, counts)
        before = {name: (one.done, one.counted, one.first, one.cached) for name, one in bound.items()}
        sampled = Step(PLACES, PLACES, KEYS, CPU)
        last = np.array([one.computed - 1 for one in every])
        left = every[draw.randrange(3)].name
        chosen = {name: one for name, one in bound.items() if name != left}
        ids = torch.tensor([one.tokens[-1] for one in every])
        sampled.begin_last(chosen, [one.name for one in every], last, ids)
        assert sampled.active
        assert {name: (one.done, one.counted, one.first, one.cached) for name, one in bound.items()} == before
        for row, one in enumerate(every):
            number = one.bound.number if one.name in chosen else 0  # type: ignore[union-attr]
            assert int(sampled.rows.binding[row]) == number
            if number:
                expected = torch.tensor(one.gains(one.computed - 1))
                torch.testing.assert_close(sampled.rows.gain[row], expected, rtol=0, atol=0, equal_nan=True)
        assert sampled.measured is not None
        assert sampled.measured.rows.tolist() == [row for row, one in enumerate(every) if one.name in chosen]
        # computed once more: steered as before, and not counted
        every[0].computed -= 1
        begin(step, every[:1], bound, [1])
        sampled.begin_last(bound, [every[0].name], np.array([every[0].computed - 1]), ids[:1])
        assert int(sampled.rows.binding[0]) == sampled.shadow(every[0].bound.number)  # type: ignore[union-attr]


def test_a_pass_of_nobody_is_blank() -> None:
    step, every, _ = decoding(2)
    step.blank()
    assert not step.rows.binding.any()
    assert step.rows.n == 0
    begin(step, every, {}, [1, 1])
    assert not step.rows.binding.any()
    assert not step.active
