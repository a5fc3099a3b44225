"""How the pool grows: what is evicted meanwhile, and how large its segments have to be."""

from __future__ import annotations

import pytest

from kvstrata.core.events import (
    ClientOpened,
    GrowPool,
    GrowthFailed,
    Refused,
    SegmentAdded,
    SegmentRegistered,
    Update,
    Updated,
    Why,
)
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, Engine, Store, key


@pytest.fixture
def full() -> tuple[Store, Engine]:
    """An engine that has filled the first of two segments, while the second is being made."""
    store = Store(slots=8, per_segment=4)
    engine = store.engine()
    store.slow = True
    engine.save(1, 2, 3, 4)
    assert store.asked == [GrowPool(4 * SLOT, SLOT)] * 2
    return store, engine


def test_a_growing_pool_asks_for_patience(full: tuple[Store, Engine]) -> None:
    store, engine = full
    assert engine.reserve(5) == [Why.NOT_READY]
    assert len(engine.match(1, 2, 3, 4)) == 4
    assert store.planner.counters["evicted_chunks"] == 0
    assert store.planner.counters["refused_not_ready"] == 1


def test_so_does_a_segment_that_is_still_being_mapped(full: tuple[Store, Engine]) -> None:
    store, engine = full
    store.step(SegmentAdded(1, 4 * SLOT, SLOT))
    assert engine.reserve(5) == [Why.NOT_READY]
    store.step(SegmentRegistered("engine", 0, 1))
    assert isinstance(engine.reserve(5)[0], Slot)
    assert store.planner.counters["evicted_chunks"] == 0


def test_a_pool_that_cannot_grow_evicts(full: tuple[Store, Engine]) -> None:
    store, engine = full
    store.step(GrowthFailed())
    assert isinstance(engine.reserve(5)[0], Slot)
    assert store.planner.counters["evicted_chunks"] == 1


def test_leases_have_a_share_of_the_pool_as_it_is(full: tuple[Store, Engine]) -> None:
    """Three quarters, so that there is always something to evict."""
    store, engine = full
    store.step(GrowthFailed())
    assert len(engine.match(1, 2, 3, 4)) == 3
    assert isinstance(engine.reserve(5)[0], Slot)


def test_an_engine_that_does_not_map_a_segment_gets_what_others_leave(full: tuple[Store, Engine]) -> None:
    store, engine = full
    store.step(SegmentAdded(1, 4 * SLOT, SLOT))
    store.tick(11)
    assert isinstance(engine.reserve(5)[0], Slot)
    assert store.planner.counters["evicted_chunks"] == 1


def test_a_pool_of_one_chunk_is_of_use() -> None:
    store = Store(slots=1, per_segment=1)
    engine = store.engine()
    engine.save(1)
    assert len(engine.match(1)) == 1
    assert len(store.engine("other").match(1)) == 1


# ------------------------------------------------------------------------- slots larger than a segment


def test_a_segment_holds_the_largest_slot_of_any_engine_whoever_asks_for_it() -> None:
    store = Store(slots=15, per_segment=4)
    engine = store.engine()
    store.step(ClientOpened("both", (SLOT, 5 * SLOT), 1))
    engine.save(1, 2, 3)
    engine.save(*range(4, 8))
    assert store.asked == [GrowPool(4 * SLOT, SLOT)] + [GrowPool(5 * SLOT, SLOT)] * 2
    store.step(SegmentRegistered("both", 0, 1))
    store.tick(1)
    (answer,) = store.step(Update("both", 1, reserve=((1, key(100), 5 * SLOT),)))
    assert isinstance(answer, Updated)
    assert answer.grants == (Slot(1, 0, 5 * SLOT),)


def test_an_engine_none_of_whose_slots_fits_a_segment_is_refused(full: tuple[Store, Engine]) -> None:
    """The second segment is being made: that one and what may come after it count, too."""
    store, _ = full
    assert store.planner.slot_bytes_max() == 4 * SLOT
    large = Engine(store, "large", 5 * SLOT, workers=1)
    assert large.open() == [Refused(Why.POOL_TOO_SMALL)]
    assert "large" not in store.planner.clients
    assert store.step(ClientOpened("both", (4 * SLOT, 5 * SLOT), 1)) == []
    store.step(SegmentAdded(1, 4 * SLOT, SLOT))
    assert large.open() == [Refused(Why.POOL_TOO_SMALL)]


def test_while_the_pool_can_grow_a_larger_slot_is_promised_and_made() -> None:
    store = Store(slots=10, per_segment=4)
    store.slow = True
    engine = Engine(store, "engine", SLOT, workers=1)
    engine.open()
    assert store.planner.slot_bytes_max() == 6 * SLOT
    large = Engine(store, "large", 6 * SLOT, workers=1)
    assert large.open() == []
    store.step(SegmentAdded(0, 4 * SLOT, SLOT))
    engine.register_all()
    engine.reserve(1)
    assert store.asked[-1] == GrowPool(6 * SLOT, SLOT)
    assert store.planner.slot_bytes_max() == 6 * SLOT
