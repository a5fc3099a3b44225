"""Slots: equal ranges of pool segments, handed out and taken back. Arithmetic and free lists only.

Rule of this file: a segment serves one slot size at a time and changes it only when empty.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's room: `nbytes` from `offset` in segment `segment`."""

    segment: int
    offset: int
    nbytes: int


@dataclass(slots=True)
class Segment:
    """One memfd of the host pool, cut into slots of `slot_bytes`."""

    id: int
    nbytes: int
    slot_bytes: int
    since: float  # when it was cut so; seconds, as the planner's `now`
    free: list[int] = field(default_factory=list)  # indices, last in first out: warm pages first

    def __post_init__(self) -> None:
        self.free = list(range(self.total))[::-1]

    @property
    def total(self) -> int:
        return self.nbytes // self.slot_bytes

    @property
    def used(self) -> int:
        return self.total - len(self.free)


class SlotAllocator:
    """Free slots of all segments, by slot size."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}

    def add(self, segment_id: int, nbytes: int, slot_bytes: int, now: float = 0.0) -> None:
        if segment_id in self.segments:
            raise ValueError(f"segment {segment_id} exists")
        self.segments[segment_id] = Segment(segment_id, nbytes, slot_bytes, now)

    def take(self, slot_bytes: int, allowed: Container[int]) -> Slot | None:
        """A free slot of `slot_bytes` in one of the `allowed` segments, the fullest first."""
        open_segments = [
            segment
            for segment in self.segments.values()
            if segment.slot_bytes == slot_bytes and segment.free and segment.id in allowed
        ]
        if not open_segments:
            return None
        segment = min(open_segments, key=lambda candidate: len(candidate.free))
        return Slot(segment.id, segment.free.pop() * slot_bytes, slot_bytes)

    def of_other_sizes(self, slot_bytes: int, allowed: Container[int]) -> list[Segment]:
        """`allowed` segments that are cut otherwise and can hold `slot_bytes`."""
        return [
            segment
            for segment in self.segments.values()
            if segment.slot_bytes != slot_bytes <= segment.nbytes and segment.id in allowed
        ]

    def give_back(self, slot: Slot) -> None:
        self.segments[slot.segment].free.append(slot.offset // slot.nbytes)

    def free_slots(self, slot_bytes: int) -> int:
        return sum(
            len(segment.free) for segment in self.segments.values() if segment.slot_bytes == slot_bytes
        )

    def reclass(self, segment_id: int, slot_bytes: int, now: float) -> None:
        """Cut an empty segment into slots of another size."""
        segment = self.segments[segment_id]
        if segment.used:
            raise ValueError(f"segment {segment_id} still holds {segment.used} slots")
        self.segments[segment_id] = Segment(segment_id, segment.nbytes, slot_bytes, now)
