"""How large the fixed buffers of an engine must be for steerings that are known before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from trimtab.sites import Site, SitePattern
from trimtab.steering import AblateSubspace, CapSubspace, Op, Steering


class Sizes(NamedTuple):
    """Settings of the plugin, by their names."""

    ops_per_site: int
    directions_per_op: int
    keys_per_steering: int

    @classmethod
    def of(cls, steerings: Iterable[Steering], *, together: int = 1) -> Sizes:
        """Return the smallest buffers that hold each of some steerings; all 1 when there is none.

        Args:
            steerings: what will act.
            together: how many of them may be one request's, so that their ops and keys add up.
        """
        listed = list(steerings)
        sites = {site for one in listed for bound in one.bound for site in _starts(bound.pattern)}

        def most(counts: Iterable[int]) -> int:
            return sum(sorted(counts, reverse=True)[:together])

        return cls(
            ops_per_site=max(
                (most(sum(bound.pattern.matches(site) for bound in one.bound) for one in listed) for site in sites),
                default=1,
            ),
            directions_per_op=max((_directions(bound.op) for one in listed for bound in one.bound), default=1),
            keys_per_steering=max(most(len({bound.key for bound in one.bound}) for one in listed), 1),
        )


def _starts(pattern: SitePattern) -> Iterator[Site]:
    """Yield the sites where the ranges of a pattern begin: where most patterns meet, one of them begins.

    How many layers the model has need not be known for that.
    """
    if not pattern.ranges:
        yield Site(pattern.point, module=pattern.module)
    for first, _ in pattern.ranges:
        yield Site(pattern.point, layer=first)


def _directions(op: Op) -> int:
    if isinstance(op, AblateSubspace):
        return max(op.rank, 1)
    return int(op.directions.shape[0]) if isinstance(op, CapSubspace) else 1
