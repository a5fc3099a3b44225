"""Copies between blocks and slots: loads before saves, every job reported once, no end without an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from kvstrata.connector.host_copies import HostCopies
from kvstrata.connector.jobs import ChunkCopy, Fence, HandedOver, LoadJob, Report, SaveJob
from kvstrata.connector.transfer import Role, Transfer
from kvstrata.controller.client import MappedSegment
from kvstrata.cuda_ext.native import ChecksumMismatch

EPOCH = b"epoch 1."
SLOT_BYTES = 64
BASE = 1 << 20  # address of segment 0
NEVER = time.monotonic() + 1e6
SOON_S = 10.0


class Segments:
    """Segment 0 of one store. `in_use` is what `use` has open."""

    def __init__(self) -> None:
        self.in_use = 0

    @contextmanager
    def use(self, epoch: bytes, segment: int) -> Iterator[MappedSegment | None]:
        self.in_use += 1
        try:
            yield MappedSegment(BASE, 1 << 16) if (epoch, segment) == (EPOCH, 0) else None
        finally:
            self.in_use -= 1


class Copier:
    """Notes what it is asked to copy; waits while `closed`; fails where a key is in `faults`."""

    def __init__(self) -> None:
        self.copies: list[tuple[str, int, tuple[int, ...], bytes]] = []
        self.faults: dict[bytes, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.running = 0

    def gather(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self._copy("save", slot_address, block_ids, key)

    def scatter(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self._copy("load", slot_address, block_ids, key)

    def _copy(self, what: str, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self.running += 1
        self.begun.release()
        assert self.gate.wait(SOON_S)
        self.running -= 1
        if key in self.faults:
            raise self.faults[key]
        self.copies.append((what, slot_address, block_ids, key))

    @property
    def order(self) -> list[tuple[str, int]]:
        return [(what, key[0]) for what, _, _, key in self.copies]


def key(number: int) -> bytes:
    return bytes([number]) * 32


def chunk(number: int, segment: int = 0) -> ChunkCopy:
    return ChunkCopy(key(number), segment, number * SLOT_BYTES, SLOT_BYTES, (number, -1))


def load(job: int, *numbers: int, expires: float = NEVER, epoch: bytes = EPOCH) -> LoadJob:
    return LoadJob(job, epoch, tuple(map(chunk, numbers)), expires)


def save(job: int, number: int, epoch: bytes = EPOCH) -> SaveJob:
    return SaveJob(job, epoch, chunk(number))


@pytest.fixture
def copier() -> Copier:
    return Copier()


@pytest.fixture
def segments() -> Segments:
    return Segments()


@pytest.fixture
def transfer(copier: Copier, segments: Segments) -> Iterator[Transfer]:
    transfer = Transfer(HostCopies({SLOT_BYTES: copier}, segments))
    yield transfer
    copier.gate.set()
    transfer.close()
    assert segments.in_use == 0


def reports(transfer: Transfer, count: int) -> dict[int, Report]:
    """The next `count` reports, by job."""
    found: list[Report] = []
    deadline = time.monotonic() + SOON_S
    while len(found) < count and time.monotonic() < deadline:
        found += transfer.poll(0.05)
    assert len(found) == count, found
    assert len({report.job for report in found}) == count, "a job is reported once"
    return {report.job: report for report in found}


def hold_first(transfer: Transfer, copier: Copier) -> None:
    """A save that is being copied until the gate opens."""
    copier.gate.clear()
    transfer.submit(saves=[save(100, 100)])
    assert copier.begun.acquire(timeout=SOON_S)


# ---------------------------------------------------------------------------------------- what is copied


def test_a_load_copies_its_chunks_in_order_to_where_they_lie(transfer: Transfer, copier: Copier) -> None:
    transfer.submit(loads=[load(1, 3, 4)])
    report = reports(transfer, 1)[1]
    assert (report.ok, report.nbytes, report.corrupt) == (True, 2 * SLOT_BYTES, None)
    assert copier.copies == [
        ("load", BASE + 3 * SLOT_BYTES, (3, -1), key(3)),
        ("load", BASE + 4 * SLOT_BYTES, (4, -1), key(4)),
    ]


def test_a_save_copies_one_chunk(transfer: Transfer, copier: Copier) -> None:
    transfer.submit(saves=[save(1, 5)])
    report = reports(transfer, 1)[1]
    assert (report.ok, report.nbytes) == (True, SLOT_BYTES)
    assert copier.copies == [("save", BASE + 5 * SLOT_BYTES, (5, -1), key(5))]


def test_loads_go_before_saves_and_each_kind_in_its_order(transfer: Transfer, copier: Copier) -> None:
    hold_first(transfer, copier)
    transfer.submit(saves=[save(1, 1), save(2, 2)])
    transfer.submit(loads=[load(3, 3), load(4, 4)])
    copier.gate.set()
    reports(transfer, 5)
    assert copier.order == [("save", 100), ("load", 3), ("load", 4), ("save", 1), ("save", 2)]


@pytest.mark.parametrize("threads", [1, 4])
def test_every_job_is_reported_once(copier: Copier, segments: Segments, threads: int) -> None:
    transfer = Transfer(HostCopies({SLOT_BYTES: copier}, segments), [Role.ANY] * threads)
    for job in range(0, 300, 3):
        transfer.submit([load(job, job % 7)], [save(job + 1, job % 7), save(job + 2, job % 5)])
        if job % 5 == 0:
            transfer.flush([job + 1, job + 2, 10**6])
    found = reports(transfer, 300)
    assert set(found) == set(range(300))
    assert all(report.ok for report in found.values())
    assert transfer.poll(0.01) == []
    transfer.close()
    assert segments.in_use == 0


# --------------------------------------------------------------------------------------------- flush


def test_flush_waits_for_a_copy_that_runs(transfer: Transfer, copier: Copier) -> None:
    hold_first(transfer, copier)
    waiting = threading.Thread(target=transfer.flush, args=([100],))
    waiting.start()
    waiting.join(timeout=0.1)
    assert waiting.is_alive()
    copier.gate.set()
    waiting.join(timeout=SOON_S)
    assert not waiting.is_alive()
    assert copier.order == [("save", 100)]


def test_flush_copies_what_is_queued_and_nothing_else(transfer: Transfer, copier: Copier) -> None:
    hold_first(transfer, copier)
    transfer.submit(saves=[save(1, 1), save(2, 2)])
    flushing = threading.Thread(target=transfer.flush, args=([2],))
    flushing.start()
    assert copier.begun.acquire(timeout=SOON_S)  # by the thread that flushes, beside the held one
    assert copier.running == 2
    copier.gate.set()
    flushing.join(timeout=SOON_S)
    assert ("save", 2) in copier.order
    assert set(reports(transfer, 3)) == {1, 2, 100}


def test_flush_of_finished_and_unknown_jobs_returns_at_once(transfer: Transfer) -> None:
    transfer.submit(saves=[save(1, 1)])
    reports(transfer, 1)
    transfer.flush([1, 2, 3])
    transfer.flush([])


def test_flush_reports_a_copy_that_fails(transfer: Transfer, copier: Copier) -> None:
    hold_first(transfer, copier)
    copier.faults[key(1)] = ValueError("no such block")
    transfer.submit(saves=[save(1, 1)])
    copier.gate.set()
    transfer.flush([1])
    assert not reports(transfer, 2)[1].ok


# ------------------------------------------------------------------------------------------- what fails


def test_a_load_past_its_deadline_begins_no_further_chunk(transfer: Transfer, copier: Copier) -> None:
    copier.gate.clear()
    transfer.submit(loads=[load(1, 1, 2, 3, expires=time.monotonic() + 0.2)])
    assert copier.begun.acquire(timeout=SOON_S)
    time.sleep(0.3)
    copier.gate.set()
    report = reports(transfer, 1)[1]
    assert (report.ok, report.failed_from, report.corrupt) == (False, 1, None)
    assert copier.order == [("load", 1)]


def test_a_load_that_is_late_from_the_start_touches_nothing(transfer: Transfer, copier: Copier) -> None:
    transfer.submit(loads=[load(1, 1, 2, expires=time.monotonic() - 1)])
    report = reports(transfer, 1)[1]
    assert (report.ok, report.failed_from) == (False, 0)
    assert copier.copies == []


def test_a_mismatch_names_its_chunk_and_ends_the_load(transfer: Transfer, copier: Copier) -> None:
    copier.faults[key(2)] = ChecksumMismatch(5)
    transfer.submit(loads=[load(1, 1, 2, 3)])
    report = reports(transfer, 1)[1]
    assert (report.ok, report.failed_from, report.corrupt) == (False, 1, key(2))
    assert copier.order == [("load", 1)]


@pytest.mark.parametrize("epoch", [b"epoch 2.", b""])
def test_slots_of_a_store_that_is_gone_are_not_copied(
    transfer: Transfer, copier: Copier, epoch: bytes
) -> None:
    transfer.submit([load(1, 1, epoch=epoch)], [save(2, 2, epoch=epoch)])
    found = reports(transfer, 2)
    assert (found[1].ok, found[1].failed_from, found[2].ok) == (False, 0, False)
    assert copier.copies == []


def test_a_segment_that_is_not_mapped_fails_the_load_from_there(transfer: Transfer, copier: Copier) -> None:
    chunks = (chunk(1), chunk(2, segment=9), chunk(3))
    transfer.submit(loads=[LoadJob(1, EPOCH, chunks, NEVER)])
    assert reports(transfer, 1)[1].failed_from == 1
    assert copier.order == [("load", 1)]


def test_after_a_failure_the_thread_goes_on(transfer: Transfer, copier: Copier) -> None:
    copier.faults = {key(1): ValueError("no such block"), key(2): ChecksumMismatch(0)}
    transfer.submit([load(1, 1), load(2, 2)], [save(3, 1)])
    transfer.submit([load(4, 4)], [save(5, 5)])
    found = reports(transfer, 5)
    assert [found[job].ok for job in range(1, 6)] == [False, False, False, True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_copy_raises_the_job_is_reported(copier: Copier, segments: Segments) -> None:
    copier.faults[key(1)] = RuntimeError("the device has gone")
    transfer = Transfer(HostCopies({SLOT_BYTES: copier}, segments))
    transfer.submit(saves=[save(1, 1), save(2, 2)])
    deadline = time.monotonic() + 0.5
    found: list[Report] = []
    while len(found) < 2 and time.monotonic() < deadline:
        found += transfer.poll(0.05)
    transfer.close()
    assert {report.job: report.ok for report in found} == {1: False, 2: True}


# -------------------------------------------------------------------------------------------- poll, close


def test_poll_returns_at_once_when_nothing_is_under_way(transfer: Transfer) -> None:
    started = time.monotonic()
    assert transfer.poll(5.0) == []
    assert time.monotonic() - started < 2.5


def test_poll_waits_no_longer_than_it_is_told(transfer: Transfer, copier: Copier) -> None:
    hold_first(transfer, copier)
    started = time.monotonic()
    assert transfer.poll(0.05) == []
    assert time.monotonic() - started < 2.5


def test_close_finishes_what_was_begun_and_drops_the_rest(copier: Copier, segments: Segments) -> None:
    transfer = Transfer(HostCopies({SLOT_BYTES: copier}, segments))
    hold_first(transfer, copier)
    transfer.submit([load(1, 1)], [save(2, 2)])
    closing = threading.Thread(target=transfer.close)
    closing.start()
    closing.join(timeout=0.1)
    assert closing.is_alive(), "the copy that runs is awaited"
    copier.gate.set()
    closing.join(timeout=SOON_S)
    assert not closing.is_alive()
    assert copier.running == 0
    assert copier.order == [("save", 100)]
    assert [report.job for report in transfer.poll()] == [100]
    assert not any(thread.name.startswith("kvstrata-copy") for thread in threading.enumerate())


def test_close_with_nothing_to_do_ends_the_threads(copier: Copier, segments: Segments) -> None:
    transfer = Transfer(HostCopies({SLOT_BYTES: copier}, segments), [Role.ANY] * 3)
    transfer.close()
    assert not any(thread.name.startswith("kvstrata-copy") for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_flushed_copy_raises_its_job_is_reported(transfer: Transfer, copier: Copier) -> None:
    """And the engine, whose thread flushes, hears nothing of it."""
    hold_first(transfer, copier)
    copier.faults[key(1)] = RuntimeError("the device has gone")
    transfer.submit(saves=[save(1, 1)])

    def flush() -> None:
        transfer.flush([1])
        returned.set()

    returned = threading.Event()
    flushing = threading.Thread(target=flush)
    flushing.start()
    assert copier.begun.acquire(timeout=SOON_S)  # beside the thread that is held
    copier.gate.set()
    assert returned.wait(SOON_S)
    flushing.join(timeout=SOON_S)
    found = [*transfer.poll(0.2), *transfer.poll(0.2)]
    assert {report.job: report.ok for report in found} == {100: True, 1: False}


class EarlyReader:
    """Copies as a device makes them: blocks are read long before their bytes are in the slot."""

    def __init__(self) -> None:
        self.read, self.written = threading.Event(), threading.Event()
        self.good = True  # what becomes of loads
        self.order: list[int] = []
        self.held: list[int] = []

    engine_idle = False

    def load(self, job: LoadJob, after: object, handed_over: Callable[[], None] | None) -> Report:
        """Hands over at once, ends when told to."""
        assert handed_over is not None
        handed_over()
        assert self.written.wait(SOON_S)
        return Report(job.job, ok=self.good)

    def save(self, jobs: Sequence[SaveJob], after: object, covered: Callable[[], None]) -> list[Report]:
        self.order += [job.job for job in jobs]
        assert self.read.wait(SOON_S)
        covered()
        assert self.written.wait(SOON_S)
        return [Report(job.job, ok=True) for job in jobs]

    def hold(self, stream: int) -> None:
        self.held.append(stream)

    def follow(self, stream: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("good", [True, False])
def test_a_load_that_is_handed_over_is_news_twice(good: bool) -> None:
    copies = EarlyReader()
    copies.good = good
    transfer = Transfer(copies, [Role.LOADS])
    transfer.submit(loads=[load(1, 1)])
    assert transfer.poll(SOON_S) == [HandedOver(1)]
    assert transfer.poll(0.01) == []
    copies.written.set()
    assert transfer.poll(SOON_S) == [Report(1, ok=good)]
    transfer.close()


def test_a_flush_waits_until_blocks_are_read_not_until_they_are_stored() -> None:
    copies = EarlyReader()
    transfer = Transfer(copies, [Role.SAVES, Role.SAVES], 1, flushes_itself=False)
    transfer.submit(saves=[save(number, number) for number in range(1, 5)])
    flushed = threading.Event()
    while len(copies.order) < 2:  # both threads have begun
        time.sleep(0.001)

    def flush() -> None:
        transfer.flush([4])
        flushed.set()

    thread = threading.Thread(target=flush)
    thread.start()
    assert not flushed.wait(0.1)
    copies.read.set()
    assert not flushed.wait(0.1), "both threads still write what they have read before"
    copies.written.set()
    assert flushed.wait(SOON_S)
    thread.join()
    transfer.close()
    assert copies.order.index(4) <= 2, "what is flushed goes before what is not"


def test_a_flush_of_what_has_been_read_returns_at_once() -> None:
    copies = EarlyReader()
    copies.read.set()
    transfer = Transfer(copies, [Role.SAVES], 4, flushes_itself=False)
    transfer.submit(saves=[save(number, number) for number in range(1, 4)])
    transfer.flush([1, 2, 3])
    assert transfer.poll() == []
    copies.written.set()
    transfer.close()


def test_what_is_flushed_out_of_turn_still_waits_for_the_newest_event() -> None:
    """Or a copy would read a block before the engine has written it."""
    copies = EarlyReader()
    seen: list[object] = []

    def save_all(jobs: Sequence[SaveJob], after: object, covered: Callable[[], None]) -> list[Report]:
        seen.append(([job.job for job in jobs], after))
        copies.written.wait(SOON_S)
        covered()
        return [Report(job.job, ok=True) for job in jobs]

    copies.save = save_all  # type: ignore[method-assign]
    transfer = Transfer(copies, [Role.SAVES], 4, flushes_itself=False)
    transfer.submit(saves=[save(1, 1)], after=Fence(1, None))
    while not seen:
        time.sleep(0.001)
    transfer.submit(saves=[save(2, 2)], after=Fence(2, None))
    transfer.submit(saves=[save(3, 3)], after=Fence(3, None))
    thread = threading.Thread(target=transfer.flush, args=([3],))
    thread.start()
    time.sleep(0.05)
    copies.written.set()
    thread.join()
    transfer.close()
    assert seen[1:] == [([3, 2], Fence(3, None))]
