"""The Hugging Face backend on a CUDA device keeps the laws of a backend."""

from __future__ import annotations

import pytest
import torch

from trimtab.backends import Backend, open_backend
from trimtab.testing.conformance import BackendConformance
from trimtab.testing.models import tiny, tiny_tokenizer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu


class TestCuda(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("qwen3").to("cuda"), tokenizer=tiny_tokenizer())
