"""Patterns such as `step_{step}/rank{rank}/{name}.npy`: how a tree of files names its tensors."""

from __future__ import annotations

import re

from trimtab.errors import InputError

NUMBERS = ("step", "micro_step", "rank", "layer", "call_index", "tp_rank", "pp_rank", "cp_rank", "ep_rank", "dp_rank")
TEXTS = ("name", "phase")
_PLACE = re.compile(r"\{([^{}]*)\}|(\*)|([^{}*]+)|([{}])", re.DOTALL)
_FOLDER = re.compile(r"(step|rank|layer)[-_=]?(\d{1,18})", re.IGNORECASE)


class Pattern:
    """Reads the fields of a path relative to the tree, its suffix left out unless the pattern has it.

    Raises:
        InputError: a placeholder that is not known, or is given twice.
    """

    def __init__(self, text: str, suffixes: tuple[str, ...]) -> None:
        self.text = text
        self._with_suffix = text.endswith(suffixes)
        seen: list[str] = []
        parts = []
        for place, star, literal, brace in _PLACE.findall(text):
            if brace or (place and place not in (*NUMBERS, *TEXTS)) or place in seen or not (place + star + literal):
                what = f"{{{place}}} twice" if place in seen else repr(brace or f"{{{place}}}")
                known = ", ".join(f"{{{name}}}" for name in (*TEXTS, *NUMBERS))
                raise InputError(f"the pattern {text!r} holds {what}; there are {known} and * (anything in one folder)")
            if place:
                seen.append(place)
                kind = r"\d{1,18}" if place in NUMBERS else "[^/]+" if place == "phase" else ".+?"
                parts.append(f"(?P<{place}>{kind})")
            else:
                parts.append("[^/]*" if star else re.escape(literal))
        self._regex = re.compile("".join(parts), re.DOTALL)

    def fields(self, path: str) -> dict[str, str] | None:
        """Return the fields of a path, or None when it does not fit."""
        match = self._regex.fullmatch(path if self._with_suffix else path.rpartition(".")[0])
        return None if match is None else match.groupdict()


def guess(path: str) -> dict[str, str]:
    """Return the fields of a path without a pattern: folders `step_3`, `rank0`, `layer=2`; the rest is the name."""
    *folders, last = path.rpartition(".")[0].split("/")
    found: dict[str, str] = {}
    name = []
    for folder in folders:
        match = _FOLDER.fullmatch(folder)
        if match and match[1].lower() not in found:
            found[match[1].lower()] = match[2]
        else:
            name.append(folder)
    return {**found, "name": "/".join([*name, last])}
