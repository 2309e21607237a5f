"""What is checked on the loaded model itself: a probe of two short sequences through all its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import hooks
from trimtab.architectures import ModelMap
from trimtab.backends.hf._load import module_dtype
from trimtab.errors import BackendError
from trimtab.sites import Site

_SHAPE = (2, 5)


def probe(model: nn.Module, sites: ModelMap, device: torch.device) -> dict[str, float | bool]:
    """Run short sequences through the model and check that its sites are what they are called.

    Checked: block l + 1 takes exactly what block l gave (`chain`); `resid_pre + attn_out + mlp_out = resid_post` within
    rounding (`algebra`, largest error relative to the largest element of the block's output); writing every site back
    unchanged leaves the logits bit-identical (`identity`); and a change at `resid_post` changes the logits of every
    position from there on (`effect`).

    Returns:
        The checks and what they found, for the manifest.

    Raises:
        BackendError: a model of a known family does not pass.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = sites.vocab_size
    ids = torch.randint(0, vocabulary, _SHAPE, generator=generator).to(device)
    seen: dict[Site, Tensor] = {}
    with hooks.attach(model, [(sites.handle(site), _keep(seen, site)) for site in _residual_sites(sites)]):
        logits = _logits(model, ids)
    chain, algebra = _chain(seen, sites), _algebra(seen, sites)
    with hooks.attach(model, [(sites.handle(site), torch.clone) for site in sites.sites()]):
        identity = torch.equal(_logits(model, ids), logits)
    effect = _effect(model, sites, ids, logits)
    found: dict[str, float | bool] = {"chain": chain, "algebra": algebra, "identity": identity, "effect": effect}
    bound = 16 * torch.finfo(module_dtype(model)).eps
    failed = [name for name, holds in (("identity", identity), ("effect", effect)) if not holds]
    if not sites.fallback:
        failed += [name for name, error in (("chain", chain), ("algebra", algebra)) if not error <= bound]
    if failed:
        raise BackendError(
            f"the sites of this {sites.family} model are not what they are called: {', '.join(failed)} failed "
            f"({found}); its modules differ from those of the family, or a foreign hook changes them"
        )
    return found


def _residual_sites(sites: ModelMap) -> list[Site]:
    wanted = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    return [site for site in sites.sites() if site.point in wanted]


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
    return max((_error(a, b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _algebra(seen: dict[Site, Tensor], sites: ModelMap) -> float:
    worst = 0.0
    for layer in range(sites.num_layers):
        parts = [seen.get(Site(point, layer=layer)) for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        if any(part is None for part in parts):
            continue
        pre, attn, mlp, post = (part.double() for part in parts if part is not None)
        worst = max(worst, _error(pre + attn + mlp, post))
    return worst


def _error(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / scale if scale else float(not torch.equal(a, b))


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
