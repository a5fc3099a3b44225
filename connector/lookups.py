"""The scheduler side's book of lookups: what the store was asked, and the leases that came of it.

Rule of this file: pure bookkeeping, for any engine.

    ASKED  --found-->       HELD   slots under a lease, for a request that waits to be scheduled
    ASKED  --not found-->   OVER   or refused, or the answer got lost
    ASKED  --not wanted-->  OVER   its request is gone or waits no more; the answer is still to come
    HELD   --end-->         OVER   the lease was given to a load, or back to the store
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvstrata.core.slots import Slot


class LookupStage(enum.Enum):
    """See the table above."""

    ASKED = "asked"
    HELD = "held"
    OVER = "over"


@dataclass(slots=True)
class Lookup:
    """One question to the store. `asked`: when, in monotonic seconds."""

    lease: int
    epoch: bytes
    request_id: str
    asked: float
    stage: LookupStage = LookupStage.ASKED
    slots: tuple[Slot, ...] = ()

    @property
    def found(self) -> int:
        """Chunks that it can still give."""
        return len(self.slots) if self.stage is LookupStage.HELD else 0

    @property
    def is_open(self) -> bool:
        """Whether its answer is still to come."""
        return self.stage is LookupStage.ASKED


class LookupBook:
    """Lookups by lease. The store may hold a lease from when it is asked until it is told otherwise."""

    def __init__(self) -> None:
        self._wanted: dict[int, Lookup] = {}  # ASKED or HELD
        self._unanswered: dict[int, float] = {}  # wanted or not: when asked, oldest first

    @property
    def unanswered(self) -> int:
        """Questions under way."""
        return len(self._unanswered)

    @property
    def leases(self) -> int:
        """Leases that the store may have on its books."""
        return len(self._unanswered.keys() | self._wanted.keys())

    @property
    def oldest_question(self) -> float:
        """When the question that is under way for longest was asked; 0 if none is."""
        return next(iter(self._unanswered.values()), 0.0)

    def ask(self, lease: int, epoch: bytes, request_id: str, now: float) -> Lookup:
        """A question goes out."""
        lookup = self._wanted[lease] = Lookup(lease, epoch, request_id, now)
        self._unanswered[lease] = now
        return lookup

    def answer(self, lease: int, slots: tuple[Slot, ...]) -> Lookup | None:
        """The store has answered, or never will. None if nobody wants it any more."""
        self._unanswered.pop(lease, None)
        lookup = self._wanted.get(lease)
        if lookup is None:
            return None
        lookup.slots, lookup.stage = slots, LookupStage.HELD
        if not slots:
            self.end(lookup)
        return lookup

    def end(self, lookup: Lookup) -> bool:
        """It is of no use any more. True: it held a lease, which is now the caller's to give on or back."""
        held = lookup.stage is LookupStage.HELD
        lookup.stage = LookupStage.OVER
        self._wanted.pop(lookup.lease, None)
        return held

    def held_since(self, moment: float) -> list[Lookup]:
        """Those that were asked before `moment` and hold a lease."""
        return [
            lookup
            for lookup in self._wanted.values()
            if lookup.stage is LookupStage.HELD and lookup.asked < moment
        ]

    def end_all(self) -> None:
        """The store that they were asked of is gone."""
        for lookup in list(self._wanted.values()):
            self.end(lookup)
