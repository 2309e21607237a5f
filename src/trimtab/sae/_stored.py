"""How compiled passes read and write stored elements. Importing this loads numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

_FAST = {"reassoc", "contract", "nsz"}


def jit(function: Any) -> Any:
    """Compile lazily, kept on disk where some cache directory is writable and in memory only where none is."""
    try:
        return njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")(function)
    except RuntimeError:  # numba found no place for its cache
        return njit(nogil=True, fastmath=_FAST, error_model="numpy")(function)


def wide(value: Any) -> Any:
    """A stored element as a number that can be computed with."""
    raise NotImplementedError


@overload(wide, strict=False)  # type: ignore[untyped-decorator, unused-ignore]
def _wide_of(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def put(out: Any, index: Any, value: Any) -> None:
    """Store a number, rounded to nearest even where the array holds bfloat16."""
    raise NotImplementedError


@overload(put, strict=False)  # type: ignore[untyped-decorator, unused-ignore]
def _put_of(out: Any, index: Any, value: Any) -> Any:
    if out.dtype == types.uint16:

        def narrow(out: Any, index: Any, value: Any) -> None:
            bits = np.float32(value).view(np.uint32)
            carried = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            out[index] = np.uint16(carried >> np.uint32(16))

        return narrow

    def plain(out: Any, index: Any, value: Any) -> None:
        out[index] = value

    return plain
