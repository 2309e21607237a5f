"""What an engine is asked to install: `additional_config={"trimtab": {...}}`, or TRIMTAB_VLLM=1 in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from trimtab.errors import InputError

KEY = "trimtab"
"""Name of our part of vLLM's `additional_config`, and of our entry in `SamplingParams.extra_args`."""
TESTED = ("0.32",)
"""vLLM releases, as major.minor, that the tests run."""

Policy = Literal["wait", "refuse"]
Storage = Literal["float32", "bfloat16"]
DEFAULT_SITES = ("layers.*.resid_post",)
REMEDY = (
    'start it with LLM(..., additional_config={"trimtab": {"sites": ["layers.*.resid_post"]}}) or with TRIMTAB_VLLM=1'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginConfig:
    """Sizes of the fixed buffers, decided when the engine starts."""

    sites: tuple[str, ...] = DEFAULT_SITES
    """Site patterns that can be steered and captured."""
    capture_sites: tuple[str, ...] = ()
    """Further site patterns, that can be captured only: they take no bank."""
    max_steering: int = 64
    """Distinct steerings that can act in one step."""
    ops_per_site: int = 2
    """Ops that one steering can have at one site."""
    directions_per_op: int = 1
    """Directions that one op can have (AblateSubspace, CapSubspace)."""
    keys_per_steering: int = 4
    """Distinct pairs of positions and gain in one steering."""
    storage: Storage = "float32"
    """Dtype that the directions lie in."""
    when_full: Policy = "wait"
    """What a request meets when every slot is taken by another steering: it waits, or it is refused."""
    max_payload_bytes: int = 1 << 30
    """Largest steering that one registration takes."""

    def __post_init__(self) -> None:
        for name in ("sites", "capture_sites"):
            value: object = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(one, str) for one in value):  # type: ignore[attr-defined]
                raise InputError(f"trimtab {name}={value!r}: a list of site patterns was expected")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.sites and not self.capture_sites:
            raise InputError("trimtab sites is empty; at least one site pattern was expected")
        sizes = ("max_steering", "ops_per_site", "directions_per_op", "keys_per_steering", "max_payload_bytes")
        for name in sizes:
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise InputError(f"trimtab {name}={number!r}: a whole number of at least 1 was expected")
        for name, known in (("storage", get_args(Storage)), ("when_full", get_args(Policy))):
            if getattr(self, name) not in known:
                raise InputError(f"trimtab {name}={getattr(self, name)!r}: expected one of {', '.join(known)}")

    @classmethod
    def of(cls, given: Any) -> PluginConfig:
        """Read what stands under "trimtab" in `additional_config`.

        Raises:
            InputError: not a mapping, an unknown name, or a value out of range.
        """
        if given is True:
            return cls()
        if not isinstance(given, dict):
            raise InputError(f'additional_config["trimtab"] is {given!r}; a mapping of settings was expected')
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(f"trimtab has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**given)


def untested(version: str) -> str | None:
    """Say why a release of vLLM is refused; None: the tests run it."""
    if any(version.startswith(f"{one}.") or version == one for one in TESTED):
        return None
    return f"vLLM {version} is installed and {tested()}, or start the engine without the trimtab setting"


def tested() -> str:
    """Say which releases the tests run, and how to install one."""
    return f"steering is tested with {', '.join(f'{one}.x' for one in TESTED)}; pip install 'vllm~={TESTED[-1]}.0'"


def asked(vllm_config: Any) -> PluginConfig | None:
    """Return what an engine was asked to install, or None."""
    additional = getattr(vllm_config, "additional_config", None)
    given = additional.get(KEY) if isinstance(additional, dict) else None
    if given is False:
        return None
    if given is None:
        return PluginConfig() if os.environ.get("TRIMTAB_VLLM", "") == "1" else None
    return PluginConfig.of(given)
