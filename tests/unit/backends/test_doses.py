"""What a dose says of rows that were measured, counted only, or not there."""

from __future__ import annotations

import json

import pytest
import torch

import trimtab as tt
from trimtab.backends import Backend, Capture, Request, open_backend
from trimtab.results import DoseSummary, to_json
from trimtab.testing.memory import MemoryWriter
from trimtab.testing.models import tiny

PROMPT = (9, 17, 33, 40)


@pytest.fixture(params=["hf", "mock"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return open_backend(request.param, tiny("llama") if request.param == "hf" else "m")


def doses(backend: Backend, writer: MemoryWriter | None, positions: str = "all") -> tuple[DoseSummary, ...]:
    vector = torch.randn(backend.info.hidden_size, generator=torch.Generator().manual_seed(0))
    ops = [tt.Cap(vector, max=0.0), tt.Add(vector, scale=0.5)]
    steering = tt.Steering({"layers.0.resid_post": ops}, positions=positions)
    request = Request(prompt=PROMPT, id="r", steering=steering, max_new_tokens=6, ignore_eos=True)
    capture = None if writer is None else Capture(sites=("layers.0.resid_post",))
    (made,) = backend.generate([request], writer=writer, capture=capture, allow_unfired=True)
    return made.doses


def test_clamps_that_were_not_measured_are_none_and_never_zero() -> None:
    for dose in doses(open_backend("hf", tiny("llama")), None):
        assert (dose.rows, dose.clamped, dose.mean_projection_before) == (9, None, None)
        assert json.loads(to_json(dose))["clamped"] is None


def test_clamps_that_were_measured_are_those_of_the_table(backend: Backend) -> None:
    writer = MemoryWriter()
    cap, add = doses(backend, writer)
    counted = sum(row.clamped for row in writer.doses if row.op == "0:Cap")
    assert cap.rows == add.rows == 9
    assert cap.clamped == counted and 0 < counted < 9
    assert add.clamped == 0


def test_of_no_rows_none_was_clamped(backend: Backend) -> None:
    for dose in doses(backend, None, positions="90:"):
        assert (dose.rows, dose.clamped) == (0, 0) and dose.reason
