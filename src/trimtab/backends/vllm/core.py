"""The plugin inside an engine core: cache keys, admission, and a watch over what its workers know."""

from __future__ import annotations

from typing import Any

from trimtab.backends.vllm import admission, cache_keys, wire
from trimtab.backends.vllm.config import KEY, PluginConfig
from trimtab.errors import BackendError

_RPC = "trimtab"
_BY_HASH = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector"})
_BY_REQUEST = frozenset(
    {
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
        "MooncakeConnector",
        "MoRIIOConnector",
        "DecodeBenchConnector",
        "ExampleHiddenStatesConnector",
    }
)
"""KV connectors that name blocks by the hashes that we key, or move those of one request: they keep steerings apart."""


def install(core: Any, config: PluginConfig) -> None:
    """Have an engine core key its cache by steering, admit no more steerings than slots, and refuse unknown ones."""
    _refuse(core.vllm_config)
    cache_keys.install()
    known: set[str] = set()
    gate = admission.Admission(config.max_steering, config.when_full, known)
    admission.install(core.scheduler, gate)
    _watch(core, gate, known)


def _refuse(vllm_config: Any) -> None:
    for name in _connectors(vllm_config.kv_transfer_config):
        if name not in _BY_HASH | _BY_REQUEST:
            raise BackendError(
                f"the KV connector {name} names blocks by their tokens, or is not known to do otherwise, and would mix "
                "steered with unsteered ones; start the engine without it, or without steering. Known: "
                f"{', '.join(sorted(_BY_HASH | _BY_REQUEST))}"
            )


def _connectors(transfer: Any) -> list[str]:
    """Return the names of the KV connectors of an engine, those inside of a MultiConnector included."""
    name = getattr(transfer, "kv_connector", None)
    if name != "MultiConnector":
        return [str(name)] if name else []
    return [str(one.get("kv_connector")) for one in transfer.kv_connector_extra_config.get("connectors", ())]


def _watch(core: Any, gate: admission.Admission, known: set[str]) -> None:
    """Follow which steerings the workers know; one that a queued or running request names is not forgotten."""
    rpc = core.collective_rpc

    def collective_rpc(method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        verb = args[0] if method == _RPC and args else None
        if verb == "collect":
            labels = wire.from_bytes(args[1])["labels"]
            early = _unfinished(core, labels)
            if early:
                text = f"request {early} is still running; collect what it leaves when it has finished"
                return [wire.to_bytes({"error": "BackendError", "message": text})]
            answers = rpc(method, timeout, args, kwargs)
            reasons = gate.take_reasons(labels)
            refused = {label: [type(one).__name__, str(one)] for label, one in reasons.items()}
            return [*answers, wire.to_bytes({"refused": refused})] if refused else answers
        digests = wire.from_bytes(args[1])["digests"] if verb == "forget" else []
        for digest in digests:
            if gate.users(digest):
                text = f"steering {digest[:16]} is named by {gate.users(digest)} unfinished requests"
                return [wire.to_bytes({"error": "BackendError", "message": text})]
        answers = rpc(method, timeout, args, kwargs)
        if verb == "register":
            said = [wire.from_bytes(one) for one in answers]
            digests = [one["digest"] for one in said if "digest" in one]
            if len(digests) == len(said):
                known.update(digests)
            elif digests and digests[0] not in known:  # it fits some pipeline stages, and others refuse it
                rpc(method, timeout, ("forget", wire.to_bytes({"digests": digests[:1]})))
        if verb == "forget" and not any("error" in wire.from_bytes(one) for one in answers):
            known.difference_update(digests)
        if verb == "stats":
            counts = gate.counts()._asdict()
            answers = [wire.to_bytes(wire.from_bytes(one) | {"admission": counts}) for one in answers]
        return answers

    core.collective_rpc = collective_rpc


def _unfinished(core: Any, labels: list[str]) -> str:
    """Return the engine's id of a request that has one of the labels and runs still; "" when there is none."""
    wanted = set(labels)
    for request in core.scheduler.requests.values():
        params = request.sampling_params
        ours = (params.extra_args or {}).get(KEY) if params is not None else None
        if isinstance(ours, dict) and ours.get("id") in wanted:
            return str(request.request_id)
    return ""
