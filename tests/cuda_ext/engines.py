"""Made-up engines: the ways of laying out a layer's KV blocks that real ones use, and odder ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.cuda_ext.reference import Plane

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bit patterns, not numbers


@dataclass(frozen=True)
class Shape:
    """One layer of one rank."""

    blocks: int
    heads: int
    tokens: int  # of a block
    dims: tuple[int, ...]  # of the planes
    item_bytes: int


def noise(items: int, item_bytes: int, seed: int) -> torch.Tensor:
    """Random bits. As bf16 nearly all lie within a few powers of two, as KV does; some far below, or NaN."""
    draw = random.Random(seed)
    found = torch.frombuffer(bytearray(draw.randbytes(items * item_bytes)), dtype=INTEGERS[item_bytes])
    if item_bytes == 2:
        found &= 0x83FF - 0x10000  # exponents 112..119
        found |= 0x3800
        for _ in range(items // 1000):
            found[draw.randrange(items)] = draw.choice((draw.randrange(0x3800), 0x7F80, -128, 0x7FC1))
    return found


def separate_nhd(s: Shape, seed: int) -> list[Plane]:
    """A tensor for each plane, [block][token][head][dim]."""
    return [_dense(s, "BTHD", dim, seed + i) for i, dim in enumerate(s.dims)]


def separate_hnd(s: Shape, seed: int) -> list[Plane]:
    """A tensor for each plane, [block][head][token][dim]."""
    return [_dense(s, "BHTD", dim, seed + i) for i, dim in enumerate(s.dims)]


def planes_outermost(s: Shape, seed: int) -> list[Plane]:
    """One tensor, [plane][block][token][head][dim]."""
    sizes = [s.blocks * s.tokens * s.heads * dim for dim in s.dims]
    storage = noise(sum(sizes), s.item_bytes, seed)
    starts = [0, *itertools.accumulate(sizes)]
    return [
        Plane(storage, start, (s.tokens * s.heads * dim, dim, s.heads * dim, 1), s.tokens, dim)
        for start, dim in zip(starts, s.dims, strict=False)
    ]


def blocks_outermost(s: Shape, seed: int) -> list[Plane]:
    """One tensor, [block][plane][token][head][dim]."""
    return _regions(s, seed, lambda dim: (dim, s.heads * dim, 1), per_head=False)


def joined(s: Shape, seed: int) -> list[Plane]:
    """One tensor, [block][head][token][all planes' dims]."""
    width = sum(s.dims)
    storage = noise(s.blocks * s.heads * s.tokens * width, s.item_bytes, seed)
    strides = (s.heads * s.tokens * width, s.tokens * width, width, 1)
    starts = [0, *itertools.accumulate(s.dims)]
    return [Plane(storage, start, strides, s.tokens, dim) for start, dim in zip(starts, s.dims, strict=False)]


def transposed_keys(s: Shape, seed: int) -> list[Plane]:
    """vLLM on CPUs: [block][head], then the keys as [dim][token] and the values as [token][dim]."""
    keys, *values = _regions(s, seed, lambda dim: (0, dim, 1), per_head=True)
    keys = Plane(keys.storage, keys.offset, (*keys.strides[:2], 1, s.tokens), s.tokens, keys.dim)
    return [keys, *values]


def packed_pairs(s: Shape, seed: int) -> list[Plane]:
    """Tables: [pair of dims][token][2], as matrix units like it, with a hole where dims are odd."""
    planes = []
    for i, dim in enumerate(s.dims):
        token, d = torch.arange(s.tokens)[:, None], torch.arange(dim)[None, :]
        table = d // 2 * 2 * s.tokens + token * 2 + d % 2
        region = (dim + 1) // 2 * 2 * s.tokens
        storage = noise(s.blocks * s.heads * region, s.item_bytes, seed + i)
        planes.append(Plane(storage, 0, (s.heads * region, region, 0, 0), s.tokens, dim, table))
    return planes


def any_strides(s: Shape, seed: int) -> list[Plane]:
    """The axes in any order, with gaps anywhere, and now and then running backwards."""
    draw = random.Random(seed)
    planes = []
    for dim in s.dims:
        strides: dict[str, int] = {}
        span = 1
        for axis in draw.sample("BHTD", 4):
            strides[axis] = span
            span = span * _size(s, axis, dim) + draw.choice((0, 0, 1, 3)) * span
        storage = noise(span, s.item_bytes, draw.randrange(1 << 30))
        offset = 0
        if draw.random() < 0.2:
            offset = strides["T"] * (s.tokens - 1)
            strides["T"] = -strides["T"]
        planes.append(Plane(storage, offset, _bhtd(strides), s.tokens, dim))
    return planes


Arrangement = Callable[[Shape, int], list[Plane]]
ARRANGEMENTS: Sequence[Arrangement] = (
    separate_nhd, separate_hnd, planes_outermost, blocks_outermost, joined, transposed_keys, packed_pairs,
    any_strides,
)  # fmt: skip


def _size(s: Shape, axis: str, dim: int) -> int:
    return {"B": s.blocks, "H": s.heads, "T": s.tokens, "D": dim}[axis]


def _bhtd(strides: dict[str, int]) -> tuple[int, int, int, int]:
    return strides["B"], strides["H"], strides["T"], strides["D"]


def _dense(s: Shape, order: str, dim: int, seed: int) -> Plane:
    strides: dict[str, int] = {}
    span = 1
    for axis in reversed(order):
        strides[axis] = span
        span *= _size(s, axis, dim)
    return Plane(noise(span, s.item_bytes, seed), 0, _bhtd(strides), s.tokens, dim)


def _regions(
    s: Shape, seed: int, inner: Callable[[int], tuple[int, int, int]], per_head: bool
) -> list[Plane]:
    """Planes that follow one another inside a block (or a head of it); `inner`: head, token, dim strides."""
    width = s.tokens * sum(s.dims)
    storage = noise(s.blocks * s.heads * width, s.item_bytes, seed)
    planes, start = [], 0
    for dim in s.dims:
        head, token, d = inner(dim)
        strides = (s.heads * width, width if per_head else head, token, d)
        planes.append(Plane(storage, start, strides, s.tokens, dim))
        start += s.tokens * dim * (1 if per_head else s.heads)
    return planes
