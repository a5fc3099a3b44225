"""What the copy layer must do, said slowly: one block, one head, one plane at a time, in torch.

Nothing here is shared with the native code. Where a byte lies in a chunk is asked of
`ChunkLayout.sub_blocks`; how an engine stores a block is said by `Plane`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvstrata.core.layout import ChunkLayout, SubBlock, writer_of
from kvstrata.cuda_ext.native import PlaneView
from tests.cuda_ext import packing

_U64 = (1 << 64) - 1
_KEY_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Plane:
    """One (layer, plane) of a made-up engine: a place in `storage`, a flat tensor of integers.

    `strides` are (block, head, token, dim) in elements. `table` is `[token][dim]`, offsets inside a
    (block, head) region, and replaces the last two.
    """

    storage: torch.Tensor
    offset: int
    strides: tuple[int, int, int, int]
    block_tokens: int
    dim: int
    table: torch.Tensor | None = None

    def view(self) -> PlaneView:
        item = self.storage.element_size()
        table = None if self.table is None else self.table.to(torch.int32).numpy().tobytes()
        block, head, token, dim = (stride * item for stride in self.strides)
        return PlaneView(self.storage.data_ptr() + self.offset * item, block, head, token, dim, table)

    def places(self, block: int, head: int) -> torch.Tensor:
        """The index in `storage` of each element, shape [block_tokens, dim]."""
        start = self.offset + block * self.strides[0] + head * self.strides[1]
        if self.table is not None:
            return start + self.table
        token, dim = torch.arange(self.block_tokens)[:, None], torch.arange(self.dim)[None, :]
        return start + token * self.strides[2] + dim * self.strides[3]

    def rows(self, block: int, head: int) -> torch.Tensor:
        """A copy of the block's elements, shape [block_tokens, dim]."""
        return self.storage[self.places(block, head)]

    def write_rows(self, block: int, head: int, rows: torch.Tensor) -> None:
        """Writes `rows`, [block_tokens, dim]."""
        self.storage[self.places(block, head)] = rows

    def on(self, storage: torch.Tensor) -> Plane:
        return Plane(storage, self.offset, self.strides, self.block_tokens, self.dim, self.table)


@dataclass(frozen=True)
class Rank:
    """A tensor-parallel rank; every rank of every size holds whole heads."""

    tp_size: int = 1
    rank: int = 0

    def local_head(self, kv_heads: int, head: int) -> int | None:
        """Where this rank keeps the model's `head`; None if it does not."""
        if kv_heads >= self.tp_size:
            owner, local = divmod(head, kv_heads // self.tp_size)
            return local if owner == self.rank else None
        return 0 if self.rank // (self.tp_size // kv_heads) == head else None


def checksum(data: bytes, seed: int) -> int:
    total = 0
    for i, (word,) in enumerate(struct.iter_unpack("<Q", data + bytes(-len(data) % 8))):
        x = word ^ ((i + 1) * _KEY_STEP & _U64)
        p = (x & 0xFFFFFFFF) * (x >> 32) + x & _U64
        total += p ^ (p >> 32)
    return _mix(total & _U64 ^ _mix(seed ^ (len(data) * _KEY_STEP & _U64))) or 1


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _U64
    return x ^ (x >> 31)


def gather(
    layout: ChunkLayout,
    planes: Sequence[Plane | None],
    rank: Rank,
    block_ids: Sequence[int],
    key: bytes,
    slot: bytearray,
) -> None:
    for one, plane, head in _held(layout, planes, rank):
        if writer_of(layout, rank.tp_size, one) != rank.rank:
            continue
        data = _stored(layout, one, torch.cat([plane.rows(block, head) for block in block_ids]))
        slot[one.offset : one.offset + one.nbytes] = data
        entry = layout.checksum_offset + 8 * one.index
        slot[entry : entry + 8] = struct.pack(
            "<Q", checksum(data, int.from_bytes(key[:8], "little") + one.index & _U64)
        )
    header = layout.header(key)
    slot[: len(header)] = header


def scatter(
    layout: ChunkLayout,
    planes: Sequence[Plane | None],
    rank: Rank,
    block_ids: Sequence[int],
    slot: bytearray,
    stop_at: int | None = None,
) -> None:
    """`stop_at`: the table index of a damaged sub-block, which ends the copy."""
    for one, plane, head in _held(layout, planes, rank):
        if one.index == stop_at:
            return
        stored = slot[one.offset : one.offset + one.nbytes]
        if _is_packed(layout, one):
            bits = packing.unpack(bytes(stored), layout.chunk_tokens * plane.dim, plane.dim)
            stored = bytearray(struct.pack(f"<{len(bits)}H", *bits))
        rows = torch.frombuffer(stored, dtype=plane.storage.dtype).view(-1, plane.block_tokens, plane.dim)
        for i, block in enumerate(block_ids):
            if block >= 0:
                plane.write_rows(block, head, rows[i])


class Misfit(Exception):
    """A sub-block, given by its index, does not fit when packed."""


def _is_packed(layout: ChunkLayout, one: SubBlock) -> bool:
    layer = layout.parts[one.part].layers[one.layer]
    return layout.is_packed(layer, layer.plane_dims[one.plane])


def _stored(layout: ChunkLayout, one: SubBlock, rows: torch.Tensor) -> bytes:
    """The bytes of a sub-block, from its rows [token][dim]."""
    raw = rows.contiguous().view(torch.uint8).numpy().tobytes()
    if not _is_packed(layout, one):
        return raw
    packed = packing.pack(struct.unpack(f"<{len(raw) // 2}H", raw), rows.shape[1])
    if packed is None:
        raise Misfit(one.index)
    return packed


def _held(
    layout: ChunkLayout, planes: Sequence[Plane | None], rank: Rank
) -> Iterator[tuple[SubBlock, Plane, int]]:
    """The sub-blocks a rank holds, with their plane and local head, in the order they are copied."""
    found = []
    for one in layout.sub_blocks:
        index, kv_heads = _plane_index(layout, one)
        local = rank.local_head(kv_heads, one.head)
        plane = planes[index]
        if plane is not None and local is not None:
            found.append((index, one, plane, local))
    return ((one, plane, local) for _, one, plane, local in sorted(found, key=lambda each: each[:1]))


def _plane_index(layout: ChunkLayout, one: SubBlock) -> tuple[int, int]:
    """The place of a sub-block's plane among all (part, layer, plane), and its layer's KV heads."""
    index = 0
    for part_index, part in enumerate(layout.parts):
        for layer_index, layer in enumerate(part.layers):
            if (part_index, layer_index) == (one.part, one.layer):
                return index + one.plane, layer.kv_heads
            index += len(layer.plane_dims)
    raise AssertionError(one)
