"""Running models: one Protocol, several backends.

backend = open_backend("hf", "testbed", dtype="bfloat16")
with TraceWriter("runs/mine", kind="generation") as writer:
    backend.generate(
        [Request(prompt="...", steering=steering, max_new_tokens=32)],
        capture=Capture(sites=("layers.*.resid_post",)),
        writer=writer,
    )
"""

from __future__ import annotations

from trimtab.backends._registry import BACKENDS, open_backend
from trimtab.backends.base import (
    Backend,
    Capture,
    EncodedPrompt,
    Generation,
    Message,
    ModelInfo,
    Prompt,
    Request,
    RoleSpan,
    Sampling,
    Score,
    num_rows,
    perplexity,
)
from trimtab.results.runs import DoseSummary

__all__ = [
    "BACKENDS",
    "Backend",
    "Capture",
    "DoseSummary",
    "EncodedPrompt",
    "Generation",
    "Message",
    "ModelInfo",
    "Prompt",
    "Request",
    "RoleSpan",
    "Sampling",
    "Score",
    "num_rows",
    "open_backend",
    "perplexity",
]
