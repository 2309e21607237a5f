"""Steering: ordered ops bound to sites, with positions and gains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trimtab.errors import SiteError, SteeringError, VectorError
from trimtab.sites import Site, SitePattern, nearest, resolve_sites
from trimtab.steering import _canonical
from trimtab.steering._chain import Step
from trimtab.steering.gains import Constant, Gain, as_gain
from trimtab.steering.ops import Math, Op
from trimtab.steering.positions import Positions
from trimtab.steering.program import Program, SiteProgram

_OF_HIDDEN_WIDTH = frozenset(
    {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_raw", "mlp_raw", "embed", "final_norm"}
)


@dataclass(frozen=True)
class BoundOp:
    """One op, the sites it acts at, the rows it selects, and how strongly it acts at each."""

    pattern: SitePattern
    op: Op
    positions: Positions
    gain: Gain

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", _normal_pattern(self.pattern))
        origin = self.op.origin
        if origin is not None and str(self.pattern) != origin:
            raise VectorError(
                f"{self.pattern}: the vector of {self.op.kind} was made at {origin}; bind it there, or pass its bare "
                "tensor (.vector) to use it elsewhere on purpose"
            )

    @cached_property
    def key(self) -> str:
        """Text that names the rows and the gain."""
        return f"{self.positions.canonical()}|{self.gain}"


class Steering:
    """Ordered ops bound to sites. Immutable; its digest names it everywhere.

    Args:
        ops: site pattern -> one op or several, which run in the order given. Patterns of one mapping that overlap run
            in the order of their text, so that the order of a dict never matters; compose with `+` to choose an order.
        positions: the rows that the ops act on: text, mask, list of positions, or Positions.
        gain: a number, Ramp or Decay.

    Raises:
        SiteError: a key is not a site pattern, or counts layers from the end.
        SteeringError: no op, or something that is not an op.
        VectorError: two vectors of different widths at one site, or a vector bound to a site it was not made at.
        PositionError: positions that cannot be read.

    Example:
        >>> cap = Cap([0.0, 1.0], max=5.0)
        >>> both = Steering({"layers.3.resid_post": [cap]}, positions="generated")
        >>> both += Steering({"embed": Add([1.0, 0.0])})
        >>> sorted(both.sites)
        ['embed', 'layers.3.resid_post']
    """

    bound: tuple[BoundOp, ...]

    def __init__(
        self,
        ops: Mapping[str | Site | SitePattern, Op | Sequence[Op]],
        *,
        positions: str | Positions | Sequence[int] = "all",
        gain: Gain | float = 1.0,
    ) -> None:
        if not isinstance(ops, Mapping) or not ops:
            raise SteeringError(
                "a Steering maps sites to ops, such as {'layers.3.resid_post': [Cap(direction, max=5.0)]}"
            )
        where, strength = Positions.parse(positions), as_gain(gain)
        bound = []
        for site, listed in ops.items():
            pattern = SitePattern.parse(site)
            chosen = [listed] if isinstance(listed, Op) else list(listed)
            if not chosen:
                raise SteeringError(f"{pattern}: no op was given")
            for op in chosen:
                if not isinstance(op, Op):
                    raise SteeringError(
                        f"{pattern}: a {type(op).__name__} was given where an op such as Add was expected"
                    )
                bound.append(BoundOp(pattern, op, where, strength))
        self._take(sorted(bound, key=lambda one: str(one.pattern)))

    @classmethod
    def of(cls, bound: Iterable[BoundOp]) -> Steering:
        """Make a Steering of ops already bound, in their order.

        Raises:
            SteeringError: none was given.
        """
        made = object.__new__(cls)
        made._take(list(bound))
        return made

    def _take(self, bound: list[BoundOp]) -> None:
        if not bound:
            raise SteeringError("a Steering holds at least one op")
        object.__setattr__(self, "bound", _canonical.order(bound))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Steering cannot be changed ({name}); make another, or compose with +")

    def __add__(self, other: Steering) -> Steering:
        """Compose: at each site the ops of `self` run before those of `other`."""
        return Steering.of(self.bound + other.bound) if isinstance(other, Steering) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Steering):
            return NotImplemented
        return self.bound == other.bound

    def __hash__(self) -> int:
        return hash(tuple(one.key for one in self.bound))

    def __repr__(self) -> str:
        parts = [f"{one.pattern}: {one.op.kind}[{one.positions}]" for one in self.bound]
        return f"Steering({'; '.join(parts)})"

    def describe(self) -> str:
        """Return the ops in words, in one line."""
        parts = []
        for one in self.bound:
            rows = one.positions.canonical()
            gain = "" if one.gain == Constant(1.0) else f" gain {one.gain}"
            parts.append(f"{one.op.describe()} at {one.pattern} on {rows}{gain}")
        return "; ".join(parts)

    def with_math(self, math: Math) -> Steering:
        """Return the same steering with the arithmetic of every op in `math`."""
        return Steering.of([replace(one, op=replace(one.op, math=math)) for one in self.bound])

    def with_model_math(self, dtype: str) -> Steering:
        """Return the same steering with "model" arithmetic written out as a model's dtype, such as "bfloat16"."""
        named: Math = dtype  # type: ignore[assignment]
        fixed = [replace(one, op=replace(one.op, math=named)) if one.op.math == "model" else one for one in self.bound]
        return Steering.of(fixed)

    @property
    def sites(self) -> tuple[str, ...]:
        """The site patterns, each once, in canonical order."""
        return tuple(dict.fromkeys(str(one.pattern) for one in self.bound))

    @property
    def serialisable(self) -> bool:
        """Whether it can be saved, digested and sent: an Edit cannot."""
        return all(one.op.serialisable for one in self.bound)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 of the canonical form, in hex: equal in every process and for every order of a dict.

        The form is JSON with sorted keys; floats are written as float64 hex; a tensor is its shape and the BLAKE2b-256
        of its little-endian float32 bytes.

        Raises:
            SteeringError: an op is Python code (Edit) and has no canonical form.
        """
        return _canonical.digest(self.bound)

    def canonical(self) -> str:
        """Return the canonical form that the digest is taken of."""
        return _canonical.text(self.bound)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file whose metadata holds the canonical form.

        Raises:
            SteeringError: an op is Python code (Edit), or the file cannot be written.
        """
        from trimtab.steering import _files

        _files.save(self.bound, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Steering:
        """Read what `save` wrote.

        Raises:
            SteeringError: not such a file, a newer version, unknown keys, or bytes that do not match its digest.
        """
        from trimtab.steering import _files

        return cls.of(_files.load(path))

    def dumps(self) -> bytes:
        """Return the bytes of the file that `save` writes.

        Raises:
            SteeringError: an op is Python code (Edit).
        """
        from trimtab.steering import _files

        return _files.dumps(self.bound)

    @classmethod
    def loads(cls, data: bytes, *, name: str = "these bytes") -> Steering:
        """Read what `dumps` or `save` made; `name` stands for the bytes in messages.

        Raises:
            SteeringError: as `load`.
        """
        from trimtab.steering import _files

        return cls.of(_files.loads(data, name))

    def identities(self) -> tuple[tuple[str, str, str], ...]:
        """Return, per op, a digest of op and site, its canonical positions, and its gain as JSON.

        Raises:
            SteeringError: an op is Python code (Edit).
        """
        return tuple(_canonical.identity(one) for one in self.bound)

    def resolve(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        sites: Iterable[Site] | None = None,
        widths: Callable[[Site], int | None] | None = None,
    ) -> Program:
        """Bind to a model.

        Args:
            num_layers: decoder blocks of the model.
            hidden_size: width of its residual stream.
            sites: the sites it has; None accepts every site of the grammar.
            widths: site -> width of its states; None knows the residual stream only and leaves other widths to `apply`.

        Returns:
            Site -> SiteProgram, in the order of the forward pass.

        Raises:
            SiteError: a layer outside the model, or a site that it does not have; names the nearest.
            VectorError: a vector of another width than the states at its site; gives both.
        """
        existing = None if sites is None else tuple(sites)
        steps: dict[Site, list[Step]] = {}
        for one in self.bound:
            for site in _resolve(one.pattern, num_layers, existing):
                width = widths(site) if widths is not None else None
                if width is None and site.point in _OF_HIDDEN_WIDTH and site.module is None:
                    width = hidden_size
                if width is not None and one.op.width not in (None, width):
                    raise VectorError(
                        f"{site}: the vector of {one.op.kind} has width {one.op.width} and the states there have width "
                        f"{width}; use a vector made for this model"
                    )
                there = steps.setdefault(site, [])
                there.append(Step(f"{len(there)}:{one.op.kind}", one.op, one.positions, one.gain, one.key))
        ordered = sorted(steps, key=lambda site: site.sort_key)
        return Program({site: SiteProgram(site, steps[site]) for site in ordered})

    def __reduce__(self) -> tuple[Any, ...]:
        return (Steering.of, (self.bound,))


def _resolve(pattern: SitePattern, num_layers: int, existing: tuple[Site, ...] | None) -> tuple[Site, ...]:
    if existing is None:
        return resolve_sites(pattern, num_layers)
    if pattern.ranges:
        points: dict[int, list[str]] = {}
        for site in existing:
            if site.layer is not None:
                points.setdefault(site.layer, []).append(site.point)
        return resolve_sites(pattern, num_layers, lambda layer: points.get(layer, []))
    (site,) = pattern.resolve(num_layers)
    if site.module is None and site not in existing:
        raise SiteError(f"this model has no {site}; nearest: {nearest(site, existing)}")
    return (site,)


def _normal_pattern(pattern: SitePattern) -> SitePattern:
    """Sort and merge the layers; refuse layers that count from the end: they are resolved at the edge, never stored."""
    if pattern.ranges in ((), ((0, -1),)):
        return pattern
    every = (0, -1) in pattern.ranges
    if not every and any(first < 0 or last < 0 for first, last in pattern.ranges):
        raise SiteError(
            f"{pattern}: a Steering is not bound to a model yet; write 0-based layers, or * for all of them"
        )
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pattern.ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return SitePattern(pattern.point, ((0, -1),) if every else tuple(merged), pattern.module)
