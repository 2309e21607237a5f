"""What differs between vLLM's two model runners: where the rows of a batch are told, and where tokens are sampled."""

from __future__ import annotations

from typing import Any, Protocol

from trimtab.backends.vllm.runners.graphs import require_untested
from trimtab.backends.vllm.state import WorkerState
from trimtab.errors import BackendError


class Runner(Protocol):
    """One model runner of a worker."""

    def install(self, state: WorkerState) -> None:
        """Have the runner tell the state of its requests and of each pass."""


def adapter(runner: Any) -> Runner:
    """Return the adapter of a model runner.

    Raises:
        BackendError: a runner that is not known, or the second one where it was not allowed.
    """
    from trimtab.backends.vllm.runners.v1 import RunnerV1

    if RunnerV1.accepts(runner):
        return RunnerV1(runner)
    from trimtab.backends.vllm.runners.v2 import RunnerV2

    if RunnerV2.accepts(runner):
        require_untested(
            "on vLLM's model runner V2",
            "select the first one with VLLM_USE_V2_MODEL_RUNNER=0, and enforce_eager=True",
        )
        return RunnerV2(runner)
    raise BackendError(
        f"steering does not know the model runner {type(runner).__name__}; select vLLM's first one with "
        "VLLM_USE_V2_MODEL_RUNNER=0"
    )
