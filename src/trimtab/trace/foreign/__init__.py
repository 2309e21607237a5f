"""Dumps that others wrote: sglang's of three eras, Miles' trees of them, and plain .pt, .npy and .safetensors files.

`open_foreign` reads a directory in place; `import_dump` keeps its index, so that it is found at once the next time;
`export_dump` writes a trace in such a layout. Values are never copied by importing.
"""

from __future__ import annotations

from trimtab.trace.foreign._open import Foreign, open_foreign, values_of
from trimtab.trace.foreign._values import ForeignValues

__all__ = ["Foreign", "ForeignValues", "open_foreign", "values_of"]
