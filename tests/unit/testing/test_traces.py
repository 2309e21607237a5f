"""The assertion for other people's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.testing import assert_traces_match
from trimtab.trace import TraceWriter


def trace(path: Path, value: float) -> Path:
    with TraceWriter(path, provenance={}) as writer:
        writer.write("loss", torch.tensor([value]))
    return path


def test_it_passes_or_says_why_not(tmp_path: Path) -> None:
    one, same, other = trace(tmp_path / "a", 1.0), trace(tmp_path / "b", 1.0), trace(tmp_path / "c", 1.5)
    assert assert_traces_match(one, same).counts["identical"] == 1
    assert assert_traces_match(one, other, waive=["failed:loss"]).passed
    with pytest.raises(AssertionError, match="the traces do not match\nFAILED: 1 of 1 pairs do not pass; first: loss"):
        assert_traces_match(one, other)
