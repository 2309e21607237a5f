"""The mock backend keeps the laws of a backend."""

from __future__ import annotations

import pytest

from trimtab.backends import Backend, open_backend
from trimtab.testing.conformance import BackendConformance


class TestMockBackend(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return open_backend("mock", "conformance", layers=3)
