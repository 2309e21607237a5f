"""Sets of named directions, and the controls that they are compared with.

A direction is known by its kind and its name together: a role and a trait may both be called "curious" and stay two.
Every set holds unit directions in float64; the norm that each had is kept beside it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trimtab._base import jsonio
from trimtab.errors import InputError, VectorError

Kind = Literal["pc", "role", "trait", "latent", "vector", "control"]
KINDS: tuple[Kind, ...] = ("pc", "role", "trait", "latent", "vector", "control")
ControlKind = Literal["isotropic", "covariance", "shuffled"]
CONTROL_KINDS: tuple[ControlKind, ...] = ("isotropic", "covariance", "shuffled")
MIN_CONTROLS = 8
"""Fewer leave the deviation that a z-score divides by unknown by more than a quarter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What is known of one direction, without its numbers."""

    name: str
    kind: Kind
    source: str
    """The file or the words it came from."""
    norm: float
    """Length before it was normalised."""
    layer: int | None = None
    """0-based block whose output it was made at, when its file says so."""
    number: int | None = None
    """Of a principal component, counted from 1; of a latent, its row."""
    variance: float | None = None
    """Share of the variance that a principal component explains."""
    control: ControlKind | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"direction {self.name!r}: kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if (self.kind == "control") != (self.control is not None):
            raise InputError(f"direction {self.name!r}: a control, and nothing else, names its kind of control")

    @property
    def label(self) -> str:
        """Kind and name, such as "role lawyer": no two directions of a set share it."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionSet:
    """Named unit directions of one width.

    Args:
        about: what is known of each, in order.
        units: float64 [n, d], rows of length 1.

    Raises:
        VectorError: rows that are not finite, or do not fit `about`.
        InputError: two directions of one kind share a name; names both sources.

    Example:
        >>> found = DirectionSet.of({"up": torch.tensor([0.0, 2.0])}, kind="trait")
        >>> found.labels
        ('trait up',)
    """

    about: tuple[Named, ...]
    units: Tensor

    def __post_init__(self) -> None:
        if self.units.ndim != 2 or self.units.shape[0] != len(self.about) or self.units.dtype != torch.float64:
            raise VectorError(
                f"directions of shape {list(self.units.shape)} {self.units.dtype} were given with {len(self.about)} "
                "names; float64 [names, d] was expected"
            )
        seen: dict[str, Named] = {}
        for one in self.about:
            if one.label in seen:
                raise InputError(
                    f"two directions are called {one.label!r}: {seen[one.label].source} and {one.source}; give one of "
                    "them another name, as NAME=FILE"
                )
            seen[one.label] = one

    @classmethod
    def of(
        cls,
        vectors: dict[str, Tensor] | Sequence[tuple[str, Tensor]],
        *,
        kind: Kind = "vector",
        source: str = "given",
        layer: int | None = None,
        variance: Sequence[float] | None = None,
    ) -> DirectionSet:
        """Normalise vectors in float64.

        Args:
            vectors: name -> vector [d] of any floating dtype and length above 0.
            kind: of all of them; the principal components are numbered from 1 in their order.
            source: where they came from.
            layer: 0-based block whose output they were made at.
            variance: share of the variance that each principal component explains.

        Raises:
            VectorError: no vector, one that is zero, not finite or of another width.
        """
        listed = list(vectors.items()) if isinstance(vectors, dict) else list(vectors)
        if not listed:
            raise VectorError(f"{source}: no direction was given")
        width = listed[0][1].numel()
        rows = [_checked(vector, f"{source}: {kind} {name!r}", width) for name, vector in listed]
        matrix = torch.stack(rows)
        norms = matrix.norm(dim=1)
        about = tuple(
            Named(
                name=name,
                kind=kind,
                source=source,
                norm=float(norms[place]),
                layer=layer,
                number=place + 1 if kind == "pc" else None,
                variance=None if variance is None else float(variance[place]),
            )
            for place, (name, _) in enumerate(listed)
        )
        return cls(about=about, units=matrix / norms[:, None])

    def __len__(self) -> int:
        return len(self.about)

    def __iter__(self) -> Iterator[Named]:
        return iter(self.about)

    def __add__(self, other: DirectionSet) -> DirectionSet:
        return join([self, other])

    @property
    def hidden_size(self) -> int:
        """Width of every direction."""
        return int(self.units.shape[1])

    @property
    def labels(self) -> tuple[str, ...]:
        """Kind and name of each, in order."""
        return tuple(one.label for one in self.about)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of each, in order."""
        return tuple(one.kind for one in self.about)

    @property
    def layer(self) -> int | None:
        """The one block whose output they were made at; None when no file said so."""
        return next((one.layer for one in self.about if one.layer is not None), None)

    def places(self, *, kind: Kind | None = None, control: ControlKind | None = None) -> list[int]:
        """Return the rows of one kind, or of one kind of control."""
        return [
            place
            for place, one in enumerate(self.about)
            if (kind is None or one.kind == kind) and (control is None or one.control == control)
        ]

    def take(self, places: Sequence[int]) -> DirectionSet:
        """Return some of them, in the order asked for."""
        return DirectionSet(about=tuple(self.about[one] for one in places), units=self.units[list(places)])

    @property
    def digest(self) -> str:
        """BLAKE2b-256 of names, kinds and numbers."""
        state = hashlib.blake2b(digest_size=32)
        state.update(jsonio.dumps([[one.kind, one.name, one.control] for one in self.about]).encode())
        state.update(np.ascontiguousarray(self.units.numpy()).tobytes())
        return state.hexdigest()


def join(sets: Iterable[DirectionSet]) -> DirectionSet:
    """Return the directions of several sets in one.

    Raises:
        InputError: nothing to join, or a kind and name that two of them share.
        VectorError: different widths, or directions made at different blocks; names both.
    """
    listed = [one for one in sets if len(one)]
    if not listed:
        raise InputError("no directions were given; give files of vectors, a persona folder, or principal components")
    first = listed[0]
    for one in listed[1:]:
        if one.hidden_size != first.hidden_size:
            raise VectorError(
                f"{one.about[0].source} has width {one.hidden_size} and {first.about[0].source} {first.hidden_size}; "
                "take directions of one model"
            )
    about = tuple(named for one in listed for named in one.about)
    placed = [one for one in about if one.layer is not None]
    other = next((one for one in placed if one.layer != placed[0].layer), None)
    if other is not None:
        raise VectorError(
            f"{placed[0].source} was made at layer {placed[0].layer} and {other.source} at layer {other.layer}; "
            "directions of different layers lie in different coordinates: take those of one layer"
        )
    return DirectionSet(about=about, units=torch.cat([one.units for one in listed]))


def rename(directions: DirectionSet, name: str) -> DirectionSet:
    """Return the set with its one direction called `name`.

    Raises:
        InputError: it holds several.
    """
    if len(directions) != 1:
        raise InputError(f"{name!r} is one name and {directions.about[0].source} holds {len(directions)} directions")
    return replace(directions, about=(replace(directions.about[0], name=name),))


def isotropic(count: int, hidden_size: int, *, seed: int) -> DirectionSet:
    """Return random directions, uniform on the sphere (numpy's RandomState stream, which never changes)."""
    drawn = np.random.RandomState(seed).standard_normal((count, hidden_size))
    return _controls(torch.from_numpy(drawn), "isotropic", f"isotropic, seed {seed}")


def covariance_matched(states: Tensor, count: int, *, seed: int) -> DirectionSet:
    """Return random directions with the covariance of a sample: `sum_i g_i (x_i - mean)`, g standard normal.

    Args:
        states: [m, d] activations at the site of the directions; with m at most d the controls span the sample only.
        count: of controls.
        seed: of numpy's RandomState.

    Raises:
        InputError: fewer than two states, or states that are not finite or all alike.
    """
    rows = _states(states)
    weights = torch.from_numpy(np.random.RandomState(seed).standard_normal((count, len(rows))))
    made = weights @ (rows - rows.mean(dim=0))
    return _controls(made, "covariance", f"covariance of {len(rows)} states, seed {seed}")


def shuffled_labels(states: Tensor, labels: Tensor | None, count: int, *, seed: int) -> DirectionSet:
    """Return differences of means under shuffled labels: what a contrast finds where there is none.

    Args:
        states: [m, d] activations, a row an example.
        labels: [m] of 0 and 1; None takes halves.
        count: of controls.
        seed: of numpy's RandomState.

    Raises:
        InputError: labels that do not fit the states, or that leave one side without an example.
    """
    rows = _states(states)
    marks = torch.arange(len(rows)) % 2 if labels is None else labels.reshape(-1).long()
    positive = int((marks == 1).sum())
    if len(marks) != len(rows) or positive + int((marks == 0).sum()) != len(rows) or not 0 < positive < len(rows):
        raise InputError(
            f"{len(marks)} labels, {positive} of them 1, were given for {len(rows)} states; a 0 or 1 each, and both, "
            "were expected"
        )
    source = np.random.RandomState(seed)
    shares = np.where(marks.numpy() == 1, 1 / positive, -1 / (len(rows) - positive))
    weights = torch.from_numpy(np.stack([shares[source.permutation(len(rows))] for _ in range(count)]))
    made = weights @ (rows - rows.mean(dim=0))
    return _controls(made, "shuffled", f"shuffled labels of {len(rows)} states, seed {seed}")


def make_controls(
    count: int,
    hidden_size: int,
    *,
    seed: int,
    kinds: Sequence[ControlKind] = ("isotropic",),
    states: Tensor | None = None,
    labels: Tensor | None = None,
) -> DirectionSet:
    """Return `count` controls of each kind.

    Raises:
        InputError: fewer than a z-score needs, an unknown kind, or no states for the kinds that are made of them.
        VectorError: states of another width.
    """
    if count < MIN_CONTROLS:
        raise InputError(f"{count} controls were asked for; a z-score needs at least {MIN_CONTROLS}, better 64")
    unknown = [kind for kind in kinds if kind not in CONTROL_KINDS]
    if unknown or not kinds:
        raise InputError(f"control {', '.join(map(repr, unknown)) or 'kinds ()'}; one of {', '.join(CONTROL_KINDS)}")
    if states is None and set(kinds) != {"isotropic"}:
        named = " and ".join(one for one in kinds if one != "isotropic")
        raise InputError(f"{named} controls are made of states [n, d]; give them (states), or take isotropic ones")
    if states is not None and states.shape[-1] != hidden_size:
        raise VectorError(f"the states have width {states.shape[-1]} and the directions {hidden_size}")
    made = []
    for kind in dict.fromkeys(kinds):
        if kind == "isotropic":
            made.append(isotropic(count, hidden_size, seed=seed))
        elif kind == "covariance":
            assert states is not None
            made.append(covariance_matched(states, count, seed=seed + 1))
        else:
            assert states is not None
            made.append(shuffled_labels(states, labels, count, seed=seed + 2))
    return join(made)


def natural_key(text: str) -> list[Any]:
    """Sort "layer2" before "layer10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _controls(matrix: Tensor, control: ControlKind, source: str) -> DirectionSet:
    norms = matrix.double().norm(dim=1)
    about = tuple(
        Named(name=f"{control} {place + 1}", kind="control", source=source, norm=float(norm), control=control)
        for place, norm in enumerate(norms)
    )
    return DirectionSet(about=about, units=matrix.double() / norms[:, None])


def _states(states: Tensor) -> Tensor:
    rows = states.double()
    if rows.ndim != 2 or len(rows) < 2 or not bool(torch.isfinite(rows).all()):
        raise InputError(f"states of shape {list(rows.shape)} were given; finite [n, d] with n of at least 2 is needed")
    if not bool((rows - rows[0]).any()):
        raise InputError(f"all {len(rows)} states are alike; controls are made of how states differ")
    return rows


def _checked(vector: Tensor, what: str, width: int) -> Tensor:
    if not isinstance(vector, Tensor) or vector.ndim != 1 or vector.numel() != width:
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise VectorError(f"{what}: shape {shape} was given; [{width}] was expected")
    wide = vector.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(wide).all()) or not bool(wide.any()):
        raise VectorError(f"{what} is not a direction: it is zero or holds values that are not finite")
    return wide
