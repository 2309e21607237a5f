"""Names of the places in a model where a tensor is read or changed.

    embed | final_norm | logits | layers.<L>.<point> | module:<dotted path>.<side>

`<L>` of a `Site` is a 0-based layer. A `SitePattern` selects several: `*`, `4-8`, `{0,12}`, `{0,4-8}`, and negative
layers that count from the end. Negative layers are resolved as soon as the number of layers is known, and never stored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from trimtab.errors import SiteError

LAYER_POINTS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "attn_raw",
    "mlp_raw",
    "mlp_act",
    "attn_z",
    "q",
    "k",
    "v",
)
GLOBAL_POINTS = ("embed", "final_norm", "logits")
MODULE_SIDES = ("output", "input", "grad_output", "grad_input")

_LAYER = re.compile(r"layers\.(?P<layers>\*|\{[^{}]*\}|-?\d+(?:-\d+)?)\.(?P<point>\w+)")
_RANGE = re.compile(r"(?P<first>-?\d+)(?:-(?P<last>\d+))?")
_GRAMMAR = "embed, final_norm, logits, layers.<L>.<point> (L: 3, -1, 4-8, {0,12} or *) or module:<path>.output"


@dataclass(frozen=True, slots=True)
class Site:
    """One place in a model: a point of one layer, a global point, or a side of a named module.

    Example:
        >>> str(Site.parse("layers.12.resid_post"))
        'layers.12.resid_post'
    """

    point: str
    layer: int | None = None
    module: str | None = None

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read one site.

        Raises:
            SiteError: not a site, or a pattern that selects several or counts from the end.
        """
        return text if isinstance(text, Site) else _site(text)

    def __str__(self) -> str:
        if self.module is not None:
            return f"module:{self.module}.{self.point}"
        return self.point if self.layer is None else f"layers.{self.layer}.{self.point}"

    @property
    def sort_key(self) -> tuple[float, int, str]:
        """Order of a forward pass: embed, layer 0 in the order of its points, ..., final_norm, logits, modules."""
        if self.module is not None:
            return (float("inf"), len(GLOBAL_POINTS), self.module + self.point)
        if self.layer is not None:
            return (float(self.layer), _FLOW.index(self.point), "")
        index = GLOBAL_POINTS.index(self.point)
        return (-1.0 if index == 0 else float("inf"), index, "")


_FLOW = (
    "resid_pre",
    "q",
    "k",
    "v",
    "attn_z",
    "attn_raw",
    "attn_out",
    "resid_mid",
    "mlp_act",
    "mlp_raw",
    "mlp_out",
    "resid_post",
)


@dataclass(frozen=True, slots=True)
class SitePattern:
    """A selection of sites: a point and the layers it is taken at.

    `ranges` holds inclusive pairs; the pair (0, -1) is every layer; an empty tuple means a global or module site.
    """

    point: str
    ranges: tuple[tuple[int, int], ...] = ()
    module: str | None = None

    @classmethod
    def parse(cls, text: str | Site | SitePattern) -> SitePattern:
        """Read a pattern.

        Raises:
            SiteError: the text does not fit the grammar, or names a point that no model has.
        """
        if isinstance(text, SitePattern):
            return text
        if isinstance(text, Site):
            return cls(text.point, () if text.layer is None else ((text.layer, text.layer),), text.module)
        if text.startswith("module:"):
            return _parse_module(text)
        if text in GLOBAL_POINTS:
            return cls(text)
        match = _LAYER.fullmatch(text)
        if match is None:
            near = difflib.get_close_matches(text, GLOBAL_POINTS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SiteError(f"{text!r} is not a site: {hint}a site is {_GRAMMAR}")
        if match["point"] not in LAYER_POINTS:
            near = difflib.get_close_matches(match["point"], LAYER_POINTS, n=3, cutoff=0.3) or list(LAYER_POINTS)
            raise SiteError(
                f"{text!r}: no point {match['point']!r}; nearest: {', '.join(near)}; all: {', '.join(LAYER_POINTS)}"
            )
        return cls(match["point"], _parse_layers(match["layers"], text))

    def __str__(self) -> str:
        if self.module is not None:
            return f"module:{self.module}.{self.point}"
        if not self.ranges:
            return self.point
        parts = [
            "*" if pair == (0, -1) else str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}-{pair[1]}"
            for pair in self.ranges
        ]
        layers = parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"
        return f"layers.{layers}.{self.point}"

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the selected layers, ascending.

        Raises:
            SiteError: a layer outside the model, or a range that runs backwards there.
        """
        chosen: set[int] = set()
        for first, last in self.ranges:
            low, high = (_resolve(index, num_layers, self) for index in (first, last))
            if high < low:
                raise SiteError(
                    f"{self}: layer {first} of this model is layer {low}, and the range runs backwards from there to "
                    f"{high}; write {high}-{low}"
                )
            chosen.update(range(low, high + 1))
        return tuple(sorted(chosen))

    def resolve(self, num_layers: int) -> tuple[Site, ...]:
        """Return the sites that this pattern selects in a model of `num_layers` layers.

        Raises:
            SiteError: a layer outside the model.
        """
        if not self.ranges:
            return (Site(self.point, module=self.module),)
        return tuple(Site(self.point, layer=layer) for layer in self.layers(num_layers))

    def matches(self, site: Site) -> bool:
        """Whether a resolved site belongs to this pattern (no negative layers except in `*`)."""
        if (site.point, site.module) != (self.point, self.module) or (site.layer is None) != (not self.ranges):
            return False
        if site.layer is None:
            return True
        return any(pair == (0, -1) or pair[0] <= site.layer <= pair[1] for pair in self.ranges)


def resolve_sites(
    patterns: str | Site | SitePattern | Iterable[str | Site | SitePattern],
    num_layers: int,
    points: Callable[[int], Sequence[str]] | None = None,
) -> tuple[Site, ...]:
    """Resolve patterns against a model, in the order of a forward pass and without repeats.

    Args:
        patterns: one pattern or several; a text may hold several, separated by spaces, commas or semicolons.
        num_layers: decoder blocks of the model.
        points: layer -> the points that this layer has; None accepts every point. Under `*` a layer without the
            point is left out when another layer has it (hybrid models); a layer named by number must have it.

    Raises:
        SiteError: nothing was given, a layer outside the model, or a point that a layer does not have.
    """
    listed = [patterns] if isinstance(patterns, (str, Site, SitePattern)) else list(patterns)
    parts = [one for item in listed for one in (split_patterns(item) if isinstance(item, str) else [item])]
    parsed = [SitePattern.parse(one) for one in parts]
    if not parsed:
        raise SiteError(f"no site was given; a site is {_GRAMMAR}")
    found: set[Site] = set()
    for pattern in parsed:
        sites = pattern.resolve(num_layers)
        if points is not None:
            sites = _present(pattern, sites, points)
        found.update(sites)
    return tuple(sorted(found, key=lambda site: site.sort_key))


def nearest(site: Site | str, existing: Iterable[Site], count: int = 3) -> str:
    """Return the names of the existing sites nearest to `site`, for error messages."""
    names = [str(one) for one in existing]
    return ", ".join(difflib.get_close_matches(str(site), names, n=count, cutoff=0.0)) or "none"


def split_patterns(text: str) -> list[str]:
    """Return the patterns that a text holds, separated by spaces, commas or semicolons."""
    return [part for part in re.split(r"[;\s]+|,(?![^{}]*\})", text.strip()) if part]


def _present(pattern: SitePattern, sites: tuple[Site, ...], points: Callable[[int], Sequence[str]]) -> tuple[Site, ...]:
    present = tuple(site for site in sites if site.layer is None or site.point in points(site.layer))
    every = pattern.ranges == ((0, -1),)
    if len(present) < len(sites) and not (every and present):
        missing = next(site for site in sites if site not in present)
        assert missing.layer is not None
        raise SiteError(f"this model has no {missing}; layer {missing.layer} has: {', '.join(points(missing.layer))}")
    return present


def _resolve(index: int, num_layers: int, pattern: SitePattern) -> int:
    layer = index + num_layers if index < 0 else index
    if not 0 <= layer < num_layers:
        raise SiteError(f"{pattern}: layer {index} is outside this model, which has layers 0 to {num_layers - 1}")
    return layer


def _parse_layers(text: str, whole: str) -> tuple[tuple[int, int], ...]:
    if text == "*":
        return ((0, -1),)
    ranges = []
    for part in text.strip("{}").split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise SiteError(f"{whole!r}: {part!r} is not a layer; write a number, a range such as 4-8, or *")
        first = int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        if match["last"] is not None and last < first:
            raise SiteError(f"{whole!r}: the range {part.strip()} runs backwards; write {last}-{first}")
        ranges.append((first, last))
    return tuple(ranges)


@lru_cache(maxsize=4096)
def _site(text: str) -> Site:
    pattern = SitePattern.parse(text)
    if pattern.module is not None or pattern.ranges == ():
        return Site(pattern.point, module=pattern.module)
    first, last = pattern.ranges[0]
    if len(pattern.ranges) > 1 or first != last or first < 0:
        raise SiteError(f"{text!r} selects layers by pattern; one site was expected, such as layers.3.{pattern.point}")
    return Site(pattern.point, layer=first)


def _parse_module(text: str) -> SitePattern:
    path, _, side = text.removeprefix("module:").rpartition(".")
    if not path or side not in MODULE_SIDES:
        raise SiteError(
            f"{text!r}: a module site ends in one of {', '.join(MODULE_SIDES)}, such as module:encoder.block.3.output"
        )
    return SitePattern(side, module=path)
