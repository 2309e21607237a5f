"""Device graphs: the taps go into them when they are captured, and run in every pass that replays one."""

from __future__ import annotations

import os
from typing import Any

from trimtab.backends.vllm.state import WorkerState
from trimtab.errors import BackendError

UNTESTED = "TRIMTAB_ALLOW_UNTESTED_RUNNER"


def require_untested(where: str, instead: str) -> None:
    """Refuse what has not run on a device yet, where the environment does not accept that.

    Args:
        where: what has not run, after "steering has not run".
        instead: what to do.

    Raises:
        BackendError: names both.
    """
    if os.environ.get(UNTESTED) != "1":
        raise BackendError(
            f"steering has not run {where} yet; {instead}, or accept that it is untested with {UNTESTED}=1"
        )


def follow_graphs(runner: Any, state: WorkerState) -> None:
    """Have the kernels of the taps be captured, with no row tracked."""
    capture = runner.capture_model

    def capture_model(*args: Any, **kwargs: Any) -> Any:
        state.step.blank()
        state.step.active = True
        try:
            return capture(*args, **kwargs)
        finally:
            state.step.active = False

    runner.capture_model = capture_model
