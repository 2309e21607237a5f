"""Ways to make vectors in the scaling test, by name, side by side.

Cleaning learns its subspaces once a run: the contamination of a site from neutral texts, the manifold of an attribute
at a site from texts about it, on the testbed others than those of the vectors. Every vector is cleaned with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch

from trimtab.backends import Backend
from trimtab.errors import InputError
from trimtab.results.stress import StressMethod
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.vectors import extract, train
from trimtab.vectors.clean import (
    Contamination,
    Manifold,
    clean_vector,
    from_neutral,
    keep_accurate,
    pooled_states,
    task_manifold,
)
from trimtab.vectors.data import ContrastData, Example, Pool
from trimtab.vectors.extract import Stream
from trimtab.workflows.stress.sources import Attribute

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Make = Callable[[Backend, ContrastData], Mapping[Any, SteeringVector]]
"""A method of one's own: (model, contrast data) -> a vector a site."""
CLEANED = {"contamination": (True, False), "manifold": (False, True), "dual": (True, True)}
"""Method -> (without the contamination, on the manifold)."""
TRAINING: Mapping[str, Any] = {"loss": "bipo", "learning_rate": 0.2, "epochs": 5, "patience": 0}
MAX_LOSS = 0.05
"""Accuracy that the removal of a contamination may cost a vector; see `CleanConfig.max_loss`."""


def check_methods(methods: Sequence[str], own: Mapping[str, Make], neutral: Sequence[Example]) -> None:
    """Refuse methods that do not exist, twice the same, and a contamination without neutral texts.

    Raises:
        InputError: which.
    """
    named = [*methods, *own]
    if not named or len(set(named)) < len(named):
        raise InputError(f"methods {named}: at least one, each once, was expected")
    unknown = [one for one in methods if one not in get_args(StressMethod)]
    if unknown:
        raise InputError(f"no method {unknown[0]!r}; there are {', '.join(get_args(StressMethod))}, and own_methods=")
    needing = [one for one in methods if CLEANED.get(one, (False, False))[0]]
    if needing and not neutral:
        raise InputError(f"method {needing[0]!r} needs texts about nothing in particular: give neutral=")


class Workshop:
    """Makes vectors, and keeps what several of them are made with.

    Args:
        backend: the model.
        sites: patterns: every one of these gets a vector.
        pool: tokens whose states count.
        seed: of what is drawn.
        neutral: texts about nothing in particular.
        own: methods of one's own.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        sites: Sequence[str],
        pool: Pool,
        seed: int,
        neutral: Sequence[Example],
        own: Mapping[str, Make],
    ) -> None:
        self.backend, self.pool, self.own = backend, pool, own
        self._patterns, self._seed, self._neutral = tuple(sites), seed, neutral
        self._contaminations: dict[Site, Contamination] = {}
        self._manifolds: dict[tuple[str, Site], Manifold] = {}
        self._about: dict[str, dict[bool, dict[Any, Matrix]]] = {}

    def make(self, method: str, attribute: Attribute, data: ContrastData) -> Mapping[Any, SteeringVector]:
        """Return a vector a site, made from the data by the method.

        Raises:
            InputError: data that the method cannot use.
        """
        if method in self.own:
            return self.own[method](self.backend, data)
        if method == "raw":
            return self._raw(data)
        if method == "trained":
            return self._trained(data)
        if method in CLEANED:
            return self._cleaned(method, attribute, data)
        return self._extracted("mean_difference" if method == "contrastive" else method, data)

    def pooled(self, data: ContrastData, sites: Sequence[Any]) -> dict[bool, dict[Any, Matrix]]:
        """Return the states [n, d] of both labels at every site."""
        return {
            side: pooled_states(
                self.backend,
                [one for one in data.examples if one.label == label],
                tuple(sites),
                pool=self.pool,
                what=data.name,
            )
            for side, label in ((True, data.positive), (False, data.negative))
        }

    def _extracted(self, method: Any, data: ContrastData) -> Mapping[Site, SteeringVector]:
        return extract(
            self.backend,
            data,
            method=method,
            sites=self._patterns,
            pool=self.pool,
            validation=None,
            num_controls=0,
            seed=self._seed,
        ).vectors

    def _raw(self, data: ContrastData) -> Mapping[Site, SteeringVector]:
        positive = [one for one in data.examples if one.label == data.positive]
        sites = Stream(self.backend, self._patterns).sites
        states = pooled_states(self.backend, positive, sites, pool=self.pool, what=data.name)
        means = {site: torch.from_numpy(rows.mean(axis=0)).float() for site, rows in states.items()}
        return {site: SteeringVector.of(mean, site=site) for site, mean in means.items()}

    def _trained(self, data: ContrastData) -> Mapping[Site, SteeringVector]:
        made = train(self.backend, data, sites=self._patterns, seed=self._seed, **TRAINING)
        ops: list[tuple[Site, Any]] = [(Site.parse(str(one.pattern)), one.op) for one in made.steering.bound]
        return {site: SteeringVector.of(op.vector, site=site) for site, op in ops}

    def _cleaned(self, method: str, attribute: Attribute, data: ContrastData) -> Mapping[Site, SteeringVector]:
        without, within = CLEANED[method]
        found = {}
        for site, vector in self._extracted("mean_difference", data).items():
            raw = vector.vector.double().numpy()
            removed = self._contamination(attribute, site, raw) if without else None
            manifold = self._manifold(attribute, site) if within else None
            cleaned = clean_vector(raw, removed, manifold, 0.0)
            size = float(np.linalg.norm(cleaned))
            if not size > 1e-6 * vector.norm:
                raise InputError(f"{attribute.name}: method {method!r} leaves nothing of the vector at {site}")
            scaled = torch.from_numpy(cleaned * (vector.norm / size)).float()
            found[site] = SteeringVector.of(scaled, site=site)
        return found

    def _contamination(self, attribute: Attribute, site: Site, vector: Matrix) -> Contamination:
        if not self._contaminations:
            sites = Stream(self.backend, self._patterns).sites
            states = pooled_states(self.backend, self._neutral, sites, pool=self.pool, what="neutral texts")
            for one, rows in states.items():
                self._contaminations[one] = from_neutral(rows, seed=self._seed)
        sides = self._states(attribute)
        here = (sides[True][site], sides[False][site])
        return keep_accurate(self._contaminations[site], [(vector, here)], MAX_LOSS)

    def _manifold(self, attribute: Attribute, site: Site) -> Manifold:
        key = (attribute.name, site)
        if key not in self._manifolds:
            states = self._states(attribute)[True][site]
            self._manifolds[key] = task_manifold(states, f"{attribute.name} at {site}", seed=self._seed)
        return self._manifolds[key]

    def _states(self, attribute: Attribute) -> dict[bool, dict[Any, Matrix]]:
        if attribute.name not in self._about:
            self._about[attribute.name] = self.pooled(attribute.about, Stream(self.backend, self._patterns).sites)
        return self._about[attribute.name]
