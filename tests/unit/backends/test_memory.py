"""An allocation that fails says what was asked for, what is free, and what to lower."""

from __future__ import annotations

import pytest
import torch

from trimtab.backends._memory import out_of_memory
from trimtab.errors import BackendError


def test_a_cpu_allocation_that_cannot_be_met_is_one_line() -> None:
    with (
        pytest.raises(
            BackendError, match=r"a batch of 8 prompts: asked for 2\.0 PiB|asked for 2048\.0 TiB, .* free; lower"
        ) as e,
        out_of_memory("a batch of 8 prompts", "lower batch_size (8)"),
    ):
        torch.empty(2**51, dtype=torch.uint8)
    assert "\n" not in str(e.value)


def test_a_gpu_s_own_words_are_read() -> None:
    with pytest.raises(BackendError, match=r"asked for 3\.50 GiB"), out_of_memory("loading", "use dtype bfloat16"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), out_of_memory("a batch", "lower batch_size"):
        raise RuntimeError("something else")
