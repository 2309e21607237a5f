"""The backend on vLLM: the laws of `trimtab.backends.base`, on a stock engine with the plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.backends import _digest
from trimtab.backends._encode import encode
from trimtab.backends._item import check_request
from trimtab.backends._place import VOCABULARIES, has_vocabulary, locate
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
    num_rows,
)
from trimtab.backends.vllm import results
from trimtab.backends.vllm.client import attach
from trimtab.backends.vllm.config import DEFAULT_SITES, Storage
from trimtab.backends.vllm.engine import start
from trimtab.backends.vllm.results import Job
from trimtab.errors import BackendError, InputError, SteeringError, TrimtabError
from trimtab.numerics import dtype_name, resolve_dtype
from trimtab.sites import Site
from trimtab.steering import Positions

if TYPE_CHECKING:
    import torch

    from trimtab.steering import Program, Steering
    from trimtab.trace import Writer

_CHUNK_BYTES = 1 << 28
"""Recorded rows that a worker holds for one call."""


class VLLMBackend:
    """A model in an engine of its own.

    Args:
        model: a directory, a hub id, or "testbed".
        dtype: of weights and arithmetic; None: the model's own.
        device: "cpu" or "cuda"; None: what this vLLM was built for.
        batch_size: sequences that the engine runs at once (vLLM's max_num_seqs).
        sites: site patterns that can be steered, besides the output of every block.
        capture_sites: further site patterns that can be recorded.
        max_steering: distinct steerings that can act at once.
        ops_per_site: ops of one steering at one site.
        directions_per_op: directions of one op.
        keys_per_steering: distinct pairs of positions and gain in one steering.
        storage: dtype that the directions are stored in; "bfloat16" takes half the memory and rounds them.
        max_payload_bytes: largest steering, in the bytes of its file.
        engine: any other argument of `vllm.LLM`, such as gpu_memory_utilization or tensor_parallel_size.
        dose: "auto" measures full doses when there is a writer and counts otherwise.
        prefix_caching: reuse the cache of equal prompts; rows taken from it are not counted in doses.
        template_options: more variables of the chat template.

    Raises:
        PrerequisiteError: vLLM is not installed, or not a tested release.
        BackendError: the engine did not start; the message has its reason and which option to lower.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        batch_size: int = 64,
        allow_fallback: bool = False,
        sites: Sequence[str] = (),
        capture_sites: Sequence[str] = (),
        max_steering: int = 64,
        ops_per_site: int = 4,
        directions_per_op: int = 1,
        keys_per_steering: int = 4,
        storage: Storage = "float32",
        max_payload_bytes: int = 1 << 30,
        engine: Mapping[str, Any] | None = None,
        dose: Literal["auto", "counts", "full"] = "auto",
        prefix_caching: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, (str, Path)):
            raise InputError(f"the vllm backend loads models itself; a name was expected, got {type(model).__name__}")
        if allow_fallback:
            raise InputError("allow_fallback: vLLM runs the families it knows; use the hf backend for other models")
        self.model_id = str(model)
        place = locate(self.model_id)
        folder = Path(place)
        self._bare = folder.is_dir() and not has_vocabulary(folder)
        settings = {
            "sites": list(dict.fromkeys([*DEFAULT_SITES, *sites])),
            "capture_sites": list(dict.fromkeys(capture_sites)),
            "max_steering": max_steering,
            "ops_per_site": ops_per_site,
            "directions_per_op": directions_per_op,
            "keys_per_steering": keys_per_steering,
            "storage": storage,
            "max_payload_bytes": max_payload_bytes,
        }
        self._llm = start(
            place,
            dtype="auto" if dtype is None else dtype_name(resolve_dtype(dtype)),
            device=device,
            batch_size=batch_size,
            prefix_caching=prefix_caching,
            tokenizer=not self._bare,
            settings=settings,
            engine=dict(engine or {}),
        )
        self._client = attach(self._llm)
        self._dose, self._template_options = dose, dict(template_options or {})
        config = self._llm.llm_engine.vllm_config
        self.tokenizer = None if self._bare else self._llm.get_tokenizer()
        self.eos_ids = _eos_ids(config.model_config)
        found = self._client.info
        self.info = ModelInfo(
            family=found.family,
            num_layers=found.num_layers,
            hidden_size=found.hidden_size,
            vocab_size=config.model_config.get_vocab_size(),
            dtype=dtype_name(config.model_config.dtype),
            device=str(config.device_config.device_type),
            max_positions=config.model_config.max_model_len - 1,
            weights_digest=_digest.of_directory(folder) if folder.is_dir() else "",
            attention="vllm",
            notes=(f"steering holds {found.buffer_bytes / 2**20:.1f} MiB of buffers",),
        )

    def sites(self) -> tuple[Site, ...]:
        """Return the sites that can be captured and steered, in the order of a forward pass."""
        return tuple(self._client.info.widths)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Turn a prompt into token ids, with the spans of its messages."""
        missing = f"{self.model_id} has none of {', '.join(VOCABULARIES)}; copy its tokenizer there"
        return encode(
            self.tokenizer,
            prompt,
            self.info.vocab_size,
            template_options=self._template_options,
            missing=missing if self._bare else "",
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
        """Run the requests, all at once as the engine schedules them; see `Backend.generate`."""
        sites = self._captured(capture, writer)
        jobs = self._jobs(requests, capture)
        full = self._dose == "full" or (self._dose == "auto" and writer is not None)
        done: list[Generation] = []
        for part in self._parts(jobs, sites):
            for job in part:
                job.params = self._params(job, capture, full and job.program is not None)
            self._run(part)
            for job in part:
                done.append(results.finish(job, sites, capture, writer, config, allow_unfired, self.tokenizer))
                if writer is not None:
                    writer.write_tokens(token_rows(self.tokenizer, job, config))
            if progress is not None:
                progress(len(done), len(jobs))
        return done

    def score(self, texts: Sequence[Prompt], *, steering: Steering | None = None) -> list[Score]:
        """Return the log-likelihood of each text, token by token.

        Raises:
            BackendError: a steering at `logits`: vLLM computes those of a prompt apart.
        """
        if steering is not None and "logits" in steering.sites:
            raise BackendError("score with a steering at logits is not possible in vLLM; use the hf backend")
        requests = [Request(prompt=text, steering=steering, max_new_tokens=0) for text in texts]
        jobs = self._jobs(requests, None)
        for job in jobs:
            job.params = self._params(job, None, full=False, prompt_logprobs=0)
        self._run(jobs)
        return [results.score(job) for job in jobs]

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest should say of this backend."""
        import vllm

        return {
            "backend": self.name,
            "model": self.model_id,
            "model_dtype": self.info.dtype,
            "weights_digest": self.info.weights_digest,
            "device": self.info.device,
            "vllm": vllm.__version__,
            "eager": bool(self._llm.llm_engine.vllm_config.model_config.enforce_eager),
        }

    def close(self) -> None:
        """End the engine."""
        core = getattr(self._llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()

    def _jobs(self, requests: Sequence[Request], capture: Capture | None) -> list[Job]:
        """Return what runs; a prompt or a steering that many requests share is looked at once."""
        prompts = {id(one.prompt): one.prompt for one in requests}
        encoded = {key: self.encode(prompt) for key, prompt in prompts.items()}
        steerings = {id(one.steering): one.steering for one in requests if one.steering is not None}
        programs = {key: self._program(steering) for key, steering in steerings.items()}
        return [
            self._job(name, one, encoded[id(one.prompt)], programs.get(id(one.steering)), capture)
            for name, one in zip(name_requests(requests), requests, strict=True)
        ]

    def _program(self, steering: Steering) -> Program:
        if not steering.serialisable:
            raise SteeringError("Edit is Python code and cannot be sent to vLLM's workers; use the hf backend")
        return steering.resolve(
            num_layers=self.info.num_layers,
            hidden_size=self.info.hidden_size,
            sites=self.sites(),
            widths=lambda site: self._client.info.widths.get(site),
        )

    def _job(
        self, name: str, request: Request, encoded: EncodedPrompt, program: Program | None, capture: Capture | None
    ) -> Job:
        length = len(encoded.ids)
        check_request(name, request, length, self.info.vocab_size, self.info.max_positions)
        if program is not None:
            program.check_positions(length)
        if capture is not None:
            Positions.parse(capture.positions).check(length)
        return Job(name, request, encoded, program)

    def _captured(self, capture: Capture | None, writer: Writer | None) -> tuple[Site, ...]:
        if capture is None:
            return ()
        if writer is None:
            raise InputError("capture was given without a writer; pass writer=TraceWriter(...), which takes the rows")
        if any(text.startswith("module:") for text in capture.sites):
            raise BackendError("sites of any module are read with the hf backend; vLLM has the sites of sites()")
        return self._client.recorded(capture.sites)

    def _params(self, job: Job, capture: Capture | None, full: bool, **settings: Any) -> Any:
        request, sampling = job.request, job.request.sampling
        options: dict[str, Any] = {"dose": "full" if full else "counts"}
        options["check_logits"] = request.logprobs is None and request.budget > 0
        if capture is not None:
            options |= {"sites": capture.sites, "edit": capture.edit, "positions": capture.positions}
            options["prompt_logits"] = capture.prompt_logits
        if request.forced_tokens:
            options["forced"] = request.forced_tokens
        stops = [] if request.ignore_eos or request.forced_tokens is not None else sorted(self.eos_ids)
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed % (1 << 63),
            "max_tokens": max(request.budget, 1),
            "ignore_eos": True,
            "stop_token_ids": stops,
            "logprobs": request.logprobs,
            "flat_logprobs": True,
            "detokenize": False,
            **settings,
        }
        return self._client.params(request.steering, **options, **settings)

    def _parts(self, jobs: Sequence[Job], sites: Sequence[Site]) -> Iterator[list[Job]]:
        """Share the requests out so that the rows that a worker holds for the client stay bounded."""
        widths = self._client.info.widths
        row = 8 * sum(widths[site] for site in sites)  # both edits, four bytes
        part: list[Job] = []
        size = 0
        for job in jobs:
            needs = row * num_rows(job.length, job.request.budget)
            if part and size + needs > _CHUNK_BYTES:
                yield part
                part, size = [], 0
            part.append(job)
            size += needs
        if part:
            yield part

    def _run(self, jobs: Sequence[Job]) -> None:
        prompts: list[Any] = [{"prompt_token_ids": list(job.prompt.ids)} for job in jobs]
        params = [job.params for job in jobs]
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise BackendError(
                f"the engine stopped: {' '.join(str(error).split())[:400]}; open the backend again, with a lower "
                "batch_size or more memory (gpu_memory_utilization) if it ran out of it"
            ) from error
        refused = [job for job, output in zip(jobs, outputs, strict=True) if output.outputs[0].finish_reason == "error"]
        if refused:
            self._client.discard(params)
            raise BackendError(f"request {refused[0].name!r}: {self._why(refused[0])}")
        for job, output, report in zip(jobs, outputs, self._client.collect(params), strict=True):
            job.take(output, report[0])

    def _why(self, job: Job) -> str:
        """Return why the engine refused a request."""
        try:
            self._client.collect([job.params])
        except TrimtabError as error:
            return str(error)
        return "it was refused by the engine; its log has the reason"


def _eos_ids(model_config: Any) -> frozenset[int]:
    """Return the ids that end a generation: the generation configuration's, else the configuration's."""
    generation = model_config.try_get_generation_config() or {}
    sources = (
        generation.get("eos_token_id"),
        *(getattr(one, "eos_token_id", None) for one in (model_config.hf_config, model_config.hf_text_config)),
    )
    for found in sources:
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
