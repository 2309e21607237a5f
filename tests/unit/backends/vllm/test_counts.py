"""What ops did, as one array and as reports."""

from __future__ import annotations

import numpy as np

from trimtab.backends.vllm.counts import NOTHING, Counted, OpReport, OpReports
from trimtab.sites import Site

A, B = Site.parse("layers.0.resid_post"), Site.parse("layers.3.resid_post")


def test_reports_are_those_of_a_plain_loop_over_banks_and_ops() -> None:
    counts = np.arange(4 * 3 * 3, dtype=np.int64).reshape(4, 3, 3)
    counted = Counted([(2, A, [("0:Add", 1, True), ("1:Patch", 0, False)]), (0, B, [("0:Cap", 0, True)])])
    found = counted.report(counts, np.array([70, 80]))
    assert list(found) == [
        OpReport(str(A), "0:Add", 18, 19, 20, 80),
        OpReport(str(A), "1:Patch", 21, None, 23, 70),
        OpReport(str(B), "0:Cap", 0, 1, 2, 70),
    ]
    assert found[-1] == found[2]
    assert found[1:] == tuple(found)[1:]
    assert [one.selected for one in counted.report(counts, None)] == [None, None, None]
    counts[:] = 0
    assert found[0].rows == 18  # what a request left does not change when its places are used again


def test_reports_are_equal_by_what_they_say() -> None:
    names = ((str(A), "0:Add"),)
    one, same, other = (OpReports(names, np.array([[rows, -1, 0, 5]])) for rows in (5, 5, 4))
    assert one == same
    assert hash(one) == hash(same)
    assert one == (OpReport(str(A), "0:Add", 5, None, 0, 5),)
    assert one != other
    assert repr(one) == repr(tuple(same))
    assert not NOTHING
    assert not Counted([]).report(np.zeros((0, 2, 3), dtype=np.int64), np.empty(0, np.int64))
