"""Slots against a plain account of who uses what, and in which order steerings fell idle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.backends.vllm.slots import Slots
from trimtab.errors import BackendError

NAMES = "abc"


@given(
    size=st.integers(1, 2),
    work=st.lists(
        st.tuples(st.sampled_from(["take", "give", "forget"]), st.sampled_from(NAMES)), min_size=8, max_size=40
    ),
)
def test_a_slot_holds_one_steering_and_the_longest_idle_one_goes_first(size: int, work: list[tuple[str, str]]) -> None:
    slots, users = Slots(size), dict.fromkeys(NAMES, 0)
    resident: dict[str, int] = {}
    idle: list[str] = []
    for verb, name in work:
        busy = sum(1 for count in users.values() if count)
        if verb == "take":
            if name not in resident and busy == size:
                with pytest.raises(BackendError, match=f"all {size} slots"):
                    slots.take(name)
                continue
            if name not in resident and len(resident) == size:
                del resident[idle.pop(0)]
            slot, fresh = slots.take(name)
            assert fresh == (name not in resident)
            assert slot == resident.setdefault(name, slot)
            users[name] += 1
            idle = [one for one in idle if one != name]
        elif verb == "give" and users[name]:
            slots.give(name)
            users[name] -= 1
            idle += [name] * (not users[name])
        elif verb == "forget" and users[name]:
            with pytest.raises(BackendError, match=f"used by {users[name]} running"):
                slots.forget(name)
        elif verb == "forget":
            assert slots.forget(name) == resident.pop(name, 0)
            idle = [one for one in idle if one != name]
        assert len(slots) == len(resident)
        assert slots.active == sum(1 for count in users.values() if count)
        assert [slots.users(one) for one in NAMES] == [users[one] for one in NAMES]
        assert len(set(resident.values())) == len(resident)
        assert set(resident.values()) <= set(range(1, size + 1))


def test_the_steering_that_was_used_last_stays_longest() -> None:
    slots = Slots(3)
    for name in "abc":
        slots.take(name)
    for name in "bca":
        slots.give(name)
    slots.take("c")
    slots.give("c")  # now b is idle for longest, then a, then c
    for new, gone in zip("xyz", "bac", strict=True):
        slot, fresh = slots.take(new)
        assert fresh
        assert slots.forget(gone) == 0
        assert slot in (1, 2, 3)
