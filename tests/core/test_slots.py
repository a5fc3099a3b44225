"""Slots never overlap, come back whole, and a segment changes its slot size only when empty."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstrata.core.slots import Slot, SlotAllocator


def allocator(*segments: tuple[int, int, int]) -> SlotAllocator:
    found = SlotAllocator()
    for segment in segments:
        found.add(*segment)
    return found


def overlap(one: Slot, other: Slot) -> bool:
    return (
        one.segment == other.segment
        and one.offset < other.offset + other.nbytes
        and other.offset < one.offset + one.nbytes
    )


@given(
    st.lists(st.tuples(st.integers(10, 50), st.sampled_from([8, 12])), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from([8, 12]), st.booleans(), st.integers(0, 99)), max_size=40),
)
@settings(max_examples=200)
def test_granted_slots_lie_apart_inside_their_segments(
    sizes: list[tuple[int, int]], steps: list[tuple[int, bool, int]]
) -> None:
    slots = allocator(*((number, nbytes, slot) for number, (nbytes, slot) in enumerate(sizes)))
    room = {size: slots.free_slots(size) for size in (8, 12)}
    granted: list[Slot] = []
    for size, take, which in steps:
        if take:
            none_left = slots.free_slots(size) == 0
            slot = slots.take(size, range(len(sizes)))
            assert (slot is None) == none_left
            if slot is not None:
                assert slot.nbytes == size
                assert slot.offset + size <= slots.segments[slot.segment].nbytes
                assert not any(overlap(slot, other) for other in granted)
                granted.append(slot)
        elif granted:
            slots.give_back(granted.pop(which % len(granted)))
        for each in (8, 12):
            held = sum(slot.nbytes == each for slot in granted)
            assert slots.free_slots(each) + held == room[each]


def test_only_allowed_segments_are_used() -> None:
    slots = allocator((1, 16, 8), (2, 16, 8))
    assert [slots.take(8, {2}) for _ in range(3)] == [Slot(2, 0, 8), Slot(2, 8, 8), None]


def test_the_fullest_segment_goes_first_so_that_others_may_become_empty() -> None:
    slots = allocator((1, 32, 8), (2, 32, 8))
    taken = [slots.take(8, {1, 2}) for _ in range(5)]
    assert [slot.segment for slot in taken if slot] == [1, 1, 1, 1, 2]
    assert taken[0] is not None
    slots.give_back(taken[0])
    assert slots.take(8, {1, 2}) == taken[0]


def test_the_slot_given_back_last_is_taken_first() -> None:
    slots = allocator((1, 32, 8))
    first, second = slots.take(8, {1}), slots.take(8, {1})
    assert first is not None and second is not None
    slots.give_back(first)
    slots.give_back(second)
    assert slots.take(8, {1}) == second


def test_what_is_left_over_at_the_end_of_a_segment_is_not_a_slot() -> None:
    assert allocator((1, 30, 8)).free_slots(8) == 3


def test_a_segment_is_added_once() -> None:
    with pytest.raises(ValueError, match="segment 1 exists"):
        allocator((1, 16, 8), (1, 16, 8))


def test_an_empty_segment_changes_its_slot_size() -> None:
    slots = allocator((1, 30, 8))
    slots.reclass(1, 12, now=1.0)
    assert (slots.free_slots(8), slots.free_slots(12)) == (0, 2)


def test_a_segment_in_use_keeps_its_slot_size() -> None:
    slots = allocator((1, 16, 8))
    assert slots.take(8, {1}) is not None
    with pytest.raises(ValueError, match="still holds 1 slots"):
        slots.reclass(1, 16, now=1.0)
