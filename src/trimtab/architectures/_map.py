"""`ModelMap`: the sites of one model and the facts about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from trimtab.architectures._family import Family, Numerics, Sizes
from trimtab.architectures._handle import Handle
from trimtab.errors import BackendError, SiteError
from trimtab.sites import GLOBAL_POINTS, LAYER_POINTS, Site, nearest

_ABSENT = {
    "resid_mid": "its attention and MLP read the same input (parallel block); use attn_out, mlp_out or resid_post",
    "mlp_act": "its MLP is a mixture of experts, which has no one row of neurons per token; use mlp_raw or mlp_out",
    "attn_z": "it mixes tokens by linear attention, without softmax heads; use attn_raw or attn_out",
}
_ABSENT["q"] = _ABSENT["k"] = _ABSENT["v"] = _ABSENT["attn_z"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMap:
    """Where every site of one model is. Made by `describe`.

    Example:
        >>> model_map = describe(model)
        >>> model_map.handle(Site.parse("layers.1.resid_post")).module_path
        'model.layers.1'
    """

    family: str
    model_type: str
    fallback: bool
    """Found by structure, not by the table: reading works, steering needs consent."""
    steerable: bool
    num_layers: int
    sizes: Sizes
    text_path: str
    """Path of the module that owns the decoder blocks; "" is the model itself."""
    blocks_path: str
    numerics: Numerics | None
    """None for a model found by structure."""
    definition: Family | None
    """The family's table entry with weight names and vLLM classes; None for a model found by structure."""
    handles: Mapping[Site, Handle] = field(repr=False)
    absent: Mapping[Site, str] = field(default_factory=dict, repr=False)
    """Why a site that other models have is missing here."""
    notes: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.sizes.hidden

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.sizes.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.sizes.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.sizes.head_dim

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.sizes.vocab

    def points(self, layer: int) -> tuple[str, ...]:
        """Return the points that a layer has."""
        return tuple(point for point in LAYER_POINTS if Site(point, layer=layer) in self.handles)

    def sites(self) -> tuple[Site, ...]:
        """Return every site, in the order of a forward pass."""
        return tuple(sorted(self.handles, key=lambda site: site.sort_key))

    def handle(self, site: Site | str) -> Handle:
        """Return where a site is.

        Raises:
            SiteError: this model does not have it; the message says why and names what there is.
        """
        site = Site.parse(site)
        found = self.handles.get(site)
        if found is None:
            raise SiteError(self._why_absent(site))
        return found

    def require_steerable(self) -> None:
        """Refuse to steer a model whose sites were found by structure, unless that was allowed.

        Raises:
            BackendError: the model is of no known family and `allow_fallback` was not given.
        """
        if not self.steerable:
            raise BackendError(
                f"model type {self.model_type!r} is in no table of architectures; its sites were found by structure, "
                "which is good for reading only; pass allow_fallback=True to steer it all the same"
            )

    def _why_absent(self, site: Site) -> str:
        start = f"this {self.family} model has no {site}"
        if site.module is not None:
            return f"{start}: module sites are taken from the module tree, not from the model's map"
        if site.layer is None:
            have = ", ".join(point for point in GLOBAL_POINTS if Site(point) in self.handles)
            return f"{start}: {self.absent.get(site, 'its class has no such module')}; it has: {have}"
        if not 0 <= site.layer < self.num_layers:
            return f"{start}: it has layers 0 to {self.num_layers - 1}; nearest: {nearest(site, self.handles)}"
        reason = self.absent.get(site) or _ABSENT.get(site.point, "its blocks do not expose it")
        return f"{start}: {reason}; layer {site.layer} has: {', '.join(self.points(site.layer))}"


def global_handles(
    model: nn.Module, sizes: Sizes, paths: Mapping[str, str | None], *, has_logits: bool
) -> dict[Site, Handle]:
    """Return the handles of embed, final_norm and logits, for those that the model has."""
    handles = {
        Site(point): Handle(site=Site(point), module_path=path, side="output", width=sizes.hidden)
        for point, path in paths.items()
        if path is not None
    }
    if has_logits:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        width = sizes.vocab if head is None else int(head.weight.shape[0])
        logits = Site("logits")
        handles[logits] = Handle(
            site=logits,
            module_path="",
            side="logits",
            width=width,
            note="the model's output, after any softcap or scale",
        )
    return handles


def join(*parts: str) -> str:
    """Join module paths, leaving out empty ones."""
    return ".".join(part for part in parts if part)
