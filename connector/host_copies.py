"""Copies for engines whose cache lies in host memory: chunk by chunk, on the calling thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kvstrata.connector.jobs import Fence, LoadJob, Report, SaveJob
from kvstrata.controller.client import MappedSegment
from kvstrata.cuda_ext.native import ChunkMismatch, DoesNotFit, OutOfMemory

log = logging.getLogger("kvstrata.transfer")


class Segments(Protocol):
    """Where granted segments are mapped; see `kvstrata.controller.client.SegmentMap`."""

    def use(self, epoch: bytes, segment: int) -> AbstractContextManager[MappedSegment | None]: ...


class Copier(Protocol):
    """Moves one chunk; see `kvstrata.cuda_ext.native.CopyEngine`."""

    def gather(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None: ...

    def scatter(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None: ...


class HostCopies:
    """Carries out jobs with copiers.

    Args:
        copiers: by the size of a slot, in bytes: each moves one chunk stored in its way, GIL released.
        segments: mappings by store epoch.
    """

    def __init__(self, copiers: Mapping[int, Copier], segments: Segments) -> None:
        self._copiers, self._segments = copiers, segments
        self.engine_idle = False

    def load(self, job: LoadJob, after: Fence | None, handed_over: Callable[[], None] | None) -> Report:
        started = time.monotonic()
        for index, chunk in enumerate(job.chunks):
            if time.monotonic() > job.expires:
                log.warning("load of %d chunks missed its deadline at chunk %d", len(job.chunks), index)
                return Report(job.job, ok=False, failed_from=index)
            try:
                with self._segments.use(job.epoch, chunk.segment) as mapping:
                    if mapping is None:
                        return Report(job.job, ok=False, failed_from=index)
                    copier = self._copiers[chunk.nbytes]
                    copier.scatter(mapping.address + chunk.offset, chunk.blocks, chunk.key)
            except ChunkMismatch as error:
                log.error("stored chunk %s refused: %s", chunk.key.hex()[:16], error)
                return Report(job.job, ok=False, failed_from=index, corrupt=chunk.key)
            except (OutOfMemory, ValueError):
                log.exception("load of chunk %s failed", chunk.key.hex()[:16])
                return Report(job.job, ok=False, failed_from=index)
        nbytes = sum(chunk.nbytes for chunk in job.chunks)
        return Report(job.job, ok=True, nbytes=nbytes, seconds=time.monotonic() - started)

    def save(self, jobs: Sequence[SaveJob], after: Fence | None, covered: Callable[[], None]) -> list[Report]:
        return [self._save(job) for job in jobs]

    def hold(self, stream: int) -> None:
        """There is no device: what has not been read is not done."""

    def follow(self, stream: int) -> None:
        """No load is handed over before its end: it would not end any sooner."""

    def close(self) -> None:
        """Nothing was taken."""

    def _save(self, job: SaveJob) -> Report:
        started = time.monotonic()
        try:
            with self._segments.use(job.epoch, job.chunk.segment) as mapping:
                if mapping is None:
                    return Report(job.job, ok=False)
                copier = self._copiers[job.chunk.nbytes]
                copier.gather(mapping.address + job.chunk.offset, job.chunk.blocks, job.chunk.key)
        except DoesNotFit as error:
            log.debug("chunk %s: %s", job.chunk.key.hex()[:16], error)
            return Report(job.job, ok=False, does_not_fit=True)
        except (OutOfMemory, ValueError):
            log.exception("save of chunk %s failed", job.chunk.key.hex()[:16])
            return Report(job.job, ok=False)
        return Report(job.job, ok=True, nbytes=job.chunk.nbytes, seconds=time.monotonic() - started)
