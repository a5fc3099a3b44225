"""Copies between an engine's blocks and slots, on threads of their own.

Rule of this file: a job submitted is reported exactly once, or dropped unbegun by `close`. Loads go
before saves. A load past its deadline fails before a chunk is begun, never inside one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kvstrata.controller.client import MappedSegment
from kvstrata.cuda_ext.native import ChunkMismatch

log = logging.getLogger("kvstrata.transfer")


@dataclass(frozen=True, slots=True)
class ChunkCopy:
    """One chunk between a slot and engine blocks.

    `blocks` are the engine's block ids of the whole chunk, -1 where a block takes no part.
    """

    key: bytes
    segment: int
    offset: int  # bytes into the segment
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Slots -> blocks, for one request. `expires`: monotonic seconds, past which no chunk is begun."""

    job: int
    epoch: bytes  # of the store that granted the slots
    chunks: tuple[ChunkCopy, ...]
    expires: float


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Blocks -> slot, one chunk."""

    job: int
    epoch: bytes
    chunk: ChunkCopy


@dataclass(slots=True)
class Report:
    """What became of a job. `failed_from`: index of the first chunk of a load that is not in the blocks."""

    job: int
    ok: bool
    failed_from: int = 0
    corrupt: bytes | None = None  # key of the chunk whose bytes failed their check
    nbytes: int = 0
    seconds: float = 0.0


class Segments(Protocol):
    """Where granted segments are mapped; see `kvstrata.controller.client.SegmentMap`."""

    def use(self, epoch: bytes, segment: int) -> AbstractContextManager[MappedSegment | None]: ...


class Copier(Protocol):
    """Moves one chunk; see `kvstrata.cuda_ext.native.CopyEngine`."""

    def gather(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None: ...

    def scatter(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None: ...


class Transfer:
    """Runs jobs on `threads` threads; the caller polls for reports.

    Args:
        copier: moves one chunk, GIL released.
        segments: mappings by store epoch.
        slot_bytes: size of a chunk's slot.
        threads: more than one only where one core cannot fill the link.
    """

    def __init__(self, copier: Copier, segments: Segments, slot_bytes: int, threads: int = 1) -> None:
        self._copier, self._segments, self._slot_bytes = copier, segments, slot_bytes
        self._loads: deque[LoadJob] = deque()
        self._saves: dict[int, SaveJob] = {}
        self._running: set[int] = set()
        self._reports: list[Report] = []
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start_thread()

    def submit(self, loads: Iterable[LoadJob] = (), saves: Iterable[SaveJob] = ()) -> None:
        """Queue jobs; returns at once."""
        with self._changed:
            self._loads.extend(loads)
            self._saves.update((save.job, save) for save in saves)
            self._changed.notify_all()

    def flush(self, jobs: Iterable[int]) -> None:
        """Return when the copies of these saves are done: their blocks are about to be overwritten."""
        wanted = set(jobs)
        while True:
            with self._changed:
                save = next((self._saves.pop(job) for job in wanted if job in self._saves), None)
                if save is None:
                    while wanted & self._running:
                        self._changed.wait()
                    return
                self._running.add(save.job)
            report = Report(save.job, ok=False)
            try:
                report = self._save(save)
            finally:
                self._finish(save.job, report)

    def poll(self, wait_s: float = 0.0) -> list[Report]:
        """Reports since the last call; waits up to `wait_s` seconds for one if something is under way."""
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

    # --- the threads -------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                report = Report(job.job, ok=False)
                try:
                    report = self._load(job) if isinstance(job, LoadJob) else self._save(job)
                finally:  # an error that nobody foresaw fails this job, and the thread says so as it ends
                    self._finish(job.job, report)
        finally:
            with self._changed:
                if not self._closing:
                    self._start_thread()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="kvstrata-copy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _next(self) -> LoadJob | SaveJob | None:
        with self._changed:
            while not (self._closing or self._loads or self._saves):
                self._changed.wait()
            if self._closing:
                return None
            job = self._loads.popleft() if self._loads else self._saves.pop(next(iter(self._saves)))
            self._running.add(job.job)
            return job

    def _finish(self, job: int, report: Report) -> None:
        with self._changed:
            self._running.discard(job)
            self._reports.append(report)
            self._changed.notify_all()

    def _load(self, job: LoadJob) -> Report:
        started = time.monotonic()
        for index, chunk in enumerate(job.chunks):
            if time.monotonic() > job.expires:
                log.warning("load of %d chunks missed its deadline at chunk %d", len(job.chunks), index)
                return Report(job.job, ok=False, failed_from=index)
            try:
                with self._segments.use(job.epoch, chunk.segment) as mapping:
                    if mapping is None:
                        return Report(job.job, ok=False, failed_from=index)
                    self._copier.scatter(mapping.address + chunk.offset, chunk.blocks, chunk.key)
            except ChunkMismatch as error:
                log.error("stored chunk %s refused: %s", chunk.key.hex()[:16], error)
                return Report(job.job, ok=False, failed_from=index, corrupt=chunk.key)
            except ValueError:
                log.exception("load of chunk %s failed", chunk.key.hex()[:16])
                return Report(job.job, ok=False, failed_from=index)
        nbytes = self._slot_bytes * len(job.chunks)
        return Report(job.job, ok=True, nbytes=nbytes, seconds=time.monotonic() - started)

    def _save(self, job: SaveJob) -> Report:
        started = time.monotonic()
        try:
            with self._segments.use(job.epoch, job.chunk.segment) as mapping:
                if mapping is None:
                    return Report(job.job, ok=False)
                self._copier.gather(mapping.address + job.chunk.offset, job.chunk.blocks, job.chunk.key)
        except ValueError:
            log.exception("save of chunk %s failed", job.chunk.key.hex()[:16])
            return Report(job.job, ok=False)
        return Report(job.job, ok=True, nbytes=self._slot_bytes, seconds=time.monotonic() - started)
