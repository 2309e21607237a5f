"""vLLM: steering and capture per request, inside a stock engine.

llm = vllm.LLM(model, additional_config={"trimtab": {"sites": ["layers.*.resid_post"], "max_steering": 64}})
client = trimtab.vllm.attach(llm)
params = [client.params(steering, temperature=0), client.params(None, sites=["layers.3.resid_post"])]
outputs = llm.generate(prompts, params)
reports = client.collect(params)
"""

from __future__ import annotations

from trimtab.backends.vllm.asynchronous import AsyncClient, attach_async
from trimtab.backends.vllm.backend import VLLMBackend
from trimtab.backends.vllm.client import Client, Info, attach
from trimtab.backends.vllm.counts import OpReport
from trimtab.backends.vllm.reports import CapturedRows, Report

__all__ = [
    "AsyncClient",
    "CapturedRows",
    "Client",
    "Info",
    "OpReport",
    "Report",
    "VLLMBackend",
    "attach",
    "attach_async",
]
