"""Engine: one loaded model that many trainings share; its weights stay as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from trimtab._base.optional import require
from trimtab.architectures import ModelMap
from trimtab.backends import Prompt, open_backend
from trimtab.backends.base import EncodedPrompt, ModelInfo
from trimtab.backends.hf import HFBackend
from trimtab.errors import InputError
from trimtab.sites import Site, SitePattern, resolve_sites

ModelLike = str | Path | nn.Module


class Engine:
    """A model that vectors are trained on.

    Args:
        model: a directory, a hub id, "testbed", a module, or a Hugging Face backend that holds one.
        tokenizer: for a module.
        dtype: what the weights are loaded in; None: float32, or the module's own. Vectors are float32 in any case.
        device: None: the accelerator where there is one.
        device_map: spreads the weights over several devices with accelerate, such as "auto"; instead of `device`.
        offload_folder: where weights lie that the map places on "disk".
        allow_fallback: train at sites of a model whose family is unknown.
    """

    def __init__(
        self,
        model: ModelLike | HFBackend,
        *,
        tokenizer: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        offload_folder: str | Path | None = None,
        allow_fallback: bool = False,
    ) -> None:
        backend: Any = model
        if not isinstance(model, HFBackend):
            options: dict[str, Any] = {"tokenizer": tokenizer, "dtype": dtype, "allow_fallback": allow_fallback}
            backend = open_backend("hf", model, device="cpu" if device_map is not None else device, **options)
        self._backend: HFBackend = backend
        self.model: nn.Module = backend.model
        self.tokenizer: Any = backend.tokenizer
        self.map: ModelMap = backend.map
        self.info: ModelInfo = backend.info
        self.model_id: str = backend.model_id
        self.map.require_steerable()
        if device_map is not None:
            accelerate = require("accelerate", extra="train", feature="a device map")
            places = device_map
            if isinstance(device_map, str):
                places = accelerate.infer_auto_device_map(
                    self.model, no_split_module_classes=getattr(self.model, "_no_split_modules", None)
                )
            try:
                self.model = accelerate.dispatch_model(self.model, device_map=places, offload_dir=offload_folder)
            except ValueError as error:
                said = " ".join(str(error).split())
                raise InputError(f"device_map={places}: {said[:200]}; disk needs offload_folder=") from error
        self.device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.parameters = frozenset(inspect.signature(type(self.model).forward).parameters)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Turn a prompt into token ids, with the spans of its messages."""
        return self._backend.encode(prompt)

    def sites(self, patterns: tuple[str, ...]) -> tuple[Site, ...]:
        """Return the sites that patterns name, in the order of a forward pass.

        Raises:
            SiteError: one that this model does not have.
        """
        found = resolve_sites([SitePattern.parse(one) for one in patterns], self.map.num_layers, self.map.points)
        for site in found:
            self.map.handle(site)
        return tuple(sorted(dict.fromkeys(found), key=lambda site: site.sort_key))

    def provenance(self) -> dict[str, Any]:
        """Return what a record should say of the model."""
        return {
            "model": self.model_id,
            "model_digest": self.info.weights_digest,
            "model_dtype": self.info.dtype,
            "device": str(self.device),
            "attention": self.info.attention,
            "transformers": transformers.__version__,
        }

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Run with every weight frozen, in evaluation mode, without autocast; then put all back."""
        training = [module for module in self.model.modules() if module.training]
        learning = [one for one in self.model.parameters() if one.requires_grad]
        precision = torch.get_float32_matmul_precision()
        try:
            for module in training:
                module.training = False
            for parameter in learning:
                parameter.requires_grad_(False)
            if precision != "highest":
                torch.set_float32_matmul_precision("highest")
            with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
            for parameter in learning:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
