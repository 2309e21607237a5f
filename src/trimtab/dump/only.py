"""The second pass: which records differed, so that only their values are fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.errors import InputError
from trimtab.results import Comparison
from trimtab.results.comparison import RecordKey

_IGNORED = ("rank=", "layer=", "occurrence=", "edit=", "config=")


def diverged(found: Comparison | Iterable[RecordKey | str]) -> tuple[str, ...]:
    """Return the identities of the records that a comparison did not find identical.

    What the comparison passed within its tolerance counts too: the second pass is about where a difference begins.
    Identities leave the rank out, so that every process keeps its part.

    Args:
        found: a comparison, or the keys or identities themselves.

    Raises:
        InputError: nothing differs, so there is nothing to fetch.
    """
    if isinstance(found, Comparison):
        texts = [one.key.text for one in found.records if one.status != "identical"]
        texts += [one.name for one in found.ledger.entries if one.kind in ("skipped", "corrupt", "inconclusive")]
    else:
        texts = [one.text if isinstance(one, RecordKey) else one for one in found]
    listed = tuple(dict.fromkeys(_shorten(text) for text in texts))
    if not listed:
        raise InputError("only=: no record differs, so a second pass has nothing to fetch")
    return listed


def identity_of(name: str, fields: Mapping[str, Any]) -> str:
    """Return the identity of a record that is about to be written."""
    key = RecordKey(
        site=fields.get("site") or "",
        name=name,
        phase=fields["phase"],
        step=fields["step"],
        micro_step=fields["micro_step"],
        call_index=fields.get("call_index", 0),
        kind=fields.get("kind", "value"),
        recompute=fields.get("recompute", False),
    )
    return _shorten(key.text)


def _shorten(text: str) -> str:
    return " ".join(word for word in text.split(" ") if not word.startswith(_IGNORED))
