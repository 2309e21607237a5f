"""One extraction while it goes on: the pass that learns, the pass that judges, and what both leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab._base.progress import SILENT, Progress
from trimtab.directions import QUANTILES
from trimtab.errors import InputError, NotAppliedError
from trimtab.results.vectors import ExampleCount, SiteEvidence
from trimtab.sites import Site
from trimtab.steering import SteeringVector
from trimtab.vectors.data import ContrastData, Encoded, Encoder
from trimtab.vectors.extract import controls as control_vectors
from trimtab.vectors.extract.effect import steering_effects
from trimtab.vectors.extract.evidence import Reading, read
from trimtab.vectors.extract.methods import Method, scaled
from trimtab.vectors.extract.sae import Latents
from trimtab.vectors.extract.stream import Pooled, Stream
from trimtab.vectors.extract.sums import Sketches, Sums

_RECIPE = ("effect", "auc", "accuracy", "separation", "random_auc", "covariance_auc", "shuffled_auc", "note")
"""The evidence that stands in the vector's file."""


class Run:
    """One extraction while it goes on; the arguments are those of `extract`."""

    def __init__(
        self,
        stream: Stream,
        encoder: Encoder,
        method: Method,
        sae: Any = None,
        num_controls: int = 20,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        self.stream, self.encoder, self.method = stream, encoder, method
        self.num_controls, self.seed, self.progress = num_controls, seed, progress
        self.latents = None if sae is None else Latents.load(sae, stream)
        self.sums: dict[Site, Sums] = {}
        self.found: dict[Site, control_vectors.Directions] = {}
        self.norms = Sketches(len(stream.sites))
        self.projections = Sketches(len(stream.sites))
        self.truncated = 0

    def learn(self, data: ContrastData) -> ExampleCount:
        """Run the training examples and find every site's direction and controls."""
        encoded, labels = self._encode(data)
        weights = control_vectors.weights(labels, self.num_controls, self.seed)
        units = _pair_units(data) if self.method.needs.pairs else [[index] for index in range(len(labels))]
        self.pass_over(encoded, labels, weights, units)
        for site, sums in self.sums.items():
            if sum(sums.counts) < 2:
                raise NotAppliedError(
                    f"{site}: {sum(sums.counts)} activations of {len(encoded)} examples of {data.name} were collected; "
                    "at least 2 are needed"
                )
            solved = self.method.solve(sums) if self.latents is None else self.latents.solve()
            if not float(sums.difference.norm()) or not float(solved.direction.norm()):
                raise InputError(f"{site}: the labels of {data.name} have equal means, so there is no direction")
            vector = scaled(solved.direction, sums.difference)
            self.found[site] = control_vectors.directions(vector, sums, solved.note, self.num_controls, self.seed)
        return _count(data, encoded)

    def pass_over(
        self, encoded: Sequence[Encoded], labels: Tensor, weights: Tensor, units: Sequence[Sequence[int]]
    ) -> None:
        """One forward pass over the examples, reduced as it goes."""
        transform = None if self.latents is None else self.latents.encode
        device = self.stream.device
        labels, weights = labels.to(device), weights.to(device)

        for batch in self.stream.batches(encoded, units):
            lengths: list[Tensor] = []
            members = torch.tensor(batch.members, device=device)

            def take(site: Site, pooled: Pooled, lengths: list[Tensor] = lengths, members: Tensor = members) -> None:
                sums = self.sums.get(site)
                if sums is None:
                    sums = self.sums[site] = Sums(pooled.rows.shape[1], self.method.needs, device, seed=self.seed)
                sums.add(pooled.rows, labels[members], weights[members])
                if self.latents is not None and pooled.latents is not None:
                    self.latents.add(pooled.latents, labels[members])
                lengths.append(pooled.tokens[..., 0])

            self.stream.run(batch, take, transform=transform)
            self.norms.add(torch.stack(lengths)[:, batch.marked])
            self.progress.advance(len(batch.members))
        for sums in self.sums.values():
            sums.flush()

    def judge(self, data: ContrastData) -> tuple[dict[Site, Reading], ExampleCount]:
        """Read held-out examples along every direction."""
        encoded, labels = self._encode(data)
        along = {site: one.unit.to(self.stream.device) for site, one in self.found.items()}
        matrices = {site: one.matrix.to(self.stream.device) for site, one in self.found.items()}
        scores: dict[Site, list[Tensor]] = {site: [] for site in self.found}
        order: list[int] = []
        for batch in self.stream.batches(encoded, [[index] for index in range(len(encoded))]):
            lengths: list[Tensor] = []

            def take(site: Site, pooled: Pooled, lengths: list[Tensor] = lengths) -> None:
                scores[site].append((pooled.rows @ matrices[site].T).double().cpu())
                lengths.append(pooled.tokens[..., 1])

            self.stream.run(batch, take, along=along)
            self.projections.add(torch.stack(lengths)[:, batch.marked])
            order += batch.members
            self.progress.advance(len(batch.members))
        sides = labels[order].numpy() == 0
        readings = {
            site: read(torch.cat(parts).numpy(), sides, self.found[site].threshold, self.num_controls)
            for site, parts in scores.items()
        }
        return readings, _count(data, encoded)

    def effects(self, data: ContrastData) -> tuple[dict[Site, float], str]:
        """What adding every direction does to held-out examples, and why that is not known where it is not."""
        units = {site: one.unit for site, one in self.found.items()}
        return steering_effects(self.stream.backend, units, data, self.encoder, self.progress)

    def evidence(self, readings: Mapping[Site, Reading], effects: Mapping[Site, float]) -> dict[Site, SiteEvidence]:
        """What is known of every site."""
        found = {}
        for place, (site, one) in enumerate(self.found.items()):
            held = readings.get(site)
            found[site] = SiteEvidence(
                site=str(site),
                norm=float(one.vector.norm()),
                median_norm=self.norms.quantiles(place, (0.5,))[0],
                cosine_to_mean_difference=one.cosine,
                note=one.note,
                effect=effects.get(site),
                **({} if held is None else held._asdict()),
            )
        return found

    def vectors(
        self, evidence: Mapping[Site, SiteEvidence], recipe: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[Site, SteeringVector]:
        """The vectors, with their evidence in their recipe."""
        vectors = {}
        for place, (site, one) in enumerate(self.found.items()):
            seen = {name: getattr(evidence[site], name) for name in _RECIPE}
            known = dict(zip(QUANTILES, self.projections.quantiles(place, QUANTILES), strict=True))
            vectors[site] = SteeringVector.of(
                one.vector,
                site=site,
                recipe={**recipe, "evidence": seen},
                quantiles=known if seen["auc"] is not None else {},
                median_norm=evidence[site].median_norm,
                **about,
            )
        return vectors

    def controls(self, recipe: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, dict[Site, SteeringVector]]:
        """The first control of each kind, as long as the site's vector."""
        kinds: dict[str, dict[Site, SteeringVector]] = {}
        for site, one in self.found.items():
            for kind, vector in one.first_controls().items():
                made = SteeringVector.of(vector, site=site, recipe={**recipe, "control": kind}, **about)
                kinds.setdefault(kind, {})[site] = made
        return kinds

    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know."""
        if not self.truncated:
            return ()
        return (f"{self.truncated} examples were cut at max_length={self.encoder.max_length} tokens",)

    def _encode(self, data: ContrastData) -> tuple[list[Encoded], Tensor]:
        encoded = [self.encoder(one) for one in data.examples]
        self.truncated += sum(one.truncated > 0 for one in encoded)
        self._check_lengths(data, encoded)
        return encoded, torch.tensor([0 if one.label == data.positive else 1 for one in data.examples])

    def _check_lengths(self, data: ContrastData, encoded: Sequence[Encoded]) -> None:
        limit = self.stream.backend.info.max_positions
        longest = max(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        if limit is not None and len(encoded[longest].ids) > limit:
            raise InputError(
                f"{data.name}: an example of question {data.examples[longest].question!r:.60} has "
                f"{len(encoded[longest].ids)} tokens and the model's context is {limit}; give max_length={limit}"
            )


def _pair_units(data: ContrastData) -> list[list[int]]:
    """Places of positive and negative of every pair."""
    place = {id(one): index for index, one in enumerate(data.examples)}
    return [[place[id(positive)], place[id(negative)]] for positive, negative in data.pairs()]


def _count(data: ContrastData, encoded: Sequence[Encoded]) -> ExampleCount:
    return ExampleCount(
        positive=data.counts[data.positive],
        negative=data.counts[data.negative],
        questions=len(data.questions),
        tokens=sum(one.num_marked for one in encoded),
    )
