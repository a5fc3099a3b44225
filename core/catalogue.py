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
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstrata.core.policy import EvictionPolicy
from kvstrata.core.slots import Slot

# Entries that one call of `victims` looks at: a few milliseconds, less than a step of an engine.
_LOOKED_AT_MAX = 10_000
_LOOKED_AT_INSIDE = 16  # of a segment


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

    __slots__ = ("key", "pin_deadline", "readers", "slot", "state", "used")

    def __init__(self, key: bytes, slot: Slot, now: float) -> None:
        self.key = key
        self.used = now  # when it was written, read or touched last; same clock as the planner's `now`
        self.slot = slot
        self.state = State.RESERVED
        self.readers = 0
        self.pin_deadline = 0.0  # seconds, same clock as the planner's `now`; 0: not pinned

    def may_go(self, now: float) -> bool:
        """Whether it may be evicted: READY, no readers, no live pin."""
        return self.state is State.READY and not self.readers and self.pin_deadline <= now


class Catalogue:
    """Entries by key. A key has at most one visible entry (RESERVED or READY) at a time.

    `new_policy` makes the eviction order of one slot size: sizes cannot take each other's slots.
    """

    def __init__(self, new_policy: Callable[[], EvictionPolicy], on_free: Callable[[Slot], None]) -> None:
        self._visible: dict[bytes, Entry] = {}
        self._hidden: set[Entry] = set()  # EVICTING and QUARANTINED: their keys may be written anew
        self._inside: defaultdict[int, dict[Entry, None]] = defaultdict(dict)  # by segment, oldest first
        self._orders: defaultdict[int, EvictionPolicy] = defaultdict(new_policy)  # by bytes a slot
        self._on_free = on_free
        self.bytes_being_read = 0  # in slots of all sizes with at least one reader

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

    def reserve(self, key: bytes, slot: Slot, now: float = 0.0) -> Entry:
        """A RESERVED entry for `key` in `slot`. The key must have no visible entry."""
        if key in self._visible:
            raise ValueError(f"chunk {key.hex()[:16]} has an entry")
        entry = self._visible[key] = Entry(key, slot, now)
        self._inside[slot.segment][entry] = None
        return entry

    def inside(self, segment: int) -> list[Entry]:
        """The entries, in whatever state, that have their slots in `segment`."""
        return list(self._inside.get(segment, ()))

    def mostly_unused_since(self, segment: int) -> float:
        """The moment since which three quarters of what is in `segment` were not used, seconds.

        One popular chunk does not keep all that lies beside it. Of many entries some are looked at.
        """
        inside = self._inside.get(segment, {})
        looked_at = itertools.islice(inside, 0, None, len(inside) // _LOOKED_AT_INSIDE + 1)
        used = sorted(entry.used for entry in looked_at)
        if len(used) < 2:
            return used[0] if used else -math.inf
        # Three quarters of two or three, rounded up, would be all: there the newest is left out, too.
        oldest = min(math.ceil(len(used) * 3 / 4), len(used) - 1)
        return used[oldest - 1]

    def hold(self, entries: Sequence[Entry], now: float = 0.0) -> None:
        """One more reader on each of `entries`, a prefix in prompt order. Counts as use."""
        for entry in entries:
            if entry.state is not State.READY:
                raise ValueError(f"chunk {entry.key.hex()[:16]} is {entry.state.value}, not ready")
            if not entry.readers:
                self.bytes_being_read += entry.slot.nbytes
            entry.readers += 1
            entry.used = now
        keys = [entry.key for entry in entries]
        for slot_bytes in {entry.slot.nbytes for entry in entries}:
            self.touch(slot_bytes, keys)

    def touch(self, slot_bytes: int, keys: Sequence[bytes]) -> None:
        """`keys`, a prefix in prompt order, were used. Those not in slots of `slot_bytes` are ignored."""
        order = self._orders.get(slot_bytes)
        if order is not None:
            order.touch(keys)

    def let_go(self, entries: Sequence[Entry]) -> None:
        """One reader less on each of `entries`."""
        for entry in entries:
            entry.readers -= 1
            if not entry.readers:
                self.bytes_being_read -= entry.slot.nbytes
                if entry.state is State.EVICTING:
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
            self._orders[entry.slot.nbytes].remove(entry.key)
        if after is None:
            self._hidden.discard(entry)
            del self._inside[entry.slot.segment][entry]
            self._on_free(entry.slot)
            return
        entry.state = after
        if after is State.READY:
            self._orders[entry.slot.nbytes].admit(entry.key)
        else:
            self._hidden.add(entry)

    def orders(self) -> Iterator[tuple[int, Iterable[bytes]]]:
        """The keys in the eviction order of each slot size. For the audit."""
        yield from self._orders.items()

    def victims(
        self, slot_bytes: int, now: float, wanted: int, usable: Callable[[Entry], bool] = lambda _: True
    ) -> list[Entry]:
        """Up to `wanted` entries in slots of `slot_bytes` that are `usable` and may go, first to go first.

        Looks at the first entries of the order only. Those in use move back in it: being read is a
        use, and whatever stays in use for long would otherwise hide all others from every call.
        """
        order = self._orders.get(slot_bytes)
        if order is None:
            return []
        found: list[Entry] = []
        in_use: list[bytes] = []
        for key in itertools.islice(order.victims(), _LOOKED_AT_MAX):
            entry = self._visible[key]
            if not entry.may_go(now):
                in_use.append(key)
            elif usable(entry):
                found.append(entry)
                if len(found) == wanted:
                    break
        order.touch(in_use[::-1])  # the last of a prefix counts as the oldest: so they keep their order
        return found
