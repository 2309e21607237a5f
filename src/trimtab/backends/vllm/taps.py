"""Which modules of a vLLM model are tapped for which sites.

A block of vLLM carries the stream as two tensors whose sum it is, and forms the sum inside a fused norm. A tap stands
where one branch is finished and not yet added: the stream there is r + x, with x the branch and r the stream so far,
which the taps themselves keep up (`Tap.after`). Nothing here imports vLLM; modules are read by their attributes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from trimtab.architectures import FAMILIES, BlockPaths, Family, Sizes
from trimtab.errors import BackendError, SiteError
from trimtab.sites import GLOBAL_POINTS, LAYER_POINTS, Site, SitePattern, nearest

_MISSING = ("PPMissingLayer", "StageMissingLayer")
_DRAFT = re.compile(r"^P?Eagle(?!2_5)|MTP(Model)?$|DFlash|DSpark|LiLiCorr|Medusa|Speculator|ExtractHiddenStates")
_MULTIMODAL = ("", "language_model.")
_BEHIND = ("attn_out", "resid_mid", "mlp_out", "resid_post")
"""Points behind a norm that follows a branch."""
_PARALLEL = "its attention and MLP read the same input (parallel block); use attn_out, mlp_out or resid_post"
_EXPERTS = "its MLP is a mixture of experts, which has no one row of neurons per token; use mlp_raw or mlp_out"
_LINEAR = "it mixes tokens by linear attention, without softmax heads; use attn_raw or attn_out"
_PER_HEAD = "vLLM keeps it between other columns of every head in one fused projection; use attn_z or attn_raw"


@dataclass(frozen=True, slots=True)
class Stage:
    """One site of a tap. The site's tensor is r + x where `over_residual`, else x."""

    site: Site
    over_residual: bool = False


@dataclass(frozen=True, slots=True)
class Tap:
    """One tensor that is read and changed, in place or beside the graph (`fused`).

    Its last dimension is the site's; those before it are rows.
    """

    name: str
    module_path: str
    side: Literal["input", "output"]
    element: int | None
    """Index in a tuple that the module returns; None: it returns the tensor."""
    columns: tuple[int, int] | None
    """The part of the last dimension that is the site's; None: all of it."""
    stages: tuple[Stage, ...]
    """In the order in which they act."""
    after: Literal["none", "set", "add"]
    """What becomes of r once the stages have changed x: nothing, r := x, or r := round(r + x)."""
    width: int
    """Of x on this rank."""
    sharded: bool = False
    """x is this rank's part of the site."""
    offset: int = 0
    """First column of this rank's part in the whole site."""
    argument: tuple[int, str] | None = None
    """Position and name of an input tap's tensor among the parameters of the module's forward."""
    projected: bool = False
    """x is what a projection returns: a tensor of its own in every compiled graph."""
    fused: Literal["norm", "embed"] | None = None
    """In a graph that is compiled for the CPU x is no tensor, but computed where it is read: it is what a norm behind a
    branch returns, or what is embedded, on its way to the first block."""

    @property
    def joins(self) -> bool:
        """Whether it only adds x to r, and x is there for the next tap to add."""
        return self.projected and not self.stages and self.after == "add"


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmMap:
    """Where every site of one vLLM model is. Made by `describe`."""

    family: str
    num_layers: int
    """Of the whole model."""
    layers: range
    """Those that this pipeline stage holds."""
    hidden_size: int
    first_layer_has_residual: bool
    """A later pipeline stage: r starts as the sum of the tensors that the stage before sent."""
    sites_widths: Mapping[Site, int] = field(repr=False)
    absent: Mapping[Site, str] = field(repr=False)
    """Why a site that other models have is missing here."""
    embed: str = ""
    """Path of the embedding."""
    positions: str | None = None
    """Path of the module whose positions are added to what is embedded, before the first block."""
    every_tap: tuple[Tap, ...] = field(repr=False)
    """All taps of this stage with all their sites, in the order of a forward pass."""

    def sites(self) -> tuple[Site, ...]:
        """Return every site of the model, those of other pipeline stages included, in the order of a forward pass."""
        return tuple(sorted(self.sites_widths, key=lambda site: site.sort_key))

    def points(self, layer: int) -> tuple[str, ...]:
        """Return the points that a layer has."""
        return tuple(point for point in LAYER_POINTS if Site(point, layer=layer) in self.sites_widths)

    def widths(self, site: Site | str) -> int:
        """Return the width of a site over all ranks.

        Raises:
            SiteError: this model does not have it.
        """
        return self.sites_widths[self._require(site)]

    def taps(self, sites: Iterable[Site | str]) -> tuple[Tap, ...]:
        """Return the taps that some sites need on this stage, those that only keep r up included.

        `logits` needs none: it is what `compute_logits` returns.

        Raises:
            SiteError: this model does not have one of the sites.
        """
        wanted = frozenset(self._require(site) for site in sites)
        kept: list[Tap] = []
        awaited = False  # whether a later tap reads r
        for tap in reversed(self.every_tap):
            stages = tuple(stage for stage in tap.stages if stage.site in wanted)
            after = tap.after if awaited else "none"
            awaited = awaited or any(stage.over_residual for stage in stages)
            if stages or after != "none":
                kept.append(replace(tap, stages=stages, after=after))
        return tuple(reversed(kept))

    def needs_residual(self, sites: Iterable[Site | str]) -> bool:
        """Whether a site is over r on this stage, so that r must be kept."""
        return any(stage.over_residual for tap in self.taps(sites) for stage in tap.stages)

    def _require(self, site: Site | str) -> Site:
        site = Site.parse(site)
        if site in self.sites_widths:
            return site
        start = f"this {self.family} model in vLLM has no {site}"
        if site.module is not None:
            raise SiteError(f"{start}: sites of any module are read with the hf backend")
        if site.layer is None:
            raise SiteError(f"{start}; it has: {', '.join(p for p in GLOBAL_POINTS if Site(p) in self.sites_widths)}")
        if not 0 <= site.layer < self.num_layers:
            near = nearest(site, self.sites_widths)
            raise SiteError(f"{start}: it has layers 0 to {self.num_layers - 1}; nearest: {near}")
        have = ", ".join(self.points(site.layer))
        raise SiteError(f"{start}: {self.absent[site]}; layer {site.layer} has: {have}")


def is_draft(model: nn.Module) -> bool:
    """Whether a model only proposes tokens for another one (EAGLE, MTP and their like); such are never steered."""
    return any(_DRAFT.search(base.__name__) for base in type(model).__mro__)


def fuses(config: Any, patterns: Iterable[str]) -> bool:
    """Whether some patterns need taps of fused tensors; asked before there is a model to describe.

    Args:
        config: the model's transformers configuration.
        patterns: of sites.

    Raises:
        SiteError: what is no pattern.
    """
    text = config.get_text_config()
    family = FAMILIES.get(text.model_type)
    if family is None or (family.vllm.block or family.block)(text).attn_out is None:
        return False
    parsed = [SitePattern.parse(one) for one in patterns]
    return any(one.point in _BEHIND or (one.point == "resid_pre" and one.ranges != ((0, 0),)) for one in parsed)


def describe(model: nn.Module, config: Any) -> VllmMap:
    """Find the sites of a model that vLLM has loaded.

    Args:
        model: what the model runner holds.
        config: its transformers configuration, with the text configuration inside when it is multimodal.

    Raises:
        BackendError: a draft model, a class of no known family, or a form in which the stream cannot be followed.
    """
    if is_draft(model):
        raise BackendError(f"{type(model).__name__} proposes tokens for another model; steer the model it serves")
    text = config.get_text_config()
    family = _family(model, text)
    return _Builder(model, family, config, text).build()


def _family(model: nn.Module, text: Any) -> Family:
    name = type(model).__name__
    named: dict[str, Family] = {arch: family for family in FAMILIES.values() for arch in family.vllm.architectures}
    if name in named:
        return named[name]
    typed: Family | None = FAMILIES.get(text.model_type)
    if name == "TransformersForCausalLM" and typed is not None and not typed.vllm.native:
        return typed
    raise BackendError(
        f"vLLM class {name} (model type {text.model_type!r}) is of no known family; known: {', '.join(sorted(named))}"
    )


class _Builder:
    """Puts a family's facts and one model's modules together."""

    def __init__(self, model: nn.Module, family: Family, config: Any, text: Any) -> None:
        self.model, self.family, self.form, self.text = model, family, family.vllm, text
        self.sizes = Sizes.of(text)
        self.paths: BlockPaths = (family.vllm.block or family.block)(text)
        self.added_after = family.vllm.added_after(config)
        self.blocks_path, self.blocks = self._find_blocks()
        self.root = self.blocks_path.rpartition(".")[0]
        self.num_layers = len(self.blocks)
        held = [index for index, block in enumerate(self.blocks) if type(block).__name__ not in _MISSING]
        self.layers = range(held[0], held[-1] + 1) if held else range(0)
        self._refuse_what_cannot_be_followed()

    def build(self) -> VllmMap:
        widths, absent = self._sites()
        taps = tuple(self._taps(widths))
        return VllmMap(
            family=self.family.name,
            num_layers=self.num_layers,
            layers=self.layers,
            hidden_size=self.sizes.hidden,
            first_layer_has_residual=self.layers.start > 0,
            sites_widths=widths,
            absent=absent,
            embed=f"{self.root}.{self.family.embed}",
            positions=f"{self.root}.{self.form.positions}" if self.form.positions else None,
            every_tap=tuple(tap for tap in taps if tap.stages),
        )

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        for prefix in _MULTIMODAL:
            try:
                found = self.model.get_submodule(prefix + self.form.layers)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return prefix + self.form.layers, found
        raise BackendError(
            f"{type(self.model).__name__} holds no blocks at {self.form.layers}, as {self.family.name} models of the "
            "tested vLLM do; vllm>=0.32,<0.33 is tested"
        )

    def _refuse_what_cannot_be_followed(self) -> None:
        name = type(self.model).__name__
        for index in self.layers:
            block = self.blocks[index]
            if getattr(block, "use_attn_reduce_scatter_for_moe", False):
                raise BackendError(
                    f"{name} splits the rows of the stream over ranks (sequence-parallel experts), so a row is not "
                    "where its request is; start vLLM without --enable-expert-parallel or data parallelism"
                )
            if getattr(block, "layer_scale", False):
                raise BackendError(f"{name} scales each branch outside any module (layer_scale), where no tap reaches")
        if 0 < self.layers.start == self.added_after:
            raise BackendError(
                f"{name} adds visual features right before layer {self.added_after}, where this pipeline stage "
                "begins; choose another split with VLLM_PP_LAYER_PARTITION"
            )

    def _linear(self, layer: int) -> bool:
        types = getattr(self.text, "layer_types", None)
        return self.paths.linear_attn is not None and types is not None and types[layer] == "linear_attention"

    def _sites(self) -> tuple[dict[Site, int], dict[Site, str]]:
        """Widths of what there is, and reasons for what there is not."""
        sizes = self.sizes
        heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        inner = {"attn_z": heads, "q": heads, "k": kv_heads, "v": kv_heads}
        widths = {Site("embed"): sizes.hidden, Site("final_norm"): sizes.hidden, Site("logits"): sizes.vocab}
        absent = {}
        for layer in range(self.num_layers):
            for point in LAYER_POINTS:
                site = Site(point, layer=layer)
                reason = self._absent(point, layer)
                if reason is None:
                    widths[site] = self._inner(layer) if point == "mlp_act" else inner.get(point, sizes.hidden)
                else:
                    absent[site] = reason
        return widths, absent

    def _absent(self, point: str, layer: int) -> str | None:
        if point == "resid_mid" and self.paths.mid is None:
            return _PARALLEL
        if point == "mlp_act" and self.form.sparse(self.text, layer):
            return _EXPERTS
        if point in ("q", "k", "v", "attn_z") and self._linear(layer):
            return _LINEAR
        mixed = {"fused_per_head": ("q", "k", "v"), "gated": ("q",)}
        return _PER_HEAD if point in mixed.get(self.paths.qkv, ()) else self.form.absent.get(point)

    def _inner(self, layer: int) -> int:
        """Width of the MLP's neurons."""
        if layer in self.layers:
            return int(
                _linear(self._require(f"{self.blocks_path}.{layer}.{self.paths.mlp}.{self.paths.down}")).input_size
            )
        config = self.text
        for name in ("intermediate_size_mlp", "intermediate_size", "n_inner"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        return 4 * self.sizes.hidden

    def _taps(self, widths: Mapping[Site, int]) -> Iterator[Tap]:
        first, last = 0 in self.layers, self.num_layers - 1 in self.layers
        if first and self.form.positions:
            embed = self._output("embed", f"{self.root}.{self.family.embed}", [Stage(Site("embed"))])
            yield replace(embed, fused="embed")
        for layer in self.layers:
            yield from self._layer(layer, f"{self.blocks_path}.{layer}", widths)
        if last:
            norm = self._output("final_norm", f"{self.root}.{self.family.final_norm}", [Stage(Site("final_norm"))])
            yield replace(norm, element=0 if self.form.returns_residual else None)

    def _layer(self, layer: int, path: str, widths: Mapping[Site, int]) -> Iterator[Tap]:
        paths, linear = self.paths, self._linear(layer)
        attn = paths.linear_attn if linear and paths.linear_attn else paths.attn
        yield from self._enter(layer, path)
        yield from (tap for tap in self._heads(layer, f"{path}.{attn}", widths))
        attn_end = [Stage(self._site("attn_out", layer))]
        if paths.mid is not None:
            attn_end.append(Stage(self._site("resid_mid", layer), True))
        yield from self._branch(layer, "attn", path, attn, paths.attn_out, attn_end, "add")
        if (act := self._site("mlp_act", layer)) in widths:
            yield self._input(f"layers.{layer}.mlp_act", f"{path}.{paths.mlp}.{paths.down}", act)
        mlp_end = [Stage(self._site("mlp_out", layer)), Stage(self._site("resid_post", layer), True)]
        followed = layer < self.added_after
        if layer + 1 < self.num_layers and not followed:
            mlp_end.append(Stage(self._site("resid_pre", layer + 1), True))
        yield from self._branch(layer, "mlp", path, paths.mlp, paths.mlp_out, mlp_end, "none" if followed else "add")

    def _enter(self, layer: int, path: str) -> Iterator[Tap]:
        """What a block receives, where that is no block's last branch."""
        pre = self._site("resid_pre", layer)
        if layer == 0:
            stages = (*(() if self.form.positions else (Stage(Site("embed")),)), Stage(pre))
            tap = self._input(f"layers.{layer}.in", path, pre, name="hidden_states")
            yield replace(tap, stages=stages, after="set", fused="embed")
        elif layer <= self.added_after:
            tap = self._input(f"layers.{layer}.in", path, pre, name="hidden_states")
            yield replace(tap, stages=(Stage(pre, True),), after="add")

    def _branch(
        self,
        layer: int,
        name: str,
        path: str,
        raw: str,
        out: str | None,
        end: list[Stage],
        after: Literal["none", "add"],
    ) -> Iterator[Tap]:
        """The output of one branch, and of the norm behind it where there is one."""
        start, label = [Stage(self._site(f"{name}_raw", layer))], f"layers.{layer}.{name}"
        element = 0 if name == "attn" and not self.form.native else None
        if out is None:
            tap = self._output(label, f"{path}.{raw}", start + end)
            yield replace(tap, element=element, after=after, projected=element is None)
        else:
            yield replace(self._output(label, f"{path}.{raw}", start), element=element)
            yield replace(self._output(f"{label}_norm", f"{path}.{out}", end), after=after, fused="norm")

    def _heads(self, layer: int, attn: str, widths: Mapping[Site, int]) -> Iterator[Tap]:
        """q, k, v and what enters the output projection."""
        wanted = [point for point in ("q", "k", "v") if self._site(point, layer) in widths]
        for point in wanted:
            yield self._projection(point, layer, attn, widths)
        z = self._site("attn_z", layer)
        if z in widths:
            yield self._input(f"layers.{layer}.attn_z", f"{attn}.{self.paths.o}", z)

    def _projection(self, point: str, layer: int, attn: str, widths: Mapping[Site, int]) -> Tap:
        """One of q, k, v: columns of the fused projection, [q, k, v] of this rank's heads."""
        fused = self.paths.fused
        path = f"{attn}.{fused}" if hasattr(self.model.get_submodule(attn), fused) else f"{attn}.{point}_proj"
        module = _linear(self.model.get_submodule(path))
        site = self._site(point, layer)
        whole, columns, offset = widths[site], None, 0
        width = whole
        if hasattr(module, "num_kv_heads"):
            q, kv = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
            begin = {"q": 0, "k": q, "v": q + kv}[point]
            width = q if point == "q" else kv
            columns = (begin, begin + width)
            offset = (module.tp_rank // (1 if point == "q" else module.num_kv_head_replicas)) * width
        elif hasattr(module, "output_size_per_partition"):
            width = module.output_size_per_partition
            offset = module.tp_rank * width if width != whole else 0
        tap = self._output(f"layers.{layer}.{point}", path, [Stage(site)])
        element = 0 if module.return_bias else None
        return replace(tap, element=element, columns=columns, width=width, sharded=width != whole, offset=offset)

    def _output(self, name: str, path: str, stages: list[Stage]) -> Tap:
        self._require(path)
        return Tap(name, path, "output", None, None, tuple(stages), "none", self.sizes.hidden)

    def _input(self, label: str, path: str, site: Site, name: str | None = None) -> Tap:
        module = self._require(path)
        width, sharded, offset = self.sizes.hidden, False, 0
        if name is None:
            projection = _linear(module)
            width = getattr(projection, "input_size_per_partition", projection.input_size)
            sharded = width != projection.input_size
            offset = projection.tp_rank * width if sharded else 0
        argument = _argument(module, name)
        return Tap(label, path, "input", None, None, (Stage(site),), "none", width, sharded, offset, argument)

    def _require(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise BackendError(
                f"{type(self.model).__name__} has no module {path}, as {self.family.name} models of the tested vLLM "
                "do; vllm>=0.32,<0.33 is tested"
            ) from None

    @staticmethod
    def _site(point: str, layer: int) -> Site:
        return Site(point, layer=layer)


def _linear(module: nn.Module) -> Any:
    """A projection, without the wrapper that LoRA puts around it."""
    return getattr(module, "base_layer", module)


def _argument(module: nn.Module, name: str | None) -> tuple[int, str]:
    """Position and name of a parameter of a module's forward; the first one when no name is given."""
    names = list(inspect.signature(module.forward).parameters)
    position = 0 if name is None else names.index(name)
    return position, names[position]
