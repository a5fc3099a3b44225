"""The catalogue: which chunk is where, who is writing it, who is reading it.

Rule of this file: the states of a chunk are this table, and nothing else changes them.

    absent      --reserve-->  RESERVED
    RESERVED    --commit-->   READY          every writer has finished: from here readers see it
    RESERVED    --abort-->    absent         the writer says that it writes no more
    RESERVED    --overdue-->  QUARANTINED    the writer is silent: its copy may still be in flight
    READY       --drop-->     EVICTING       evicted or found corrupt: no new readers
    EVICTING    --drained-->  absent         the last reader has let go
    QUARANTINED --abort-->    absent         the writer answered or its process is gone

A slot returns to the free list only on the way to "absent": nothing can recall a copy in flight.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

from kvstrata.core.policy import EvictionPolicy
from kvstrata.core.slots import Slot


class State(enum.Enum):
    RESERVED = "reserved"
    READY = "ready"
    EVICTING = "evicting"
    QUARANTINED = "quarantined"


class Cause(enum.Enum):
    COMMIT = "commit"
    ABORT = "abort"
    OVERDUE = "overdue"
    DROP = "drop"
    DRAINED = "drained"


# None: the entry is gone and its slot is free.
TRANSITIONS: dict[tuple[State, Cause], State | None] = {
    (State.RESERVED, Cause.COMMIT): State.READY,
    (State.RESERVED, Cause.ABORT): None,
    (State.RESERVED, Cause.OVERDUE): State.QUARANTINED,
    (State.READY, Cause.DROP): State.EVICTING,
    (State.EVICTING, Cause.DRAINED): None,
    (State.QUARANTINED, Cause.ABORT): None,
}


class Entry:
    """One chunk in one slot. `readers` counts leases; only READY and EVICTING entries have any."""

    __slots__ = ("key", "pin_deadline", "readers", "slot", "state")

    def __init__(self, key: bytes, slot: Slot) -> None:
        self.key = key
        self.slot = slot
        self.state = State.RESERVED
        self.readers = 0
        self.pin_deadline = 0.0  # seconds, same clock as the planner's `now`; 0: not pinned


class Catalogue:
    """Entries by key. A key has at most one visible entry (RESERVED or READY) at a time."""

    def __init__(self, policy: EvictionPolicy, on_free: Callable[[Slot], None]) -> None:
        self._visible: dict[bytes, Entry] = {}
        self._hidden: set[Entry] = set()  # EVICTING and QUARANTINED: their keys may be written anew
        self._policy = policy
        self._on_free = on_free
        self.being_read = 0  # entries with at least one reader

    def __len__(self) -> int:
        return len(self._visible) + len(self._hidden)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._visible.values()
        yield from self._hidden

    def get(self, key: bytes) -> Entry | None:
        """The visible entry of `key`."""
        return self._visible.get(key)

    def match(self, keys: Sequence[bytes]) -> list[Entry]:
        """The READY entries of the longest prefix of `keys`. Changes nothing."""
        found: list[Entry] = []
        visible, ready, append = self._visible, State.READY, found.append
        for key in keys:
            entry = visible.get(key)
            if entry is None or entry.state is not ready:
                break
            append(entry)
        return found

    def reserve(self, key: bytes, slot: Slot) -> Entry:
        """A RESERVED entry for `key` in `slot`. The key must have no visible entry."""
        if key in self._visible:
            raise ValueError(f"chunk {key.hex()[:16]} has an entry")
        entry = self._visible[key] = Entry(key, slot)
        return entry

    def hold(self, entries: Sequence[Entry]) -> None:
        """One more reader on each of `entries`, a prefix in prompt order; counts as a use."""
        for entry in entries:
            if entry.state is not State.READY:
                raise ValueError(f"chunk {entry.key.hex()[:16]} is {entry.state.value}, not ready")
            self.being_read += not entry.readers
            entry.readers += 1
        self._policy.touch([entry.key for entry in entries])

    def touch(self, keys: Sequence[bytes]) -> None:
        """`keys`, a prefix in prompt order, were used."""
        self._policy.touch(keys)

    def let_go(self, entries: Sequence[Entry]) -> None:
        """One reader less on each of `entries`."""
        for entry in entries:
            entry.readers -= 1
            self.being_read -= not entry.readers
            if entry.state is State.EVICTING and not entry.readers:
                self.move(entry, Cause.DRAINED)

    def drop(self, entry: Entry) -> None:
        """Take a READY entry out of sight; its slot is free once its last reader lets go."""
        self.move(entry, Cause.DROP)
        if not entry.readers:
            self.move(entry, Cause.DRAINED)

    def move(self, entry: Entry, cause: Cause) -> None:
        """Apply the table. Raises ValueError for what it does not list."""
        try:
            after = TRANSITIONS[entry.state, cause]
        except KeyError:
            raise ValueError(f"a {entry.state.value} chunk cannot {cause.value}") from None
        was_visible = entry.state in (State.RESERVED, State.READY)
        if was_visible and after is not State.READY:
            del self._visible[entry.key]
            self._policy.remove(entry.key)
        if after is None:
            self._hidden.discard(entry)
            self._on_free(entry.slot)
            return
        entry.state = after
        if after is State.READY:
            self._policy.admit(entry.key)
        else:
            self._hidden.add(entry)

    def victims(self, now: float) -> Iterator[Entry]:
        """READY entries that may go now, first to go first: no readers, no live pin."""
        for key in self._policy.victims():
            entry = self._visible[key]
            if not entry.readers and entry.pin_deadline <= now:
                yield entry
