"""What evaluating sparse autoencoders found, and what their numbers do to a low precision before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SAE_EVALUATION_VERSION = 1  # 1: first version
PRECISION_REPORT_VERSION = 1  # 1: first version

TensorRole = Literal["input", "weight", "activation", "gradient", "moment"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """The magnitudes of one tensor beside the range of the dtype that it would have; shares are of its elements."""

    name: str
    """Such as "x", "pre", "W_enc", "grad W_enc", "v W_enc"."""
    role: TensorRole
    dtype: str
    """What it is stored or computed in."""
    count: int
    """Elements that were seen."""
    rms: float
    """Root of the mean square of the finite elements; 0 when there is none."""
    absmin: float
    """Smallest magnitude above 0; 0 when there is none."""
    absmax: float
    """Largest magnitude; "inf" or "nan" when there is such an element."""
    zeros: float
    """Exact zeros in the wide precision."""
    underflow: float
    """Elements other than 0 that the dtype rounds to 0."""
    subnormal: float
    """Elements that the dtype holds, with fewer bits."""
    overflow: float
    """Elements past the dtype's largest number, Inf and NaN among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionReport:
    """What a precision would do to the tensors of a training, measured on a few batches before it."""

    format_version: int = PRECISION_REPORT_VERSION
    kind: str = "precision_report"
    passed: bool
    """No tensor overflows, and every parameter has a finite gradient other than 0."""
    reason: str
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    dtype: str
    """Of storage."""
    compute: str
    """Of the matrix products and what is elementwise around them."""
    batches: int
    batch_size: int
    scales: Mapping[str, float]
    """s, b_e, b_d, c, g in use."""
    recommended_g: float
    """Gradient scale, a power of two, that keeps every gradient and moment in range."""
    tensors: tuple[TensorRange, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A value with its 95 % interval, from resampling texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Splice:
    """What the model loses when it runs on the reconstruction; cross entropies in nats per predicted token."""

    tokens: int
    """Predictions that were compared."""
    ce_clean: float
    ce_sae: float
    ce_zero: float
    """With zeros at the site."""
    ce_mean: float
    """With the mean of the evaluation set at the site."""
    delta_ce: Measured
    """`ce_sae - ce_clean`."""
    recovered: Measured
    """`(ce_zero - ce_sae) / (ce_zero - ce_clean)`: 1 loses nothing; zeros flatter it."""
    recovered_mean: Measured
    """The same against the mean: stricter."""
    kl: Measured
    """Mean KL of the spliced model's next token from the clean one's, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Densities:
    """How often latents fire: share of tokens, latent by latent."""

    edges: tuple[float, ...]
    """Ends of the bins, log10 of the density."""
    counts: tuple[int, ...]
    """Latents of each bin; one fewer than `edges`. The dead ones are in none."""
    quantiles: Mapping[str, float]
    """Fraction -> density, over all latents."""
    dead: int
    """Latents that never fired."""
    dead_share: float
    dead_below: float
    """What 95 % confidence puts the density of a dead latent under: `3 / tokens`."""
    always: int
    """Latents that fired on more than half of the tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderCosines:
    """Largest absolute cosine of each latent's decoder row with another's."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    latents: int
    """Latents looked at, drawn with the seed when there are many; each against all others."""
    median: float
    p95: float
    twins: float
    """Share of latents with a cosine over 0.9."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Where a latent fired strongly."""

    activation: float
    text: int
    """Index of the text."""
    position: int
    tokens: tuple[str, ...]
    """The token and what stands around it."""
    activations: tuple[float, ...]
    """Of the latent on each of them."""
    at: int
    """Place of the token in `tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentExamples:
    """One latent and the strongest of its firings."""

    latent: int
    density: float
    max: float
    """Largest activation, in units of the decoder row's length."""
    mean: float
    """Mean activation where it fires."""
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEScore:
    """One autoencoder on the evaluation set."""

    name: str
    path: str
    """Empty when it was given in memory."""
    family: str
    """Autoencoders of one family make one curve."""
    architecture: str
    """How it was trained."""
    d_in: int
    d_sae: int
    d_out: int
    fvu: Measured
    """`sum |y - y_hat|^2 / sum |y - mean|^2` with the mean of the whole set; 0 is perfect, 1 is the mean."""
    l0: Measured
    """Latents above 0 per token."""
    cosine: float
    """Mean over tokens of the cosine of y and y_hat."""
    l2_ratio: float
    """Mean over tokens of `|y_hat| / |y|`: under 1 it shrinks."""
    bias: float
    """Relative reconstruction bias `E|y_hat|^2 / E<y, y_hat>`: 1 has none, under 1 it shrinks."""
    densities: Densities
    decoder: DecoderCosines
    splice: Splice | None
    """None where no model was run."""
    latents: tuple[LatentExamples, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedValue:
    """One family at an L0 that all families reach."""

    family: str
    l0: float
    fvu: float
    """Interpolated between its autoencoders, linear in log L0; never beyond them."""
    recovered: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEEvaluation:
    """Autoencoders of one site on one fixed set of activations."""

    format_version: int = SAE_EVALUATION_VERSION
    kind: str = "sae_evaluation"
    model: str
    """Empty where activations were given without one."""
    model_digest: str
    model_dtype: str
    site: str
    target_site: str
    """What is reconstructed: the site itself, or another one for a transcoder."""
    data: str
    data_digest: str
    """Of the activations: equal digests mean that two evaluations are of one set."""
    texts: int
    tokens: int
    """Rows that count."""
    left_out: Mapping[str, int]
    """Rows that do not, by reason."""
    seed: int
    scores: tuple[SAEScore, ...]
    matched: tuple[MatchedValue, ...]
    """Empty with fewer than two families, or when they share no L0."""
    precision: tuple[PrecisionReport, ...] = ()
    path: str = ""
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedLatent:
    """A latent as it was written to steer with."""

    latent: int
    site: str
    scale: float
    """Of the steering, in parts of `max_activation`."""
    positions: str
    max_activation: float
    density: float
    """Share of the tokens on which it fires."""
    active_quantiles: Mapping[str, float]
    """Fraction -> activation, over the tokens on which it fires."""
    norm: float
    """Of the vector, in hidden units: the largest activation times the decoder row's length."""
    median_norm: float | None
    """Median length of the states at the site."""
    tokens: int
    steering_digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEExport:
    """What exporting an autoencoder wrote."""

    format_version: int = 1  # 1: first version
    kind: str = "sae_export"
    path: str
    files: tuple[str, ...]
    architecture: str
    trained_as: str
    d_in: int
    d_sae: int
    d_out: int
    site: str
    target_site: str
    latent: ExportedLatent | None
    """None where the whole autoencoder was written."""
