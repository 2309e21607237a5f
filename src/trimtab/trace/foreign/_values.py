"""Values of a foreign dump: a file is opened when one of its tensors is read; the last few stay open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from trimtab.errors import TraceCorruptError
from trimtab.trace._tensors import buffer, contiguous, digest, dtype_text
from trimtab.trace.foreign._archive import Refused
from trimtab.trace.foreign._payload import SUFFIXES, decode_key, find, read_payload

_OPEN_FILES = 16


class ForeignValues:
    """Reads tensors where a foreign dump has them.

    Args:
        root: directory of the dump.
        unreadable: file -> why its record has no tensor.
    """

    def __init__(self, root: str, unreadable: Mapping[str, str]) -> None:
        self._root = Path(root)
        self.unreadable = unreadable
        self._open: OrderedDict[str, Any] = OrderedDict()

    def tensor(self, shard: str, key: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor; its memory is the file's, copied page by page when written to.

        Raises:
            TraceCorruptError: the file cannot be read, or no longer holds what the index says.
        """
        try:
            found = find(self._payload(shard), decode_key(key))
        except Refused as reason:
            raise TraceCorruptError(f"{self._root / shard}: {reason}".replace("\0", "?")) from reason
        if (dtype_text(found.dtype), list(found.shape)) != (dtype, list(shape)):
            raise TraceCorruptError(
                f"{self._root / shard} holds {dtype_text(found.dtype)}{list(found.shape)}, the index says "
                f"{dtype}{list(shape)}: the file has changed; import it again"
            )
        return found.clone() if found.numel() and found.data_ptr() % found.element_size() else found

    def rehash(self, shard: str, key: str, dtype: str, shape: Sequence[int]) -> str:
        """Return the digest of the values as they are now.

        Raises:
            TraceCorruptError: as `tensor`.
        """
        return digest(buffer(contiguous(self.tensor(shard, key, dtype, shape))), dtype, shape)

    def _payload(self, shard: str) -> Any:
        if shard in self.unreadable:
            raise Refused(self.unreadable[shard])
        if shard not in self._open:
            parts = PurePosixPath(shard).parts
            if not shard.endswith(SUFFIXES) or ".." in parts or shard.startswith("/") or "\0" in shard:
                raise Refused("the index names a file outside of the dump; import it again")
            self._open[shard] = read_payload(self._root / shard)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]
