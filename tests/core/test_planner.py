"""What a node store grants, to whom, and when it takes something back."""

from __future__ import annotations

import pytest

from kvstrata.core.audit import audit
from kvstrata.core.catalogue import State
from kvstrata.core.events import (
    ClientGone,
    ClientOpened,
    GrowPool,
    Match,
    Matched,
    Refused,
    SegmentRegistered,
    Update,
    Updated,
    Why,
    WorkerDisconnected,
)
from kvstrata.core.planner import Limits, Planner
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, Engine, Store, key, keys

DEADLINE = 120.0


@pytest.fixture
def store() -> Store:
    return Store(claim_deadline_s=DEADLINE)


@pytest.fixture
def engine(store: Store) -> Engine:
    return store.engine()


def last(numbers: set[int] | dict[int, bytes]) -> int:
    return max(numbers)


# ------------------------------------------------------------------------------------ store and find


def test_what_was_committed_is_found_in_its_slot(engine: Engine) -> None:
    granted = engine.reserve(1, 2)
    engine.tell(committed=tuple(engine.jobs))
    assert engine.match(1, 2, 3) == granted


def test_what_is_being_written_is_not_found_but_announced(engine: Engine) -> None:
    engine.save(1)
    engine.reserve(2)
    answer = engine.ask(1, 2)
    assert isinstance(answer, Matched)
    assert len(answer.slots) == 1
    assert answer.being_written


def test_a_chunk_is_written_once(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    other = store.engine("other")
    assert other.reserve(1, 1) == [Why.EXISTS, Why.EXISTS]
    engine.tell(committed=tuple(engine.jobs))
    assert other.reserve(1) == [Why.EXISTS]


def test_a_chunk_is_granted_once_in_one_message(engine: Engine) -> None:
    grants = engine.reserve(1, 1)
    assert isinstance(grants[0], Slot)
    assert grants[1] is Why.EXISTS


def test_an_aborted_chunk_is_not_found_and_its_slot_is_free(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    engine.tell(aborted=tuple(engine.jobs))
    assert engine.match(1) == []
    assert store.free == store.total


def test_another_engine_finds_what_one_wrote(store: Store, engine: Engine) -> None:
    engine.save(1, 2)
    assert store.engine("other").match(1, 2) == engine.match(1, 2)


def test_a_corrupt_chunk_is_gone_at_once_and_may_be_written_again(store: Store, engine: Engine) -> None:
    engine.save(1, 2)
    engine.tell(corrupt=(key(1), key(7)))
    assert engine.match(1, 2) == []
    assert isinstance(engine.reserve(1)[0], Slot)


def test_a_chunk_that_is_being_written_cannot_be_called_corrupt(engine: Engine) -> None:
    engine.reserve(1)
    engine.tell(corrupt=(key(1),))
    engine.tell(committed=tuple(engine.jobs))
    assert len(engine.match(1)) == 1


def test_a_report_that_comes_twice_counts_once(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    jobs = tuple(engine.jobs)
    for _ in range(2):
        engine.tell(committed=jobs)
    engine.match(1)
    for _ in range(2):
        engine.tell(aborted=jobs, released=(last(engine.leases),) if engine.leases else (99,))
    assert store.planner.counters["committed_chunks"] == 1
    assert len(engine.match(1)) == 1


# ------------------------------------------------------------------------------------------- leases


def test_a_leased_chunk_is_not_evicted(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    leased = engine.match(1, 2, 3)
    grants = engine.reserve(*range(11, 19))
    assert not set(leased) & set(grants)
    assert grants.count(Why.FULL) == 3
    assert engine.match(1, 2, 3) == leased


def test_a_dropped_chunk_keeps_its_slot_for_its_readers(store: Store, engine: Engine) -> None:
    engine.save(1)
    (slot,) = engine.match(1)
    engine.tell(corrupt=keys(1))
    assert slot not in engine.reserve(*range(11, 19))
    engine.tell(released=(last(engine.leases),), aborted=tuple(engine.jobs))
    assert store.free == store.total


def test_waiting_requests_cannot_lease_the_whole_pool(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    assert len(engine.match(*range(1, 9))) == 6, "three quarters of eight, the rest is computed"
    assert engine.ask(7) == Refused(Why.BUSY)
    engine.tell(released=tuple(engine.leases))
    assert len(engine.match(7)) == 1


def test_what_is_leased_already_may_be_leased_by_all(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    other = store.engine("other")
    for _ in range(3):
        assert len(engine.match(1, 2, 3, 4, 5, 6)) == 6
        assert len(other.match(1, 2, 3, 4, 5, 6, 7)) == 6
    engine.tell(released=tuple(engine.leases))
    assert other.ask(7) == Refused(Why.BUSY), "the other still reads six"
    other.tell(released=tuple(other.leases))
    assert len(other.match(7)) == 1


def test_leases_of_all_slot_sizes_share_one_limit() -> None:
    store = Store(slots=16, per_segment=8)  # of which twelve may be leased
    small, large = store.engine("small"), store.engine("large", slot_bytes=4 * SLOT)
    small.save(*range(1, 9))
    large.save(101, 102)
    assert len(small.match(*range(1, 9))) == 8
    assert len(large.match(101, 102)) == 1, "a large slot is four small ones"
    for engine in (small, large):
        engine.tell(released=tuple(engine.leases))
    assert len(large.match(101, 102)) == 2
    assert len(small.match(*range(1, 9))) == 4, "two large slots are eight small ones"


# ------------------------------------------------------------------------------- segments and their workers


def test_nothing_is_granted_before_every_rank_has_registered(store: Store) -> None:
    engine = Engine(store, "engine", SLOT, workers=2)
    engine.open()
    assert engine.reserve(1) == [Why.NOT_READY]
    store.step(SegmentRegistered("engine", 0, 0))
    store.step(SegmentRegistered("engine", 0, 0))
    assert engine.reserve(1) == [Why.NOT_READY]
    store.step(SegmentRegistered("engine", 1, 0))
    assert isinstance(engine.reserve(1)[0], Slot)


@pytest.mark.parametrize(("rank", "segment"), [(0, 7), (0, -1), (2, 0), (-1, 0), (10**9, 10**9)])
def test_a_registration_that_cannot_be_is_ignored_and_counted(store: Store, rank: int, segment: int) -> None:
    engine = store.engine(workers=2)
    before = {number: set(ranks) for number, ranks in store.planner.clients["engine"].registered.items()}
    assert store.planner.counters["ignored_registrations"] == 0
    store.step(SegmentRegistered(engine.name, rank, segment))
    client = store.planner.clients["engine"]
    assert client.registered == before == {0: {0, 1}}
    assert client.usable == {0}
    assert store.planner.counters["ignored_registrations"] == 1


def test_a_match_ends_where_a_rank_has_not_mapped_the_segment(store: Store, engine: Engine) -> None:
    engine.save(1, 2, 3, 4)
    engine.save(5)
    other = Engine(store, "other", SLOT, workers=1)
    other.open()
    store.step(SegmentRegistered("other", 0, 0))
    assert len(other.match(1, 2, 3, 4, 5)) == 4


def test_nothing_is_granted_from_what_a_returning_worker_has_not_mapped_again(store: Store) -> None:
    engine = store.engine(workers=2)
    engine.save(1, 2, 3, 4)
    engine.save(5)
    engine.stop()
    store.step(WorkerDisconnected("engine", 1))
    engine.resume()
    assert engine.reserve(6) == [Why.NOT_READY]
    assert engine.match(1) == []
    store.step(SegmentRegistered("engine", 1, 1))
    assert [slot.segment for slot in engine.reserve(6) if isinstance(slot, Slot)] == [1]
    assert (len(engine.match(1)), len(engine.match(5))) == (0, 1)
    store.step(SegmentRegistered("engine", 1, 0))
    assert len(engine.match(1, 2, 3, 4, 5)) == 5


def test_a_worker_takes_nothing_of_another_with_it(store: Store, engine: Engine) -> None:
    engine.save(1)
    other = store.engine("other")
    for name, rank in (("other", 0), ("engine", 1), ("engine", -1), ("stranger", 0)):
        store.step(WorkerDisconnected(name, rank))
    assert len(engine.match(1)) == 1
    assert other.reserve(2) == [Why.NOT_READY]


def test_the_pool_grows_before_it_is_needed(store: Store, engine: Engine) -> None:
    assert len(store.asked) == 1
    engine.reserve(1)
    assert len(store.asked) == 2  # less than a whole segment is free
    engine.reserve(2, 3)
    assert len(store.asked) == 2


def test_the_pool_grows_to_its_limit_and_no_further() -> None:
    store = Store(slots=10, per_segment=4)
    engine = store.engine()
    for number in range(10):
        engine.save(number)
    engine.save(11)
    assert [asked.nbytes // SLOT for asked in store.asked] == [4, 4, 2]
    assert store.total == 10


def test_one_segment_is_asked_for_at_a_time() -> None:
    planner = Planner(Limits(8 * SLOT, 4 * SLOT))
    assert planner.step(ClientOpened("one", (SLOT,), 1), 0) == [GrowPool(4 * SLOT, SLOT)]
    assert planner.step(ClientOpened("two", (SLOT,), 1), 0) == []


def test_a_host_without_memory_is_asked_again_after_a_while(store: Store) -> None:
    store.can_grow = False
    engine = Engine(store, "engine", SLOT, workers=1)
    engine.open()
    store.tick(29)
    engine.open()
    assert engine.reserve(1) == [Why.FULL]
    assert len(store.asked) == 1
    store.can_grow = True
    store.tick(2)
    engine.reserve(1)
    engine.register_all()
    assert isinstance(engine.reserve(1)[0], Slot)


def test_a_pool_smaller_than_a_slot_is_refused(store: Store) -> None:
    engine = Engine(store, "engine", 9 * SLOT, workers=1)
    assert engine.open() == [Refused(Why.POOL_TOO_SMALL)]
    assert "engine" not in store.planner.clients


def test_a_slot_larger_than_a_segment_gets_a_segment_of_its_own(store: Store) -> None:
    store.engine(slot_bytes=6 * SLOT)
    assert store.asked == [GrowPool(6 * SLOT, 6 * SLOT)]


def test_another_slot_size_gets_the_least_used_segment_once_the_pool_is_made(
    store: Store, engine: Engine
) -> None:
    engine.save(*range(1, 5))
    engine.save(5)
    large = store.engine("large", slot_bytes=2 * SLOT)
    assert isinstance(large.reserve(100)[0], Slot)
    assert [bool(engine.match(number)) for number in range(1, 6)] == [True] * 4 + [False]


def test_a_segment_with_readers_or_writers_keeps_its_slot_size(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.match(1)
    engine.reserve(5)
    large = store.engine("large", slot_bytes=2 * SLOT)
    assert large.reserve(100) == [Why.FULL]
    engine.tell(released=tuple(engine.leases), aborted=tuple(engine.jobs))
    assert isinstance(large.reserve(100)[0], Slot)


def test_a_segment_with_a_live_pin_keeps_its_slot_size(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    for number in (1, 5):
        pinned = store.planner.catalogue.get(key(number))
        assert pinned is not None
        pinned.pin_deadline = 10.0
    large = store.engine("large", slot_bytes=2 * SLOT)
    store.now = 9.0
    assert large.reserve(100) == [Why.FULL]
    assert len(engine.match(1)) == len(engine.match(5)) == 1
    engine.tell(released=tuple(engine.leases))
    store.now = 10.0
    assert isinstance(large.reserve(100)[0], Slot)


def test_two_slot_sizes_on_one_segment_do_not_starve_each_other() -> None:
    store = Store(slots=4)
    small, large = store.engine("small"), store.engine("large", slot_bytes=2 * SLOT)
    for number in range(10):
        assert isinstance(small.reserve(number)[0], Slot)
        small.tell(aborted=tuple(small.jobs))
        assert isinstance(large.reserve(100 + number)[0], Slot)
        large.tell(aborted=tuple(large.jobs))


# ------------------------------------------------------------------------------------ overdue and gone


def test_an_overdue_write_keeps_its_slot_until_it_is_answered_for(store: Store, engine: Engine) -> None:
    (slot,) = engine.reserve(1)
    store.tick(DEADLINE + 1)
    assert [entry.state for entry in store.planner.catalogue] == [State.QUARANTINED]
    other = store.engine("other")
    assert slot not in other.reserve(*range(1, 20))
    engine.tell(aborted=tuple(engine.jobs))
    assert other.reserve(30) == [slot]


def test_a_commit_that_comes_too_late_publishes_nothing(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    late = tuple(engine.jobs)
    store.tick(DEADLINE + 1)
    other = store.engine("other")
    (second,) = other.reserve(1)
    engine.tell(committed=late)
    assert other.match(1) == []
    other.tell(committed=tuple(other.jobs))
    assert other.match(1) == [second]


def test_an_overdue_lease_keeps_its_slots(store: Store, engine: Engine) -> None:
    engine.save(1)
    (slot,) = engine.match(1)
    store.tick(DEADLINE + 1)
    assert slot not in store.engine("other").reserve(*range(11, 30))


def test_a_claim_is_not_overdue_at_its_deadline(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    store.tick(DEADLINE)
    engine.tell(committed=tuple(engine.jobs))
    assert len(engine.match(1)) == 1


def test_who_does_not_answer_for_much_gets_nothing_more(store: Store, engine: Engine) -> None:
    engine.save(1)
    other = store.engine("other")
    engine.reserve(2, 3)
    silent = tuple(engine.jobs)
    store.tick(DEADLINE + 1)
    assert len(engine.match(1)) == 1  # two of eight are a quarter: still allowed
    engine.tell(released=tuple(engine.leases))
    assert isinstance(engine.reserve(4)[0], Slot)
    store.tick(DEADLINE + 1)
    assert engine.ask(1) == Refused(Why.QUARANTINE)
    assert engine.reserve(5, 6) == [Why.QUARANTINE] * 2
    assert len(other.match(1)) == 1
    engine.tell(aborted=silent)
    assert len(engine.match(1)) == 1


def test_an_engine_whose_connection_ended_gets_nothing_and_may_still_report(
    store: Store, engine: Engine
) -> None:
    engine.save(1)
    engine.reserve(2)
    engine.match(1)
    engine.stop()
    assert engine.ask(1) == Refused(Why.STOPPED)
    assert engine.reserve(3) == [Why.STOPPED]
    assert store.free + 2 == store.total
    engine.tell(committed=tuple(engine.jobs), released=tuple(engine.leases))
    assert len(store.engine("other").match(1, 2)) == 2


def test_an_engine_that_comes_back_has_what_it_had(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    engine.stop()
    engine.open()  # introducing itself is not enough while a connection is missing
    assert engine.ask(1) == Refused(Why.STOPPED)
    engine.resume()
    engine.tell(committed=tuple(engine.jobs))
    assert len(engine.match(1)) == 1


def test_what_a_dead_engine_held_is_free(store: Store, engine: Engine) -> None:
    engine.save(1)
    engine.reserve(2)
    engine.match(1)
    store.tick(DEADLINE + 1)
    engine.reserve(3)
    engine.die()
    assert store.free + 1 == store.total
    assert store.planner.counters["reclaimed_claims"] == 3
    assert len(store.engine("other").match(1, 2)) == 1


def test_the_death_of_a_stranger_changes_nothing(store: Store, engine: Engine) -> None:
    engine.reserve(1)
    store.step(ClientGone("stranger"))
    engine.tell(committed=tuple(engine.jobs))
    assert len(engine.match(1)) == 1


# --------------------------------------------------------------------------------- late and foreign calls


def test_an_overtaken_call_is_refused_whole(store: Store, engine: Engine) -> None:
    engine.save(1)
    engine.match(1)
    lease = last(engine.leases)
    engine.seq += 5
    engine.tell()
    for seq in (engine.seq, engine.seq - 1, 1):
        late_match = Match(engine.name, seq, 100, keys(1))
        late_update = Update(engine.name, seq, reserve=((101, key(2), SLOT),), released=(lease,))
        assert store.step(late_match) == [Refused(Why.STALE)]
        assert store.step(late_update) == [Refused(Why.STALE)]
    client = store.planner.clients[engine.name]
    assert set(client.leases) == {lease}
    assert not client.jobs


def test_a_stranger_gets_nothing(store: Store) -> None:
    assert store.step(Match("stranger", 1, 1, keys(1))) == [Refused(Why.UNKNOWN_CLIENT)]
    assert store.step(Update("stranger", 1, reserve=((1, key(1), SLOT),))) == [Refused(Why.UNKNOWN_CLIENT)]
    assert store.step(SegmentRegistered("stranger", 0, 0)) == []


def test_an_engine_gives_back_by_number_what_a_lost_answer_granted(store: Store, engine: Engine) -> None:
    engine.save(1)
    engine.seq += 1
    store.step(Match(engine.name, engine.seq, 500, keys(1)))
    engine.seq += 1
    (answer,) = store.step(Update(engine.name, engine.seq, reserve=((501, key(2), SLOT),), leases_held=1))
    assert isinstance(answer, Updated)
    engine.tell(aborted=(501,), released=(500,))
    assert store.free + 1 == store.total


def test_a_lease_number_used_twice_loses_no_slot(store: Store, engine: Engine) -> None:
    engine.save(1, 2)
    for seq, number in enumerate((1, 2), start=engine.seq + 1):
        store.planner.step(Match(engine.name, seq, 77, keys(number)), 0)
    engine.die()
    assert audit(store.planner) == []


def test_a_job_number_used_twice_loses_no_slot(store: Store, engine: Engine) -> None:
    reserve = ((77, key(1), SLOT), (77, key(2), SLOT))
    store.planner.step(Update(engine.name, engine.seq + 1, reserve=reserve), 0)
    engine.die()
    assert audit(store.planner) == []
