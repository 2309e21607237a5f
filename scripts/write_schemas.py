"""Write the JSON schema of every result document to docs/schemas."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path

from trimtab import results

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


def main() -> None:
    """Write one file for each result that has a version."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in results.__all__:
        kind = getattr(results, name)
        if is_dataclass(kind) and hasattr(kind, "format_version"):
            (FOLDER / f"{name}.json").write_text(json.dumps(results.schema(kind), indent=2) + "\n")


if __name__ == "__main__":
    main()
