"""What goes when a pool is full, for whom, and how far the planner looks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest

from kvstrata.core.events import ClientOpened, SegmentRegistered, Update, Updated, Why
from kvstrata.core.policy import LRU, POLICIES
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, Engine, Store, key, keys


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def engine(store: Store) -> Engine:
    return store.engine()


def test_the_least_recently_used_chunk_goes_first(engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    engine.tell(used=(keys(1, 2),))
    engine.save(11, 12)
    found = [number for number in range(1, 9) if engine.match(number)]
    assert found == [1, 2, 5, 6, 7, 8]


def test_a_full_pool_refuses_and_says_so(store: Store, engine: Engine) -> None:
    engine.reserve(*range(1, 5))
    engine.register_all()
    grants = engine.reserve(*range(5, 12))
    assert grants[4:] == [Why.FULL] * 3
    assert store.planner.counters["refused_full"] == 3


def test_only_chunks_that_the_writer_can_reach_are_evicted_for_it(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    other = Engine(store, "other", SLOT, workers=1)
    other.open()
    store.step(SegmentRegistered("other", 0, 1))
    granted = other.reserve(11)
    assert [slot.segment for slot in granted if isinstance(slot, Slot)] == [1]
    assert len(engine.match(1, 2, 3, 4)) == 4


class CountingLRU(LRU):
    """Counts the keys that it was made to show."""

    shown = 0

    def victims(self) -> Iterator[bytes]:
        for each in super().victims():
            CountingLRU.shown += 1
            yield each


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many candidates evictions have looked at since it was asked last."""
    monkeypatch.setitem(POLICIES, "lru", CountingLRU)

    def since() -> int:
        count, CountingLRU.shown = CountingLRU.shown, 0
        return count

    since()
    return since


def test_one_model_s_eviction_does_not_look_at_another_s_chunks(shown: Callable[[], int]) -> None:
    store = Store(slots=1008, per_segment=1000)
    small = store.engine("small")
    small.save(*range(1000))
    large = store.engine("large", slot_bytes=4 * SLOT)
    large.save(5000, 5001)  # in the last segment, later than all of the other's
    assert store.free == 0
    large.save(5002)
    small.save(2000)
    assert shown() == 2
    assert [bool(large.match(number)) for number in (5000, 5001, 5002)] == [False, True, True]
    assert [bool(small.match(number)) for number in (0, 1, 2000)] == [False, True, True]


def test_an_update_walks_past_what_it_cannot_evict_once(shown: Callable[[], int]) -> None:
    store = Store(slots=1500, per_segment=1000)
    engine = store.engine()
    engine.save(*range(1000))
    engine.save(*range(1000, 1500))
    shown()
    other = Engine(store, "other", SLOT, workers=1)
    other.open()
    store.step(SegmentRegistered("other", 0, 1))  # and not the first, where the oldest chunks are
    other.save(*range(2000, 2100))
    assert shown() == 1100


def test_an_eviction_gives_up_after_a_while(
    shown: Callable[[], int], store: Store, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.core.catalogue._LOOKED_AT_MAX", 3)
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    shown()
    other = Engine(store, "other", SLOT, workers=1)
    other.open()
    store.step(SegmentRegistered("other", 0, 1))
    assert other.reserve(11, 12) == [Why.FULL] * 2
    assert shown() == 3, "not once more for the second"


def test_what_a_model_has_left_behind_goes_before_anything_of_another(store: Store, engine: Engine) -> None:
    """Two segments of the old model's, and a new one with slots twice as large: it gets both."""
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    store.tick(60)
    large = store.engine("large", slot_bytes=2 * SLOT)
    large.save(101, 102)
    store.tick(1)
    large.save(103, 104)
    assert len(large.match(101)) == 1 and len(large.match(103)) == 1
    assert not engine.match(1) and not engine.match(5)


def test_a_model_in_use_keeps_its_segments_while_another_reuses_its_own(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    store.tick(60)
    large = store.engine("large", slot_bytes=2 * SLOT)
    large.save(101, 102)  # one segment changes hands: the pool has no other room
    half = 2  # chunks of the segment: one popular chunk would not keep it
    (kept,) = [first for first in (1, 5) if engine.match(*range(first, first + half))]
    engine.tell(released=tuple(engine.leases))
    for number in range(103, 120):
        store.tick(1)
        large.save(number)
        store.tick(1)
        assert len(engine.match(*range(kept, kept + half))) == half
        engine.tell(released=tuple(engine.leases))


def test_a_hot_model_takes_nothing_from_a_quiet_one_while_its_own_chunks_are_older(
    store: Store, engine: Engine
) -> None:
    """Each of its segments may have a popular chunk in it; what it has not used for longest goes first."""
    quiet = store.engine("quiet", slot_bytes=2 * SLOT)
    quiet.save(101)
    engine.register_all()
    popular = 1
    engine.save(popular)
    for number in range(2, 40):
        store.tick(1)
        engine.tell(used=(keys(popular),))
        engine.save(number)
        if number % 3 == 0:
            assert len(quiet.match(101)) == 1
            quiet.tell(released=tuple(quiet.leases))


def test_only_segments_that_the_writer_has_mapped_change_hands(store: Store, engine: Engine) -> None:
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    store.tick(60)
    large = Engine(store, "large", 2 * SLOT, workers=1)
    large.open()
    assert large.reserve(101) == [Why.FULL]
    assert len(engine.match(1, 2, 3, 4)) == 4


def test_two_sizes_in_one_update_do_not_evict_a_chunk_twice(store: Store, engine: Engine) -> None:
    """The second reservation takes over the segment in which the third one's victim was."""
    engine.save(*range(1, 5))
    engine.save(*range(5, 9))
    store.tick(1)
    for number in (2, 3, 4, 6, 7, 8):  # 1 and 5 are the oldest then, in two segments
        engine.match(number)
    engine.tell(released=tuple(engine.leases))
    store.step(ClientOpened("both", (SLOT, 2 * SLOT), 1))
    for segment in (0, 1):
        store.step(SegmentRegistered("both", 0, segment))
    reserve = ((1, key(11), SLOT), (2, key(12), 2 * SLOT), (3, key(13), SLOT))
    (answer,) = store.step(Update("both", 1, reserve=reserve))
    assert isinstance(answer, Updated)
    first, second, third = answer.grants
    assert isinstance(first, Slot) and isinstance(second, Slot)
    assert second.segment == 1, "the other one has to be taken over for this to show anything"
    assert isinstance(third, Slot) and third.segment == 0, "there is more that may go, in the other segment"
    assert store.planner.counters["evicted_chunks"] == 1 + 4 + 1


@pytest.mark.parametrize("seed", range(60))
def test_an_update_of_two_sizes_is_refused_only_what_there_is_no_room_for(seed: int) -> None:
    random = Random(seed)
    per_segment = random.choice([4, 8, 16])
    store = Store(slots := 8 * per_segment, per_segment)
    old = store.engine("old")
    old_chunks = range(slots)
    for first in range(0, slots, per_segment):
        old.save(*range(first, first + per_segment))
    for number in random.choices(old_chunks, k=slots):
        store.tick(1)
        old.tell(used=(keys(number),))
    for number in random.sample(old_chunks, random.choice([0, 2, slots // 2])):
        old.match(number)  # and holds on to it
    store.tick(1)
    store.step(ClientOpened("both", (SLOT, 2 * SLOT), 1))
    for segment in store.planner.slots.segments:
        store.step(SegmentRegistered("both", 0, segment))
    # Large ones for two segments at most: so often are lost victims made up for.
    large = random.sample(range(12), random.randint(1, 4))
    sizes = [2 * SLOT if at in large else SLOT for at in range(12)]
    reserve = tuple((at, key(1000 + at), nbytes) for at, nbytes in enumerate(sizes))
    (answer,) = store.step(Update("both", 1, reserve=reserve))
    assert isinstance(answer, Updated)
    refused = {nbytes for nbytes, grant in zip(sizes, answer.grants, strict=True) if grant is Why.FULL}
    catalogue, may_go = store.planner.catalogue, lambda entry: entry.may_go(store.now)
    for nbytes in refused:
        assert not [entry for entry in catalogue if entry.slot.nbytes == nbytes and may_go(entry)]
        others = [each.id for each in store.planner.slots.segments.values() if each.slot_bytes != nbytes]
        assert not [segment for segment in others if all(map(may_go, catalogue.inside(segment)))]


@pytest.mark.parametrize("per_segment", [16, 5, 4, 3, 2])
def test_one_popular_chunk_does_not_keep_what_lies_beside_it(per_segment: int) -> None:
    """One chunk of each segment is used: a model in need gets one segment after the other."""
    slots = 16 * per_segment
    store = Store(slots, per_segment)
    old = store.engine("old")
    for first in range(0, slots, per_segment):
        old.save(*range(first, first + per_segment))
    store.tick(60)
    popular = range(0, slots, per_segment)
    new = store.engine("new", slot_bytes=2 * SLOT)
    a_turn = 4 * (per_segment // 2)  # chunks that fill four segments
    hits = 0
    for turn in range(3 * a_turn):
        store.tick(1)
        for number in popular:
            old.match(number)
        old.tell(released=tuple(old.leases))
        wanted = 1000 + turn % a_turn
        if new.match(wanted):
            hits += 1
        else:
            new.save(wanted)
        new.tell(released=tuple(new.leases))
    assert hits == 2 * a_turn
    assert sum(bool(old.match(number)) for number in popular) == 16 - 4, "no more changed hands than needed"
