"""A directory that a refused run made is not left in the way of the next attempt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import TrimtabError, UnfinishedError


@contextmanager
def removed_when_refused(path: str | Path, *kept: str) -> Iterator[None]:
    """Remove `path` when the block made it and was refused before it held anything.

    Args:
        path: the directory that the block makes.
        kept: globs of the files that are worth keeping; one of them anywhere below `path` keeps all.
    """
    place = Path(path)
    existed = place.exists()
    try:
        yield
    except UnfinishedError:
        raise
    except TrimtabError:
        if not existed and not any(any(place.rglob(pattern)) for pattern in kept):
            shutil.rmtree(place, ignore_errors=True)
        raise
