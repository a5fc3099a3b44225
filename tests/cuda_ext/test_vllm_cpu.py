"""What vLLM's own CPU kernel writes into its cache is what a chunk holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstrata.cuda_ext.native import CopyEngine, EngineCache, Library
from tests.cuda_ext import engines
from tests.cuda_ext.cases import KEY, Slot, layout_of
from tests.cuda_ext.reference import Plane

pytestmark = pytest.mark.slow  # importing vLLM

HEADS, BLOCKS = 3, 6
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CpuCache:
    """One layer's cache, [blocks, heads, block_tokens, 2 * dim], as vLLM's backend makes and fills it."""

    def __init__(self, dtype: torch.dtype, block_tokens: int, dim: int) -> None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.block_tokens, self.dim = block_tokens, dim
        self.isa = _get_attn_isa(dtype, block_tokens, dim, "auto")
        shape = (BLOCKS, HEADS, block_tokens, 2 * dim)
        noise = engines.noise(BLOCKS * HEADS * block_tokens * 2 * dim, dtype.itemsize, seed=1)
        self.tensor = noise.view(dtype).view(shape)

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.tensor.view(BLOCKS, HEADS, 2 * self.block_tokens, self.dim).chunk(2, dim=2)
        return keys, values

    def write(self, keys: torch.Tensor, values: torch.Tensor, block_ids: list[int]) -> None:
        """`keys` and `values`: [tokens, heads, dim]."""
        from vllm import _custom_ops

        within = torch.arange(self.block_tokens)
        slots = torch.cat([block * self.block_tokens + within for block in block_ids])
        _custom_ops.cpu_attn_reshape_and_cache(keys, values, *self.halves(), slots, self.isa)

    def planes(self) -> tuple[Plane, Plane]:
        """The layout, found by writing every element's number into block 0 of a cache like this one."""
        probe = CpuCache(self.tensor.dtype, self.block_tokens, self.dim)
        item = self.tensor.element_size()
        count = self.block_tokens * self.dim
        numbers = torch.arange(count, dtype=torch.int64).view(self.block_tokens, 1, self.dim)
        # As bit patterns of ordinary numbers: kernels may move floats, not integers.
        patterns = (numbers + 0x1000).expand(-1, HEADS, -1).to(engines.INTEGERS[item]).contiguous()
        probe.tensor.zero_()
        probe.write(patterns.view(self.tensor.dtype), patterns.view(self.tensor.dtype), [0])
        found = []
        for half in probe.halves():
            region = half[0, 0].reshape(-1).view(engines.INTEGERS[item]).to(torch.int64) - 0x1000
            table = torch.empty(count, dtype=torch.int64)
            table[region] = torch.arange(count)
            flat = self.tensor.view(-1).view(engines.INTEGERS[item])
            strides = (half.stride(0), half.stride(1), 0, 0)
            table = table.view(self.block_tokens, self.dim)
            found.append(Plane(flat, int(half.storage_offset()), strides, self.block_tokens, self.dim, table))
        return found[0], found[1]


def known(dtype: torch.dtype, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    keys, values = torch.randn(2, tokens, HEADS, dim, generator=generator).to(dtype)
    return keys, values


def part_of(slot: Slot, layout: Any, head: int, plane: int, dtype: torch.dtype) -> torch.Tensor:
    (one,) = (each for each in layout.sub_blocks if (each.head, each.plane) == (head, plane))
    data = bytearray(slot.raw[one.offset : one.offset + one.nbytes])
    return torch.frombuffer(data, dtype=dtype).view(layout.chunk_tokens, -1)


@pytest.mark.parametrize("tables", [False, True], ids=["strides", "tables"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("block_tokens", "dim"), [(32, 64), (128, 64), (32, 80), (64, 128)])
def test_a_chunk_holds_what_vllm_wrote(
    library: Library, name: str, block_tokens: int, dim: int, tables: bool
) -> None:
    dtype = DTYPES[name]
    cache = CpuCache(dtype, block_tokens, dim)
    if cache.isa == "amx" and not tables:
        cache.isa = "vec"  # matrix units get a packing that no strides describe
    views = strided_views(cache)
    if tables:
        views = tuple(plane.view() for plane in cache.planes())
    layout = layout_of(HEADS, (dim, dim), name, 2 * block_tokens, layers=1)
    keys, values = known(dtype, layout.chunk_tokens, dim)
    cache.write(keys, values, [4, 1])

    engine = CopyEngine(layout, EngineCache(block_tokens, BLOCKS, views), library)
    slot = Slot(layout)
    engine.gather(slot.address, [4, 1], KEY)
    for head in range(HEADS):
        assert torch.equal(part_of(slot, layout, head, 0, dtype), keys[:, head])
        assert torch.equal(part_of(slot, layout, head, 1, dtype), values[:, head])

    # And back, into blocks 5 and 2: the cache is the one vLLM would have written itself.
    wanted = CpuCache(dtype, block_tokens, dim)
    wanted.isa = cache.isa
    wanted.tensor.copy_(cache.tensor)
    wanted.write(keys, values, [5, 2])
    engine.scatter(slot.address, [5, 2], KEY)
    assert torch.equal(cache.tensor.view(torch.uint8), wanted.tensor.view(torch.uint8))  # NaNs too


def strided_views(cache: CpuCache) -> tuple[Any, ...]:
    """Keys are [dim][token] in a block, values [token][dim]."""
    keys, values = cache.halves()
    flat = cache.tensor.view(-1).view(engines.INTEGERS[cache.tensor.element_size()])
    tokens, dim = cache.block_tokens, cache.dim
    block, head = keys.stride(0), keys.stride(1)
    return (
        Plane(flat, int(keys.storage_offset()), (block, head, 1, tokens), tokens, dim).view(),
        Plane(flat, int(values.storage_offset()), (block, head, dim, 1), tokens, dim).view(),
    )
