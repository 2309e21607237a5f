"""What an autoencoder is and how it is optimised; every number is free of units.

All hyperparameters refer to activations divided by the root of their mean squared length: E|x|^2 = 1, **not** centred
(the decoder bias takes the mean). Targets of a transcoder are divided by a root of their own. The squared error of a
token is then a share of the mean squared length, and bandwidths, thresholds, penalties and learning rates mean the same
in every layer and model. `Scales` maps them to what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from trimtab.errors import RecipeError

Architecture = Literal[
    "jumprelu", "topk", "batchtopk", "gated", "standard", "matryoshka-batchtopk", "matryoshka-jumprelu"
]
Penalty = Literal["step", "tanh"]
Optimizer = Literal["adam", "rmsprop"]
DecoderNorm = Literal["unit", "free"]

_GROUPS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the latents that the groups of a Matryoshka autoencoder have unless `widths` says otherwise."""


def _choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{name} is {value!r}; one of {', '.join(map(str, choices))} was expected")


def _number(name: str, value: object, *, zero: bool = True, below: float = math.inf) -> None:
    least = "at least 0" if zero else "above 0"
    limit = f" and below {below:g}" if below < math.inf else ""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (not zero and value == 0) or value >= below:  # type: ignore[operator]
        raise RecipeError(f"{name} is {value!r}; a finite number {least}{limit} was expected")


def _count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RecipeError(f"{name} is {value!r}; a whole number of at least {least} was expected")


class _Readable:
    """A configuration that a mapping can hold."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make one of a mapping, such as JSON holds.

        Raises:
            RecipeError: for a key that is unknown, or a value that makes no sense.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise RecipeError(f"{key!r} is no setting of {cls.__name__}; there are {', '.join(sorted(known))}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig(_Readable):
    """One autoencoder, or a transcoder where `d_out` or the target is another."""

    architecture: Architecture = "jumprelu"
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    d_out: int | None = None
    """Width of the target; None: `d_in`."""
    k: int | None = None
    """Active latents per token: exactly (topk), or on average over a batch (batchtopk kinds). None elsewhere."""
    penalty: Penalty = "step"
    """JumpReLU kinds: `step` counts active latents (Gemma Scope); `tanh` is sum tanh(c z |d|) (Anthropic)."""
    sparsity_coefficient: float = 1e-3
    """Factor lambda of the penalty; none in the TopK kinds."""
    ste_to_input: bool = False
    """JumpReLU kinds: let the straight-through gradient of the threshold reach the pre-activation too."""
    pre_act_coefficient: float = 0.0
    """JumpReLU kinds: factor of sum relu(threshold - pre) |d|, which revives latents that never fire."""
    bandwidth: float | None = None
    """Width of the rectangle kernel; None: 0.001 (step) or 2 / sqrt(d_in) (tanh)."""
    threshold: float | None = None
    """First threshold of every latent; None: 0.001 (step) or 0.1 / sqrt(d_in) (tanh)."""
    tanh_scale: float | None = None
    """Factor c of the tanh penalty; None: 4 sqrt(d_in), Anthropic's 4 for activations of length sqrt(d_in)."""
    widths: tuple[int, ...] = ()
    """Matryoshka kinds: latents in each nested prefix, rising to `d_sae`; (): groups of 1/16 1/16 1/8 1/4 1/2."""
    aux_coefficient: float = 1 / 32
    """TopK kinds: factor of the auxiliary loss, in which dead latents reconstruct the error."""
    aux_k: int | None = None
    """TopK kinds: dead latents that take part per token; None: d_in / 2."""
    dead_tokens: int = 10_000_000
    """A latent that has not fired for so many tokens is dead."""
    threshold_rate: float = 0.01
    """BatchTopK kinds: how fast the threshold used after training follows the smallest kept activation."""
    subtract_b_dec: bool | None = None
    """Encode x - b_dec; None: yes for an autoencoder, no where `d_out` is given."""
    decoder_norm: float = 1.0
    """First length of the decoder's rows."""
    encoder_norm: float | None = None
    """First length of the encoder's rows, before `decoder_norm` divides it; None: 1 in the TopK kinds, else
    min(1, d_in / d_sae), from which the reconstruction starts near half of x."""

    def __post_init__(self) -> None:
        _choose("architecture", self.architecture, get_args(Architecture))
        _choose("penalty", self.penalty, get_args(Penalty))
        for name in ("d_in", "d_sae", "dead_tokens"):
            _count(name, getattr(self, name))
        for name in ("d_out", "k", "aux_k"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        for name in ("sparsity_coefficient", "pre_act_coefficient", "aux_coefficient"):
            _number(name, getattr(self, name))
        for name in ("bandwidth", "threshold", "tanh_scale", "encoder_norm"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), zero=False)
        _number("decoder_norm", self.decoder_norm, zero=False)
        _number("threshold_rate", self.threshold_rate, zero=False, below=1.0)
        self._check_latents()

    def _check_latents(self) -> None:
        if self.is_topk and (self.k is None or self.k > self.d_sae):
            raise RecipeError(f"k is {self.k}; {self.architecture} needs 1 to d_sae = {self.d_sae}")
        if not self.is_topk and self.k is not None:
            raise RecipeError(
                f"k is {self.k}; {self.architecture} has none: its penalty or target L0 sets how many fire"
            )
        widths = self.widths
        if widths and not self.is_matryoshka:
            raise RecipeError(
                f"widths is {widths}; only Matryoshka kinds have nested prefixes, not {self.architecture}"
            )
        if widths and (list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae):
            raise RecipeError(f"widths is {widths}; rising numbers that end with d_sae = {self.d_sae} were expected")
        if self.subtract_b_dec and self.output != self.d_in:
            raise RecipeError(f"b_dec has width {self.output} and cannot be subtracted from activations of {self.d_in}")

    @property
    def is_topk(self) -> bool:
        """Whether k sets how many latents fire."""
        return self.architecture in ("topk", "batchtopk", "matryoshka-batchtopk")

    @property
    def is_jumprelu(self) -> bool:
        """Whether every latent trains a threshold."""
        return self.architecture in ("jumprelu", "matryoshka-jumprelu")

    @property
    def is_matryoshka(self) -> bool:
        """Whether prefixes of the latents reconstruct too."""
        return self.architecture.startswith("matryoshka")

    @property
    def output(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def centres(self) -> bool:
        """Whether b_dec is subtracted from x."""
        return self.d_out is None if self.subtract_b_dec is None else self.subtract_b_dec

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Latents in each nested prefix; one prefix, all of them, outside the Matryoshka kinds."""
        if not self.is_matryoshka:
            return (self.d_sae,)
        if self.widths:
            return self.widths
        ends = [math.ceil(self.d_sae * sum(_GROUPS[: i + 1])) for i in range(len(_GROUPS))]
        return tuple(sorted(set(ends)))

    @property
    def first_threshold(self) -> float:
        """The first threshold, `threshold` or its default."""
        default = 1e-3 if self.penalty == "step" else 0.1 / math.sqrt(self.d_in)
        return default if self.threshold is None else self.threshold

    @property
    def kernel(self) -> float:
        """The kernel's width, `bandwidth` or its default."""
        default = 1e-3 if self.penalty == "step" else 2 / math.sqrt(self.d_in)
        return default if self.bandwidth is None else self.bandwidth

    @property
    def steepness(self) -> float:
        """Factor inside the tanh, `tanh_scale` or its default."""
        return 4 * math.sqrt(self.d_in) if self.tanh_scale is None else self.tanh_scale

    @property
    def dead_k(self) -> int:
        """Dead latents per token of the auxiliary loss."""
        return max(1, self.d_in // 2) if self.aux_k is None else self.aux_k

    @property
    def first_encoder_norm(self) -> float:
        """First length of the encoder's rows times that of the decoder's."""
        default = 1.0 if self.is_topk else min(1.0, self.d_in / self.d_sae)
        return default if self.encoder_norm is None else self.encoder_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Readable):
    """How an autoencoder is optimised."""

    optimizer: Optimizer = "adam"
    """`rmsprop` is Adam without a first moment, its bias correction in the rate and in eps: a buffer less."""
    lr: float = 3e-4
    """Peak learning rate, in units of unscaled parameters per step."""
    beta1: float = 0.0
    """First-moment decay of `adam`; 0 keeps stale momentum off latents that rarely fire."""
    beta2: float = 0.999
    """Second-moment decay."""
    eps: float = 1e-8
    """Added to the root of the second moment, in units of unscaled gradients."""
    warmup: int = 1000
    """Steps in which the rate rises from a tenth of its peak; never more than a tenth of the run."""
    decay: float = 0.2
    """Share of the run, at its end, in which the rate falls to 0 along a line."""
    clip: float | None = None
    """Largest norm of the unscaled gradient; a larger one is scaled down. None: no clipping."""
    decoder_norm: DecoderNorm = "unit"
    """`unit` keeps the decoder's rows at their first length: gradients are projected, rows renormalised."""
    sparsity_warmup: int = 0
    """Steps in which the sparsity coefficient rises from 0 along a line."""
    target_l0: float | None = None
    """Mean number of active latents that the coefficient is steered to; None: the coefficient stays. With a step
    penalty the coefficient may become negative for a while."""

    def __post_init__(self) -> None:
        _choose("optimizer", self.optimizer, get_args(Optimizer))
        _choose("decoder_norm", self.decoder_norm, get_args(DecoderNorm))
        for name in ("lr", "eps"):
            _number(name, getattr(self, name), zero=False)
        for name in ("beta1", "beta2"):
            _number(name, getattr(self, name), below=1.0)
        for name in ("warmup", "sparsity_warmup"):
            _count(name, getattr(self, name), 0)
        _number("decay", self.decay)
        if self.decay > 1:
            raise RecipeError(f"decay is {self.decay}; a share of the run, 0 to 1, was expected")
        for name in ("clip", "target_l0"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), zero=False)
        if self.optimizer == "rmsprop" and self.beta1 != 0:
            raise RecipeError(
                f"beta1 is {self.beta1}; rmsprop has no first moment: 0 was expected, or the optimizer adam"
            )

    def check(self, config: SAEConfig) -> None:
        """Refuse what does not fit the autoencoder.

        Raises:
            RecipeError: a target L0 above `d_sae`, or of an architecture whose k sets it.
        """
        if self.target_l0 is None:
            return
        if config.is_topk:
            raise RecipeError(
                f"target_l0 is {self.target_l0:g}; {config.architecture} has k = {config.k} active latents"
            )
        if self.target_l0 > config.d_sae:
            raise RecipeError(f"target_l0 is {self.target_l0:g}; at most d_sae = {config.d_sae} latents can be active")
