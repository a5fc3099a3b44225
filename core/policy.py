"""Which chunk goes first when room is needed. One class for each policy, one registry line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders the keys of one slot size by how soon they may be evicted. Knows nothing of leases or states."""

    def admit(self, key: bytes) -> None:
        """`key` has become evictable for the first time."""

    def touch(self, keys: Sequence[bytes]) -> None:
        """`keys`, a prefix in prompt order, were used. Unknown keys are ignored."""

    def remove(self, key: bytes) -> None:
        """`key` is gone. Unknown keys are ignored."""

    def victims(self) -> Iterator[bytes]:
        """Keys, first to go first. The caller may skip some; it must not change the policy meanwhile."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Every key once, in any order. For the audit."""
        ...


class LRU:
    """Least recently used. A prefix is touched last chunk first, so that its tail goes before its head."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def admit(self, key: bytes) -> None:
        self._order[key] = None

    def touch(self, keys: Sequence[bytes]) -> None:
        order = self._order
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key)

    def remove(self, key: bytes) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        return iter(self._order)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._order)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
}
