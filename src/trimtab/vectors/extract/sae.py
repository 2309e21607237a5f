"""The latent of a sparse autoencoder that the labels differ in most; its decoder row is the direction."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trimtab.errors import InputError, VectorError
from trimtab.vectors.extract.methods import Found, Method
from trimtab.vectors.extract.stream import Stream
from trimtab.vectors.extract.sums import Needs, Sums


def _solve(sums: Sums) -> Found:
    raise AssertionError("an autoencoder's latents solve for themselves")


SAE = Method(_solve, Needs(), 1)


class Latents:
    """An autoencoder at one site, and the mean activations of its latents for each label.

    `z = relu((h - b_dec) W_enc + b_enc)`, and where there is a threshold `z (z > threshold)`; float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, device: torch.device) -> None:
        self.name = name
        self._encoder, self._bias = (tensors[key].float().to(device) for key in ("W_enc", "b_enc"))
        self._decoder, self._centre = (tensors[key].float().to(device) for key in ("W_dec", "b_dec"))
        threshold = tensors.get("threshold")
        self._threshold = None if threshold is None else threshold.float().to(device)
        self._sums = torch.zeros(2, self._encoder.shape[1], dtype=torch.float64, device=device)
        self._counts = [0, 0]

    @classmethod
    def load(cls, file: str | os.PathLike[str], stream: Stream) -> Latents:
        """Read an autoencoder for the one site of a stream.

        Raises:
            InputError: not a readable file, several sites, or tensors that are missing; names those that exist.
            VectorError: it is of another width than the site.
        """
        path = Path(file)
        if len(stream.sites) != 1:
            raise InputError(
                f"an autoencoder belongs to one site and {len(stream.sites)} were asked for; name its site"
            )
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}") from error
        missing = [key for key in ("W_enc", "b_enc", "W_dec", "b_dec") if key not in tensors]
        if missing:
            raise InputError(f"{path}: no tensor {missing[0]!r}; it has: {', '.join(sorted(tensors))}")
        handle: Any = stream.handles[stream.sites[0]]
        width = getattr(handle, "width", tensors["W_enc"].shape[0])
        shapes = (tuple(tensors["W_enc"].shape), tuple(tensors["W_dec"].shape))
        if shapes != ((width, shapes[0][-1]), (shapes[0][-1], width)):
            raise VectorError(
                f"{path}: W_enc is {list(shapes[0])} and W_dec {list(shapes[1])}; [{width}, latents] and "
                f"[latents, {width}] were expected at {stream.sites[0]}"
            )
        return cls(tensors, path.name, stream.device)

    def encode(self, states: Tensor) -> Tensor:
        """Return the latents' activations, float32 [..., latents]."""
        active = torch.relu((states - self._centre) @ self._encoder + self._bias)
        return active if self._threshold is None else active * (active > self._threshold)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Take mean activations [N, latents] with their labels."""
        for label in (0, 1):
            inside = rows[labels == label].double()
            self._sums[label] += inside.sum(dim=0)
            self._counts[label] += len(inside)

    def solve(self) -> Found:
        """Return the decoder row whose contribution grows most from the negative label to the positive one."""
        means = self._sums / torch.tensor(self._counts, dtype=torch.float64, device=self._sums.device)[:, None]
        grows = (means[0] - means[1]) * self._decoder.double().norm(dim=1)
        latent = int(grows.argmax())
        note = (
            f"latent {latent} of {self.name}: mean activation {means[0, latent]:.4g}, negative {means[1, latent]:.4g}"
        )
        return Found(self._decoder[latent].double(), note)
