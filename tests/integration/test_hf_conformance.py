"""The Hugging Face backend keeps the laws of a backend, on families that differ in what could break them."""

from __future__ import annotations

import pytest
import torch

from trimtab.backends import Backend, open_backend
from trimtab.testing.conformance import BackendConformance
from trimtab.testing.models import tiny, tiny_tokenizer


class TestQwen3(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("qwen3"), tokenizer=tiny_tokenizer())


class TestGpt2(BackendConformance):
    """Learned positions: left padding without position ids would be seen."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("gpt2"), tokenizer=tiny_tokenizer())


class TestGemma3(BackendConformance):
    """Sliding windows, post-norms, a softcap in some sizes."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("gemma3"), tokenizer=tiny_tokenizer())


class TestChunkedPrefill(BackendConformance):
    """The prompt in passes of three tokens: every row is seen once, at its own position."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("llama"), tokenizer=tiny_tokenizer(), prefill_chunk=3)


class TestBfloat16(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("hf", tiny("qwen2", dtype=torch.bfloat16), tokenizer=tiny_tokenizer())
