"""The recorder against rows kept one by one."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.backends.vllm import captured
from trimtab.backends.vllm.bound import Bound
from trimtab.backends.vllm.captured import Recorder
from trimtab.backends.vllm.step import Wanted
from trimtab.backends.vllm.wire import RequestData
from trimtab.sites import Site

SITES = [Site.parse("layers.0.resid_post"), Site.parse("layers.1.resid_post")]


def request(name: str) -> Bound:
    return Bound(req_id=name, data=RequestData(label=name), prompt_ids=[1], number=1)


@pytest.mark.parametrize("passes", [3, 64, captured._MAX_PASSES * 2 + 5])
def test_every_row_comes_back_to_its_request_in_order(passes: int) -> None:
    draw, recorder = random.Random(passes), Recorder()
    requests = [request(f"r{n}") for n in range(4)]
    expected: dict[tuple[str, Site], dict[int, torch.Tensor]] = {(r.req_id, s): {} for r in requests for s in SITES}
    at = dict.fromkeys((one.req_id for one in requests), 0)
    wanted, shift = None, 0
    for number in range(passes):
        if wanted is None or draw.random() < 0.3:  # else a steady pass: the same rows, one position on
            spans, places = [], []
            for one in draw.sample(requests, draw.randint(1, 4)):
                if draw.random() < 0.1:
                    at[one.req_id] = draw.randint(0, at[one.req_id])  # computed again
                count = draw.randint(1, 3)
                spans.append((one, count))
                places += range(at[one.req_id], at[one.req_id] + count)
                at[one.req_id] += count
            rows = torch.arange(len(places))
            wanted, shift = Wanted(tuple(spans), rows, torch.tensor(places), frozenset({"after"})), 0
        else:
            shift += 1
            for one, _ in wanted.spans:
                at[one.req_id] += 1
        owners = [one.req_id for one, count in wanted.spans for _ in range(count)]
        for site in SITES if draw.random() < 0.9 else SITES[:1]:
            values = torch.full((len(owners), 2), float(number)) + torch.arange(len(owners))[:, None] / 64
            recorder.take(site, "after", values, wanted, shift)
            for name, place, row in zip(owners, (wanted.positions + shift).tolist(), values, strict=True):
                expected[name, site][place] = row  # what is computed last stands
    for one in requests:
        found = recorder.collect(one.req_id)
        for site in SITES:
            mine = expected[one.req_id, site]
            if not mine:
                assert (site, "after") not in found
                continue
            rows, places = found[site, "after"]
            assert places.tolist() == sorted(mine)
            assert torch.equal(rows, torch.stack([mine[place] for place in sorted(mine)]))
        assert recorder.collect(one.req_id) == {}
    assert recorder.nbytes == 0


class Elements(TorchDispatchMode):
    """Counts the elements of what operations return."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count += sum(
            one.numel() for one in (made if isinstance(made, list | tuple) else (made,)) if hasattr(one, "numel")
        )
        return made


def test_the_work_grows_with_the_rows_and_no_faster():
    def work(passes: int) -> int:
        recorder, requests = Recorder(), [request(f"r{n}") for n in range(3)]
        wanted = Wanted(
            tuple((one, 1) for one in requests),
            torch.arange(3),
            torch.zeros(3, dtype=torch.int64),
            frozenset({"after"}),
        )
        with Elements() as elements:
            for shift in range(passes):
                recorder.take(SITES[0], "after", torch.ones(3, 64), wanted, shift)
            found = [recorder.collect(one.req_id)[SITES[0], "after"] for one in requests]
        assert [len(rows) for rows, _ in found] == [passes] * 3
        return elements.count

    few, many = 5 * captured._MAX_PASSES, 40 * captured._MAX_PASSES
    assert work(many) < 1.05 * 8 * work(few)
