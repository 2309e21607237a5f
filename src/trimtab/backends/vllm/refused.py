"""Why an engine did not start, brought from its processes to the one that starts it.

vLLM's own error says that some process failed and that its log has the cause. A refusal of ours is written to a file
that the starting process names in the environment, and raised there as what it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab import errors
from trimtab.errors import TrimtabError

_FILE = "TRIMTAB_VLLM_REFUSAL"


@contextmanager
def listening() -> Iterator[Callable[[], TrimtabError | None]]:
    """Yield what returns the refusal of an engine that is started meanwhile, or None."""
    before = os.environ.get(_FILE)
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        file = Path(folder, "refusal.json")
        os.environ[_FILE] = str(file)
        try:
            yield lambda: _read(file)
        finally:
            del os.environ[_FILE]
            if before is not None:
                os.environ[_FILE] = before


@contextmanager
def telling() -> Iterator[None]:
    """Write down a refusal that passes through, where somebody listens."""
    try:
        yield
    except TrimtabError as error:
        file = os.environ.get(_FILE)
        if file is not None and Path(file).parent.is_dir():  # else whoever started the engine listens no longer
            own = Path(f"{file}.{os.getpid()}")
            own.write_text(json.dumps([type(error).__name__, str(error)]))
            own.replace(file)
        raise


def _read(file: Path) -> TrimtabError | None:
    if not file.is_file():
        return None
    kind, message = json.loads(file.read_text())
    found: TrimtabError = getattr(errors, kind, errors.BackendError)(message)
    return found
