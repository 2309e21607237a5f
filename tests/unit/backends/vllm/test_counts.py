"""What ops did, as one array and as reports."""

from __future__ import annotations

import numpy as np

from trimtab.backends.vllm.counts import NOTHING, Counted, OpReport, OpReports
from trimtab.sites import Site

A, B = Site.parse("layers.0.resid_post"), Site.parse("layers.3.resid_post")


def test_reports_are_those_of_a_plain_loop_over_banks_and_ops() -> None:
    counts = np.arange(4 * 3 * 3, dtype=np.int64).reshape(4, 3, 3)
    counted = Counted([(2, A, [("0:Add", 1, True), ("1:Patch", 0, False)]), (0, B, [("0:Cap", 0, True)])])
    values = counted.values([counts, counts + 100], [np.array([70, 80]), np.array([7, 8])])
    found = OpReports(counted.names, values[0])
    assert list(found) == [
        OpReport(str(A), "0:Add", 18, 19, 20, 80),
        OpReport(str(A), "1:Patch", 21, None, 23, 70),
        OpReport(str(B), "0:Cap", 0, 1, 2, 70),
    ]
    assert found[-1] == found[2]
    assert found[1:] == tuple(found)[1:]
    assert [tuple(one) for one in values[1].tolist()] == [(118, 119, 120, 8), (121, -1, 123, 7), (100, 101, 102, 7)]
    some = counted.values([counts, counts], [None, np.array([7, 8])])
    assert some[:, :, 3].tolist() == [[-1, -1, -1], [8, 7, 7]]


def test_reports_are_equal_by_what_they_say() -> None:
    names = ((str(A), "0:Add"),)
    one, same, other = (OpReports(names, np.array([[rows, -1, 0, 5]])) for rows in (5, 5, 4))
    assert one == same
    assert hash(one) == hash(same)
    assert one == (OpReport(str(A), "0:Add", 5, None, 0, 5),)
    assert one != other
    assert repr(one) == repr(tuple(same))
    assert not NOTHING
    nothing = Counted([]).values([np.zeros((0, 2, 3), dtype=np.int64)], [np.empty(0, np.int64)])
    assert nothing.shape == (1, 0, 4)
