"""Variants: the conditions that an evaluation compares, each a steering or a system prompt, or neither."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from trimtab.backends import Message, ModelInfo, Prompt
from trimtab.directions import Direction, check_origin, load_direction, random_control
from trimtab.errors import InputError, SiteError
from trimtab.sites import Site
from trimtab.steering import Add, Positions, Steering, SteeringVector

ScaleUnit = Literal["absolute", "token_norm", "matched_norm"]
VectorInput = str | os.PathLike[str] | SteeringVector | Direction
UNSTEERED, PROMPTED = "unsteered", "prompted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One condition of an evaluation."""

    name: str
    steering: Steering | None = None
    system: str = ""
    """Put before the prompt: a system message of a conversation, leading text of a text."""
    group: str = ""
    """Variants of one vector at several scales share it; empty: the variant stands alone."""
    scale: float | None = None
    """Strength in `unit`."""
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 128 or any(ord(sign) < 33 for sign in self.name):
            raise InputError(f"variant name {self.name!r}: use 1 to 128 signs without blanks")
        if self.scale is not None and not math.isfinite(self.scale):
            raise InputError(f"variant {self.name!r} has scale {self.scale}; a finite number was expected")


def make_variants(
    vectors: Mapping[str, VectorInput],
    info: ModelInfo,
    *,
    scales: Sequence[float] = (),
    unit: ScaleUnit = "token_norm",
    learned: str = "",
    prompted: str = "",
    controls: int = 0,
    layer: int | None = None,
    positions: str | Positions = "all",
    seed: int = 0,
) -> tuple[Variant, ...]:
    """Return the usual conditions: unsteered, prompted, every vector at every scale, matched norms, controls.

    A vector runs at scales or at the learned norm; one that would run at neither is refused, not left out.

    Args:
        vectors: name -> vector, or anything that `load_direction` reads.
        info: the model that they steer.
        scales: strengths; negative ones steer away. 0 is the same as unsteered and is refused.
        unit: "absolute", hidden units along the unit direction; "token_norm", parts of the norm of each token's state;
            "matched_norm", multiples of the norm of the vector `learned`, for every vector.
        learned: name of the vector whose norm counts as learned: it also runs as it is (`NAME@learned`), and the others
            at plus and minus its norm (`OTHER@learned`, `OTHER@-learned`).
        prompted: a system prompt, for the variant `prompted`.
        controls: random directions at the first vector's site, at the same scales, and at the learned norm.
        layer: 0-based layer for vectors that do not say their own.
        positions: rows that are steered.
        seed: of the controls.

    Raises:
        InputError: a name, scale or unit that makes no sense.
        VectorError: a vector that does not fit the model, its width or its weights.
    """
    if unit not in get_args(ScaleUnit):
        raise InputError(f"unit is {unit!r}; expected one of {', '.join(get_args(ScaleUnit))}")
    if any(scale == 0 or not math.isfinite(scale) for scale in scales):
        raise InputError(f"scales {list(scales)}: finite numbers other than 0 were expected (0 is 'unsteered')")
    read = {name: _read(name, given, info, layer) for name, given in vectors.items()}
    if (learned or unit == "matched_norm") and learned not in read:
        raise InputError(f"learned is {learned!r}; name the vector of the norm to match: {', '.join(read) or 'none'}")
    if controls < 0 or (controls and not read):
        raise InputError(f"controls is {controls}; 0 or more were expected, and a vector to control")
    if read and not scales and not learned:
        raise InputError(
            f"{', '.join(read)}: no strength to run at; give scales, such as --scale=-0.1 --scale 0.1 (parts of each "
            f"token's norm), or learned={next(iter(read))!r} to run it as it is"
        )
    if scales and not read:
        raise InputError(f"scales {list(scales)} and no vector to run at them; give one")
    norm = read[learned].norm if learned else 1.0
    made = [Variant(name=UNSTEERED)]
    if prompted:
        made.append(Variant(name=PROMPTED, system=prompted))
    doses = _Doses(tuple(scales), unit, norm if unit == "matched_norm" else 1.0, Positions.parse(positions))
    for name, vector in read.items():
        made += doses.of(name, vector)
        if learned:
            made += _at_learned(name, vector, norm, own=name == learned, positions=doses.positions)
    for number in range(controls):
        control = random_control(next(iter(read.values())), seed=seed + number)
        made += doses.of(f"random-{number}", control)
        if learned:
            made += _at_learned(f"random-{number}", control, norm, own=True, positions=doses.positions)
    return check_variants(made)


def check_variants(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return the variants as a tuple.

    Raises:
        InputError: none, or two of one name.
    """
    names = [one.name for one in variants]
    if not names:
        raise InputError("no variant was given; at least one was expected")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two variants are called {twice[0]!r}; give each scale and vector once")
    return tuple(variants)


def apply_prompt(variant: Variant, prompt: Prompt, *, no_system: bool) -> Prompt:
    """Return what a variant's model reads.

    Args:
        variant: its own system prompt replaces that of the conversation.
        prompt: text, token ids or messages.
        no_system: drop the system messages of a conversation, except the variant's own.

    Raises:
        InputError: a system prompt and a prompt of token ids.
    """
    if isinstance(prompt, str):
        return f"{variant.system} {prompt}" if variant.system else prompt
    messages = tuple(one for one in prompt if isinstance(one, Message))
    if not messages:
        if variant.system:
            raise InputError(f"variant {variant.name!r} has a system prompt, and a prompt is token ids; give text")
        return prompt
    if no_system or variant.system:
        messages = tuple(one for one in messages if one.role != "system")
    if variant.system:
        messages = (Message(role="system", content=variant.system), *messages)
    return messages


def question(prompt: Prompt) -> str:
    """Return what was asked, without any condition: the text, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [one.content for one in prompt if isinstance(one, Message) and one.role == "user"]
    return asked[-1] if asked else ""


def buffers(variants: Sequence[Variant]) -> dict[str, Any]:
    """Return what an engine with fixed buffers must be told to run all variants in one batch."""
    from trimtab.backends.vllm.sizes import Sizes

    steerings = [one.steering for one in variants if one.steering is not None]
    sites = dict.fromkeys(site for one in steerings for site in one.sites)
    return {"sites": tuple(sites), "max_steering": max(len(steerings), 1), **Sizes.of(steerings)._asdict()}


@dataclass(frozen=True, slots=True)
class _Doses:
    scales: tuple[float, ...]
    unit: str
    factor: float
    positions: Positions

    def of(self, name: str, vector: Direction) -> Iterator[Variant]:
        """Yield the vector at every scale."""
        unit: Any = "token_norm" if self.unit == "token_norm" else "absolute"
        for scale in self.scales:
            op = Add(vector.unit, scale=scale * self.factor, unit=unit)
            yield Variant(
                name=f"{name}@{scale:+g}",
                steering=Steering({str(vector.site): op}, positions=self.positions),
                group=name,
                scale=scale,
                unit=self.unit,
            )


def _at_learned(name: str, vector: Direction, norm: float, *, own: bool, positions: Positions) -> Iterator[Variant]:
    """Yield a vector at the learned norm, with both signs where it is not its own.

    Along the unit direction, whatever norm the vector has itself.
    """
    for sign, label in ((1.0, "learned"),) if own else ((1.0, "learned"), (-1.0, "-learned")):
        yield Variant(
            name=f"{name}@{label}",
            steering=Steering({str(vector.site): Add(vector.unit, scale=sign * norm)}, positions=positions),
            group=f"{name}@norm",
            scale=sign * norm,
            unit="absolute",
        )


def _read(name: str, given: VectorInput, info: ModelInfo, layer: int | None) -> Direction:
    try:
        ready = isinstance(given, str) and given.startswith("testbed:")
        read = load_direction(given, layer=None if ready else layer, hidden_size=info.hidden_size)
    except InputError as error:
        raise type(error)(f"vector {name!r}: {error}") from error
    known = given if isinstance(given, SteeringVector) else read.calibrated
    if known is not None:
        check_origin(known.model_digest, info.weights_digest, f"vector {name!r}")
    where = read.site
    if where is None or (layer is not None and ready):
        level = read.layer if layer is None else layer
        if level is None:
            raise InputError(f"vector {name!r} does not say its layer; give one, 0 to {info.num_layers - 1}")
        where = Site("resid_post", level)
    if where.layer is not None and not 0 <= where.layer < info.num_layers:
        raise SiteError(f"vector {name!r}: layer {where.layer} is outside 0 to {info.num_layers - 1} of this model")
    return replace(read, site=where)
