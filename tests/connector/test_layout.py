"""The layout of an engine's cache is found by watching the engine write, or the start is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from kvstrata.connector.vllm.layout import chunk_layout, engine_cache
from kvstrata.core.errors import UnsupportedModel
from kvstrata.cuda_ext.native import CopyEngine

HEADS, TOKENS, DIM, BLOCKS, CHUNK = 2, 32, 16, 6, 64
KEY = bytes(range(32))
Write = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def config(spec: Any, names: list[str]) -> KVCacheConfig:
    return KVCacheConfig(
        num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
    )


def spec(**changes: Any) -> FullAttentionSpec:
    settings: dict[str, Any] = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": DIM}
    return FullAttentionSpec(**(settings | {"dtype": torch.float32} | changes))


def by_rows(_: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """[token][K | V]"""
    for i, slot in enumerate(slots.tolist()):
        cache[slot // TOKENS, :, slot % TOKENS, :DIM] = key[i]
        cache[slot // TOKENS, :, slot % TOKENS, DIM:] = value[i]


def transposed(
    _: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """K as [dim][token], then V as [token][dim]"""
    for i, slot in enumerate(slots.tolist()):
        region = cache[slot // TOKENS].reshape(HEADS, -1).clone()
        region[:, : TOKENS * DIM].view(HEADS, DIM, TOKENS)[:, :, slot % TOKENS] = key[i]
        region[:, TOKENS * DIM :].view(HEADS, TOKENS, DIM)[:, slot % TOKENS] = value[i]
        cache[slot // TOKENS] = region.view(HEADS, TOKENS, 2 * DIM)


def paired(_: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Pairs of dims side by side, as matrix units want them: no strides describe it"""
    for i, slot in enumerate(slots.tolist()):
        region = cache[slot // TOKENS].reshape(HEADS, -1).clone()
        pairs = region[:, : TOKENS * DIM].view(HEADS, DIM // 2, TOKENS, 2)
        pairs[:, :, slot % TOKENS] = key[i].view(HEADS, DIM // 2, 2)
        region[:, TOKENS * DIM :].view(HEADS, TOKENS, DIM)[:, slot % TOKENS] = value[i]
        cache[slot // TOKENS] = region.view(HEADS, TOKENS, 2 * DIM)


def forgetful(
    _: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Never writes V"""
    by_rows(_, key, torch.zeros_like(value), cache, slots)


def swapped(_: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Heads in another order than the axis of heads says"""
    by_rows(_, key.flip(1), value.flip(1), cache, slots)


def misplaced(
    _: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Blocks at another stride than the axis of blocks says"""
    by_rows(_, key, value, cache, slots - TOKENS)


def layer(write: Write) -> Any:
    return SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write))


def made(write: Write, **caches: torch.Tensor) -> Any:
    names = list(caches) or ["layer.0"]
    layout = chunk_layout(config(spec(), names), CHUNK)
    tensors = caches or {"layer.0": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM)}
    return layout, tensors, engine_cache(layout, tensors, {name: layer(write) for name in names}, TOKENS)


@pytest.mark.parametrize("write", [by_rows, transposed, paired])
def test_what_the_engine_writes_is_what_a_chunk_holds(write: Write) -> None:
    layout, tensors, cache = made(write)
    key, value = torch.rand(CHUNK, HEADS, DIM), torch.rand(CHUNK, HEADS, DIM)
    slots = torch.tensor([4 * TOKENS + t for t in range(TOKENS)] + [1 * TOKENS + t for t in range(TOKENS)])
    write(None, key, value, tensors["layer.0"], slots)
    slot = ctypes.create_string_buffer(layout.slot_bytes)

    CopyEngine(layout, cache).gather(ctypes.addressof(slot), [4, 1], KEY)

    for one in layout.sub_blocks:
        stored = torch.frombuffer(
            bytearray(slot.raw), dtype=torch.float32, count=one.nbytes // 4, offset=one.offset
        )
        assert torch.equal(stored.view(CHUNK, DIM), (key, value)[one.plane][:, one.head])
    assert (cache.planes[0].table is not None) == (write is paired)


@pytest.mark.parametrize("write", [forgetful, swapped, misplaced])
def test_an_engine_that_writes_otherwise_than_its_tensors_say_is_refused(write: Write) -> None:
    with pytest.raises(UnsupportedModel, match=r"layer\.0: the engine does not write each element"):
        made(write)


def test_layers_with_different_numbers_of_blocks_are_refused() -> None:
    one, other = (torch.zeros(blocks, HEADS, TOKENS, 2 * DIM) for blocks in (BLOCKS, BLOCKS + 1))
    with pytest.raises(UnsupportedModel, match=r"different numbers of KV blocks: \[6, 7\]"):
        made(by_rows, a=one, b=other)


def test_tensors_of_another_shape_or_shared_ones_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="expected"):
        made(by_rows, a=torch.zeros(BLOCKS, HEADS, TOKENS, DIM))
    with pytest.raises(UnsupportedModel, match="expected float32"):
        made(by_rows, a=torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16))
    shared = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM)
    with pytest.raises(UnsupportedModel, match="a and b share one KV cache"):
        made(by_rows, a=shared, b=shared)


def test_layers_come_in_model_order() -> None:
    names = [f"model.layers.{i}.attn" for i in (10, 9, 2, 0)]
    layout = chunk_layout(config(spec(), names), CHUNK)
    assert [layer.name for layer in layout.parts[0].layers] == [names[i] for i in (3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            SlidingWindowSpec(
                block_size=32, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64
            ),
            "SlidingWindowSpec",
        ),
        (spec(page_size_padded=1 << 20), "page_size_padded"),
        (spec(dtype=torch.float64), "'float64' is not one of"),
    ],
    ids=["sliding window", "padded page", "dtype"],
)
def test_what_cannot_be_described_is_refused(bad: Any, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        chunk_layout(config(bad, ["layer.0"]), CHUNK)


def test_several_groups_are_refused_with_a_way_out() -> None:
    several = config(spec(), ["a"])
    several.kv_cache_groups.append(KVCacheGroupSpec(["b"], spec()))
    with pytest.raises(UnsupportedModel, match=r"2 KV cache groups.*--disable-hybrid-kv-cache-manager"):
        chunk_layout(several, CHUNK)


def test_a_chunk_is_whole_blocks() -> None:
    assert chunk_layout(config(spec(), ["a"]), 100).chunk_tokens == 128
