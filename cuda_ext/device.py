"""Copies chunks between a GPU engine's KV cache and slots (the CUDA library's typed face).

Rule of this file: as in native.py, everything that could make C touch a wrong byte is checked here.
Whole jobs cross into C at once and release the GIL, so that a busy engine does not slow a copy.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstrata.core.digest import DIGEST_BYTES
from kvstrata.core.errors import KVStrataError
from kvstrata.core.layout import ChunkLayout
from kvstrata.cuda_ext.native import (
    ABI_VERSION,
    ChecksumMismatch,
    ChunkMismatch,
    DoesNotFit,
    EngineCache,
    HeaderMismatch,
    NativeLibraryError,
    Plane,
    check_block_ids,
    find_library,
    header_of,
    how_to_build,
    native_planes,
)

LIBRARY_NAME = "_kvstrata_cuda.so"
BLOCKS_MAX = 256  # KVS_BLOCKS_MAX
CHUNKS_MAX = 1024  # KVS_CHUNKS_MAX, of a job
STAGING_BYTES = 64 << 20  # a pipe: pieces of a sixth; smaller ones disturb less and use the link worse
REGISTERED_AT_ONCE = 64 << 20  # KVS_REGISTERED_AT_ONCE
_AHEAD = 8  # times the staging memory may be enqueued ahead: some 700 operations, CUDA's queues hold 1,000
_ALL_GOOD = -1
_OTHER_CHUNK = -1  # KVS_OTHER_CHUNK, in the place of an error


class DeviceError(KVStrataError):
    """CUDA refused something; the message is CUDA's. `code`: a cudaError_t."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"CUDA error {code}: {text}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to copy: its slot's address in registered memory, its blocks, its key.

    `way`: how it is stored: 0 as its pipe's layout says, 1 in the other of `ChunkLayout.ways`.
    """

    slot_address: int
    block_ids: tuple[int, ...]
    key: bytes
    way: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """The last chunks of a load, which its caller may rely on before they have come.

    From the chunk `first` on, `is_sure` is asked for each before it is enqueued: whether the bytes of it and
    of all after it have been verified in their slots, and the engine has nothing to do meanwhile. Once that
    is so, all of them are enqueued at once, and `handed_over` is called when those before are in their
    blocks: a stream that `DevicePipe.follow` was told of may then use all. Each is verified again as it is
    unpacked; the load's outcome says how that went.
    """

    first: int
    is_sure: Callable[[int], bool]
    handed_over: Callable[[], None]


class _Shape(ctypes.Structure):
    """kvs_pipe_shape"""

    _fields_ = [
        ("staging_bytes", ctypes.c_int64),
        ("device", ctypes.c_int32),
        ("chunk_tokens", ctypes.c_int32),
        ("block_tokens", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("checksum_offset", ctypes.c_int64),
    ]


class _Plan(ctypes.Structure):
    """kvs_plan"""

    _fields_ = [
        ("planes", ctypes.POINTER(Plane)),
        ("n_planes", ctypes.c_int64),
        ("before_key", ctypes.c_char_p),
        ("before_bytes", ctypes.c_int64),
        ("after_key", ctypes.c_char_p),
        ("after_bytes", ctypes.c_int64),
    ]


class _Chunks(ctypes.Structure):
    """kvs_chunks"""

    _fields_ = [
        ("count", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("keys", ctypes.c_char_p),
        ("block_ids", ctypes.c_void_p),
        ("plans", ctypes.c_char_p),
    ]


class DeviceLibrary:
    """The loaded CUDA library, and the calls that need no engine. Made by `load_device_library`."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self.native = _declare(native)

    def register(self, device: int, address: int, nbytes: int) -> None:
        """Make host memory known to CUDA, so that copies run at the link's rate.

        Raises:
            DeviceError: there is no GPU, or memory may not be locked.
        """
        self.check(self.native.kvs_cuda_register(device, address, nbytes))

    def unregister(self, device: int, address: int) -> None:
        """Raises DeviceError."""
        self.check(self.native.kvs_cuda_unregister(device, address))

    def check(self, error: int) -> None:
        if error:
            raise DeviceError(error, self.native.kvs_cuda_error(error).decode())


class DevicePipe:
    """Moves chunks one way between one engine rank's cache and slots, through staging memory of its own.

    Args:
        layout: of the chunks.
        cache: the engine's, in memory of `device`.
        device: CUDA ordinal.
        staging_bytes: of the device's memory, for chunks on their way; they move in pieces of whole
            layers, of which six fit in there. At least three layers of a chunk are taken. Of a `Rest` no
            more than `ahead_bytes` should be handed over.
        gathers: whether this pipe saves; a rank saves only the planes that it writes.

    Raises:
        ValueError: `cache` does not fit `layout`, or a block cannot be described by strides.
        DeviceError: CUDA refused, e.g. for want of memory.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        cache: EngineCache,
        device: int,
        staging_bytes: int,
        gathers: bool,
        library: DeviceLibrary | None = None,
    ) -> None:
        self.cache = cache
        self.ahead_bytes = _AHEAD * staging_bytes
        self._enqueuing = threading.Lock()  # nothing comes between the parts of a load
        self._handed_over: set[_Job] = set()
        self._lock = threading.Lock()  # of the set
        self._step = max(1, staging_bytes // 6 // layout.slot_bytes)  # chunks that fill a slab
        self._layouts = [layout, *(way for way in layout.ways if way.codec != layout.codec)]
        self._library = library or load_device_library()
        self._blocks = layout.chunk_tokens // cache.block_tokens
        if self._blocks > BLOCKS_MAX:
            raise ValueError(f"a chunk is {self._blocks} engine blocks, a GPU copies up to {BLOCKS_MAX}")
        if any(view is not None and view.table is not None for view in cache.planes):
            raise ValueError("this engine packs its blocks in a way that no strides describe")
        plans = (_Plan * len(self._layouts))()
        for plan, one in zip(plans, self._layouts, strict=True):
            held = [plane for plane, written in native_planes(one, cache, {}) if written or not gathers]
            plan.planes, plan.n_planes = (Plane * len(held))(*held), len(held)
            plan.before_key, plan.after_key = before, after = one.header_around_key
            plan.before_bytes, plan.after_bytes = len(before), len(after)
        shape = _Shape(
            staging_bytes, device, layout.chunk_tokens, cache.block_tokens, 0, layout.checksum_offset
        )
        self._pipe = ctypes.c_void_p()
        error = self._library.native.kvs_pipe_open(
            ctypes.byref(shape), plans, len(plans), ctypes.byref(self._pipe)
        )
        self._library.check(error)

    def load(
        self, chunks: Sequence[Chunk], after: int, expires: float, rest: Rest | None = None
    ) -> tuple[int, ChunkMismatch | None]:
        """Slots -> blocks, behind the CUDA event `after` (0: none).

        No chunk is begun past `expires` (monotonic seconds), but those of a `rest` once that is sure: then
        the load is handed over before its end.

        Returns:
            How many chunks, from the first, are in their blocks; and what was wrong with the next, if
            it was not the time.

        Raises:
            DeviceError: CUDA failed; nothing can be said about the blocks.
            ValueError: a block id outside the cache, or a wrong number of them.
        """
        done = 0
        for begin in range(0, len(chunks), CHUNKS_MAX):
            some = chunks[begin : begin + CHUNKS_MAX]
            last = begin + len(some) == len(chunks)
            copied, mismatch = self._load_some(some, after, expires, rest if last else None, begin)
            done += copied
            if copied < len(some):
                return done, mismatch
        return done, None

    def _load_some(
        self, chunks: Sequence[Chunk], after: int, expires: float, rest: Rest | None, place: int
    ) -> tuple[int, ChunkMismatch | None]:
        """As many chunks as a job may have, the first of which is the load's chunk number `place`."""
        split = max(1, rest.first - place) if rest else len(chunks)
        native = self._native(chunks[:split], may_skip=True)
        with _Job(self._library, self._pipe) as begun, _Job(self._library, self._pipe) as ahead:
            with self._enqueuing:
                begun.load(native, after, expires)
                while rest and begun.count == split < len(chunks) and not rest.is_sure(place + split):
                    some = chunks[split : split + self._step]
                    begun.load(self._native(some, may_skip=True), 0, expires)
                    split += len(some)
                if begun.count == split < len(chunks):
                    ahead.load(self._native(chunks[split:], may_skip=True), 0, math.inf, ahead=True)
            begun.end()
            if rest and begun.all_good and 0 < ahead.count == len(chunks) - split:
                with self._lock:
                    self._handed_over.add(ahead)
                rest.handed_over()
            try:
                ahead.end()
            finally:
                with self._lock:
                    self._handed_over.discard(ahead)
        done, mismatch = _outcome(chunks, begun)
        if done < split:
            return done, mismatch
        done, mismatch = _outcome(chunks[split:], ahead)
        return split + done, mismatch

    def save(
        self, chunks: Sequence[Chunk], after: int, covered: Callable[[], None] = lambda: None
    ) -> list[DoesNotFit | None]:
        """Blocks -> slots, behind the CUDA event `after` (0: none); for each chunk why it is not stored.

        `covered` is called once `hold` covers these chunks, or it has failed.

        Raises:
            DeviceError: CUDA failed; the slots hold no chunks.
            ValueError: a block id outside the cache, or a wrong number of them; or more than a job may have.
        """
        with _Job(self._library, self._pipe) as job:
            try:
                job.save(self._native(chunks, may_skip=False), after)
            finally:
                covered()
            job.end()
        outcome: list[DoesNotFit | None] = []
        for chunk, flag in zip(chunks, job.flags, strict=True):
            if flag == _ALL_GOOD:
                header = header_of(self._layouts[chunk.way], chunk.key)
                ctypes.memmove(chunk.slot_address, header, len(header))
            outcome.append(None if flag == _ALL_GOOD else DoesNotFit(flag))
        return outcome

    def hold(self, stream: int) -> None:
        """Make the CUDA stream `stream` wait until all saves enqueued so far have read their blocks.

        Raises:
            DeviceError: CUDA refused.
        """
        self._library.check(self._library.native.kvs_pipe_hold(self._pipe, stream))

    def follow(self, stream: int) -> None:
        """Make the CUDA stream `stream` wait for the loads that were handed over.

        Raises:
            DeviceError: CUDA refused.
        """
        with self._lock:
            for job in self._handed_over:
                job.follow(stream)

    def close(self) -> None:
        """Wait for what is under way, give the staging memory back."""
        if self._pipe:
            self._library.native.kvs_pipe_close(self._pipe)
            self._pipe = ctypes.c_void_p()

    def _native(self, chunks: Sequence[Chunk], may_skip: bool) -> _Native:
        if len(chunks) > CHUNKS_MAX:
            raise ValueError(f"a job of {len(chunks)} chunks; at most {CHUNKS_MAX}")
        for chunk in chunks:
            check_block_ids(self.cache, self._blocks, chunk.block_ids, may_skip)
        return _Native(
            array("Q", [chunk.slot_address for chunk in chunks]),
            b"".join([chunk.key for chunk in chunks]),
            array("i", itertools.chain.from_iterable([chunk.block_ids for chunk in chunks])),
            bytes([chunk.way for chunk in chunks]),
        )


class _Native:
    """Chunks as C wants them, in arrays: a job is made ready in tenths of a millisecond."""

    def __init__(self, slots: array[int], keys: bytes, block_ids: array[int], plans: bytes) -> None:
        if len(keys) != DIGEST_BYTES * len(slots):
            raise ValueError(f"a key has {DIGEST_BYTES} bytes")
        self._held = slots, block_ids  # C gets their addresses only
        self.count = len(slots)
        self.struct = _Chunks(self.count, slots.buffer_info()[0], keys, block_ids.buffer_info()[0], plans)


class _Job:
    """kvs_ticket: however the `with` ends, all that was enqueued is over afterwards."""

    def __init__(self, library: DeviceLibrary, pipe: ctypes.c_void_p) -> None:
        self._library, self._pipe = library, pipe
        self._ticket = ctypes.c_void_p()
        self._ended = False
        self.count = 0  # chunks begun
        self.other_chunk = False  # it stopped at a slot that holds something else than its chunk
        self.flags: list[int] = []  # of the chunks begun, once it has ended

    def __enter__(self) -> _Job:
        self._library.check(self._library.native.kvs_pipe_begin(self._pipe, ctypes.byref(self._ticket)))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self._end()

    def follow(self, stream: int) -> None:
        """Make a CUDA stream wait for what was enqueued; once that has ended, perhaps for more."""
        self._library.check(self._library.native.kvs_pipe_follow(self._pipe, self._ticket, stream))

    def end(self) -> None:
        """Wait for what was enqueued. Raises DeviceError: nothing can be said about any of it."""
        self._library.check(self._end())

    def _end(self) -> int:
        flags = (ctypes.c_int64 * CHUNKS_MAX)()
        self._ended = True
        error: int = self._library.native.kvs_pipe_end(self._pipe, self._ticket, flags)
        self.flags = flags[: self.count]
        return error

    @property
    def all_good(self) -> bool:
        return not self.other_chunk and all(flag == _ALL_GOOD for flag in self.flags)

    def load(self, chunks: _Native, after: int, expires: float, ahead: bool = False) -> None:
        """`ahead`: all at once, whatever staging memory is free."""
        begun = ctypes.c_int64()
        error = self._library.native.kvs_pipe_load(
            self._pipe,
            self._ticket,
            ctypes.byref(chunks.struct),
            after or None,
            expires,
            ahead,
            ctypes.byref(begun),
        )
        self.count += begun.value
        self.other_chunk = error == _OTHER_CHUNK
        if not self.other_chunk:
            self._library.check(error)

    def save(self, chunks: _Native, after: int) -> None:
        self._library.check(
            self._library.native.kvs_pipe_save(
                self._pipe, self._ticket, ctypes.byref(chunks.struct), after or None
            )
        )
        self.count += chunks.count


def _outcome(chunks: Sequence[Chunk], job: _Job) -> tuple[int, ChunkMismatch | None]:
    """How many of a load's chunks are in their blocks, and what was wrong with the next."""
    for index, flag in enumerate(job.flags):
        if flag != _ALL_GOOD:
            return index, ChecksumMismatch(flag)
    return job.count, HeaderMismatch.of(chunks[job.count].key) if job.other_chunk else None


def load_device_library(path: Path | None = None) -> DeviceLibrary:
    """Loads the CUDA library from `path`, or from where it was installed.

    Raises:
        NativeLibraryError: it was not built, cannot be loaded, or has another ABI version.
    """
    path = path or find_library(LIBRARY_NAME)
    try:
        native = ctypes.CDLL(str(path))
        found = native.kvs_cuda_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"{path} cannot be loaded ({error}): {how_to_build(LIBRARY_NAME)}"
        ) from error
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {found}, this kvstrata needs {ABI_VERSION}: "
            f"{how_to_build(LIBRARY_NAME)}, and remove stale copies"
        )
    return DeviceLibrary(native)


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    chunks, flags = ctypes.POINTER(_Chunks), ctypes.POINTER(int64)
    native.kvs_cuda_error.argtypes = [ctypes.c_int]
    native.kvs_cuda_error.restype = ctypes.c_char_p
    native.kvs_cuda_register.argtypes = [ctypes.c_int, pointer, int64]
    native.kvs_cuda_unregister.argtypes = [ctypes.c_int, pointer]
    native.kvs_pipe_open.argtypes = [
        ctypes.POINTER(_Shape),
        ctypes.POINTER(_Plan),
        int64,
        ctypes.POINTER(pointer),
    ]
    native.kvs_pipe_close.argtypes = [pointer]
    native.kvs_pipe_close.restype = None
    native.kvs_pipe_begin.argtypes = [pointer, ctypes.POINTER(pointer)]
    native.kvs_pipe_load.argtypes = [
        pointer, pointer, chunks, pointer, ctypes.c_double, ctypes.c_int32, ctypes.POINTER(int64),
    ]  # fmt: skip
    native.kvs_pipe_save.argtypes = [pointer, pointer, chunks, pointer]
    native.kvs_pipe_hold.argtypes = [pointer, pointer]
    native.kvs_pipe_follow.argtypes = [pointer, pointer, pointer]
    native.kvs_pipe_end.argtypes = [pointer, pointer, flags]
    return native
