"""Copies chunks between a GPU engine's KV cache and slots (the CUDA library's typed face).

Rule of this file: as in native.py, everything that could make C touch a wrong byte is checked here.
Whole jobs cross into C at once and release the GIL, so that a busy engine does not slow a copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstrata.core.errors import KVStrataError
from kvstrata.core.layout import ChunkLayout
from kvstrata.cuda_ext.native import (
    ABI_VERSION,
    ChecksumMismatch,
    ChunkMismatch,
    DoesNotFit,
    EngineCache,
    NativeLibraryError,
    Plane,
    check_block_ids,
    compare_header,
    find_library,
    header_of,
    native_planes,
    seed_of,
)

LIBRARY_NAME = "_kvstrata_cuda.so"
BLOCKS_MAX = 256  # KVS_BLOCKS_MAX
CHUNKS_MAX = 1024  # KVS_CHUNKS_MAX, of a job
_FIRST_PART = 12  # chunks: some milliseconds
SLABS = 3  # one fills, one is copied, one drains
_ALL_GOOD = -1


class DeviceError(KVStrataError):
    """CUDA refused something; the message is CUDA's."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to copy: its slot's address in registered memory, its blocks, its key."""

    slot_address: int
    block_ids: tuple[int, ...]
    key: bytes


class _Shape(ctypes.Structure):
    """kvs_pipe_shape"""

    _fields_ = [
        ("device", ctypes.c_int32),
        ("slabs", ctypes.c_int32),
        ("slab_bytes", ctypes.c_int64),
        ("chunk_tokens", ctypes.c_int32),
        ("block_tokens", ctypes.c_int32),
        ("checksum_offset", ctypes.c_int64),
    ]


class _Chunk(ctypes.Structure):
    """kvs_chunk"""

    _fields_ = [
        ("slot", ctypes.c_void_p),
        ("block_ids", ctypes.POINTER(ctypes.c_int32)),
        ("seed", ctypes.c_uint64),
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
            raise DeviceError(f"CUDA error {error}: {self.native.kvs_cuda_error(error).decode()}")


class DevicePipe:
    """Moves chunks one way between one engine rank's cache and slots, through staging memory of its own.

    Args:
        layout: of the chunks.
        cache: the engine's, in memory of `device`.
        device: CUDA ordinal.
        slab_bytes: of each of three staging slabs; larger chunks move in pieces of whole layers.
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
        slab_bytes: int,
        gathers: bool,
        library: DeviceLibrary | None = None,
    ) -> None:
        self.layout, self.cache = layout, cache
        self._library = library or load_device_library()
        self._blocks = layout.chunk_tokens // cache.block_tokens
        if self._blocks > BLOCKS_MAX:
            raise ValueError(f"a chunk is {self._blocks} engine blocks, a GPU copies up to {BLOCKS_MAX}")
        if any(view is not None and view.table is not None for view in cache.planes):
            raise ValueError("this engine packs its blocks in a way that no strides describe")
        held = [plane for plane, written in native_planes(layout, cache, {}) if written or not gathers]
        planes = (Plane * len(held))(*held)
        shape = _Shape(
            device, SLABS, slab_bytes, layout.chunk_tokens, cache.block_tokens, layout.checksum_offset
        )
        self._pipe = ctypes.c_void_p()
        error = self._library.native.kvs_pipe_open(
            ctypes.byref(shape), planes, len(held), ctypes.byref(self._pipe)
        )
        self._library.check(error)

    def load(self, chunks: Sequence[Chunk], after: int, expires: float) -> tuple[int, ChunkMismatch | None]:
        """Slots -> blocks, behind the CUDA event `after` (0: none).

        No chunk is begun past `expires` (monotonic seconds).

        Returns:
            How many chunks, from the first, are in their blocks; and what was wrong with the next, if
            it was not the time.

        Raises:
            DeviceError: CUDA failed; nothing can be said about the blocks.
            ValueError: a block id outside the cache, or a wrong number of them.
        """
        mismatch: ChunkMismatch | None = None
        with _Job(self._library, self._pipe) as job:
            for part in _parts(chunks):
                good, mismatch = self._with_headers(part)
                if not job.load(self._native(good, may_skip=True), after, expires) or mismatch:
                    break
        for index, flag in enumerate(job.flags):
            if flag != _ALL_GOOD:
                return index, ChecksumMismatch(flag)
        return len(job.flags), mismatch

    def _with_headers(self, chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], ChunkMismatch | None]:
        """The chunks up to the first whose slot holds something else."""
        for index, chunk in enumerate(chunks):
            try:
                compare_header(chunk.slot_address, self.layout, chunk.key)
            except ChunkMismatch as error:
                return chunks[:index], error
        return chunks, None

    def save(self, chunks: Sequence[Chunk], after: int) -> list[DoesNotFit | None]:
        """Blocks -> slots, behind the CUDA event `after` (0: none); for each chunk why it is not stored.

        Raises:
            DeviceError: CUDA failed; the slots hold no chunks.
            ValueError: a block id outside the cache, or a wrong number of them.
        """
        with _Job(self._library, self._pipe) as job:
            for part in _parts(chunks):
                job.save(self._native(part, may_skip=False), after)
        outcome: list[DoesNotFit | None] = []
        for chunk, flag in zip(chunks, job.flags, strict=True):
            if flag == _ALL_GOOD:
                header = header_of(self.layout, chunk.key)
                ctypes.memmove(chunk.slot_address, header, len(header))
            outcome.append(None if flag == _ALL_GOOD else DoesNotFit(flag))
        return outcome

    def close(self) -> None:
        """Wait for what is under way, give the staging memory back."""
        if self._pipe:
            self._library.native.kvs_pipe_close(self._pipe)
            self._pipe = ctypes.c_void_p()

    def _native(self, chunks: Sequence[Chunk], may_skip: bool) -> ctypes.Array[_Chunk]:
        native = (_Chunk * len(chunks))()
        for one, chunk in zip(native, chunks, strict=True):
            check_block_ids(self.cache, self._blocks, chunk.block_ids, may_skip)
            one.slot = chunk.slot_address
            one.block_ids = (ctypes.c_int32 * self._blocks)(*chunk.block_ids)
            one.seed = seed_of(chunk.key)
        return native


def _parts(chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    """A job's chunks in two parts, so that the first is copied while the rest is made ready.

    Not in more: each return to Python may wait milliseconds for a busy engine to let go of the GIL.

    Raises:
        ValueError: more chunks than a job may have.
    """
    if len(chunks) > CHUNKS_MAX:
        raise ValueError(f"a job of {len(chunks)} chunks; at most {CHUNKS_MAX}")
    yield chunks[:_FIRST_PART]
    if len(chunks) > _FIRST_PART:
        yield chunks[_FIRST_PART:]


class _Job:
    """kvs_ticket: however the `with` ends, all that was enqueued is over afterwards.

    `flags` are then those of the chunks that were begun.
    """

    def __init__(self, library: DeviceLibrary, pipe: ctypes.c_void_p) -> None:
        self._library, self._pipe = library, pipe
        self._ticket = ctypes.c_void_p()
        self._begun = 0
        self.flags: list[int] = []

    def __enter__(self) -> _Job:
        self._library.check(self._library.native.kvs_pipe_begin(self._pipe, ctypes.byref(self._ticket)))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        flags = (ctypes.c_int64 * CHUNKS_MAX)()
        error = self._library.native.kvs_pipe_end(self._pipe, self._ticket, flags)
        if kind is None:
            self._library.check(error)
            self.flags = flags[: self._begun]

    def load(self, chunks: ctypes.Array[_Chunk], after: int, expires: float) -> bool:
        """Whether all of them were begun in time."""
        begun = ctypes.c_int64()
        self._library.check(
            self._library.native.kvs_pipe_load(
                self._pipe, self._ticket, chunks, len(chunks), after or None, expires, ctypes.byref(begun)
            )
        )
        self._begun += begun.value
        return begun.value == len(chunks)

    def save(self, chunks: ctypes.Array[_Chunk], after: int) -> None:
        self._library.check(
            self._library.native.kvs_pipe_save(self._pipe, self._ticket, chunks, len(chunks), after or None)
        )
        self._begun += len(chunks)


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
        raise NativeLibraryError(f"{path} cannot be loaded ({error}): build it again") from error
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {found}, this kvstrata needs {ABI_VERSION}: build it again"
        )
    return DeviceLibrary(native)


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    chunks, flags = ctypes.POINTER(_Chunk), ctypes.POINTER(int64)
    native.kvs_cuda_error.argtypes = [ctypes.c_int]
    native.kvs_cuda_error.restype = ctypes.c_char_p
    native.kvs_cuda_register.argtypes = [ctypes.c_int, pointer, int64]
    native.kvs_cuda_unregister.argtypes = [ctypes.c_int, pointer]
    native.kvs_pipe_open.argtypes = [
        ctypes.POINTER(_Shape),
        ctypes.POINTER(Plane),
        int64,
        ctypes.POINTER(pointer),
    ]
    native.kvs_pipe_close.argtypes = [pointer]
    native.kvs_pipe_close.restype = None
    native.kvs_pipe_begin.argtypes = [pointer, ctypes.POINTER(pointer)]
    native.kvs_pipe_load.argtypes = [
        pointer, pointer, chunks, int64, pointer, ctypes.c_double, ctypes.POINTER(int64),
    ]  # fmt: skip
    native.kvs_pipe_save.argtypes = [pointer, pointer, chunks, int64, pointer]
    native.kvs_pipe_end.argtypes = [pointer, pointer, flags]
    return native
