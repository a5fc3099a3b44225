"""A chunk layout, an engine rank that holds it, and the buffers of a test."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout, LayerSpec, Part, PartKind
from kvstrata.cuda_ext.native import CopyEngine, EngineCache, Library, tensor_parallel_slice
from tests.cuda_ext import engines
from tests.cuda_ext.reference import Plane, Rank

DTYPES = ("float8_e4m3fn", "bfloat16", "float32")
KEY = bytes(range(7, 39))


@dataclass(frozen=True)
class Case:
    layout: ChunkLayout
    planes: tuple[Plane | None, ...]
    rank: Rank
    block_tokens: int
    num_blocks: int
    block_ids: list[int]

    def engine(self, library: Library) -> CopyEngine:
        heads, writes = tensor_parallel_slice(self.layout, self.rank.tp_size, self.rank.rank)
        views = tuple(plane.view() if plane else None for plane in self.planes)
        return CopyEngine(
            self.layout, EngineCache(self.block_tokens, self.num_blocks, views, heads, writes), library
        )

    def storages(self) -> list[torch.Tensor]:
        """Each tensor of the engine once."""
        found = {plane.storage.data_ptr(): plane.storage for plane in self.planes if plane}
        return list(found.values())

    def copy(self) -> tuple[Plane | None, ...]:
        """The same planes on copies of the storages."""
        copies = {storage.data_ptr(): storage.clone() for storage in self.storages()}
        return tuple(plane and plane.on(copies[plane.storage.data_ptr()]) for plane in self.planes)


class Slot:
    """A slot filled with poison. `address` is what the native side gets, `raw` what it left there."""

    def __init__(self, layout: ChunkLayout, content: bytes | None = None) -> None:
        self.nbytes = layout.slot_bytes
        content = random.Random(3).randbytes(self.nbytes) if content is None else content
        self.buffer = (ctypes.c_char * self.nbytes).from_buffer_copy(content)
        self.address = ctypes.addressof(self.buffer)

    @property
    def raw(self) -> bytes:
        return self.buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self.nbytes
        ctypes.memmove(self.address + offset, data, len(data))

    def flip(self, byte: int, bit: int = 0) -> None:
        self.write(byte, bytes([self.raw[byte] ^ (1 << bit)]))


def layout_of(
    kv_heads: int, dims: Sequence[int], dtype: str, chunk_tokens: int, layers: int = 2, codec: int = CODEC_RAW
) -> ChunkLayout:
    specs = tuple(LayerSpec(f"layer.{i}", kv_heads, tuple(dims), dtype) for i in range(layers))
    return ChunkLayout(chunk_tokens, (Part(PartKind.FULL, specs),), codec)


def case_of(
    layout: ChunkLayout,
    arrangements: Sequence[engines.Arrangement],
    block_tokens: int,
    num_blocks: int,
    rank: Rank = Rank(),  # noqa: B008 (immutable)
    seed: int = 0,
) -> Case:
    """An engine that lays out its layers by `arrangements`, in turn."""
    planes: list[Plane | None] = []
    layers = [layer for part in layout.parts for layer in part.layers]
    for i, layer in enumerate(layers):
        heads = max(1, layer.kv_heads // rank.tp_size)
        shape = engines.Shape(num_blocks, heads, block_tokens, layer.plane_dims, layer.item_bytes)
        planes += arrangements[i % len(arrangements)](shape, seed * 1000 + i)
    blocks = layout.chunk_tokens // block_tokens
    ids = random.Random(seed).sample(range(num_blocks), blocks)
    return Case(layout, tuple(planes), rank, block_tokens, num_blocks, ids)


def _layers(count: int, kv_heads: int, dims: tuple[int, ...], dtype: str) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(f"{len(dims)}.{dtype}.{i}", kv_heads, dims, dtype) for i in range(count))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any model, engine, rank and chunk, small."""
    dim = st.sampled_from((1, 3, 4, 8, 16, 17, 24, 40))
    kv_heads = draw(st.sampled_from((1, 2, 3, 4)))
    parts = []
    if draw(st.booleans()):
        same = draw(st.booleans())
        key_dim = draw(dim)
        dims = (key_dim, key_dim if same else draw(dim))
        layers = _layers(draw(st.integers(1, 2)), kv_heads, dims, draw(st.sampled_from(DTYPES)))
        parts.append(Part(PartKind.FULL, layers))
    if not parts or draw(st.booleans()):
        layers = _layers(draw(st.integers(1, 2)), 1, (draw(dim),), draw(st.sampled_from(DTYPES)))
        parts.append(Part(PartKind.LATENT, layers))
    block_tokens = draw(st.sampled_from((1, 2, 5, 8, 16, 19, 32)))
    blocks = draw(st.integers(1, 3))
    codec = draw(st.sampled_from((CODEC_RAW, CODEC_PACKED)))
    layout = ChunkLayout(block_tokens * blocks, tuple(parts), codec)
    heads_of_parts = {part.layers[0].kv_heads for part in parts}
    sizes = [n for n in (1, 2, 3, 4, 8) if all(h % n == 0 or n % h == 0 for h in heads_of_parts)]
    tp_size = draw(st.sampled_from(sizes))
    rank = Rank(tp_size, draw(st.integers(0, tp_size - 1)))
    arrangements = draw(st.lists(st.sampled_from(engines.ARRANGEMENTS), min_size=1, max_size=3))
    num_blocks = blocks + draw(st.integers(0, 3))
    case = case_of(layout, arrangements, block_tokens, num_blocks, rank, draw(st.integers(0, 1 << 20)))
    if draw(st.integers(0, 4)) == 0:  # a pipeline stage that holds some of the layers
        missing = draw(st.integers(0, len(case.planes) - 1))
        planes = tuple(None if i == missing else plane for i, plane in enumerate(case.planes))
        case = Case(layout, planes, rank, block_tokens, num_blocks, case.block_ids)
    return case
