"""Engines that are planned, run in a process of their own, and compared row by row with our Hugging Face backend."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trimtab.backends import Capture, Request, open_backend
from trimtab.numerics.tolerances import engine_row_rel_l2
from trimtab.sites import Site
from trimtab.steering import Steering
from trimtab.testing import models
from trimtab.testing.memory import MemoryWriter

WIDTH, LAYERS, BOUND = 128, 3, 2e-5
KINDS = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},
}
PROMPTS = ((5, 17, 99, 3, 64, 28, 7), (40, 41, 42, 9, 11, 90, 77, 13, 8, 101, 60, 31) * 2)


def family_model(family: str) -> nn.Module:
    """Return a tiny model with heads of 32, the smallest that vLLM's CPU attention takes."""
    config = models.tiny(family, layers=LAYERS).config
    text: Any = config.get_text_config()
    heads = {"hidden_size": WIDTH, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    changes = {
        **heads,
        "shared_expert_intermediate_size": 64,
        "n_embd": WIDTH,
        "n_inner": 128,
        "attention_chunk_size": 64,
    }
    changes |= {"intermediate_size_mlp": 128, "query_pre_attn_scalar": 32}
    changes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "attention_chunk_size": 32}
    for name, value in changes.items():
        if name in text.__dict__:
            setattr(text, name, value)
    if text.__dict__.get("num_key_value_heads", 1) is None:
        del text.num_key_value_heads
    if family == "llama4":
        text.num_experts_per_tok = 1  # all that vLLM's experts do with a weight on their input
    if family == "qwen3_moe":
        del text.shared_expert_intermediate_size  # vLLM would make a shared expert, for which there are no weights
    if family == "qwen3_vl_moe":
        text.norm_topk_prob = True
        text.moe_intermediate_size = 96  # the two layouts of its experts are told apart by their shapes
    if "_vl" in family:
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
        vision = config.vision_config
        for name in ("out_hidden_size", "hidden_size") if family == "qwen2_vl" else ("out_hidden_size",):
            setattr(vision, name, WIDTH)
    tied = family == "gemma2"  # vLLM's class has no head of its own
    if tied:
        config.tie_word_embeddings = True
    kind = type(models.tiny(family, layers=LAYERS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: nn.Module = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                models._randomise(name, parameter)
    if tied:
        model.tie_weights()
    config.architectures = [kind.__name__]
    return model


def save(family: str, folder: Path) -> Path:
    model: Any = family_model(family)
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        _lay_experts_as_released(folder / "model.safetensors")
    return folder


def _lay_experts_as_released(path: Path) -> None:
    """Qwen's own files, the only ones that vLLM reads, hold each expert's matrices as [in, out]."""
    tensors = safetensors.torch.load_file(path)
    turned = {name: one.mT.contiguous() if ".experts." in name else one for name, one in tensors.items()}
    safetensors.torch.save_file(turned, path, metadata={"format": "pt"})


@functools.cache
def direction(seed: int, width: int = WIDTH, rows: int = 1) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return drawn[0] if rows == 1 else drawn


@dataclass(frozen=True)
class Asked:
    """One request, for both backends."""

    prompt: tuple[int, ...]
    steering: Steering | None
    sites: tuple[str, ...]
    tokens: int


class Group:
    """Engines that share a process, and the reference of each request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: list[dict[str, Any]] = []
        self.models: dict[str, tuple[Path | str, str]] = {}
        self.asked: dict[str, list[Asked]] = {}
        self.forced: dict[str, list[tuple[int, ...]] | None] = {}

    def add(
        self,
        name: str,
        model: Path,
        asked: list[Asked],
        *,
        settings: dict[str, Any],
        dtype: str = "float32",
        forced: list[tuple[int, ...]] | None = None,
        **engine: Any,
    ) -> None:
        """Plan an engine."""
        requests = []
        for number, one in enumerate(asked):
            path = None
            if one.steering is not None:
                path = self.folder / f"{name}-{number}.steering"
                one.steering.save(path)
            requests.append(
                {
                    "prompt": one.prompt,
                    "steering": None if path is None else str(path),
                    "sites": one.sites,
                    "tokens": one.tokens,
                    "forced": None if forced is None else forced[number],
                }
            )
        self.models[name], self.asked[name], self.forced[name] = (model, dtype), asked, forced
        engine = {"dtype": dtype, "enforce_eager": True, **engine}
        self.plan.append(
            {"name": name, "model": str(model), "settings": settings, "engine": engine, "requests": requests}
        )

    def run(self) -> None:
        """Run the engines, one after the other."""
        path = self.folder / "plan.json"
        path.write_text(json.dumps(self.plan))
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        if any("language_model_only" in one["engine"] for one in self.plan):
            settings["PYTHONPATH"] = str(Path(__file__).with_name("stand_ins"))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("families_engine.py")), str(path)],
            env=os.environ | settings | {"VLLM_LOGGING_LEVEL": "ERROR"},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        (self.folder / "said.txt").write_text(done.stdout + done.stderr)

    def found(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what an engine made."""
        path = self.folder / f"{name}.json"
        assert path.exists(), (self.folder / "said.txt").read_text()[-3000:]
        document = json.loads(path.read_text())
        assert "error" not in document, document["error"][-3000:]
        return document, safetensors.torch.load_file(self.folder / f"{name}.safetensors")

    def reference(self, name: str, dtype: str | None = None) -> tuple[list[tuple[int, ...]], MemoryWriter]:
        """Return the tokens and rows of our Hugging Face backend, in the engine's dtype or another."""
        model, own = self.models[name]
        backend = open_backend("hf", str(model), dtype=dtype or own)
        forced = self.forced[name]
        writer = MemoryWriter()
        sites = self.asked[name][0].sites
        made = backend.generate(
            [
                Request(
                    prompt=one.prompt,
                    id=str(number),
                    steering=one.steering,
                    max_new_tokens=one.tokens,
                    forced_tokens=None if forced is None else forced[number],
                    ignore_eos=True,
                )
                for number, one in enumerate(self.asked[name])
            ],
            capture=Capture(sites=sites),
            writer=writer,
        )
        backend.close()
        return [one.token_ids for one in made], writer


def errors(rows: dict[str, Tensor], writer: MemoryWriter) -> dict[str, float]:
    """Return the largest rel_l2 of a row, per request and site."""
    found = {}
    for name, mine in rows.items():
        number, _, site = name.partition("/")
        _, theirs = writer.rows(site, number)
        assert mine.shape == theirs.shape
        ours, reference = mine.double(), theirs.double()
        found[name] = float(((ours - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)).max())
    return found


def too_far(group: Group, name: str, rows: dict[str, Tensor], writer: MemoryWriter, layers: int) -> dict[str, float]:
    """Return the errors above what is allowed, in the order of the rows.

    In float32 the stated bound. In 16 bits the table's for the site's depth, or where that is more what two independent
    roundings can differ by: twice the reference's own distance from float32, on the same tokens.
    """
    dtype, found = group.models[name][1], errors(rows, writer)
    if dtype == "float32":
        return {where: error for where, error in found.items() if not error < BOUND}
    _, exact = group.reference(name, "float32")
    rounded = {where: writer.rows(where.partition("/")[2], where.partition("/")[0])[1] for where in found}
    wrong = {}
    for where, own in errors(rounded, exact).items():
        layer = Site.parse(where.partition("/")[2]).layer
        table = engine_row_rel_l2(dtype, layers if layer is None else layer)
        if not found[where] < max(table, 2 * own):
            wrong[where] = found[where]
    return wrong
