"""The first parameters of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.sae.config import SAEConfig


def first_parameters(
    config: SAEConfig, generator: torch.Generator, keep: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return unscaled float64 parameters, weights latent-major: W_enc [d_sae, d_in], W_dec [d_sae, d_out].

    The decoder's rows are random directions; the encoder's are the same ones where the widths allow it, so that the
    reconstruction starts along x. Biases are 0.

    Args:
        config: the autoencoder.
        generator: gives the directions of all latents, whoever keeps them.
        keep: takes the latents that are wanted out of a tensor of all.
    """
    rows = keep(_directions(config.d_sae, config.output, generator))
    same = config.output == config.d_in
    encoder = rows if same else keep(_directions(config.d_sae, config.d_in, generator))
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    parameters = {
        "W_enc": encoder * (config.first_encoder_norm / config.decoder_norm),
        "W_dec": rows * config.decoder_norm,
        "b_enc": zeros,
        "b_dec": torch.zeros(config.output, dtype=torch.float64),
    }
    if config.is_jumprelu:
        parameters["threshold"] = torch.full_like(zeros, config.first_threshold)
    if config.architecture == "gated":
        parameters |= {"b_mag": zeros.clone(), "r_mag": zeros.clone()}
    return parameters


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    raw = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return raw.div_(raw.norm(dim=1, keepdim=True))
