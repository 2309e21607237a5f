"""The Hugging Face backend: its own generation loop over a transformers model, with hooks of its own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.architectures import check_model, describe
from trimtab.backends._encode import encode
from trimtab.backends._item import Item, check_request
from trimtab.backends._memory import out_of_memory
from trimtab.backends._sampling import Sampler
from trimtab.backends._tokens import token_rows
from trimtab.backends.base import (
    Capture,
    EncodedPrompt,
    Generation,
    ModelInfo,
    OnProgress,
    Prompt,
    Request,
    Score,
    name_requests,
)
from trimtab.backends.hf._batch import Layout
from trimtab.backends.hf._checks import probe
from trimtab.backends.hf._load import load, module_device, module_dtype
from trimtab.backends.hf._run import BatchRun, CapturePlan, Setting
from trimtab.errors import BackendError, InputError, SiteError
from trimtab.numerics.dtypes import dtype_name
from trimtab.sites import Site, SitePattern, resolve_sites
from trimtab.steering import Positions, Program, Steering
from trimtab.steering.dose import Detail

if TYPE_CHECKING:
    from trimtab.trace import Writer


class HFBackend:
    """A transformers causal language model, run by our own loop; see `open_backend`.

    Args:
        model: path, hub id, "testbed", or a module (never cast, its training mode restored after each call).
        tokenizer: for a module; None means that prompts are token ids.
        dtype: what the weights are loaded in; None: float32, or the module's own.
        device: None: the accelerator where there is one.
        batch_size: requests that run together, left-padded.
        allow_fallback: steer a model whose sites were found by structure.
        attention: attention implementation; None: the model's default, eager where sdpa would drop a softcap.
        revision: of a hub model.
        prefill_chunk: most prompt tokens of one forward pass; None: the whole prompt.
        dose: "auto" measures full doses when there is a writer and counts otherwise.
        verify: probe the model's sites at load.
        template_options: more variables of the chat template.
    """

    name = "hf"

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        batch_size: int = 8,
        allow_fallback: bool = False,
        attention: str | None = None,
        revision: str | None = None,
        prefill_chunk: int | None = None,
        dose: Literal["auto", "counts", "full"] = "auto",
        verify: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        for what, value in (("batch_size", batch_size), ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise InputError(f"{what} is {value}; at least 1 was expected")
        loaded = load(model, tokenizer=tokenizer, dtype=dtype, device=device, attention=attention, revision=revision)
        self.model, self.tokenizer, self.model_id = loaded.model, loaded.tokenizer, loaded.model_id
        self._missing = loaded.missing
        self.map = describe(self.model, allow_fallback=allow_fallback)
        self._batch_size, self._chunk, self._dose = batch_size, prefill_chunk, dose
        self._template_options = dict(template_options or {})
        self._programs: WeakKeyDictionary[Steering, Program] = WeakKeyDictionary()
        self._sites = self.map.sites()
        text: Any = self.model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
        self.eos_ids = _eos_ids(self.model, text)
        dtype_found, where = module_dtype(self.model), module_device(self.model)
        self._setting = Setting(
            model=self.model,
            device=where,
            map=self.map,
            parameters=_forward_parameters(self.model),
            chunk=prefill_chunk,
        )
        self.info = ModelInfo(
            family=self.map.family,
            num_layers=self.map.num_layers,
            hidden_size=self.map.hidden_size,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],  # type: ignore[operator]
            dtype=dtype_name(dtype_found),
            device=str(where),
            fallback=self.map.fallback,
            max_positions=getattr(text, "max_position_embeddings", None),
            weights_digest=loaded.digest,
            attention=getattr(self.model.config, "_attn_implementation", None) or "",
            notes=loaded.notes + self.map.notes,
        )
        self.checks: dict[str, float | bool] = {}
        found: tuple[str, ...] = ()
        with self._running():
            doubts = check_model(self.model)
            if verify:
                self.checks, found = probe(self.model, self.map, where)
        for doubt in doubts:
            warnings.warn(doubt, UserWarning, stacklevel=3)
        self.info = replace(self.info, notes=self.info.notes + doubts + found)

    def sites(self) -> tuple[Site, ...]:
        """Return the sites that can be captured and steered, in the order of a forward pass."""
        return self._sites

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Turn a prompt into token ids, with the spans of its messages.

        Raises:
            InputError: no tokens, ids outside the vocabulary, or messages that the chat template refuses.
            PrerequisiteError: text, and the model has no tokenizer.
        """
        return encode(
            self.tokenizer,
            prompt,
            self.info.vocab_size,
            template_options=self._template_options,
            missing=self._missing,
        )

    def generate(
        self,
        requests: Sequence[Request],
        *,
        capture: Capture | None = None,
        writer: Writer | None = None,
        config: str = "",
        progress: OnProgress | None = None,
        allow_unfired: bool = False,
    ) -> list[Generation]:
        """Run the requests, `batch_size` at a time, and return their generations in order.

        See `Backend.generate` for the arguments and errors.
        """
        plan = self._plan(capture, writer)
        items = [self._item(name, request) for name, request in zip(name_requests(requests), requests, strict=True)]
        if plan is not None:
            for item in items:
                plan.positions.check(item.length)
        detail: Detail = "full" if self._dose == "full" or (self._dose == "auto" and writer is not None) else "counts"
        done: list[Generation] = []
        with self._running():
            for start in range(0, len(items), self._batch_size):
                batch = items[start : start + self._batch_size]
                run = BatchRun(
                    self._setting, self._layout(batch), batch, plan=plan, writer=writer, config=config, detail=detail
                )
                with self._memory(batch):
                    doses = run.generate(allow_unfired=allow_unfired)
                for item, dose in zip(batch, doses, strict=True):
                    if writer is not None:
                        writer.write_tokens(token_rows(self.tokenizer, item, config))
                    done.append(item.generation(self._decode(item.tokens), dose))
                if progress is not None:
                    progress(len(done), len(items))
        if plan is not None and not allow_unfired:
            plan.check_counts(items)
        return done

    def score(self, texts: Sequence[Prompt], *, steering: Steering | None = None) -> list[Score]:
        """Return the log-likelihood of each text, token by token, from one forward pass.

        Args:
            texts: text, token ids or messages.
            steering: applied to the whole text, which counts as prompt.

        Raises:
            InputError: no text, or an empty one.
        """
        requests = [Request(prompt=text, steering=steering, max_new_tokens=0) for text in texts]
        items = [self._item(name, request) for name, request in zip(name_requests(requests), requests, strict=True)]
        found: list[Score] = []
        with self._running():
            for start in range(0, len(items), self._batch_size):
                batch = items[start : start + self._batch_size]
                run = BatchRun(self._setting, self._layout(batch), batch)
                with self._memory(batch):
                    logprobs = run.score()
                found += [
                    Score(ids=item.prompt.ids, logprobs=tuple(values))
                    for item, values in zip(batch, logprobs, strict=True)
                ]
        return found

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest should say of this backend."""
        info = self.info
        return {
            "backend": self.name,
            "model": self.model_id,
            "family": info.family,
            "fallback": info.fallback,
            "weights_digest": info.weights_digest,
            "model_dtype": info.dtype,
            "device": info.device,
            "attention": info.attention,
            "batch_size": self._batch_size,
            "prefill_chunk": self._chunk,
            "float32_matmul_precision": "highest",
            "checks": dict(self.checks),
            "notes": list(info.notes),
            "sites": {
                str(site): {"module": handle.module_path, "side": handle.side, "width": handle.width}
                for site, handle in ((site, self.map.handle(site)) for site in self._sites)
            },
        }

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._programs.clear()
        del self.model, self._setting
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run in evaluation mode, without gradients, autocast or reduced matrix products; then put all back."""
        training = [module for module in self.model.modules() if module.training]
        precision = torch.get_float32_matmul_precision()
        device = self._setting.device.type
        try:
            for module in training:
                module.training = False
            if precision != "highest":
                torch.set_float32_matmul_precision("highest")
            with torch.no_grad(), torch.autocast(device, enabled=False):
                yield
        finally:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
            for module in training:
                module.training = True

    def _memory(self, batch: Sequence[Item]) -> AbstractContextManager[None]:
        longest = max(item.length + item.request.budget for item in batch)
        what = f"a batch of {len(batch)} requests of up to {longest} tokens"
        return out_of_memory(what, f"lower batch_size ({self._batch_size}) or the tokens per request")

    def _decode(self, tokens: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _layout(self, batch: Sequence[Item]) -> Layout:
        layout = Layout(batch, filler=min(self.eos_ids, default=0), device=self._setting.device)
        if layout.padded and self.info.dtype == "float64" and self.info.attention == "eager":
            raise BackendError(
                "float64 with eager attention gives NaN beside left padding; call "
                "model.set_attn_implementation('sdpa'), or run prompts of unequal length with batch_size=1"
            )
        return layout

    def _item(self, name: str, request: Request) -> Item:
        encoded = self.encode(request.prompt)
        check_request(name, request, len(encoded.ids), self.info.vocab_size, self.info.max_positions)
        program = self._program(request.steering)
        if program is not None:
            program.check_positions(len(encoded.ids))
        return Item(name, request, encoded, program, self.eos_ids, Sampler(request.sampling))

    def _program(self, steering: Steering | None) -> Program | None:
        if steering is None:
            return None
        found = self._programs.get(steering)
        if found is None:
            self.map.require_steerable()
            found = self._programs[steering] = steering.resolve(
                num_layers=self.map.num_layers,
                hidden_size=self.map.hidden_size,
                sites=self._sites,
                widths=self._width,
            )
        return found or None

    def _width(self, site: Site) -> int | None:
        return None if site.module is not None else self.map.handle(site).width

    def _plan(self, capture: Capture | None, writer: Writer | None) -> CapturePlan | None:
        if capture is None:
            return None
        if writer is None:
            raise InputError("capture was given without a writer; pass writer=TraceWriter(...), which takes the rows")
        patterns = [SitePattern.parse(text) for text in capture.sites]
        inner = [pattern for pattern in patterns if pattern.module is None]
        sites = list(resolve_sites(inner, self.map.num_layers, self.map.points)) if inner else []
        for pattern in patterns:
            if pattern.module is not None:
                sites.append(Site(pattern.point, module=pattern.module))
        for site in sites:
            if site.point.startswith("grad"):
                raise SiteError(f"{site}: a backend runs no backward pass; record gradients with the dumper")
        handles = {site: self._setting.handle(site) for site in dict.fromkeys(sites)}
        return CapturePlan(capture, Positions.parse(capture.positions), handles)


def _eos_ids(model: nn.Module, text_config: Any) -> frozenset[int]:
    """Return the ids that end a generation: the generation configuration's, else the configuration's."""
    for source in (getattr(model, "generation_config", None), model.config, text_config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
