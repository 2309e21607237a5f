"""What a server counts, in the registry that vLLM's own /metrics shows."""

from __future__ import annotations

from typing import Any

from trimtab._base.optional import require


class Metrics:
    """Counters and gauges.

    Args:
        registry: a prometheus_client registry; None takes the one that vLLM uses.
    """

    def __init__(self, registry: Any = None) -> None:
        prometheus: Any = require("prometheus_client", extra="vllm", feature="trimtab serve")
        where = prometheus.REGISTRY if registry is None else registry

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(name, text, labelnames=labels, registry=where)

        def gauge(name: str, text: str) -> Any:
            return prometheus.Gauge(name, text, registry=where)

        self.stored = gauge("trimtab_steerings_stored", "Steerings that can be named in requests.")
        self.registered = gauge("trimtab_steerings_registered", "Distinct steerings held by the engine.")
        self.active = gauge("trimtab_steerings_active", "Distinct steerings of the requests in flight.")
        self.requests = counter("trimtab_requests", "Requests that named a steering.", "steering")
        self.dose_rows = counter("trimtab_dose_rows", "Rows that the ops of a steering changed.", "steering")
        self.unfired = counter("trimtab_unfired_ops", "Ops that found no row in their request.", "steering")
        self.nonfinite = counter("trimtab_nonfinite_rows", "Rows clamped to finite values.", "steering")
        self.refusals = counter("trimtab_refusals", "Requests turned down.", "reason")
        self.lost = counter("trimtab_reports_lost", "Requests whose doses could not be brought home.")
