"""A backend without transformers, batching, padding or a cache: the laws of a backend in their plainest form.

Its model is a small random decoder (causal mean instead of attention) over ASCII characters. Every step runs the whole
sequence again, one request at a time, and rows are captured by one last pass, so nothing here can go wrong in the ways
that the other backends must guard against. Use it in tests of what consumes a backend.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.backends._capture import RowOwner, RowSink, Slot, Taken
from trimtab.backends._doses import DoseLedger, DoseOwner
from trimtab.backends._encode import encode
from trimtab.backends._item import Item, check_request
from trimtab.backends._sampling import LogProbs, Sampler
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
from trimtab.errors import BackendError, InputError, NonFiniteError
from trimtab.numerics.dtypes import dtype_name, resolve_dtype
from trimtab.sites import Site, resolve_sites
from trimtab.steering import Positions, Program, Rows, Steering

if TYPE_CHECKING:
    from trimtab.trace import Writer

VOCABULARY = 128
BOS, EOS = 1, 2
_POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
Touch = Callable[[Site, Tensor], Tensor]


class MockTokenizer:
    """One token per ASCII character; other characters become "?". A chat turn is `<role>content` and a line end."""

    is_fast = True
    bos_token = chr(BOS)
    eos_token_id = EOS
    chat_template = "built in"

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Return `input_ids`, and `offset_mapping` when asked for."""
        ids = [ord(one) if ord(one) < VOCABULARY else ord("?") for one in text]
        offsets = [(index, index + 1) for index in range(len(ids))]
        if add_special_tokens:
            ids, offsets = [BOS, *ids], [(0, 0), *offsets]
        return {"input_ids": ids, **({"offset_mapping": offsets} if return_offsets_mapping else {})}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        return "".join(chr(one) for one in ids if not (skip_special_tokens and one in (BOS, EOS)))

    def apply_chat_template(
        self,
        turns: Sequence[Mapping[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Render a conversation."""
        text = self.bos_token + "".join(f"<{turn['role']}>{turn['content'].strip()}\n" for turn in turns)
        if continue_final_message:
            return text[:-1]
        return text + "<assistant>" if add_generation_prompt else text


class MockBackend:
    """A backend on a small random model; see `open_backend`.

    Args:
        model: any name; the weights are drawn from it.
        dtype: dtype of the weights and the arithmetic; None: float32.
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        max_positions: most positions of a request.
        device: "cpu"; there is no other here.
        batch_size: taken for symmetry; prompts run one at a time.
        allow_fallback: taken for symmetry; the model is known.
    """

    name = "mock"

    def __init__(
        self,
        model: str = "mock",
        *,
        dtype: str | torch.dtype | None = None,
        layers: int = 2,
        hidden_size: int = 16,
        max_positions: int = 512,
        device: str | None = None,
        batch_size: int = 8,
        allow_fallback: bool = False,
    ) -> None:
        if not isinstance(model, str):
            raise InputError(f"the mock backend has its own model; a name was expected, got {type(model).__name__}")
        if device not in (None, "cpu"):
            raise InputError(f"the mock backend runs on the cpu; device={device!r} was asked for")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; at least 1 was expected")
        self.model_id = model
        self.tokenizer = MockTokenizer()
        self.eos_ids = frozenset([EOS])
        self._dtype = resolve_dtype("float32" if dtype is None else dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(model.encode()))

        def draw(*shape: int) -> Tensor:
            drawn: Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            return drawn.to(self._dtype)

        self._embed = draw(VOCABULARY, hidden_size) * 2
        self._mix = [draw(hidden_size, hidden_size) for _ in range(layers)]
        self._mlp = [draw(hidden_size, hidden_size) for _ in range(layers)]
        self._head = draw(VOCABULARY, hidden_size) * 2
        self.info = ModelInfo(
            family="mock",
            num_layers=layers,
            hidden_size=hidden_size,
            vocab_size=VOCABULARY,
            dtype=dtype_name(self._dtype),
            device="cpu",
            max_positions=max_positions,
            weights_digest=f"mock:{model}:{layers}x{hidden_size}",
        )

    def sites(self) -> tuple[Site, ...]:
        """Return the sites that can be captured and steered, in the order of a forward pass."""
        inner = [Site(point, layer=layer) for layer in range(self.info.num_layers) for point in _POINTS]
        return (Site("embed"), *inner, Site("final_norm"), Site("logits"))

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Turn a prompt into token ids, with the spans of its messages."""
        return encode(self.tokenizer, prompt, VOCABULARY)

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
        """Run the requests one after the other; see `Backend.generate`."""
        sites = self._captured(capture, writer)
        items = [self._item(name, request) for name, request in zip(name_requests(requests), requests, strict=True)]
        done = []
        for item in items:
            if capture is not None:
                Positions.parse(capture.positions).check(item.length)
            self._decode(item)
            owner = DoseOwner(item.name, item.request.prompt_index, item.program, item.length)
            ledger = DoseLedger([owner], config=config, writer=writer)
            calls = self._record(item, ledger, sites, capture, writer, config)
            doses = ledger.finish([item.rows], calls, allow_unfired=allow_unfired)[0]
            if writer is not None:
                writer.write_tokens(token_rows(self.tokenizer, item, config))
            done.append(item.generation(self.tokenizer.decode(item.tokens, skip_special_tokens=True), doses))
            if progress is not None:
                progress(len(done), len(items))
        return done

    def score(self, texts: Sequence[Prompt], *, steering: Steering | None = None) -> list[Score]:
        """Return the log-likelihood of each text, token by token."""
        requests = [Request(prompt=text, steering=steering, max_new_tokens=0) for text in texts]
        found = []
        for name, request in zip(name_requests(requests), requests, strict=True):
            item = self._item(name, request)
            ids = torch.tensor(item.prompt.ids)
            logits = self._forward(item.prompt.ids, self._steer(item, from_row=0))
            found.append(Score(ids=item.prompt.ids, logprobs=tuple(LogProbs(logits[:-1]).of(ids[1:]).tolist())))
        return found

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest should say of this backend."""
        return {"backend": self.name, "model": self.model_id, "model_dtype": self.info.dtype, "device": "cpu"}

    def close(self) -> None:
        """Do nothing."""

    def _item(self, name: str, request: Request) -> Item:
        encoded = self.encode(request.prompt)
        check_request(name, request, len(encoded.ids), VOCABULARY, self.info.max_positions)
        program = Program({})
        if request.steering is not None:
            program = request.steering.resolve(
                num_layers=self.info.num_layers,
                hidden_size=self.info.hidden_size,
                sites=self.sites(),
                widths=lambda site: VOCABULARY if site.point == "logits" else None,
            )
            program.check_positions(len(encoded.ids))
        return Item(name, request, encoded, program, self.eos_ids, Sampler(request.sampling))

    def _captured(self, capture: Capture | None, writer: Writer | None) -> tuple[Site, ...]:
        if capture is None:
            return ()
        if writer is None:
            raise InputError("capture was given without a writer; pass writer=TraceWriter(...), which takes the rows")
        if any(text.startswith("module:") for text in capture.sites):
            raise BackendError(f"the mock model has no modules; its sites are {', '.join(map(str, self.sites()))}")
        return resolve_sites(capture.sites, self.info.num_layers, lambda layer: _POINTS)

    def _decode(self, item: Item) -> None:
        while item.stop is None:
            logits = self._forward((*item.prompt.ids, *item.tokens), self._steer(item))[-1:]
            shares = LogProbs(logits)
            token = int(shares.values.argmax()) if item.greedy else item.choose(shares.values[0])
            best, ids = (column[0].tolist() for column in shares.top(max(item.request.logprobs or 0, 1)))
            item.accept(token, shares.of(torch.tensor([token])).item(), tuple(zip(ids, best, strict=True)))

    def _record(
        self,
        item: Item,
        ledger: DoseLedger,
        sites: Sequence[Site],
        capture: Capture | None,
        writer: Writer | None,
        config: str,
    ) -> dict[Site, int]:
        """Run all rows once more, counting doses and writing the rows that are captured."""
        ids = (*item.prompt.ids, *item.tokens)[: item.rows]
        calls: dict[Site, int] = {}
        edited = set(item.program or ())
        sink = None
        if capture is not None and writer is not None:
            owners = [RowOwner(item.name, item.request.prompt_index)]
            sink = RowSink(writer, owners, slots=2 * len(sites), config=config, counts={})
        steer = self._steer(item, ledger=ledger)

        def touch(site: Site, x: Tensor) -> Tensor:
            calls[site] = calls.get(site, 0) + 1
            wanted = sink is not None and site in sites
            if wanted and site in edited and capture is not None and "before" in capture.edit:
                self._take(sink, item, site, "before", x, capture)
            x = steer(site, x)
            if wanted and capture is not None and (site not in edited or "after" in capture.edit):
                self._take(sink, item, site, "after" if site in edited else "none", x, capture)
            return x

        self._forward(ids, touch)
        return calls

    def _take(self, sink: Any, item: Item, site: Site, edit: Any, x: Tensor, capture: Capture) -> None:
        places = torch.arange(len(x))
        tokens = torch.tensor((*item.prompt.ids, *item.tokens))[: len(x)]
        wanted = Positions.parse(capture.positions).mask(places, item.length, tokens)
        if site.point == "logits" and not capture.prompt_logits:
            wanted &= (places >= item.length - 1) & bool(item.request.budget)
        index = places[wanted].tolist()
        slot = Slot(site, edit, (0,))
        sink.take(slot, x[None], Taken([index], [index], len(x)))
        sink.flush(slot)

    def _steer(self, item: Item, *, ledger: DoseLedger | None = None, from_row: int | None = None) -> Touch:
        """Return a function that applies the ops of a request to all its rows, or to logits from `from_row` on."""
        first = item.length - 1 if from_row is None else from_row

        def touch(site: Site, x: Tensor) -> Tensor:
            program = None if item.program is None else item.program.get(site)
            if program is None:
                return x
            start = first if site.point == "logits" else 0
            places = torch.arange(start, len(x))
            tokens = torch.tensor((*item.prompt.ids, *item.tokens))[start : len(x)]
            rows = Rows(places, item.length, tokens)
            try:
                applied = program.apply(x[start:], rows, detail="counts" if ledger is None else "full")
            except NonFiniteError as error:
                raise NonFiniteError(f"request {item.name!r}: {error}") from error
            if ledger is not None:
                ledger.add(program, applied.dose, rows, torch.zeros_like(places))
            return torch.cat((x[:start], applied.h))

        return touch

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], touch: Touch) -> Tensor:
        x = touch(Site("embed"), self._embed[torch.tensor(ids)])
        count = torch.arange(1, len(ids) + 1).to(self._dtype)[:, None]
        for layer, (mix, mlp) in enumerate(zip(self._mix, self._mlp, strict=True)):
            x = touch(Site("resid_pre", layer=layer), x)
            x = x + touch(Site("attn_out", layer=layer), (x.cumsum(0) / count) @ mix)
            x = touch(Site("resid_mid", layer=layer), x)
            x = x + touch(Site("mlp_out", layer=layer), torch.tanh(x @ mlp))
            x = touch(Site("resid_post", layer=layer), x)
        scale = x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(self._dtype)
        x = touch(Site("final_norm"), x * scale)
        return touch(Site("logits"), x @ self._head.T)
