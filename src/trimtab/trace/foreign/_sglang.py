"""sglang's dumps: what the name of a file and the metadata beside its value say about a record.

Three eras, told apart by the first key of the file's name (`forward_pass_id`, `curr_step`, `step`); the keys are
joined by `___`. Since the second era the file is `{"value": ..., "meta": {...}}`, and the metadata has the last word:
a name that holds `___` or `/` cuts the file's name into pieces that look like other keys or directories.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import InputError
from trimtab.sites import Site

STEPS = ("step", "curr_step", "forward_pass_id")
STEM = re.compile(rf"(?:^|/)((?:{'|'.join(STEPS)})=[^/]*___.*)\.pt$", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_]\w*")
_RANKS = ("pp_rank", "tp_rank", "cp_rank", "ep_rank", "etp_rank", "dp_rank")
_OWN = {*STEPS, "rank", "dump_index", "name", "recompute_status", "layer_id", "micro_step", *_RANKS}
_META_ONLY = {"world_rank", "world_size", "tokenizer_path", "dims", "dims_grad"} | {
    f"recompute_pseudo_{what}" for what in ("rank", "size")
}
_INTRUSIVE = "non_intrusive__"
_SIDE = re.compile(r"(?:(?P<path>.+)\.)?(?P<side>output|inputs)(?:\.(?P<rest>[^.]+(?:\.\d+)?))?")

# Column -> the axes that stand for it, the first that is known wins. Those after the bar only when dims name them.
_AXES = {"tp": ("tp",), "pp": ("pp",), "cp": ("cp", "attn_cp"), "ep": ("ep", "moe_ep"), "dp": ("dp", "attn_dp")}
_GROUPS = {"attn_tp": "tp", "moe_tp": "tp", "etp": "tp", "attn_cp": "cp", "attn_dp": "dp", "moe_dp": "dp", "edp": "dp"}


@dataclass(kw_only=True, slots=True)
class Tags:
    """What is known about one file before its value is read."""

    step: int = 0
    micro_step: int = 0
    rank: int = 0
    dump_index: int | None = None
    name: str = ""
    layer: int | None = None
    kind: str = "value"
    recompute: bool = False
    dims: str | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    """Column such as tp_rank -> index."""
    sizes: dict[str, int] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    """Tags of the caller; they tell records apart."""


def parse_stem(stem: str) -> dict[str, str]:
    """Split a file's name into its keys; a piece without a key belongs to the value before it."""
    found: dict[str, str] = {}
    last = ""
    for piece in stem.split("___"):
        key, equals, value = piece.partition("=")
        if equals and _KEY.fullmatch(key) and key not in found:
            found[key] = value
            last = key
        elif last:
            found[last] += f"___{piece}"
    return found


def read_tags(stem: str, meta: Mapping[str, Any]) -> Tags:
    """Return the tags of a file from its name and its metadata.

    Raises:
        InputError: neither has a step and a rank that are numbers.
    """
    named = parse_stem(stem)
    known: dict[str, Any] = {**named, **{key: value for key, value in meta.items() if isinstance(key, str)}}
    step = next((known[key] for key in STEPS if key in known), None)
    dims = meta.get("dims")
    tags = Tags(
        step=_number("step", step),
        micro_step=_number("micro_step", known.get("micro_step", 0)),
        rank=_number("rank", known.get("rank")),
        dump_index=_optional(known.get("dump_index")),
        name=str(known.get("name", "")),
        layer=_optional(known.get("layer_id")),
        recompute=known.get("recompute_status") == "recompute",
        dims=dims if isinstance(dims, str) else None,
    )
    if tags.rank < 0 or tags.rank >= 1 << 20:
        raise InputError(f"rank {tags.rank} is outside of 0 to {(1 << 20) - 1}")
    _parallel(tags, known)
    pieces = meta if "name" in meta else named  # a name with ___ in it makes pieces that only look like tags
    tags.extra = {
        str(key): str(value)
        for key, value in pieces.items()
        if key not in _OWN and key not in _META_ONLY and not str(key).endswith("_parallel_info")
    }
    if "layer_id" in known and tags.layer is None:
        tags.extra["layer_id"] = str(known["layer_id"])
    return tags


def place(name: str, layer: int | None) -> tuple[str | None, str, str, int | None]:
    """Return site, name, kind and layer for a name of sglang's.

    `grad__x` is the gradient of x, `param__x` a parameter; `non_intrusive__m.output` is the site `module:m.output`.
    Of several tensors at one side of a module the first has the site, the others a name such as `module:m.output.1`.
    """
    kind = "value"
    if name.startswith("grad__"):
        kind, name = "grad", name.removeprefix("grad__")
    if name.startswith("param__"):
        kind, name = "param" if kind == "value" else kind, name.removeprefix("param__")
        return None, name, kind, _layer_in(name) if layer is None else layer
    if not name.startswith(_INTRUSIVE):
        return None, name, kind, layer
    bare = name.removeprefix(_INTRUSIVE)
    match = _SIDE.fullmatch(bare)
    if match is None:
        return None, bare, kind, layer
    path, rest = match["path"], match["rest"]
    side = ("grad_" if kind == "grad" else "") + match["side"].removesuffix("s")
    layer = _layer_in(path or "") if layer is None else layer
    if path is None:
        return None, side + (f".{rest}" if rest else ""), kind, layer
    text = f"module:{path}.{side}"
    if rest in (None, "0"):
        try:
            return str(Site.parse(text)), text, kind, layer
        except InputError:
            return None, text, kind, layer
    return None, f"{text}.{rest}", kind, layer


def _parallel(tags: Tags, known: Mapping[str, Any]) -> None:
    info: dict[str, int] = {}
    for source in ("sglang_parallel_info", "megatron_parallel_info"):
        found = known.get(source)
        for key, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 20:
                info[str(key)] = value
    for key in _RANKS:
        index = _optional(known.get(key))
        if index is not None:
            info.setdefault(key, index)
    named = [group for group in _GROUPS if tags.dims is not None and re.search(rf"\b{group}\b", tags.dims)]
    for column, axes in _AXES.items():
        chosen = [group for group in named if _GROUPS[group] == column] + list(axes)
        axis = next((one for one in chosen if f"{one}_rank" in info), None)
        if axis is not None:
            tags.ranks[f"{column}_rank"] = info[f"{axis}_rank"]
            tags.sizes[column] = info.get(f"{axis}_size", 1)


def _layer_in(path: str) -> int | None:
    found = next((part for part in path.split(".") if part.isdecimal() and len(part) < 10), None)
    return None if found is None else int(found)


def _number(key: str, value: Any) -> int:
    number = _optional(value)
    if number is None:
        raise InputError(f"{key}={value!r} is no number")
    return number


def _optional(value: Any) -> int | None:
    if isinstance(value, str) and len(value) < 20:
        try:
            value = int(value)
        except ValueError:
            return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return value
    return None
