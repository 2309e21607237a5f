"""Activations for training: sources with a cursor, what is left out, a shuffling buffer, and the stream of batches.

Names are imported when they are used: the settings alone load no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab._base.lazy import lazy

if TYPE_CHECKING:
    from trimtab.sae.data.buffer import ShuffleBuffer as ShuffleBuffer
    from trimtab.sae.data.chunk import ActivationSource as ActivationSource
    from trimtab.sae.data.chunk import Chunk as Chunk
    from trimtab.sae.data.drawn import SyntheticSource as SyntheticSource
    from trimtab.sae.data.filters import Filters as Filters
    from trimtab.sae.data.filters import SiteMeasure as SiteMeasure
    from trimtab.sae.data.live import ModelSource as ModelSource
    from trimtab.sae.data.memory import TensorSource as TensorSource
    from trimtab.sae.data.recorded import TraceSource as TraceSource
    from trimtab.sae.data.stream import Stream as Stream
    from trimtab.sae.data.stream import StreamConfig as StreamConfig
    from trimtab.sae.data.texts import Texts as Texts
    from trimtab.sae.data.texts import open_texts as open_texts

_WHERE = {
    "ActivationSource": "chunk",
    "Chunk": "chunk",
    "Filters": "filters",
    "ModelSource": "live",
    "ShuffleBuffer": "buffer",
    "SiteMeasure": "filters",
    "Stream": "stream",
    "StreamConfig": "stream",
    "SyntheticSource": "drawn",
    "TensorSource": "memory",
    "Texts": "texts",
    "TraceSource": "recorded",
    "open_texts": "texts",
}

__all__ = [
    "ActivationSource",
    "Chunk",
    "Filters",
    "ModelSource",
    "ShuffleBuffer",
    "SiteMeasure",
    "Stream",
    "StreamConfig",
    "SyntheticSource",
    "TensorSource",
    "Texts",
    "TraceSource",
    "open_texts",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
