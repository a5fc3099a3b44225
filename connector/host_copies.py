"""Copies for engines whose cache lies in host memory: chunk by chunk, on the calling thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
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
    """Carries out jobs with a copier.

    Args:
        copier: moves one chunk, GIL released.
        segments: mappings by store epoch.
        slot_bytes: size of a chunk's slot.
    """

    def __init__(self, copier: Copier, segments: Segments, slot_bytes: int) -> None:
        self._copier, self._segments, self._slot_bytes = copier, segments, slot_bytes

    def load(self, job: LoadJob, after: Fence | None) -> Report:
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
            except (OutOfMemory, ValueError):
                log.exception("load of chunk %s failed", chunk.key.hex()[:16])
                return Report(job.job, ok=False, failed_from=index)
        nbytes = self._slot_bytes * len(job.chunks)
        return Report(job.job, ok=True, nbytes=nbytes, seconds=time.monotonic() - started)

    def save(self, jobs: Sequence[SaveJob], after: Fence | None) -> list[Report]:
        return [self._save(job) for job in jobs]

    def _save(self, job: SaveJob) -> Report:
        started = time.monotonic()
        try:
            with self._segments.use(job.epoch, job.chunk.segment) as mapping:
                if mapping is None:
                    return Report(job.job, ok=False)
                self._copier.gather(mapping.address + job.chunk.offset, job.chunk.blocks, job.chunk.key)
        except DoesNotFit as error:
            log.debug("chunk %s: %s", job.chunk.key.hex()[:16], error)
            return Report(job.job, ok=False, does_not_fit=True)
        except (OutOfMemory, ValueError):
            log.exception("save of chunk %s failed", job.chunk.key.hex()[:16])
            return Report(job.job, ok=False)
        return Report(job.job, ok=True, nbytes=self._slot_bytes, seconds=time.monotonic() - started)
