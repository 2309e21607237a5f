"""Settings in which two runs differ, read from their manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from trimtab._base import jsonio
from trimtab.results.triage import ManifestDifference

Group = Literal["precision", "optimizer", "environment", "versions", "arguments", "code", "run"]
_SKIPPED = ("created", "cwd", "plan", "counts", "hostname", "pid")
_OURS = "environment.TRIMTAB_"  # where the trace goes and what is recorded, no setting of the run
_PRECISION = (
    "dtype", "precision", "tf32", "autocast", "amp", "deterministic", "matmul", "torch_settings", "num_threads", "seed",
    "rng", "loss_scale", "attention", "attn", "math", "backend", "device",
)  # fmt: skip
_ORDER: tuple[Group, ...] = ("precision", "optimizer", "versions", "environment", "arguments", "code", "run")


def compare_manifests(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> tuple[ManifestDifference, ...]:
    """Return every setting that differs, those that decide numerics first.

    Args:
        reference: manifest of the trusted run.
        candidate: manifest of the run under test.
    """
    ours, theirs = (dict(_flat("", _settings(one))) for one in (reference, candidate))
    found = []
    for key in sorted(key for key in ours.keys() | theirs.keys() if not key.startswith(_OURS)):
        left, right = (side.get(key, "(not given)") for side in (ours, theirs))
        if left != right:
            found.append(ManifestDifference(group=_group(key), key=key, reference=left, candidate=right))
    return tuple(sorted(found, key=lambda one: (_ORDER.index(one.group), one.key)))


def groups_known(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> frozenset[Group]:
    """Return the groups of which both manifests name a setting: of others nobody can say that they agree.

    Args:
        reference: manifest of the trusted run.
        candidate: manifest of the run under test.
    """
    ours, theirs = ({_group(key) for key, _ in _flat("", _settings(one))} for one in (reference, candidate))
    return frozenset(ours & theirs)


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance, and of the plan what is a setting of the run."""
    provenance, plan = manifest.get("provenance"), manifest.get("plan")
    settings = dict(provenance) if isinstance(provenance, dict) else {}
    if isinstance(plan, dict):
        settings |= {
            key: plan[key] for key in ("dtype", "coordinates", "optimizer", "precision", "seed") if key in plan
        }
    return settings


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if prefix or key not in _SKIPPED:
                yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, str):
        yield prefix, value
    else:
        yield prefix, " ".join(map(str, value)) if prefix == "argv" else jsonio.dumps(value, indent=None)


def _group(key: str) -> Group:
    low = key.lower()
    head = low.partition(".")[0]
    if head == "packages" or head in ("python", "platform", "machine"):
        return "versions"
    if "optimizer" in low or head in ("lr", "optim"):
        return "optimizer"
    if head.startswith("git"):
        return "code"
    if head == "argv":
        return "arguments"
    if any(word in low for word in _PRECISION):
        return "precision"
    return "environment" if head == "environment" else "run"
