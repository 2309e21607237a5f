"""Which steering lies in which slot of the banks: by content, counted, the least recently used idle one given up."""

from __future__ import annotations

from collections import OrderedDict

from trimtab.errors import BackendError


class Slots:
    """Slots 1 to `size`, each holding one steering; slot 0 is no steering.

    Args:
        size: how many steerings can be resident at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._slot: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._free = list(range(size, 0, -1))

    def __len__(self) -> int:
        return len(self._slot)

    @property
    def active(self) -> int:
        """Steerings that some request uses."""
        return sum(1 for count in self._users.values() if count)

    def users(self, digest: str) -> int:
        """Return how many requests use a steering."""
        return self._users.get(digest, 0)

    def take(self, digest: str) -> tuple[int, bool]:
        """Count one more user of a steering.

        Returns:
            Its slot, and whether the slot is new to it and must be filled.

        Raises:
            BackendError: every slot is in use by another steering.
        """
        if digest in self._slot:
            self._idle.pop(digest, None)
            self._users[digest] += 1
            return self._slot[digest], False
        if not self._free:
            if not self._idle:
                raise BackendError(
                    f"all {self.size} slots hold steerings in use; raise max_steering where the engine is started"
                )
            self.forget(next(iter(self._idle)))
        self._slot[digest] = self._free.pop()
        self._users[digest] = 1
        return self._slot[digest], True

    def give(self, digest: str) -> None:
        """Count one user less; without users a steering stays until its slot is needed."""
        self._users[digest] -= 1
        if self._users[digest] == 0:
            self._idle[digest] = None

    def forget(self, digest: str) -> int:
        """Free the slot of an idle steering, and return it; 0 when it had none.

        Raises:
            BackendError: a request uses it.
        """
        if self._users.get(digest, 0):
            raise BackendError(f"steering {digest[:16]} is used by {self._users[digest]} running requests")
        slot = self._slot.pop(digest, 0)
        self._users.pop(digest, None)
        self._idle.pop(digest, None)
        if slot:
            self._free.append(slot)
        return slot
