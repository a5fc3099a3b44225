"""Copies between an engine's blocks and slots, on threads of their own.

Rule of this file: a job submitted is reported exactly once, or dropped unbegun by `close`. Loads go
before saves. A load past its deadline fails before a chunk is begun, never inside one.
"""

from __future__ import annotations

import enum
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstrata.connector.jobs import Fence, HandedOver, LoadJob, Report, SaveJob


class Copies(Protocol):
    """Carries out jobs, each to its end. May be called from several threads at once."""

    engine_idle: bool  # whether others may wait a moment with the engine; a hint, which may be out of date

    def load(self, job: LoadJob, after: Fence | None, handed_over: Callable[[], None] | None) -> Report:
        """`handed_over` may be called before the end, if the engine is idle: once all bytes are verified,
        all copies enqueued, and `follow` makes a stream wait for them.
        """
        ...

    def save(self, jobs: Sequence[SaveJob], after: Fence | None, covered: Callable[[], None]) -> list[Report]:
        """One report for each job, in their order.

        `covered` may be called before the end: once `hold` makes a stream wait for these saves, too.
        """
        ...

    def hold(self, stream: int) -> None:
        """Make this stream of the engine's device wait until all saves that are covered have read blocks."""
        ...

    def follow(self, stream: int) -> None:
        """Make this stream of the engine's device wait for all loads that were handed over."""
        ...

    def close(self) -> None:
        """Give back what was taken. No job runs any more."""
        ...


class Role(enum.Enum):
    """What a thread takes from the queue."""

    ANY = "any"  # loads first
    LOADS = "loads"
    SAVES = "saves"


@dataclass(frozen=True, slots=True)
class Queued:
    """A job and what it has to wait for: an event of the engine's."""

    job: LoadJob | SaveJob
    after: Fence | None
    turn: int  # submissions before: what is flushed is taken out of turn


class Transfer:
    """Runs jobs on threads; the caller polls for reports.

    Args:
        copies: carries jobs out, GIL released.
        threads: what each thread does.
        saves_at_once: a thread takes so many saves together.
        flushes_itself: whether `flush` copies at once, beside the threads, or leaves it to those for saves.
    """

    def __init__(
        self,
        copies: Copies,
        threads: Sequence[Role] = (Role.ANY,),
        saves_at_once: int = 1,
        flushes_itself: bool = True,
    ) -> None:
        self._copies, self._saves_at_once, self._flushes_itself = copies, saves_at_once, flushes_itself
        self._turns = itertools.count()
        self._loads: deque[Queued] = deque()
        self._saves: dict[int, Queued] = {}
        self._running: set[int] = set()
        self._unread: set[int] = set()  # saves that run, and neither have read their blocks nor are covered
        self._reports: list[Report | HandedOver] = []
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        for role in threads:
            self._start_thread(role)

    def submit(
        self, loads: Iterable[LoadJob] = (), saves: Iterable[SaveJob] = (), after: Fence | None = None
    ) -> None:
        """Queue jobs that may begin once `after` has happened; returns at once."""
        with self._changed:
            turn = next(self._turns)
            self._loads.extend(Queued(load, after, turn) for load in loads)
            self._saves.update((save.job, Queued(save, after, turn)) for save in saves)
            self._changed.notify_all()

    def flush(self, jobs: Iterable[int]) -> None:
        """Return when these saves have read their blocks, or are covered by `Copies.hold`."""
        wanted = set(jobs)
        if not wanted:
            return
        with self._changed:
            first = {job: queued for job, queued in self._saves.items() if job in wanted}
            if self._flushes_itself:
                for job in first:
                    del self._saves[job]
                self._running |= first.keys()
                self._unread |= first.keys()
            else:
                self._saves = first | self._saves
                self._changed.notify_all()
        if first and self._flushes_itself:
            # In a thread of its own: what nobody foresaw must end that one, not the engine's.
            flushing = threading.Thread(
                target=self._run, args=(list(first.values()),), name="kvstrata-flush", daemon=True
            )
            flushing.start()
            flushing.join()
        with self._changed:
            while wanted & (self._unread | self._saves.keys()):
                self._changed.wait()

    def poll(self, wait_s: float = 0.0) -> list[Report | HandedOver]:
        """News since the last call; waits up to `wait_s` seconds for one if something is under way."""
        with self._changed:
            if not self._reports and wait_s > 0 and (self._loads or self._saves or self._running):
                self._changed.wait(wait_s)
            reports, self._reports = self._reports, []
            return reports

    def close(self) -> None:
        """Finish what was begun, drop the rest, stop the threads. No copy runs afterwards."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._copies.close()

    # --- the threads -------------------------------------------------------------------------

    def _work(self, role: Role) -> None:
        try:
            while batch := self._next(role):
                self._run(batch)
        finally:
            with self._changed:
                if not self._closing:
                    self._start_thread(role)

    def _start_thread(self, role: Role) -> None:
        thread = threading.Thread(target=self._work, args=(role,), name="kvstrata-copy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _next(self, role: Role) -> list[Queued]:
        """What to do next: one load or some saves; nothing when it is time to end."""
        with self._changed:
            while True:
                if self._closing:
                    return []
                if self._loads and role is not Role.SAVES:
                    batch = [self._loads.popleft()]
                    break
                if self._saves and role is not Role.LOADS:
                    jobs = list(itertools.islice(self._saves, self._saves_at_once))
                    batch = [self._saves.pop(job) for job in jobs]
                    break
                self._changed.wait()
            begun = {queued.job.job for queued in batch}
            self._running |= begun
            if isinstance(batch[0].job, SaveJob):
                self._unread |= begun
            return batch

    def _run(self, batch: Sequence[Queued]) -> None:
        """Carry out a load, or saves; an error that nobody foresaw fails them, and its thread says so."""
        reports = [Report(queued.job.job, ok=False) for queued in batch]
        after = max(batch, key=lambda queued: queued.turn).after  # the newest covers those before it
        try:
            load = batch[0].job
            if isinstance(load, LoadJob):
                reports = [self._copies.load(load, after, lambda: self._handed_over(load.job))]
            else:
                saves = [queued.job for queued in batch if isinstance(queued.job, SaveJob)]
                reports = self._copies.save(saves, after, lambda: self._covered(batch))
        finally:
            self._covered(batch)
            with self._changed:
                self._running.difference_update(queued.job.job for queued in batch)
                self._reports += reports
                self._changed.notify_all()

    def _handed_over(self, job: int) -> None:
        with self._changed:
            self._reports.append(HandedOver(job))
            self._changed.notify_all()

    def _covered(self, batch: Sequence[Queued]) -> None:
        with self._changed:
            self._unread.difference_update(queued.job.job for queued in batch)
            self._changed.notify_all()
