from __future__ import annotations

from collections.abc import Iterator

import pytest

from trimtab.backends import Backend, open_backend


@pytest.fixture(scope="session")
def model() -> Iterator[Backend]:
    """The embedded model, open once for all tests of this folder."""
    opened = open_backend("hf", "testbed", batch_size=6)
    yield opened
    opened.close()
