"""What is trained on a stream, for how long, and what is written on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter

from trimtab._base.files import safe_name
from trimtab.errors import InputError, RecipeError
from trimtab.results import to_dict
from trimtab.sae.config import Architecture, DecoderNorm, OptimConfig, Optimizer, Penalty, SAEConfig
from trimtab.sae.precision import Precision

DtypeName = Literal["fp32", "bf16", "fp16"]
_COUNTS = {"steps": 1, "log_every": 0, "eval_every": 0, "save_every": 0, "keep_last": 1, "seed": 0, "shard_latents": 1}


@Parameter(name="*", group="Run")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run: its length, and what it writes on the way."""

    steps: int = 20_000
    """Steps of the schedule."""
    early_exit: int | None = None
    """Stop after exactly so many steps; the schedule stays that of `steps`."""
    seed: int = 0
    """Of the first parameters, and of the order of the data."""
    deterministic: Annotated[bool, Parameter(negative="")] = False
    """Refuse operations without a deterministic form, so that two runs agree to the bit."""
    compile: Annotated[bool, Parameter(negative="")] = False
    """Compile the elementwise parts with torch.compile."""
    log_every: int = 1
    """Steps between lines of figures, which the monitor sees; 0: none."""
    log_timing: Annotated[bool, Parameter(negative="")] = False
    """Add the seconds of each part of a step to its line."""
    eval_every: int = 1000
    """Steps between looks at the held-out tokens, parameters and gradients; 0: at the end only."""
    skip_initial_eval: Annotated[bool, Parameter(negative="")] = False
    """Do not look before the first step."""
    save_every: int = 1000
    """Steps between checkpoints; 0: at the end, and when it is stopped."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    monitor: str = "auto"
    """Rules to watch the figures by: auto (the architecture's), off, jumprelu, topk, gated, or a file."""
    strict: Annotated[bool, Parameter(negative="")] = False
    """Stop at the first red flag, with exit code 1."""
    shard_latents: int = 1
    """Processes of torchrun that share the latents of every SAE; the others share the tokens of a batch."""
    shard_parameters: Annotated[bool, Parameter(negative="")] = False
    """Processes that share the tokens keep a part of parameters, moments and gradients each (FSDP2)."""
    tensorboard: Annotated[bool, Parameter(negative="")] = False
    """Write TensorBoard events, histograms of parameters, gradients and densities among them."""
    wandb: str | None = None
    """Log the same to this project of Weights & Biases."""

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}; at least {least} was expected")
        if self.early_exit is not None and not 1 <= self.early_exit <= self.steps:
            raise RecipeError(
                f"early_exit is {self.early_exit}; 1 to {self.steps}, the steps of the schedule, was expected"
            )

    @property
    def last(self) -> int:
        """The step after which it ends."""
        return self.steps if self.early_exit is None else self.early_exit


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One SAE to be trained on a stream."""

    name: str
    """Names its directory and its figures."""
    config: SAEConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Precision = field(default_factory=Precision)
    adam_trick: bool = False
    """Choose scales by which every operand is near 1 and gradients stay in the range of float16."""
    seed: int = 0
    """Of the first parameters."""
    site: str = "x"
    """Where its input comes from."""
    target: str = ""
    """What it reconstructs; "": its input."""

    def __post_init__(self) -> None:
        safe_name(self.name, "the SAE's name")
        self.optim.check(self.config)
        _check_scaled(self.precision, self.adam_trick)

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse sites that the stream does not have, or whose width is not the SAE's.

        Raises:
            InputError: names site and both widths.
        """
        for site, expected in ((self.site, self.config.d_in), (self.target or self.site, self.config.output)):
            if site not in widths:
                raise InputError(f"{self.name}: the stream has no site {site}; it has {', '.join(widths)}")
            if widths[site] != expected:
                raise InputError(
                    f"{self.name}: activations of {site} have width {widths[site]}, the SAE is for {expected}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the training, as JSON can hold it."""
        return {
            "config": self.config.to_dict(),
            "optim": self.optim.to_dict(),
            "precision": str(self.precision),
            "adam_trick": self.adam_trick,
            "seed": self.seed,
            "site": self.site,
            "target": self.target,
        }


@Parameter(name="*", group="Autoencoder")
@dataclass(frozen=True, kw_only=True, slots=True)
class SAESettings:
    """The SAEs of a run: one for every site, width and seed, alike in everything else.

    Every number is free of units: activations are divided by the root of their mean squared length.
    """

    architecture: Architecture = "jumprelu"
    d_sae: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = ()
    """Latents; several widths train several SAEs. Default: `expansion` times the width of the site."""
    expansion: int = 8
    """Latents per dimension of the input, where d_sae is not given."""
    seeds: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = ()
    """Of the first parameters; several seeds train several SAEs. Default: the run's."""
    k: int | None = None
    """Active latents per token, of the TopK kinds."""
    penalty: Penalty = "step"
    """JumpReLU kinds: step counts active latents, tanh is Anthropic's."""
    sparsity_coeff: float = 1e-3
    """Factor of the penalty, at its peak; with target_l0, the first one."""
    target_l0: float | None = None
    """Steer the factor so that so many latents are active on average."""
    sparsity_warmup: int = 0
    """Steps in which the factor rises from 0."""
    ste_to_input: Annotated[bool, Parameter(negative="")] = False
    """JumpReLU kinds: the straight-through gradient reaches the pre-activation too."""
    pre_act_coefficient: float = 0.0
    """JumpReLU kinds: factor of the loss that revives latents which never fire."""
    bandwidth: float | None = None
    """JumpReLU kinds: width of the kernel."""
    threshold: float | None = None
    """JumpReLU kinds: first threshold."""
    widths: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = ()
    """Matryoshka kinds: latents in each nested prefix."""
    aux_coefficient: float = 1 / 32
    """TopK kinds: factor of the loss in which dead latents reconstruct the error."""
    dead_tokens: int = 10_000_000
    """A latent that has not fired for so many tokens is dead."""
    optimizer: Optimizer = "adam"
    """rmsprop is Adam without a first moment."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.0
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup: int = 1000
    """Steps in which the rate rises."""
    decay: float = 0.2
    """Share of the run, at its end, in which the rate falls to 0."""
    clip: float | None = None
    """Scale a larger gradient down to this norm."""
    decoder_norm: DecoderNorm = "unit"
    """unit keeps the decoder's rows at their first length."""
    dtype: DtypeName = "fp32"
    """What parameters are stored in."""
    lower_dtype: DtypeName | None = None
    """What matrix products run in; the storage dtype unless given. Valid pairs: fp32/fp32, fp32/bf16, fp32/fp16,
    bf16/bf16, fp16/fp16."""
    adam_trick: Annotated[bool, Parameter(negative="")] = False
    """Scale operands and gradients by powers of two; fp16 needs it."""

    def __post_init__(self) -> None:
        _check_scaled(Precision.parse(self.dtype, self.lower_dtype), self.adam_trick)
        if self.expansion < 1:
            raise RecipeError(f"expansion is {self.expansion}; at least 1 was expected")

    def plans(self, sites: Sequence[tuple[str, str]], widths: Mapping[str, int], seed: int) -> tuple[Plan, ...]:
        """Return one plan for every site, width and seed.

        Args:
            sites: (input, target) site names; target "" where it is the input.
            widths: site -> width.
            seed: where `seeds` is empty.

        Raises:
            RecipeError: settings that do not fit each other.
            InputError: a site that there is not.
        """
        found = []
        for (site, target), d_sae, one in product(sites, self.d_sae or (0,), self.seeds or (seed,)):
            for name in filter(None, (site, target)):
                if name not in widths:
                    raise InputError(f"the stream has no site {name}; it has {', '.join(widths)}")
            config = self._config(widths[site], widths[target] if target else None, d_sae)
            parts = [site if len(sites) > 1 else "", str(config.d_sae) if len(self.d_sae) > 1 else ""]
            parts.append(f"seed{one}" if len(self.seeds) > 1 else "")
            plan = Plan(
                name="-".join(filter(None, parts)) or "sae",
                config=config,
                optim=OptimConfig(**{name: getattr(self, name) for name in _OPTIM}),
                precision=Precision.parse(self.dtype, self.lower_dtype),
                adam_trick=self.adam_trick,
                seed=one,
                site=site,
                target=target,
            )
            found.append(plan)
        return tuple(found)

    def _config(self, d_in: int, d_out: int | None, d_sae: int) -> SAEConfig:
        same = {name: getattr(self, name) for name in _SAME}
        width = d_sae or self.expansion * d_in
        return SAEConfig(d_in=d_in, d_out=d_out, d_sae=width, sparsity_coefficient=self.sparsity_coeff, **same)


def _check_scaled(precision: Precision, adam_trick: bool) -> None:
    if precision.compute is torch.float16 and not adam_trick:
        raise RecipeError(
            f"{precision}: float16 gradients underflow without scales; add adam_trick (--adam-trick), or take bf16"
        )


_SETTINGS = {one.name for one in fields(SAESettings)}
_SAME = sorted({one.name for one in fields(SAEConfig)} & _SETTINGS - {"d_sae", "decoder_norm"})
_OPTIM = sorted({one.name for one in fields(OptimConfig)} & _SETTINGS)


def given(settings: Any) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    default = {one.name: one.default for one in fields(settings)}
    return {name: getattr(settings, name) for name in default if getattr(settings, name) != default[name]}


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain containers without what does not change the figures."""
    return {name: value for name, value in to_dict(config).items() if name not in _SILENT}


_SILENT = {
    "early_exit", "log_every", "log_timing", "eval_every", "skip_initial_eval", "save_every", "keep_last", "strict",
    "tensorboard", "wandb", "shard_latents", "shard_parameters",
}  # fmt: skip
"""Settings of a run that may differ when it goes on."""
