"""Copies for engines whose cache lies on a GPU: whole jobs, beside the engine's own work."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvstrata.connector.host_copies import Segments
from kvstrata.connector.jobs import ChunkCopy, Fence, LoadJob, Report, SaveJob
from kvstrata.controller.client import MappedSegment
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.layout import ChunkLayout
from kvstrata.cuda_ext.device import (
    REGISTERED_AT_ONCE,
    Chunk,
    DeviceError,
    DeviceLibrary,
    DevicePipe,
    Rest,
    load_device_library,
)
from kvstrata.cuda_ext.native import ChunkMismatch, EngineCache, load_library

log = logging.getLogger("kvstrata.transfer")

_ADVICE = {  # by cudaError_t
    2: ": lower client.staging, or vLLM's --gpu-memory-utilization",
    35: ": there is no NVIDIA driver, or it is older than the CUDA that kvstrata was built with; update it",
    100: ": is a GPU visible to this process (CUDA_VISIBLE_DEVICES)?",
    209: ": kvstrata was built for other GPUs; build it with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native",
}

_LEAD_S = 0.010  # an idle engine hears of a load, plans a step and launches it
_SLOWEST = 6e9  # bytes a second, until a load has shown more
_TELLING_BYTES = 64 << 20  # of a load that tells the link's rate
# One thread reads some 6 GB/s of memory that no cache holds; the link moves nine times as much.
_VERIFYING_THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))
_VERIFIED_AT_ONCE = 8 << 20


class DeviceCopies:
    """Carries out jobs with two pipes, one for each direction.

    A fence that comes with a job is an event of the engine's stream: a save reads blocks that the engine
    has written before it, a load writes blocks that the engine has read before it.
    """

    def __init__(
        self, loads: DevicePipe, saves: DevicePipe, segments: Segments, ways: Sequence[ChunkLayout]
    ) -> None:
        """`ways`: the pipes' `ChunkLayout.ways`."""
        self._loads, self._saves, self._segments, self._ways = loads, saves, segments, ways
        self._way_of = {layout.slot_bytes: way for way, layout in enumerate(ways)}
        self._verifiers = ThreadPoolExecutor(_VERIFYING_THREADS, "kvstrata-verify")
        self._library = load_library()
        self._bytes_per_s = _SLOWEST  # of loads; threads may overwrite each other's news
        self.engine_idle = False

    def load(self, job: LoadJob, after: Fence | None, handed_over: Callable[[], None] | None) -> Report:
        started = time.monotonic()
        with contextlib.ExitStack() as held:
            mapped = self._map(held, job.epoch, job.chunks)
            there = itertools.takewhile(lambda copy: copy.segment in mapped, job.chunks)
            chunks = [self._chunk(mapped[copy.segment], copy) for copy in there]
            rest = None
            if handed_over and self.engine_idle and len(chunks) == len(job.chunks):
                rest = held.enter_context(self._verified_rest(job, chunks, handed_over))
            try:
                done, mismatch = self._loads.load(chunks, _event(after), job.expires, rest)
            except (DeviceError, ValueError):
                log.exception("load of %d chunks failed", len(job.chunks))
                return Report(job.job, ok=False)
        if done == len(job.chunks):
            nbytes, seconds = sum(copy.nbytes for copy in job.chunks), time.monotonic() - started
            if nbytes >= _TELLING_BYTES:  # it may have waited for another one: forget slowly
                self._bytes_per_s = max(nbytes / seconds, 0.9 * self._bytes_per_s, _SLOWEST)
            return Report(job.job, ok=True, nbytes=nbytes, seconds=seconds)
        if mismatch is None:
            if done == len(chunks):
                return Report(job.job, ok=False, failed_from=done)  # the next one's segment is not mapped
            log.warning("load of %d chunks missed its deadline at chunk %d", len(job.chunks), done)
            return Report(job.job, ok=False, failed_from=done)
        key = job.chunks[done].key
        log.error("stored chunk %s refused: %s", key.hex()[:16], mismatch)
        return Report(job.job, ok=False, failed_from=done, corrupt=key)

    @contextlib.contextmanager
    def _verified_rest(
        self, job: LoadJob, chunks: Sequence[Chunk], handed_over: Callable[[], None]
    ) -> Iterator[Rest]:
        """The last chunks of a load, which processors verify while the others are copied.

        From the last one backwards, until they meet the copies. No more than the link moves while the engine
        gets ready: it would only wait.
        """
        room = min(self._loads.ahead_bytes, int(_LEAD_S * self._bytes_per_s))
        sizes = itertools.accumulate(copy.nbytes for copy in reversed(job.chunks[1:]))
        begin = len(chunks) - sum(1 for _ in itertools.takewhile(lambda nbytes: nbytes <= room, sizes))
        at_once = max(1, _VERIFIED_AT_ONCE // job.chunks[0].nbytes)
        verdicts = [  # of the last chunks first, each with where its chunks end
            (end, self._verifiers.submit(self._are_good, chunks[max(begin, end - at_once) : end]))
            for end in range(len(chunks), begin, -at_once)
        ]

        def is_sure(first: int) -> bool:
            for end, verdict in verdicts:
                if end <= first:
                    verdict.cancel()  # copied already
            return self.engine_idle and all(_said_yes(verdict) for end, verdict in verdicts if end > first)

        try:
            yield Rest(begin, is_sure, handed_over)
        finally:
            # What has begun reads memory that is mapped only until then.
            wait([verdict for _, verdict in verdicts if not verdict.cancel()])

    def _are_good(self, chunks: Sequence[Chunk]) -> bool:
        """Whether they are what they should be; nobody asks any more once the engine computes."""
        try:
            for chunk in chunks:
                if not self.engine_idle:
                    return False
                self._library.verify(chunk.slot_address, self._ways[chunk.way], chunk.key)
        except ChunkMismatch:
            return False  # the load will say so
        return True

    def save(self, jobs: Sequence[SaveJob], after: Fence | None, covered: Callable[[], None]) -> list[Report]:
        started = time.monotonic()
        reports = {job.job: Report(job.job, ok=False) for job in jobs}
        with contextlib.ExitStack() as held:
            begun = [
                (job, self._chunk(address, job.chunk))
                for job in jobs
                for address in self._map(held, job.epoch, [job.chunk]).values()
            ]
            try:
                outcome = self._saves.save([chunk for _, chunk in begun], _event(after), covered)
            except (DeviceError, ValueError):
                log.exception("save of %d chunks failed", len(begun))
                return list(reports.values())
        seconds = (time.monotonic() - started) / max(1, len(begun))
        for (job, _), misfit in zip(begun, outcome, strict=True):
            report = reports[job.job]
            report.ok, report.does_not_fit = misfit is None, misfit is not None
            report.nbytes, report.seconds = (job.chunk.nbytes if report.ok else 0), seconds
        return list(reports.values())

    def hold(self, stream: int) -> None:
        """`stream`: a cudaStream_t. Raises DeviceError."""
        self._saves.hold(stream)

    def follow(self, stream: int) -> None:
        """`stream`: a cudaStream_t. Raises DeviceError."""
        self._loads.follow(stream)

    def close(self) -> None:
        self._verifiers.shutdown()
        self._loads.close()
        self._saves.close()

    def _chunk(self, segment_address: int, copy: ChunkCopy) -> Chunk:
        return Chunk(segment_address + copy.offset, copy.blocks, copy.key, self._way_of[copy.nbytes])

    def _map(self, held: contextlib.ExitStack, epoch: bytes, copies: Iterable[ChunkCopy]) -> dict[int, int]:
        """Address of each segment that the copies touch, as long as `held` is; of those that are mapped."""
        addresses: dict[int, int] = {}
        for segment in dict.fromkeys(copy.segment for copy in copies):
            mapping = held.enter_context(self._segments.use(epoch, segment))
            if mapping is not None:
                addresses[segment] = mapping.address
        return addresses


def open_pipes(
    layout: ChunkLayout, cache: EngineCache, device: int, staging_bytes: int
) -> tuple[DeviceLibrary, DevicePipe, DevicePipe]:
    """The library, a pipe for loads and one for saves.

    Raises:
        UnsupportedModel: they cannot be had; the message says what to change.
    """
    library = load_device_library()
    try:
        loads, saves = (
            DevicePipe(layout, cache, device, staging_bytes, gathers, library) for gathers in (False, True)
        )
    except DeviceError as error:
        raise UnsupportedModel(
            f"kvstrata cannot copy on this GPU: {error}{_ADVICE.get(error.code, '')}"
        ) from error
    except ValueError as error:
        raise UnsupportedModel(f"kvstrata cannot copy this engine's KV cache: {error}") from error
    return library, loads, saves


def _said_yes(verdict: Future[bool]) -> bool:
    return verdict.done() and not verdict.cancelled() and verdict.result()


def _event(after: Fence | None) -> int:
    return after.handle if after else 0


class DeviceRegistration:
    """Makes mapped segments known to CUDA, so that copies run at the link's rate (38 ms a GiB).

    A piece at a time: a registration holds up the engine's own calls to the device. Pieces begin at
    multiples of `REGISTERED_AT_ONCE`, which copies do not cross.
    """

    def __init__(self, library: DeviceLibrary, device: int) -> None:
        self._library, self._device = library, device

    def add(self, mapping: MappedSegment) -> None:
        """Raises DeviceError: CUDA refused, e.g. because memory may not be locked."""
        done: list[int] = []
        try:
            for address, nbytes in _pieces(mapping):
                self._library.register(self._device, address, nbytes)
                done.append(address)
        except DeviceError:
            for address in done:
                self._library.unregister(self._device, address)
            raise

    def remove(self, mapping: MappedSegment) -> None:
        """What CUDA does not let go of it keeps until the process ends."""
        for address, _ in _pieces(mapping):
            try:
                self._library.unregister(self._device, address)
            except DeviceError as error:
                log.warning("memory of a node store that is gone stays locked: %s", error)


def _pieces(mapping: MappedSegment) -> Iterator[tuple[int, int]]:
    address, end = mapping.address, mapping.address + mapping.nbytes
    while address < end:
        following = min(end, (address // REGISTERED_AT_ONCE + 1) * REGISTERED_AT_ONCE)
        yield address, following - address
        address = following
