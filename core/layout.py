"""The canonical chunk: which byte of a chunk holds what (docs/format.md has the picture).

Rule of this file: arithmetic only. A layout is made of parts, a part of layers, a layer of
sub-blocks, one for each (kv head, plane). Everybody who needs an offset asks here.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from kvstrata.core.digest import digest
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.packing import can_pack, packed_bytes

FORMAT_VERSION = 1
ALIGNMENT = 4096  # parts and slots start on pages: direct I/O and registration need it
SUB_BLOCK_ALIGNMENT = 16  # the width of a GPU's vector loads
CODEC_RAW = 0
CODEC_PACKED = 1  # bf16 exactly, in about 12 bits (core/packing.py); other dtypes stay raw beside it

_MAGIC = b"KVSTRATA"
_HEADER = struct.Struct("<8sHHIII32s32sQ")  # see docs/format.md
_KEY_AT, _KEY_BYTES = 24, 32
_PART = struct.Struct("<HHIIIQ")
_LAYER = struct.Struct("<HBBHH")
_CHECKSUM_BYTES = 8
_LAYER_SIZE_MAX = 0xFFFF  # heads and dims are 16-bit fields of the layer table

_DTYPES = {  # name: (number in the byte format, bytes); a number is never changed or used again
    "bfloat16": (1, 2),
    "float16": (2, 2),
    "float32": (3, 4),
    "float8_e4m3fn": (4, 1),
    "float8_e5m2": (5, 1),
    "int8": (6, 1),
    "uint8": (7, 1),
}


class PartKind(enum.IntEnum):
    """What a group of layers keeps of the past; the numbers are part of the byte format."""

    FULL = 1
    WINDOW = 2
    LATENT = 3
    RECURRENT = 4
    DRAFT = 5


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's KV for one token: `kv_heads` heads, each with `plane_dims` elements a plane.

    `plane_dims` is `(key_dim, value_dim)` for attention and `(latent_dim,)` for MLA.
    Heads are the model's, before tensor parallelism divides them.
    """

    name: str
    kv_heads: int
    plane_dims: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UnsupportedModel(f"layer {self.name}: KV dtype {self.dtype!r} is not one of {known}")
        sizes = (self.kv_heads, *self.plane_dims)
        if not 1 <= len(self.plane_dims) <= 2 or not all(1 <= size <= _LAYER_SIZE_MAX for size in sizes):
            raise UnsupportedModel(
                f"layer {self.name}: {self.kv_heads} KV heads with plane sizes {self.plane_dims} "
                "cannot be laid out"
            )

    @property
    def item_bytes(self) -> int:
        return _DTYPES[self.dtype][1]


@dataclass(frozen=True, slots=True)
class Part:
    """The layers of a model that keep the same kind of past, in model order."""

    kind: PartKind
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class SubBlock:
    """The unit of packing, checksum and slicing: one (layer, kv head, plane) of a part."""

    index: int  # position in the chunk's checksum table
    part: int
    layer: int  # position inside the part
    head: int
    plane: int
    turn: int  # how many of this head's sub-blocks lie before it, in all layers with as many heads
    offset: int  # bytes from the start of the chunk
    nbytes: int


@dataclass(frozen=True)
class ChunkLayout:
    """Where every byte of one chunk lies. Immutable; equal layouts have equal `digest`."""

    chunk_tokens: int
    parts: tuple[Part, ...]
    codec: int = CODEC_RAW

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise UnsupportedModel(f"a chunk of {self.chunk_tokens} tokens cannot hold anything")
        if not self.parts or not all(part.layers for part in self.parts):
            raise UnsupportedModel("a model without KV layers has nothing to store")

    @cached_property
    def sub_blocks(self) -> tuple[SubBlock, ...]:
        """All sub-blocks in the order of the checksum table, which is also byte order."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[SubBlock]:
        index = 0
        offset = self.payload_offset
        turns: Counter[int] = Counter()  # by heads a layer: others divide them differently among ranks
        for part_index, part in enumerate(self.parts):
            offset = _round_up(offset, ALIGNMENT)
            for layer_index, layer in enumerate(part.layers):
                for head in range(layer.kv_heads):
                    for plane, dim in enumerate(layer.plane_dims):
                        nbytes = self.stored_bytes(layer, dim)
                        turn = turns[layer.kv_heads] + plane
                        yield SubBlock(index, part_index, layer_index, head, plane, turn, offset, nbytes)
                        index += 1
                        offset += _round_up(nbytes, SUB_BLOCK_ALIGNMENT)
                turns[layer.kv_heads] += len(layer.plane_dims)

    def is_packed(self, layer: LayerSpec, dim: int) -> bool:
        """Whether sub-blocks of `layer` with `dim` elements a token are stored packed."""
        return self.codec == CODEC_PACKED and can_pack(self.chunk_tokens, dim, layer.dtype)

    def stored_bytes(self, layer: LayerSpec, dim: int) -> int:
        """Size of one sub-block of `layer` with `dim` elements a token."""
        if self.is_packed(layer, dim):
            return packed_bytes(self.chunk_tokens, dim)
        return self.chunk_tokens * dim * layer.item_bytes

    @cached_property
    def sub_block_count(self) -> int:
        return sum(layer.kv_heads * len(layer.plane_dims) for part in self.parts for layer in part.layers)

    @cached_property
    def checksum_offset(self) -> int:
        """Where the table of 64-bit checksums starts; entry i belongs to sub-block i."""
        layers = sum(len(part.layers) for part in self.parts)
        tables = _HEADER.size + _PART.size * len(self.parts) + _LAYER.size * layers
        return _round_up(tables, _CHECKSUM_BYTES)

    @cached_property
    def payload_offset(self) -> int:
        return _round_up(self.checksum_offset + _CHECKSUM_BYTES * self.sub_block_count, ALIGNMENT)

    @cached_property
    def payload_bytes(self) -> int:
        """From the first sub-block to the end of the last one, gaps between parts included."""
        last = self.sub_blocks[-1]
        return last.offset + last.nbytes - self.payload_offset

    @cached_property
    def slot_bytes(self) -> int:
        """Size of the slot that holds one chunk: header, tables, payload, rounded to pages."""
        return _round_up(self.payload_offset + self.payload_bytes, ALIGNMENT)

    @cached_property
    def raw(self) -> ChunkLayout:
        """The same chunk as it is stored when it does not fit packed. Its digest names the content."""
        return self if self.codec == CODEC_RAW else replace(self, codec=CODEC_RAW)

    @cached_property
    def ways(self) -> tuple[ChunkLayout, ...]:
        """How such a chunk may be stored, this way first. The size of its slot tells which it is."""
        packed = replace(self, codec=CODEC_PACKED)
        if packed.slot_bytes == self.raw.slot_bytes:
            return (self.raw,)  # nothing of it can be packed, or rounding eats what is saved
        return (packed, self.raw) if self.codec == CODEC_PACKED else (self.raw, packed)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ whenever two layouts place any byte differently."""
        return digest(
            b"kvstrata layout",
            self._tables(),
            struct.pack("<IHH", self.chunk_tokens, FORMAT_VERSION, self.codec),
        )

    def header(self, key: bytes) -> bytes:
        """The first `checksum_offset` bytes of the chunk stored under `key`.

        They follow from layout and key alone, so a reader compares instead of parsing.
        """
        before, after = self.header_around_key
        return before + key + after

    @cached_property
    def header_around_key(self) -> tuple[bytes, bytes]:
        """What comes before and after the key in the header of every chunk."""
        fixed = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.codec,
            self.chunk_tokens,
            self.sub_block_count,
            self.payload_offset,
            bytes(_KEY_BYTES),
            self.digest,
            self.payload_bytes,
        )
        whole = (fixed + self._tables()).ljust(self.checksum_offset, b"\0")
        return whole[:_KEY_AT], whole[_KEY_AT + _KEY_BYTES :]

    def _tables(self) -> bytes:
        parts, layers, first = [], [], 0
        for part in self.parts:
            count = sum(layer.kv_heads * len(layer.plane_dims) for layer in part.layers)
            offset = self.sub_blocks[first].offset
            parts.append(_PART.pack(part.kind, len(part.layers), first, count, 0, offset))
            first += count
            for layer in part.layers:
                dims = (*layer.plane_dims, 0)[:2]
                dtype, _ = _DTYPES[layer.dtype]
                layers.append(_LAYER.pack(layer.kv_heads, len(layer.plane_dims), dtype, *dims))
        return b"".join(parts + layers)


def writer_of(layout: ChunkLayout, tp_size: int, sub_block: SubBlock) -> int:
    """The tensor-parallel rank that writes `sub_block`; every sub-block has exactly one.

    Where heads are divided, a rank writes its own heads. Where they are replicated (more ranks
    than heads, MLA), the replicas of a head take its sub-blocks in turn, over the whole chunk.

    Raises:
        UnsupportedModel: neither divides the other, so ranks would own parts of heads.
    """
    layer = layout.parts[sub_block.part].layers[sub_block.layer]
    if layer.kv_heads % tp_size == 0:
        return sub_block.head // (layer.kv_heads // tp_size)
    if tp_size % layer.kv_heads == 0:
        replicas = tp_size // layer.kv_heads
        return sub_block.head * replicas + sub_block.turn % replicas
    raise UnsupportedModel(
        f"layer {layer.name}: {layer.kv_heads} KV heads over {tp_size} ranks leaves ranks with parts of heads"
    )


def chunk_tokens_for(wanted: int, block_tokens: int) -> int:
    """`wanted` tokens a chunk, rounded up to whole engine blocks of `block_tokens`."""
    return _round_up(wanted, block_tokens)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
