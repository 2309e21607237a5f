"""Learner: one autoencoder in training, in any precision, its scales hidden from whoever trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.sae import fast
from trimtab.sae._begin import first_parameters
from trimtab.sae.architectures import FUNCTIONS, Scene, Split, Weights
from trimtab.sae.config import OptimConfig, SAEConfig
from trimtab.sae.figures import Computed as Computed
from trimtab.sae.figures import SelfTest as SelfTest
from trimtab.sae.figures import StepLosses as StepLosses
from trimtab.sae.figures import figures_of, step_losses
from trimtab.sae.optim import SparsityControl, Updater, lr_factor, sparsity_factor
from trimtab.sae.precision import Precision
from trimtab.sae.scaling import Scales

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trimtab.sae.shards import Shards


class Learner:
    """Parameters, optimizer and counters of one autoencoder.

    Args:
        config: the autoencoder, unit-free.
        optim: how it is optimised, unit-free.
        precision: of storage and compute.
        scales: of what is stored; None: `Scales.choose` for a batch of 4096.
        total_steps: of the run: the learning rate ends there.
        seed: of the first parameters.
        device: where it lives.
        compile: compile the loss with torch.compile; worth it on a GPU.
        split: how latents are spread over processes; None: they are all here.
        shared: processes of which each keeps a part of the parameters and moments, see `shards`; None: all are here.

    Raises:
        RecipeError: settings that do not fit each other.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        optim: OptimConfig | None = None,
        precision: Precision | None = None,
        scales: Scales | None = None,
        total_steps: int = 10_000,
        seed: int = 0,
        device: str | torch.device = "cpu",
        compile: bool = False,
        split: Split | None = None,
        shared: DeviceMesh | None = None,
    ) -> None:
        self.config, self.optim = config, OptimConfig() if optim is None else optim
        self.optim.check(config)
        self.precision = Precision() if precision is None else precision
        self.scales = Scales.choose(config, {}, self.precision) if scales is None else scales
        self.total_steps, self.device = total_steps, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._forward, self._latents = FUNCTIONS[config.architecture]
        if compile:
            self._forward = torch.compile(self._forward)
        self.fast = not compile
        """Whether the compiled passes of a CPU are used where they know how; the general form is their reference."""
        self._split, self._shared = split, shared
        self.own = slice(0, config.d_sae) if split is None else split.own(config.d_sae)
        """The latents that this process holds."""
        self.shards: Shards | None = None
        """Where the whole parameters come from, when this process keeps a part."""
        self._parameters = self._begin()
        self._updater = Updater(
            self.optim, self._parameters, self.scales, self.precision, decoder_norm=config.decoder_norm
        )
        target, signed = self.optim.target_l0, config.is_jumprelu and config.penalty == "step"
        self._control = None if target is None else SparsityControl(target, signed=signed)
        self._silent = torch.zeros(self.own.stop - self.own.start, dtype=torch.int64, device=self.device)
        self._cut = torch.full((), math.nan, dtype=torch.float64, device=self.device)
        self._low: dict[str, Tensor] = {}
        self._refresh()

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._updater.steps

    def step(self, x: Tensor, target: Tensor | None = None) -> StepLosses:
        """Take one step.

        Args:
            x: [batch, d_in] activations of mean squared length 1, any float dtype.
            target: [batch, d_out] of mean squared length 1; None: x itself.

        Raises:
            InputError: a width that is not the autoencoder's, or a target that is missing.
        """
        return self.apply(self.compute(x, target))

    def compute(
        self, x: Tensor, target: Tensor | None = None, *, watch: Callable[[str, Tensor], None] | None = None
    ) -> Computed:
        """Return losses and gradients of a batch; nothing moves. `watch` is told of activations by name."""
        coefficient = self._coefficient()
        self._needs(target)
        if self.shards is not None:
            terms, gradients = self.shards.differentiate(
                lambda weights: self._forward(self._scene(weights, x, target, coefficient, watch)), self.scales.loss
            )
            return Computed(figures_of(terms, len(x)), gradients, terms.fired, len(x), coefficient, terms.cut)
        scene = self._scene(Weights(self._parameters, self._low), x, target, coefficient, watch)
        if self.fast and fast.fits(scene):
            terms, gradients = fast.differentiate(scene)
            return Computed(figures_of(terms, len(x)), gradients, terms.fired, len(x), coefficient, terms.cut)
        leaves = {name: value.detach().requires_grad_() for name, value in self._parameters.items()}
        terms = self._forward(replace(scene, parameters=leaves))
        scaled = (terms.recon + terms.sparsity + terms.aux) * self.scales.loss
        found = torch.autograd.grad(scaled, list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }
        tokens = len(x)
        return Computed(figures_of(terms, tokens), gradients, terms.fired, tokens, coefficient, terms.cut)

    def apply(self, computed: Computed) -> StepLosses:
        """Move the parameters by what `compute` found; a gradient that is not finite moves nothing."""
        number = self.steps
        lr = self.optim.lr * lr_factor(self.optim, number, self.total_steps)
        norm = self._updater.norm(computed.gradients) if computed.norm is None else computed.norm
        skipped = not math.isfinite(norm)
        if skipped:
            self._updater.steps += 1
        else:
            self._updater.step(computed.gradients, self._low, lr=lr, norm=norm)
        self._silent = torch.where(computed.fired > 0, 0, self._silent + computed.tokens)
        if computed.cut is not None:
            self._follow(computed.cut)
        if self._control is not None:
            self._control.observe(computed.losses["l0"])
        return step_losses(
            computed.losses, step=number, grad_norm=norm, lr=lr, coefficient=computed.coefficient, skipped=skipped
        )

    def losses(self, x: Tensor, target: Tensor | None = None) -> StepLosses:
        """Return the losses of a batch as the next step would see it; nothing moves."""
        coefficient = self._coefficient()
        self._needs(target)
        with torch.no_grad(), self._gathered() as weights:
            terms = self._forward(self._scene(weights, x, target, coefficient))
        lr = self.optim.lr * lr_factor(self.optim, self.steps, self.total_steps)
        return step_losses(
            figures_of(terms, len(x)), step=self.steps, grad_norm=math.nan, lr=lr, coefficient=coefficient
        )

    def gradients(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Return the unscaled gradients of a batch, wide, named and laid out as `parameters_unscaled`."""
        return self._unscaled(
            {
                name: value.to(self.precision.wide) * (self.scales.of(name) ** 2 / self.scales.loss)
                for name, value in self.compute(x, target).gradients.items()
            }
        )

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """Return the latents [batch, d_sae] that training sees, unscaled, wide; BatchTopK's depend on the batch."""
        with self._gathered() as weights:
            found = self._latents(self._scene(weights, x))
        return found.to(self.precision.wide) / self.scales.pre

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction [batch, d_out], unscaled, wide."""
        with self._gathered() as weights:
            scene = self._scene(weights, x)
            return scene.decode(self._latents(scene)) / self.scales.total

    def parameters_unscaled(self) -> dict[str, Tensor]:
        """Return the parameters under SAELens's names, scales undone, wide, on the CPU.

        W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc [d_sae], b_dec [d_out]; JumpReLU kinds: threshold [d_sae];
        BatchTopK kinds: threshold [d_sae], one number, what a trained one goes by; gated: b_enc is the gate's, with
        b_mag and r_mag [d_sae].
        """
        found = self._unscaled(self._parameters)
        if self.config.is_topk and self.config.architecture != "topk":
            found["threshold"] = self._trained_threshold()
        return found

    def parameters_stored(self) -> Mapping[str, Tensor]:
        """Return the parameters as they are stored, latent-major; whoever changes them trains something else."""
        return self._parameters

    def widened(self) -> Learner:
        """Return a learner in float32 of the same parameters and scales, to see what this one's precision loses."""
        precision = Precision() if self.precision.wide == torch.float32 else self.precision
        other = Learner(
            self.config,
            optim=self.optim,
            precision=precision,
            scales=self.scales,
            total_steps=self.total_steps,
            device=self.device,
            split=self._split,
            shared=self._shared,
        )
        for name, value in self._parameters.items():
            other._parameters[name].copy_(value)
        other._silent.copy_(self._silent)
        other._refresh()
        return other

    def too_small(self) -> dict[str, float]:
        """Return the share of each stored parameter that a step of the peak learning rate would leave as it is."""
        shares = {}
        for name, value in self._parameters.items():
            moved = (value.to(self.precision.wide) + self.scales.map_lr(name, self.optim.lr)).to(value.dtype)
            shares[name] = float((moved == value).double().mean())
        return shares

    def state(self) -> dict[str, Tensor]:
        """Return everything that a bitwise resume needs, stored units, contiguous, without copies."""
        found = {f"parameter.{name}": value for name, value in self._parameters.items()}
        found |= {f"first.{name}": value for name, value in self._updater.first.items()}
        found |= {f"second.{name}": value for name, value in self._updater.second.items()}
        control = self._control
        found["steps"] = torch.tensor(self.steps)
        found["control"] = torch.tensor(
            [0.0, 0.0] if control is None else [control.integral, control.error], dtype=torch.float64
        )
        found["silent"], found["cut"] = self._silent, self._cut
        found["generator"] = self._generator.get_state()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            InputError: tensors that are missing, unknown, or of another shape or dtype.
        """
        own = self.state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state:
                raise InputError(f"the state {'lacks' if name in own else 'has an unknown'} {name!r}")
            if own[name].shape != state[name].shape or own[name].dtype != state[name].dtype:
                given, needed = (f"{tuple(t.shape)} {t.dtype}" for t in (state[name], own[name]))
                raise InputError(f"{name!r} in the state is {given}; {needed} was expected")
        for name, value in own.items():
            if name.partition(".")[0] in ("parameter", "first", "second", "silent", "cut"):
                value.copy_(state[name])
        self._updater.steps = int(state["steps"])
        if self._control is not None:
            self._control.integral, self._control.error = map(float, state["control"])
        self._generator.set_state(state["generator"])
        self._refresh()

    def dead(self, tokens: int | None = None) -> Tensor:
        """Return which latents [d_sae] have not fired for that many tokens; None: the configuration's number."""
        return self._silent >= (self.config.dead_tokens if tokens is None else tokens)

    def self_test(self, x: Tensor, target: Tensor | None = None) -> SelfTest:
        """Look whether every parameter has a finite gradient other than 0, and the sparsity reaches the parameters."""
        return SelfTest.of(self.gradients(x, target), reached=self.sparsity_reaches(x, target))

    def sparsity_reaches(self, x: Tensor, target: Tensor | None = None) -> bool:
        """Return whether the sparsity has a gradient at a parameter that is here; of TopK kinds nobody asks.

        It is looked at with its full coefficient, whatever a warm-up makes of it now.
        """
        if self.config.is_topk:
            return True
        with self._gathered() as weights:
            leaves = {name: value.detach().requires_grad_() for name, value in weights.parameters.items()}
            scene = self._scene(Weights(leaves, weights.low), x, target, max(self.config.sparsity_coefficient, 1.0))
            sparsity = self._forward(scene).sparsity
            if not sparsity.requires_grad:
                return False
            found = torch.autograd.grad(sparsity * self.scales.loss, list(leaves.values()), allow_unused=True)
        return any(bool(one.any()) for one in found if one is not None)

    @contextmanager
    def _gathered(self) -> Iterator[Weights]:
        """Have the whole parameters for a while."""
        if self.shards is None:
            yield Weights(self._parameters, self._low)
        else:
            with self.shards.gathered() as weights:
                yield weights

    def _coefficient(self) -> float:
        factor = 1.0 if self._control is None else self._control.factor
        return self.config.sparsity_coefficient * sparsity_factor(self.optim, self.steps) * factor

    def _needs(self, target: Tensor | None) -> None:
        if target is None and self.config.output != self.config.d_in:
            raise InputError(f"the target of a transcoder is missing; [batch, {self.config.output}] was expected")

    def _scene(
        self,
        weights: Weights,
        x: Tensor,
        target: Tensor | None = None,
        coefficient: float = 0.0,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> Scene:
        config, wide = self.config, self.precision.wide
        if x.ndim != 2 or x.shape[1] != config.d_in:
            raise InputError(f"activations are {tuple(x.shape)}; [batch, {config.d_in}] was expected")
        if target is not None and target.shape != (len(x), config.output):
            raise InputError(f"targets are {tuple(target.shape)}; [{len(x)}, {config.output}] was expected")
        given = x.to(self.device, wide)
        wanted = given if target is None else target.to(self.device, wide)
        scales = self.scales
        return Scene(
            config=config,
            scales=scales,
            precision=self.precision,
            parameters=weights.parameters,
            low=weights.low,
            x=given if scales.s == 1 else given * scales.s,
            target=wanted if scales.total == 1 else wanted * scales.total,
            coefficient=coefficient,
            dead=self.dead() if config.is_topk and config.aux_coefficient else None,
            unit_decoder=self.optim.decoder_norm == "unit",
            split=self._split,
            watch=watch,
        )

    def _begin(self) -> dict[str, Tensor]:
        """Return this process's part of the first parameters, as they are stored."""
        mesh = self._shared
        if mesh is None:
            mine = first_parameters(self.config, self._generator, lambda whole: whole[self.own])
            return {name: self._stored(name, value) for name, value in mine.items()}
        from trimtab.sae._mesh import part_of
        from trimtab.sae.shards import Shards

        part = first_parameters(self.config, self._generator, lambda whole: part_of(whole[self.own], mesh).clone())
        part["b_dec"] = part_of(part["b_dec"], mesh)
        count = {name: self.own.stop - self.own.start for name in part} | {"b_dec": self.config.output}
        shapes = {
            name: torch.empty(count[name], *value.shape[1:], dtype=self._dtype(name), device="meta")
            for name, value in part.items()
        }
        self.shards = Shards(shapes, mesh, self.precision, self.device)
        for name, value in part.items():
            self.shards.own[name].copy_(self._stored(name, value))
        return self.shards.own

    def _dtype(self, name: str) -> torch.dtype:
        return self.precision.wide if name == "threshold" else self.precision.dtype

    def _stored(self, name: str, unscaled: Tensor) -> Tensor:
        return (unscaled.to(self.device, self.precision.wide) * self.scales.of(name)).to(self._dtype(name))

    def _unscaled(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {
            name: value.detach().to("cpu", self.precision.wide) / self.scales.of(name) for name, value in stored.items()
        }
        found["W_enc"] = found["W_enc"].t().contiguous()
        return found

    def _trained_threshold(self) -> Tensor:
        """Return the one threshold of a BatchTopK kind, [d_sae]; before the first step it is 0."""
        cut = self._cut.nan_to_num(0.0).to("cpu", self.precision.wide)
        return cut.expand(len(self._parameters["b_enc"])).clone()

    def _refresh(self) -> None:
        """Make the low-precision copies of the weights; where the dtype is that of storage they are the weights.

        Where this process keeps a part there are none: weights are gathered in low precision.
        """
        if self.shards is not None:
            return
        for name in ("W_enc", "W_dec"):
            self._low[name] = self._parameters[name].to(self.precision.compute)

    def _follow(self, cut: Tensor) -> None:
        """Let the threshold used after training follow the smallest latent that was kept."""
        now = cut.double() / self.scales.pre
        rate = self.config.threshold_rate
        moved = torch.where(self._cut.isnan(), now, self._cut + rate * (now - self._cut))
        self._cut = torch.where(now.isfinite() & (now > 0), moved, self._cut)
