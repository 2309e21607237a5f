"""SAE: a sparse autoencoder ready to be used, whatever trained it.

Of an activation x, a row of width d_in:

    pre = (x - b_dec) W_enc + b_enc          x - b_dec only where `subtract_b_dec`
    z   = relu(pre)                          standard
        = relu(pre) where pre > threshold    jumprelu (strict)
        = relu(pre) of the k largest pre     topk
        = relu(m)   where pre > 0            gated: m = (x - b_dec) (W_enc exp(r_mag)) + b_mag, b_enc is the gate's
    y   = z W_dec + b_dec

A transcoder is one whose y is another tensor than x. Products run in the dtype of the tensors, float32 unless asked
for otherwise; nothing here depends on the precision that a training used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from trimtab.errors import InputError, VectorError
from trimtab.sites import Site

Architecture = Literal["standard", "jumprelu", "topk", "gated"]
"""What computes the latents; BatchTopK and Matryoshka autoencoders are one of these once they are trained."""
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_mag", "r_mag")
_OF_LATENTS = ("b_enc", "threshold", "b_mag", "r_mag")
_NEEDED: dict[Architecture, tuple[str, ...]] = {"jumprelu": ("threshold",), "gated": ("b_mag", "r_mag")}
_INFERENCE: dict[str, Architecture] = {
    "standard": "standard",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka-batchtopk": "jumprelu",
    "matryoshka-jumprelu": "jumprelu",
}


class Trained(Protocol):
    """What a learner gives of itself."""

    config: Any

    def parameters_unscaled(self) -> Mapping[str, Tensor]:
        """Return the parameters under the names of `SAE`, scales undone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SAE:
    """A sparse autoencoder, or a transcoder.

    Args:
        architecture: how latents are computed.
        W_enc: [d_in, d_sae].
        W_dec: [d_sae, d_out]; row i is the direction of latent i.
        b_enc: [d_sae]; of a gated one the gate's bias.
        b_dec: [d_out].
        threshold: [d_sae], at least 0; of jumprelu.
        k: latents per token; of topk.
        b_mag: [d_sae]; of gated.
        r_mag: [d_sae]; of gated.
        subtract_b_dec: whether the encoder sees x - b_dec; of a transcoder never.
        site: where x is taken, as text; empty when unknown.
        target_site: where y belongs; empty: the same.
        about: what its file says of it: how it was trained, the model, the norm of its data.

    Raises:
        InputError: shapes that do not fit, something missing or not finite; names the tensor.
    """

    architecture: Architecture
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    b_mag: Tensor | None = None
    r_mag: Tensor | None = None
    subtract_b_dec: bool = True
    site: str = ""
    target_site: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise InputError(
                f"architecture is {self.architecture!r}; one of {', '.join(get_args(Architecture))} was expected"
            )
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2 or self.W_enc.shape[1] != self.W_dec.shape[0]:
            raise InputError(
                f"W_enc is {[*self.W_enc.shape]} and W_dec {[*self.W_dec.shape]}; [d_in, d_sae] and [d_sae, d_out] "
                "were expected"
            )
        for name in _NEEDED.get(self.architecture, ()):
            if getattr(self, name) is None:
                raise InputError(f"{self.architecture} needs {name}, and there is none")
        for name in NAMES:
            self._check(name)
        if self.architecture == "topk" and not (self.k and 1 <= self.k <= self.d_sae):
            raise InputError(f"k is {self.k}; 1 to {self.d_sae}, the number of latents, was expected")
        if self.subtract_b_dec and self.d_in != self.d_out:
            raise InputError(
                f"an input of width {self.d_in} cannot have b_dec of width {self.d_out} subtracted; give "
                "subtract_b_dec=False"
            )
        for name in ("site", "target_site"):
            if getattr(self, name):
                object.__setattr__(self, name, str(Site.parse(getattr(self, name))))

    def _check(self, name: str) -> None:
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            return
        expected = {"b_dec": (self.d_out,), **dict.fromkeys(_OF_LATENTS, (self.d_sae,))}.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise InputError(f"{name} is {[*tensor.shape]}; {[*expected]} was expected")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{name} has {bad} values that are not finite; an autoencoder that diverged is of no use")
        if name == "threshold" and bool((tensor < 0).any()):
            worst = float(tensor.min())
            raise InputError(
                f"threshold has values under 0, the smallest {worst:g}; a threshold that was never estimated is no "
                "threshold: train for longer"
            )

    @classmethod
    def of(
        cls,
        learner: Trained,
        *,
        norm: float = 1.0,
        target_norm: float | None = None,
        site: str = "",
        target_site: str = "",
        about: Mapping[str, Any] | None = None,
    ) -> SAE:
        """Take what a learner has learned, for activations in hidden units.

        Latents are positively homogeneous, so the norm goes into biases and thresholds alone: the weights keep every
        bit, and a latent's activation times the length of its decoder row is in hidden units. Only the decoder of a
        transcoder is scaled, by the ratio of its two norms.

        Args:
            learner: has `config` and `parameters_unscaled()`.
            norm: what the activations were divided by for the training.
            target_norm: what the targets were divided by; None: `norm`.
            site: where they were taken.
            target_site: where the target was taken, of a transcoder.
            about: more that its file should say.

        Raises:
            InputError: the learner holds values that are not finite, or thresholds under 0.
        """
        trained = str(learner.config.architecture)
        found = {name: tensor.detach().cpu() for name, tensor in learner.parameters_unscaled().items()}
        if "b_gate" in found:
            found["b_enc"] = found.pop("b_gate")
        tensors = {name: tensor.float().contiguous() for name, tensor in found.items() if name in NAMES}
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].expand(tensors["W_enc"].shape[1]).contiguous()
        norms = {"norm": norm} if target_norm is None else {"norm": norm, "target_norm": target_norm}
        made = cls(
            architecture=_INFERENCE[trained],
            **tensors,
            k=learner.config.k if trained == "topk" else None,
            subtract_b_dec=bool(learner.config.centres),
            site=site,
            target_site=target_site,
            about={"trained_as": trained, **norms, **(about or {})},
        )
        return made.in_units_of(norm, target_norm)

    def in_units_of(self, norm: float, target_norm: float | None = None) -> SAE:
        """Return the same autoencoder for activations that are `norm` times as long, targets `target_norm` times.

        Raises:
            InputError: a norm is not a finite number above 0.
        """
        other = norm if target_norm is None else target_norm
        for value in (norm, other):
            if not 0 < value < float("inf"):
                raise InputError(f"norm is {value}; a finite number above 0 was expected")
        if norm == other == 1:
            return self
        whole = self._without_centring() if norm != other else self
        factors = {"b_enc": norm, "threshold": norm, "b_mag": norm, "b_dec": other, "W_dec": other / norm}
        pairs = ((name, getattr(whole, name), factor) for name, factor in factors.items() if factor != 1)
        return replace(whole, **{n: (one.double() * by).to(one.dtype) for n, one, by in pairs if one is not None})

    def _without_centring(self) -> SAE:
        """Return the same map with x - b_dec written into the biases of the encoder."""
        if not self.subtract_b_dec:
            return self
        shift = self.b_dec.double() @ self.W_enc.double()
        biases = {"b_enc": self.b_enc.double() - shift}
        if self.b_mag is not None and self.r_mag is not None:
            biases["b_mag"] = self.b_mag.double() - shift * self.r_mag.double().exp()
        moved: dict[str, Any] = {name: one.to(self.b_enc.dtype) for name, one in biases.items()}
        return replace(self, subtract_b_dec=False, **moved)

    @property
    def d_in(self) -> int:
        """Width of the activations that are encoded."""
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return int(self.W_dec.shape[1])

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another tensor than the one it reads."""
        return self.d_in != self.d_out or self.target_site not in ("", self.site)

    @property
    def trained_as(self) -> str:
        """Architecture of the training, where it is known; else that of the latents."""
        return str(self.about.get("trained_as") or self.architecture)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SAE:
        """Return a copy whose tensors, and so whose products, are on another device or in another dtype."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self) if one.name in NAMES}
        moved = {name: one.to(device=device, dtype=dtype) for name, one in tensors.items() if one is not None}
        return replace(self, **moved)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents of activations.

        Args:
            x: [..., d_in], any float dtype; cast to that of the tensors.

        Returns:
            [..., d_sae], none below 0.

        Raises:
            VectorError: another width; names both.
        """
        if x.shape[-1:] != (self.d_in,):
            raise VectorError(f"activations are of width {x.shape[-1]}, and the autoencoder's is {self.d_in}")
        centred = x.to(self.W_enc.dtype)
        if self.subtract_b_dec:
            centred = centred - self.b_dec
        pre = centred @ self.W_enc + self.b_enc
        if self.architecture == "gated":
            assert self.b_mag is not None and self.r_mag is not None
            return torch.relu(centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag) * (pre > 0)
        if self.architecture == "topk":
            assert self.k is not None
            best = torch.topk(pre, self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, best.indices, torch.relu(best.values))
        active = torch.relu(pre)
        return active if self.threshold is None else active * (pre > self.threshold)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the reconstruction of latents [..., d_sae], [..., d_out].

        Raises:
            VectorError: another number of latents; names both.
        """
        if latents.shape[-1:] != (self.d_sae,):
            raise VectorError(f"{latents.shape[-1]} latents were given, and the autoencoder has {self.d_sae}")
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of activations: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    __call__ = forward
