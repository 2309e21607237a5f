"""What training changed, read from the weights through directions: layers, heads, directions, pairs, matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WEIGHTS_VERSION = 1  # 1: first version

AnalysisName = Literal["susceptibility", "mlp", "attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsDirection:
    """One direction that the weights were read through; controls are counted apart."""

    name: str
    kind: str
    """pc, role, trait, latent or vector."""
    source: str
    norm: float
    """Length before it was normalised."""
    layer: int | None
    """0-based block whose output it was made at, when its file says so."""
    number: int | None
    """Of a principal component, counted from 1; of a latent, its row."""
    variance: float | None
    """Share of the variance that a principal component explains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsControls:
    """The controls of one kind."""

    kind: str
    """isotropic, covariance or shuffled."""
    count: int
    source: str
    compared_with: bool
    """Whether the z-scores are against these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsMeasure:
    """What one number says."""

    measure: str
    part: str
    """qk, vo, mlp, or the name of a matrix."""
    label: str
    meaning: str
    unit: str
    two_sided: bool
    """Measured on both models; else it is a number of the change alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsGrid:
    """One quantity of every direction at every layer."""

    measure: str
    part: str
    sign: int
    """1: the direction itself; -1: its opposite was put in."""
    quantity: str
    """base, tuned, delta, or z (of delta, against the controls)."""
    values: tuple[tuple[float, ...], ...]
    """A row a direction, a column a layer; six significant digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProfile:
    """One layer's mean over the directions of one kind, beside that of the controls."""

    measure: str
    part: str
    sign: int
    layer: int
    kind: str
    """A kind of direction, or "all"."""
    count: int
    mean: float
    """Of delta."""
    std: float
    mean_base: float | None
    mean_tuned: float | None
    mean_abs_z: float
    control_mean: float
    control_std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FocusLayer:
    """The layer where one measure changed most beyond what the controls changed.

    That is the largest mean over the directions of what |delta| exceeds the controls' mean and two deviations by; where
    nothing does, the largest mean of |delta|.
    """

    measure: str
    part: str
    layer: int
    value: float
    """Mean of |delta| over the directions there."""
    control_value: float
    """Mean of |delta| over the controls there."""
    next_layer: int | None
    """The second; None: there is one layer only."""
    top: tuple[str, ...]
    """Labels of the directions that stand out most there, at most ten: by z of `excess` where that is measured, which
    length does not decide; else by this measure's own z."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedChange:
    """One direction at one place, by how far it stands out from the controls."""

    rank: int
    measure: str
    part: str
    layer: int | None
    """None: the mean over all layers."""
    head: int | None
    """None: all heads together, or a part without heads."""
    sign: int
    direction: str
    kind: str
    base: float | None
    tuned: float | None
    delta: float
    z: float
    z_error: float
    """Standard error of z that comes from the number of controls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionProfile:
    """One direction over the layers: mean and spread of its change, and the layer of its peak."""

    rank: int
    """Within the part and measure, by `mean_z`."""
    measure: str
    part: str
    direction: str
    kind: str
    mean: float
    """Of delta over the layers."""
    std: float
    """Over the layers; 0 for one layer."""
    mean_z: float
    """Mean over the layers of z, of |z| where the measure is of both models."""
    peak_layer: int
    """Where z (or |z|) is largest."""
    peak: float
    """delta there."""
    peak_z: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """One direction's effect on another one at one layer."""

    part: str
    """qk: how much a query along the first attends to a key along the second. vo: how much attending to the first
    writes along the second. mlp: how much the change of the MLP's answer to the first points along the second."""
    layer: int | None
    """None: the mean over all layers."""
    first: str
    first_kind: str
    second: str
    second_kind: str
    base: float | None
    tuned: float | None
    delta: float
    z: float
    """Of delta, against pairs of different controls."""
    z_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadChange:
    """How far one head's treatment of the directions stands out."""

    part: str
    layer: int
    head: int
    mean_abs_z: float
    direction: str
    """The one with the largest |z|."""
    kind: str
    z: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTest:
    """Whether two kinds of directions have one mean (Welch), and how far apart they are."""

    measure: str
    part: str
    layer: int | None
    first: str
    second: str
    first_mean: float
    first_std: float
    first_count: int
    second_mean: float
    second_std: float
    second_count: int
    t: float
    p: float
    q: float
    """p adjusted for the false discovery rate over all tests of the run."""
    effect: float
    """Hedges' g."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedComponent:
    """One principal component: variance explained beside effect."""

    measure: str
    part: str
    number: int
    variance: float | None
    effect: float
    """Mean of |z| over the layers."""
    rank: int
    """By effect; 1 is the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixChange:
    """How one whole matrix differs between the models."""

    layer: int
    matrix: str
    rows: int
    columns: int
    frobenius_base: float
    frobenius_tuned: float
    frobenius: float
    """Of the difference."""
    relative: float
    """frobenius / frobenius_base."""
    cosine: float
    """Of the flattened matrices."""
    spectral: tuple[float, ...]
    """Largest singular values of the difference."""
    spectral_error: float
    """Bound e of the randomised decomposition: the true value lies within [s, sqrt(s^2 + e^2)]; 0 when it is exact."""
    effective_rank: float
    """Of the difference: participation ratio of its singular values, (sum of s^2)^2 / (sum of s^4)."""
    effective_rank_error: float = 0.0
    """Its standard error: what lies beyond the leading singular values is estimated; 0 when it is exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormChange:
    """How the weight of one norm differs between the models."""

    layer: int
    norm: str
    relative: float
    """|tuned - base| / |base|."""
    scale: float
    """The one factor that fits best: <tuned, base> / <base, base>."""
    angle: float
    """Between the two weight vectors, in radians."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsAnalysis:
    """What one analysis of a base and a tuned model found; the rows lie in Parquet files beside it."""

    format_version: int = WEIGHTS_VERSION
    kind: str = "weights"
    analysis: AnalysisName
    path: str = ""
    """Directory of the run; empty when nothing was written."""
    created: str
    base: str
    tuned: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    layers: tuple[int, ...]
    dtype: str
    """Of the arithmetic; sums, angles and statistics are in float64."""
    seed: int
    offset: int
    """Positions that the query stands after the key."""
    identical: bool
    """Every measured change is exactly zero."""
    directions: tuple[WeightsDirection, ...]
    controls: tuple[WeightsControls, ...]
    measures: tuple[WeightsMeasure, ...]
    focus: tuple[FocusLayer, ...]
    rankings: tuple[RankedChange, ...]
    profiles: tuple[LayerProfile, ...]
    grids: tuple[WeightsGrid, ...] = field(repr=False)
    tests: tuple[GroupTest, ...]
    interactions: tuple[Interaction, ...]
    profiles_of_directions: tuple[DirectionProfile, ...] = ()
    """The first 50 of every focus measure, and of `excess` beside it."""
    component_interactions: tuple[Interaction, ...] = ()
    """Of each of the first ten principal components, at the layer where the part changed most: the three that it was
    most strengthened with and the three that it was most weakened with, as the first and as the second."""
    heads: tuple[HeadChange, ...]
    components: tuple[RankedComponent, ...]
    variance_against_effect: tuple[tuple[str, str, float], ...]
    """(measure, part, Spearman's correlation of variance explained with effect over the principal components)."""
    matrices: tuple[MatrixChange, ...]
    norms: tuple[NormChange, ...]
    num_measurements: int
    """Rows in the Parquet files."""
    notes: tuple[str, ...] = ()
