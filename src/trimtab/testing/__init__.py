"""What tests of this package, and of packages that build on it, share: tiny models, a backend conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.testing.traces import assert_traces_match

__all__ = ["assert_traces_match"]


def __getattr__(name: str) -> Any:
    if name == "assert_traces_match":
        from trimtab.testing.traces import assert_traces_match

        return assert_traces_match
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
