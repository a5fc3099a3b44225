"""The scheduler side's books: every save is known by job, key and block until it is over."""

from __future__ import annotations

import itertools
from collections import deque

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstrata.connector.books import Outbox, Save, SaveBook, Stage
from kvstrata.core.slots import Slot

EPOCH, OTHER = b"epoch 1.", b"epoch 2."
SLOT = Slot(3, 4096, 64)


def save(job: int, blocks: tuple[int, ...] = (), epoch: bytes = EPOCH) -> Save:
    return Save(job, job.to_bytes(32, "little"), 4096, blocks or (job,), epoch)


def book(*saves: Save) -> SaveBook:
    found = SaveBook()
    for each in saves:
        found.want(each)
    return found


# -------------------------------------------------------------------------------------- one save's way


def test_a_save_goes_from_wanted_to_granted_to_the_workers() -> None:
    saves = book(save(1, blocks=(7, 8)))
    assert saves.dispatch() == []
    assert saves.grant(1, SLOT)
    assert saves.copying == 0
    (job,) = saves.dispatch()
    assert (job.job, job.epoch) == (1, EPOCH)
    assert (job.chunk.segment, job.chunk.offset, job.chunk.blocks) == (3, 4096, (7, 8))
    assert saves.copying == 1
    assert saves.dispatch() == []


def test_a_grant_that_nobody_waits_for_is_given_back() -> None:
    saves = book(save(1))
    saves.drop(1)
    assert not saves.grant(1, SLOT)
    assert saves.dispatch() == []


def test_a_save_dropped_after_its_grant_is_not_copied() -> None:
    saves = book(save(1), save(2))
    for job in (1, 2):
        saves.grant(job, SLOT)
    saves.drop(1)
    assert [job.job for job in saves.dispatch()] == [2]


def test_a_save_is_over_once() -> None:
    one = save(1)
    saves = book(one)
    assert saves.drop(1) is one
    assert saves.drop(1) is None
    assert len(saves) == 0
    assert one.key not in saves


def test_overwritten_finds_saves_by_any_of_their_blocks_once() -> None:
    first, second, third = save(1, (10, 11)), save(2, (11, 12)), save(3, (13,))
    saves = book(third, first, second)
    assert saves.overwritten([11, 10, 12]) == [first, second]
    assert saves.overwritten([99]) == []
    saves.drop(1)
    assert saves.overwritten([10, 11]) == [second]


def test_what_the_workers_have_outlives_its_store() -> None:
    saves = book(save(1), save(2), save(3), save(4, epoch=OTHER))
    saves.grant(2, SLOT)
    saves.grant(3, SLOT)
    saves.dispatch()
    saves.want(save(5))
    saves.grant(5, SLOT)
    assert [each.job for each in saves.of_other_stores(OTHER)] == [1, 5]
    assert [each.job for each in saves.of_other_stores(EPOCH)] == [4]
    assert [each.job for each in saves.of_other_stores(None)] == [1, 4, 5]


# --------------------------------------------------------------------------------------- against a model


class SaveBookModel(RuleBasedStateMachine):
    """The book against a dict of saves; the indices must never disagree with it."""

    def __init__(self) -> None:
        super().__init__()
        self.book = SaveBook()
        self.model: dict[int, tuple[bytes, tuple[int, ...], Stage]] = {}
        self.granted: list[int] = []
        self.numbers = itertools.count(1)

    @rule(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(tuple))
    def want(self, blocks: tuple[int, ...]) -> None:
        one = save(next(self.numbers), blocks)
        self.book.want(one)
        self.model[one.job] = (one.key, blocks, Stage.WANTED)

    @rule(job=st.integers(1, 20))
    def grant(self, job: int) -> None:
        if job in self.model and self.model[job][2] is not Stage.WANTED:
            return  # the store answers once
        assert self.book.grant(job, SLOT) == (job in self.model)
        if job in self.model:
            self.model[job] = (*self.model[job][:2], Stage.GRANTED)
            self.granted.append(job)

    @precondition(lambda self: self.model)
    @rule(job=st.integers(1, 20))
    def drop(self, job: int) -> None:
        dropped = self.book.drop(job)
        assert (dropped is not None) == (self.model.pop(job, None) is not None)

    @rule()
    def dispatch(self) -> None:
        expected = [job for job in self.granted if job in self.model]
        assert [job.job for job in self.book.dispatch()] == expected
        self.granted.clear()
        for job in expected:
            self.model[job] = (*self.model[job][:2], Stage.COPYING)

    @invariant()
    def agree(self) -> None:
        assert len(self.book) == len(self.model)
        assert self.book.copying == sum(stage is Stage.COPYING for _, _, stage in self.model.values())
        for job in range(1, 25):
            assert (save(job).key in self.book) == (job in self.model)
        for block in range(10):
            expected = sorted(job for job, (_, blocks, _) in self.model.items() if block in blocks)
            assert [each.job for each in self.book.overwritten([block])] == expected


TestSaveBookAgainstTheModel = SaveBookModel.TestCase
TestSaveBookAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------------- the outbox

numbers = st.lists(st.integers(1, 99), max_size=4)
keys = st.lists(st.binary(min_size=32, max_size=32), max_size=3)
outboxes = st.builds(
    Outbox,
    reserve=st.lists(
        st.tuples(st.integers(1, 99), st.binary(min_size=32, max_size=32), st.just(4096)), max_size=4
    ),
    committed=numbers,
    aborted=numbers,
    released=numbers,
    corrupt=keys,
    used=st.lists(keys.map(tuple), max_size=2).map(lambda used: deque(used, maxlen=64)),
)


def contents(box: Outbox) -> tuple[object, ...]:
    return (
        list(box.reserve),
        list(box.committed),
        list(box.aborted),
        list(box.released),
        list(box.corrupt),
        list(box.used),
    )


@given(outboxes)
def test_an_update_says_everything_and_empties_the_box(box: Outbox) -> None:
    before = contents(box)
    full = bool(box)
    update = box.take("engine", 7, leases_held=2, jobs_held=3, drawn=9)
    said = (update.reserve, update.committed, update.aborted, update.released, update.corrupt, update.used)
    assert tuple(map(list, said)) == before
    assert (update.client, update.seq, update.leases_held, update.jobs_held) == ("engine", 7, 2, 3)
    assert full == any(before)
    assert not box


@given(outboxes, outboxes)
def test_after_a_lost_update_every_report_is_said_again_before_newer_ones(old: Outbox, new: Outbox) -> None:
    _, committed, aborted, released, corrupt, _ = contents(old)
    reserved = [job for job, _, _ in old.reserve]
    _, newer_committed, newer_aborted, newer_released, newer_corrupt, newer_used = contents(new)
    box = old
    lost = box.take("engine", 1, 0, 0, 0)
    box.reserve, box.committed, box.aborted = list(new.reserve), list(new.committed), list(new.aborted)
    box.released, box.corrupt = list(new.released), list(new.corrupt)
    box.used = deque(new.used)
    box.take_back(lost)
    assert box.committed == committed + newer_committed
    assert box.released == released + newer_released
    assert box.corrupt == corrupt + newer_corrupt
    assert box.aborted == aborted + reserved + newer_aborted, "what it may have reserved is given back"
    assert box.reserve == new.reserve, "nothing is asked for twice"
    assert list(box.used) == newer_used


@given(outboxes, st.integers(1, 3))
@settings(max_examples=50)
def test_a_message_lost_again_and_again_loses_and_doubles_nothing(box: Outbox, times: int) -> None:
    reserved, committed = [job for job, _, _ in box.reserve], list(box.committed)
    aborted, released = list(box.aborted), list(box.released)
    for seq in range(times):
        box.take_back(box.take("engine", seq, 0, 0, 0))
    assert (box.committed, box.released) == (committed, released)
    assert box.aborted == aborted + reserved
    assert box.reserve == []


@given(outboxes)
def test_for_another_store_there_is_nothing_to_say(box: Outbox) -> None:
    box.clear()
    assert not box
    assert contents(box) == ([],) * 6


def test_one_update_tells_of_the_newest_prefixes_and_of_no_more_than_a_message_holds() -> None:
    box = Outbox()
    prefixes = [tuple(bytes([i, j // 256, j % 256]) for j in range(8000)) for i in range(100)]
    box.used.extend(prefixes)
    assert len(box.used) == 64  # nor does it grow while nobody listens
    used = box.take("engine", 1, 0, 0, 0).used
    assert used[1:] == tuple(prefixes[-4:])
    assert used[0] == prefixes[-5][:768]
    assert sum(map(len, used)) == 32768


def test_a_save_that_found_the_pool_growing_asks_again_but_not_for_ever() -> None:
    book = SaveBook()
    book.want(Save(1, b"k" * 32, 4096, (7,), b"epoch"))
    assert book.postpone(1, 10.0) and not book.postpone(2, 10.0)
    assert [save.job for save in book.ask_again(10.0)] == [1]
    assert not book.postponed
    assert book.postpone(1, 10.01)
    assert book.ask_again(10.02) == []  # not every step
    assert [save.job for save in book.ask_again(10.06)] == [1]
    assert not book.postpone(1, 22.1)
    book.drop(1)
    assert book.ask_again(23.0) == []


def test_a_postponed_save_whose_blocks_were_taken_asks_no_more() -> None:
    book = SaveBook()
    book.want(Save(1, b"k" * 32, 4096, (7,), b"epoch"))
    assert book.postpone(1, 0.0)
    (lost,) = book.overwritten([7])
    book.drop(lost.job)
    assert book.ask_again(1.0) == []
