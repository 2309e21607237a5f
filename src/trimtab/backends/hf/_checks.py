"""What is checked on the loaded model itself: a probe of two short sequences through all its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import hooks
from trimtab.architectures import ModelMap
from trimtab.backends.hf._blocks import BlockLists
from trimtab.backends.hf._head import check_head, relative_error
from trimtab.backends.hf._load import module_dtype
from trimtab.errors import BackendError
from trimtab.sites import Site

_SHAPE = (2, 5)
_RESIDUAL = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_NORM = Site("final_norm")


class Found(NamedTuple):
    """What the probe found."""

    checks: dict[str, float | bool]
    notes: tuple[str, ...]
    """What could not be checked, or is not as in other models."""


def probe(model: nn.Module, sites: ModelMap, device: torch.device) -> Found:
    """Run short sequences through the model and check that its sites are what they are called.

    Checked: the decoder blocks of the family's table are those that ran; block l + 1 takes exactly what block l gave
    (`chain`); `resid_pre + attn_out + mlp_out = resid_post` within rounding (`algebra`, largest error relative to the
    largest element of the block's output); the head makes the logits out of the normed last `resid_post` (`head`,
    likewise); writing every site back unchanged leaves the logits bit-identical (`identity`); and a change at
    `resid_post` changes the logits of every position from there on (`effect`).

    Raises:
        BackendError: a model of a known family does not pass.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = sites.vocab_size
    ids = torch.randint(0, vocabulary, _SHAPE, generator=generator).to(device)
    seen: dict[Site, Tensor] = {}
    lists = BlockLists(model)
    wanted = [site for site in sites.sites() if site.point in _RESIDUAL or site == _NORM]
    with hooks.attach(model, [(sites.handle(site), _keep(seen, site)) for site in wanted]), lists:
        logits = _logits(model, ids)
    if not sites.fallback:
        lists.check(sites)
    head = check_head(model, sites, seen, logits)
    checks: dict[str, float | bool] = {"chain": _chain(seen, sites), "algebra": _algebra(seen, sites)}
    if head.error is not None:
        checks["head"] = head.error
    with hooks.attach(model, [(sites.handle(site), torch.clone) for site in sites.sites()]):
        checks["identity"] = torch.equal(_logits(model, ids), logits)
    checks["effect"] = _effect(model, sites, ids, logits)
    bound = 16 * torch.finfo(module_dtype(model)).eps
    held = {"identity", "effect"} if sites.fallback else set(checks)
    failed = [
        name
        for name, value in checks.items()
        if name in held and not (value if isinstance(value, bool) else value <= bound)
    ]
    if failed:
        why = f"; {head.words}" if "head" in failed else ""
        raise BackendError(
            f"the sites of this {sites.family} model are not what they are called: {', '.join(failed)} failed "
            f"({checks}){why}; its modules differ from those of the family, or a foreign hook changes them"
        )
    differs = head.error is None or head.error > bound
    return Found(checks, (head.words,) if differs else ())


def _keep(seen: dict[Site, Tensor], site: Site) -> Callable[[Tensor], None]:
    def visit(x: Tensor) -> None:
        seen[site] = x.clone()

    return visit


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.logits.clone()  # type: ignore[no-any-return]


def _chain(seen: dict[Site, Tensor], sites: ModelMap) -> float:
    pairs = (
        (seen.get(Site("resid_post", layer=layer)), seen.get(Site("resid_pre", layer=layer + 1)))
        for layer in range(sites.num_layers - 1)
    )
    return max((relative_error(a, b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _algebra(seen: dict[Site, Tensor], sites: ModelMap) -> float:
    worst = 0.0
    for layer in range(sites.num_layers):
        parts = [seen.get(Site(point, layer=layer)) for point in _RESIDUAL]
        if any(part is None for part in parts):
            continue
        pre, attn, mlp, post = (part.double() for part in parts if part is not None)
        worst = max(worst, relative_error(pre + attn + mlp, post))
    return worst


def _effect(model: nn.Module, sites: ModelMap, ids: Tensor, logits: Tensor) -> bool:
    """Whether a change of one row of the middle block changes the logits of that row, and no earlier ones."""
    site = Site("resid_post", layer=(sites.num_layers - 1) // 2)
    row = ids.shape[1] // 2

    def visit(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[:, row] += 1 + changed[:, row].abs().flip(-1)
        return changed

    with hooks.attach(model, [(sites.handle(site), visit)]):
        moved = (_logits(model, ids) - logits).abs().float().amax(dim=-1)
    # experts see other numbers of tokens when the row is routed anew, so earlier rows may move by their rounding
    rounding = 64 * torch.finfo(logits.dtype).eps * logits.abs().max().item()
    return bool((moved[:, row] > 0).all()) and bool((moved[:, :row] <= rounding).all())
