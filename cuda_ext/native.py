"""Copies chunks between an engine's KV cache and slots, and checks them (the CPU library's typed face).

Rule of this file: everything that could make C touch a wrong byte is checked here, once at
construction where it can be. Loading happens in `load_library`, never on import. The calls release
the GIL and keep no state, so one object serves many threads.
"""

from __future__ import annotations

import ctypes
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvstrata.cuda_ext
from kvstrata.core.digest import DIGEST_BYTES
from kvstrata.core.errors import KVStrataError
from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout, LayerSpec, SubBlock, writer_of

ABI_VERSION = 5  # KVS_ABI_VERSION in kvstrata.h
LIBRARY_NAME = "_kvstrata_cpu.so"
NO_BLOCK = -1  # KVS_NO_BLOCK: this block takes no part in a scatter
_ALL_GOOD, _NO_MEMORY = -1, -2


class NativeLibraryError(KVStrataError):
    """The copy library is missing, or was built from another version of the source."""


class OutOfMemory(KVStrataError):
    """There is no memory for one unpacked sub-block. Nothing is wrong with the chunk."""


class ChunkMismatch(KVStrataError):
    """A slot does not hold what it should; the chunk is a miss and must be dropped."""


class HeaderMismatch(ChunkMismatch):
    """The slot's header is not the one of this layout and key."""

    @classmethod
    def of(cls, key: bytes) -> HeaderMismatch:
        return cls(f"the slot does not hold chunk {key.hex()} in the expected layout")


class ChecksumMismatch(ChunkMismatch):
    """The bytes of a sub-block are not those its checksum was made of."""

    def __init__(self, sub_block_index: int) -> None:
        super().__init__(f"sub-block {sub_block_index} does not match its checksum: the chunk is damaged")
        self.sub_block_index = sub_block_index


class DoesNotFit(KVStrataError):
    """A chunk has a sub-block with more escapes than its packed form holds."""

    def __init__(self, sub_block_index: int) -> None:
        super().__init__(f"sub-block {sub_block_index} is spread too widely to be packed")
        self.sub_block_index = sub_block_index


@dataclass(frozen=True, slots=True)
class PlaneView:
    """Where an engine keeps one (layer, plane). The caller keeps that memory alive and in place.

    The element for (block, head, token in block, dim) lies at `pointer` plus each index times its
    stride, in bytes. With a `table`, the last two terms are replaced: native int32
    `table[token * dim + d]` is the offset in elements inside the (block, head) region, which is as
    large as the strides of block and head leave room for.
    """

    pointer: int
    stride_block: int
    stride_head: int
    stride_token: int
    stride_dim: int
    table: bytes | None = None


@dataclass(frozen=True, slots=True)
class HeadRange:
    """The model's KV heads `first .. first + count - 1` of one layer."""

    first: int
    count: int


@dataclass(frozen=True)
class EngineCache:
    """What one engine rank holds of the model's KV cache.

    `planes` has an entry for each (part, layer, plane) of the chunk layout, in that order; None where
    the layer is held elsewhere: by another pipeline stage, or in blocks with other ids, which have a
    `CopyEngine` of their own. `heads` has an entry for each (part, layer); None means all heads of all
    layers. `writes` says for each plane whether this rank gathers it (it scatters all that it holds);
    None means all. `tensor_parallel_slice` makes both.
    """

    block_tokens: int
    num_blocks: int
    planes: tuple[PlaneView | None, ...]
    heads: tuple[HeadRange, ...] | None = None
    writes: tuple[bool, ...] | None = None


def tensor_parallel_slice(
    layout: ChunkLayout, tp_size: int, rank: int
) -> tuple[tuple[HeadRange, ...], tuple[bool, ...]]:
    """`EngineCache.heads` and `.writes` of tensor-parallel `rank`: its heads, and what it alone writes.

    Raises:
        UnsupportedModel: a rank would hold part of a head.
    """
    heads: list[HeadRange] = []
    writes: list[bool] = []
    for layer, planes in _sub_blocks_of_layers(layout):
        count = max(1, layer.kv_heads // tp_size)
        first = rank * layer.kv_heads // tp_size
        heads.append(HeadRange(first, count))
        writes += [writer_of(layout, tp_size, of_heads[first]) == rank for of_heads in planes]
    return tuple(heads), tuple(writes)


class Plane(ctypes.Structure):
    """kvs_plane"""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("stride_block", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
        ("stride_token", ctypes.c_int64),
        ("stride_dim", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("heads", ctypes.c_int32),
        ("first_head", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("item_bytes", ctypes.c_int32),
        ("codec", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("slot_offset", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("checksum_index", ctypes.c_int64),
        ("checksum_stride", ctypes.c_int64),
    ]


class _SubBlock(ctypes.Structure):
    """kvs_sub_block"""

    _fields_ = [("offset", ctypes.c_int64), ("nbytes", ctypes.c_int64), ("index", ctypes.c_int64)]


class Library:
    """The loaded library, and the calls that need no engine. Made by `load_library`."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self.native = _declare(native)
        self._sub_blocks: dict[bytes, ctypes.Array[_SubBlock]] = {}  # by layout digest: few live at once

    def checksum(self, buffer: bytes | bytearray | memoryview, seed: int) -> int:
        """The 64-bit checksum of a contiguous `buffer`; never 0. A read-only memoryview is copied first."""
        if not isinstance(buffer, bytes):
            view = memoryview(buffer)
            if not view.readonly and view.nbytes:
                pinned = (ctypes.c_char * view.nbytes).from_buffer(view)
                return self.checksum_at(ctypes.addressof(pinned), view.nbytes, seed)
            buffer = bytes(view)
        return int(self.native.kvs_checksum(buffer, len(buffer), seed))

    def checksum_at(self, address: int, nbytes: int, seed: int) -> int:
        """The checksum of `nbytes` bytes at `address`."""
        return int(self.native.kvs_checksum(address, nbytes, seed))

    def verify(self, slot_address: int, layout: ChunkLayout, key: bytes) -> None:
        """Checks the header and every sub-block of the chunk in a slot of `layout.slot_bytes` bytes.

        Raises:
            HeaderMismatch: it is another chunk, of another layout, or none.
            ChecksumMismatch: its bytes are damaged.
        """
        compare_header(slot_address, layout, key)
        sub_blocks = self._sub_blocks.get(layout.digest)
        if sub_blocks is None:
            each = [_SubBlock(one.offset, one.nbytes, one.index) for one in layout.sub_blocks]
            sub_blocks = (_SubBlock * len(each))(*each)
            self._sub_blocks[layout.digest] = sub_blocks
        table = layout.checksum_offset
        bad = self.native.kvs_verify(slot_address, sub_blocks, len(sub_blocks), table, seed_of(key))
        if bad != _ALL_GOOD:
            raise ChecksumMismatch(bad)


class CopyEngine:
    """Moves chunks between one engine rank's cache and slots. Needs the cache to stay where it is.

    Raises:
        ValueError: `cache` does not fit `layout`.
        NativeLibraryError: no library was passed and none can be loaded.
    """

    def __init__(self, layout: ChunkLayout, cache: EngineCache, library: Library | None = None) -> None:
        self.layout = layout
        self.cache = cache
        self._native = (library or load_library()).native
        self._tables: dict[bytes, ctypes.Array[ctypes.c_char]] = {}  # what the planes point into
        held = native_planes(layout, cache, self._tables)
        written = [plane for plane, written in held if written]
        self._held = (Plane * len(held))(*(plane for plane, _ in held))
        self._written = (Plane * len(written))(*written)
        self._blocks = layout.chunk_tokens // cache.block_tokens

    def gather(self, slot_address: int, block_ids: Sequence[int], key: bytes) -> None:
        """Copies the chunk in `block_ids` (chunk_tokens / block_tokens, in token order) into the slot.

        Writes the sub-blocks this rank writes, their checksums, and last the header; the slot needs
        `layout.slot_bytes` bytes and is otherwise left as it is.

        Raises:
            DoesNotFit: its elements are spread too widely to be packed; the slot holds no chunk.
            OutOfMemory: the slot holds no chunk.
            ValueError: a block id outside the cache, or a wrong number of them.
        """
        ids = self._block_ids(block_ids)
        header = header_of(self.layout, key)
        bad = self._native.kvs_gather(
            self._written, len(self._written), ids, self.cache.block_tokens, self.layout.chunk_tokens,
            slot_address, self.layout.checksum_offset, seed_of(key),
        )  # fmt: skip
        if bad == _NO_MEMORY:
            raise OutOfMemory
        if bad != _ALL_GOOD:
            raise DoesNotFit(bad)
        ctypes.memmove(slot_address, header, len(header))

    def scatter(self, slot_address: int, block_ids: Sequence[int], key: bytes) -> None:
        """Copies the chunk in the slot into `block_ids`, leaving out those that are `NO_BLOCK`.

        Sub-blocks are verified whole before any byte of them is written. After a mismatch the blocks
        may hold part of the chunk: the engine has to compute them.

        Raises:
            HeaderMismatch: the slot holds another chunk; nothing was written.
            ChecksumMismatch: a sub-block is damaged; it and those after it were not written.
            OutOfMemory: some were not written.
            ValueError: a block id outside the cache, or a wrong number of them.
        """
        ids = self._block_ids(block_ids, may_skip=True)
        compare_header(slot_address, self.layout, key)
        bad = self._native.kvs_scatter(
            self._held, len(self._held), ids, self.cache.block_tokens, self.layout.chunk_tokens,
            slot_address, self.layout.checksum_offset, seed_of(key),
        )  # fmt: skip
        if bad == _NO_MEMORY:
            raise OutOfMemory
        if bad != _ALL_GOOD:
            raise ChecksumMismatch(bad)

    def _block_ids(self, block_ids: Sequence[int], may_skip: bool = False) -> ctypes.Array[ctypes.c_int64]:
        check_block_ids(self.cache, self._blocks, block_ids, may_skip)
        return (ctypes.c_int64 * self._blocks)(*block_ids)


def native_planes(
    layout: ChunkLayout, cache: EngineCache, tables: dict[bytes, ctypes.Array[ctypes.c_char]]
) -> list[tuple[Plane, bool]]:
    """What C needs to know of the planes held in `cache`, each with whether this rank gathers it.

    `tables` gets the memory that planes with a table point into; keep it as long as the planes.

    Raises:
        ValueError: `cache` does not fit `layout`.
    """
    _check_cache(layout, cache)
    planes: list[tuple[Plane, bool]] = []
    index = 0
    for layer_index, (layer, of_planes) in enumerate(_sub_blocks_of_layers(layout)):
        heads = cache.heads[layer_index] if cache.heads else HeadRange(0, layer.kv_heads)
        for plane, of_heads in enumerate(of_planes):
            view = cache.planes[index]
            if view is not None:
                written = cache.writes is None or cache.writes[index]
                planes.append((_plane(layout, cache, layer, plane, view, heads, of_heads, tables), written))
            index += 1
    return planes


def _plane(
    layout: ChunkLayout,
    cache: EngineCache,
    layer: LayerSpec,
    plane: int,
    view: PlaneView,
    heads: HeadRange,
    of_heads: Sequence[SubBlock],
    tables: dict[bytes, ctypes.Array[ctypes.c_char]],
) -> Plane:
    first, last = of_heads[0], of_heads[-1]
    steps = max(1, len(of_heads) - 1)
    dim = layer.plane_dims[plane]
    return Plane(
        base=view.pointer,
        stride_block=view.stride_block,
        stride_head=view.stride_head,
        stride_token=view.stride_token,
        stride_dim=view.stride_dim,
        table=_table_address(view, cache, heads.count, dim, layer.item_bytes, tables),
        heads=heads.count,
        first_head=heads.first,
        dim=dim,
        item_bytes=layer.item_bytes,
        codec=CODEC_PACKED if layout.is_packed(layer, dim) else CODEC_RAW,
        slot_offset=first.offset,
        slot_stride=(last.offset - first.offset) // steps,
        checksum_index=first.index,
        checksum_stride=(last.index - first.index) // steps,
    )


def _table_address(
    view: PlaneView,
    cache: EngineCache,
    heads: int,
    dim: int,
    item_bytes: int,
    tables: dict[bytes, ctypes.Array[ctypes.c_char]],
) -> int | None:
    """The address of our own copy of `view.table`, one for all planes that share it."""
    if view.table is None:
        return None
    wanted = cache.block_tokens * dim * ctypes.sizeof(ctypes.c_int32)
    if len(view.table) != wanted:
        raise ValueError(f"a plane's table has {len(view.table)} bytes, its blocks need {wanted}")
    entries = memoryview(view.table).cast("i")
    if view.table not in tables:
        if min(entries) < 0 or len(set(entries)) != len(entries):
            raise ValueError("a plane's table has negative or repeated offsets")
        tables[view.table] = ctypes.create_string_buffer(view.table, len(view.table))
    # Where the memory ends is not said, but no region reaches beyond the last stride of the outer axis.
    block, head = abs(view.stride_block), abs(view.stride_head)
    end = (cache.num_blocks - 1) * block + (heads - 1) * head + (max(entries) + 1) * item_bytes
    if end > max(cache.num_blocks * block, heads * head):
        raise ValueError(f"a plane's table has the offset {max(entries)}, outside its strides' region")
    return ctypes.addressof(tables[view.table])


def check_block_ids(cache: EngineCache, blocks: int, block_ids: Sequence[int], may_skip: bool) -> None:
    """Raises ValueError unless `block_ids` are `blocks` ids inside `cache` (or `NO_BLOCK` where allowed)."""
    if len(block_ids) != blocks:
        raise ValueError(f"a chunk is {blocks} engine blocks, got {len(block_ids)} block ids")
    least = NO_BLOCK if may_skip else 0
    if min(block_ids) < least or max(block_ids) >= cache.num_blocks:
        raise ValueError(
            f"block ids {min(block_ids)} .. {max(block_ids)} are outside 0 .. {cache.num_blocks - 1}"
        )


def find_library(name: str) -> Path:
    """Where the copy library lies: in the package, or where an editable install put it.

    Raises:
        NativeLibraryError: in none of the places; the message says how to build it.
    """
    packaged = Path(str(importlib.resources.files("kvstrata") / "cuda_ext" / name))
    # An editable install spreads a package over the source tree and site-packages; both are on its path.
    spread = [Path(folder) / name for folder in kvstrata.cuda_ext.__path__]
    for path in [packaged, *spread]:
        if path.is_file():
            return path
    looked = ", ".join(str(path.parent) for path in spread)
    raise NativeLibraryError(
        f"{name} is not in {looked}: install a wheel of kvstrata that has it or, in a checkout, "
        f"{how_to_build(name)}"
    )


def how_to_build(name: str) -> str:
    """What to do for the library `name`, in words."""
    nvcc = ", and CUDA's nvcc in PATH" if "cuda" in name else ""
    return f"build it with `pip install -e .` (needs CMake and a C++17 compiler{nvcc})"


def load_library(path: Path | None = None) -> Library:
    """Loads the copy library from `path`, or from where `find_library` finds it.

    Raises:
        NativeLibraryError: it is missing, cannot be loaded, or has another ABI version.
    """
    path = path or find_library(LIBRARY_NAME)
    try:
        native = ctypes.CDLL(str(path))
        found = native.kvs_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"{path} cannot be loaded ({error}): {how_to_build(LIBRARY_NAME)}"
        ) from error
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {found}, this kvstrata needs {ABI_VERSION}: "
            f"{how_to_build(LIBRARY_NAME)}, and remove stale copies"
        )
    return Library(native)


def seed_of(key: bytes) -> int:
    """The checksum seed of the chunk stored under `key`."""
    return int.from_bytes(key[:8], "little")


def compare_header(slot_address: int, layout: ChunkLayout, key: bytes) -> None:
    """Raises `HeaderMismatch` unless the slot starts with the header of `layout` and `key`."""
    header = header_of(layout, key)
    if ctypes.string_at(slot_address, len(header)) != header:
        raise HeaderMismatch.of(key)


def header_of(layout: ChunkLayout, key: bytes) -> bytes:
    """What the slot of `key` starts with. Raises ValueError if `key` is none."""
    if len(key) != DIGEST_BYTES:
        raise ValueError(f"a key has {DIGEST_BYTES} bytes, got {len(key)}")
    return layout.header(key)


def _sub_blocks_of_layers(layout: ChunkLayout) -> Iterator[tuple[LayerSpec, list[tuple[SubBlock, ...]]]]:
    """Each layer in canonical order, with its sub-blocks as `[plane][head]`."""
    start = 0
    for part in layout.parts:
        for layer in part.layers:
            planes = len(layer.plane_dims)
            own = layout.sub_blocks[start : start + layer.kv_heads * planes]
            yield layer, [own[plane::planes] for plane in range(planes)]
            start += len(own)


def _check_cache(layout: ChunkLayout, cache: EngineCache) -> None:
    """Raises ValueError where `cache` does not describe all that `layout` needs."""
    layers = [layer for part in layout.parts for layer in part.layers]
    planes = sum(len(layer.plane_dims) for layer in layers)
    if cache.block_tokens < 1 or layout.chunk_tokens % cache.block_tokens:
        raise ValueError(f"{layout.chunk_tokens} tokens a chunk are not whole blocks of {cache.block_tokens}")
    if len(cache.planes) != planes:
        raise ValueError(f"the layout has {planes} planes, the engine's cache {len(cache.planes)}")
    if cache.writes is not None and len(cache.writes) != planes:
        raise ValueError(f"the layout has {planes} planes, `writes` {len(cache.writes)} entries")
    if cache.heads is None:
        return
    if len(cache.heads) != len(layers):
        raise ValueError(f"the layout has {len(layers)} layers, `heads` {len(cache.heads)} entries")
    for layer, heads in zip(layers, cache.heads, strict=True):
        if heads.first < 0 or heads.count < 1 or heads.first + heads.count > layer.kv_heads:
            raise ValueError(f"layer {layer.name} has {layer.kv_heads} KV heads, none such as {heads}")


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of kvstrata.h their types; without them ctypes cuts pointers to 32 bits."""
    pointer, int64, uint64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
    planes, ids = ctypes.POINTER(Plane), ctypes.POINTER(int64)
    copy: list[Any] = [planes, int64, ids, int64, int64, pointer, int64, uint64]
    native.kvs_checksum.argtypes = [pointer, int64, uint64]
    native.kvs_checksum.restype = uint64
    native.kvs_gather.argtypes = copy
    native.kvs_gather.restype = int64
    native.kvs_scatter.argtypes = copy
    native.kvs_scatter.restype = int64
    native.kvs_verify.argtypes = [pointer, ctypes.POINTER(_SubBlock), int64, int64, uint64]
    native.kvs_verify.restype = int64
    return native
