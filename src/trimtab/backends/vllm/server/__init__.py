"""An OpenAI-compatible server with per-request steering: vLLM's own, with one layer before its routes."""

from __future__ import annotations

from trimtab.backends.vllm.server.launch import ServeConfig, serve

__all__ = ["ServeConfig", "serve"]
