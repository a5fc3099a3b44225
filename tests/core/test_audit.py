"""The audit finds every contradiction that it has a sentence for, and none in a planner left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstrata.core.audit import audit
from kvstrata.core.catalogue import Cause, Entry, State
from kvstrata.core.events import ClientStopped
from kvstrata.core.planner import Claim, Planner
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, Store, key


@pytest.fixture
def planner() -> Planner:
    """A planner in which everything occurs once: chunk 1 is ready and leased, chunk 2 is being written."""
    store = Store(slots=4, per_segment=4)
    engine = store.engine()
    engine.save(1)
    engine.match(1)
    engine.reserve(2)
    assert audit(store.planner) == []
    return store.planner


def entry(planner: Planner, number: int) -> Entry:
    found = planner.catalogue.get(key(number))
    assert found is not None
    return found


def give_two_chunks_one_slot(planner: Planner) -> None:
    entry(planner, 2).slot = entry(planner, 1).slot


def lose_a_slot(planner: Planner) -> None:
    planner.slots.segments[0].free.pop()


def free_a_slot_twice(planner: Planner) -> None:
    free = planner.slots.segments[0].free
    free[0] = free[1]


def free_a_slot_in_use(planner: Planner) -> None:
    planner.slots.give_back(entry(planner, 1).slot)


def make_memory_without_noting_it(planner: Planner) -> None:
    planner.slots.add(9, SLOT, SLOT)


def make_more_memory_than_allowed(planner: Planner) -> None:
    planner.slots.add(9, SLOT, SLOT)
    planner.pool_bytes += SLOT


def forget_a_reader(planner: Planner) -> None:
    entry(planner, 1).readers -= 1


def forget_a_lease(planner: Planner) -> None:
    planner.clients["engine"].leases.clear()


def forget_a_writer(planner: Planner) -> None:
    planner.clients["engine"].jobs.clear()


def add_a_second_writer(planner: Planner) -> None:
    planner.clients["engine"].jobs[99] = Claim((entry(planner, 2),), deadline=0)


def keep_the_writer_of_a_finished_chunk(planner: Planner) -> None:
    planner.catalogue.move(entry(planner, 2), Cause.COMMIT)


def drop_without_readers(planner: Planner) -> None:
    entry(planner, 1).readers = 0
    planner.clients["engine"].leases.clear()
    planner.catalogue.move(entry(planner, 1), Cause.DROP)


def hold_a_lease_that_the_engine_does_not_know(planner: Planner) -> None:
    planner.clients["engine"].leases_believed = 0


def hold_a_job_that_the_engine_does_not_know(planner: Planner) -> None:
    planner.clients["engine"].jobs_believed = 0


def miscount_what_is_being_read(planner: Planner) -> None:
    planner.catalogue.bytes_being_read += SLOT


def take_a_ready_chunk_out_of_its_order(planner: Planner) -> None:
    planner.catalogue._orders[SLOT].remove(key(1))


def put_a_chunk_into_the_order_before_it_is_ready(planner: Planner) -> None:
    planner.catalogue._orders[SLOT].admit(key(2))


def put_a_chunk_that_is_gone_into_an_order(planner: Planner) -> None:
    planner.catalogue._orders[SLOT].admit(key(3))


def put_a_chunk_into_the_order_of_another_slot_size(planner: Planner) -> None:
    planner.catalogue._orders[2 * SLOT].admit(key(1))


PLANTED: list[tuple[Callable[[Planner], None], str]] = [
    (give_two_chunks_one_slot, "slot 0+0x0 has 2 owners"),
    (lose_a_slot, "segment 0: 2 slots in use and 1 free, of 4"),
    (free_a_slot_twice, "segment 0: 2 slots in use and 2 free, of 4"),
    (free_a_slot_in_use, "segment 0: slot 0 is free and in use"),
    (make_memory_without_noting_it, "pool of 320 bytes, 256 in the books, 256 allowed"),
    (make_more_memory_than_allowed, "pool of 320 bytes, 320 in the books, 256 allowed"),
    (forget_a_reader, "chunk 0100000000000000 (ready) counts 0 readers, leases name it 1 times"),
    (forget_a_lease, "chunk 0100000000000000 (ready) counts 1 readers, leases name it 0 times"),
    (forget_a_writer, "chunk 0200000000000000 (reserved) has 0 writers, should have 1"),
    (add_a_second_writer, "chunk 0200000000000000 (reserved) has 2 writers, should have 1"),
    (keep_the_writer_of_a_finished_chunk, "chunk 0200000000000000 (ready) has 1 writers, should have 0"),
    (drop_without_readers, "chunk 0100000000000000 (evicting) waits for readers that do not exist"),
    (miscount_what_is_being_read, "64 bytes are being read, 128 in the books"),
    (
        take_a_ready_chunk_out_of_its_order,
        "chunk 0100000000000000 (ready) is not in its eviction order",
    ),
    (
        put_a_chunk_into_the_order_before_it_is_ready,
        "the eviction order of 64-byte slots has chunk 0200000000000000, not ready there",
    ),
    (
        put_a_chunk_that_is_gone_into_an_order,
        "the eviction order of 64-byte slots has chunk 0300000000000000, not ready there",
    ),
    (
        put_a_chunk_into_the_order_of_another_slot_size,
        "the eviction order of 128-byte slots has chunk 0100000000000000, not ready there",
    ),
    (
        hold_a_lease_that_the_engine_does_not_know,
        "engine engine knows of 0 leases, the store holds 1 for it",
    ),
    (hold_a_job_that_the_engine_does_not_know, "engine engine knows of 0 jobs, the store holds 1 for it"),
]


@pytest.mark.parametrize(("plant", "sentence"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_contradiction_is_found(
    planner: Planner, plant: Callable[[Planner], None], sentence: str
) -> None:
    plant(planner)
    assert sentence in audit(planner)


def test_an_engine_may_know_of_more_than_the_store_holds(planner: Planner) -> None:
    planner.clients["engine"].leases_believed += 3
    planner.clients["engine"].jobs_believed += 3
    assert audit(planner) == []


def test_an_engine_whose_connection_ended_is_not_asked_what_it_knows(planner: Planner) -> None:
    hold_a_job_that_the_engine_does_not_know(planner)
    planner.step(ClientStopped("engine"), 0)
    assert audit(planner) == []


def test_a_quarantined_chunk_has_one_writer(planner: Planner) -> None:
    hidden = entry(planner, 2)
    planner.catalogue.move(hidden, Cause.OVERDUE)
    assert hidden.state is State.QUARANTINED
    assert audit(planner) == []
    forget_a_writer(planner)
    assert "chunk 0200000000000000 (quarantined) has 0 writers, should have 1" in audit(planner)


def test_a_slot_outside_every_segment_is_found(planner: Planner) -> None:
    entry(planner, 2).slot = Slot(7, 0, SLOT)
    assert "segment 0: 1 slots in use and 2 free, of 4" in audit(planner)
