"""Nothing is evicted for an engine for which more room is on its way."""

from __future__ import annotations

import pytest

from kvstrata.core.events import GrowPool, GrowthFailed, SegmentAdded, SegmentRegistered, Why
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, Engine, Store


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
