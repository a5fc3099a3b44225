"""vLLM's KV cache in the words of the canonical layout.

Rule of this file: nothing about an engine's layout is guessed. The spec says what is stored; where
each element lies is found by letting the engine's own code write known values into a scratch block.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from kvstrata.connector.vllm.compat import cache_layout_extras
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.layout import CODEC_RAW, ChunkLayout, LayerSpec, Part, PartKind, chunk_tokens_for
from kvstrata.cuda_ext.native import EngineCache, PlaneView

_PROBE_BITS = 3  # values 0..7 are exact in every cache dtype, fp8 included


def chunk_layout(
    config: KVCacheConfig, chunk_tokens: int, tp_size: int = 1, codec: int = CODEC_RAW
) -> ChunkLayout:
    """The canonical layout of a model, the same on the scheduler side and on every worker.

    Raises:
        UnsupportedModel: says what this version cannot store.
    """
    group = single_group(config)
    specs = group.kv_cache_spec
    layers = []
    for name in sorted(group.layer_names, key=_model_order):
        spec = specs.kv_cache_specs[name] if isinstance(specs, UniformTypeKVCacheSpecs) else specs
        layers.append(_layer(name, spec, tp_size))
    return ChunkLayout(
        chunk_tokens_for(chunk_tokens, specs.block_size), (Part(PartKind.FULL, tuple(layers)),), codec
    )


def single_group(config: KVCacheConfig) -> Any:
    """The one KV cache group of a model.

    Raises:
        UnsupportedModel: it has none, or several.
    """
    groups = config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedModel(
            f"this model has {len(groups)} KV cache groups and this version stores exactly one: "
            "start vLLM without kvstrata, or with --disable-hybrid-kv-cache-manager"
        )
    return groups[0]


def _layer(name: str, spec: Any, tp_size: int) -> LayerSpec:
    if type(spec) is not FullAttentionSpec:
        raise UnsupportedModel(
            f"layer {name} keeps its past as {type(spec).__name__}; "
            "this version stores FullAttentionSpec only"
        )
    if odd := cache_layout_extras(spec):
        raise UnsupportedModel(f"layer {name} packs its KV in a way that this version does not know: {odd}")
    dtype = str(spec.dtype).removeprefix("torch.")
    return LayerSpec(name, spec.num_kv_heads * tp_size, (spec.head_size, spec.head_size_v), dtype)


def _model_order(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", name)], name


def engine_cache(
    layout: ChunkLayout, caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any], block_tokens: int
) -> EngineCache:
    """Where a worker keeps every plane of `layout`.

    Args:
        layout: from `chunk_layout`.
        caches: layer name -> KV tensor as `register_kv_caches` delivers it.
        layers: layer name -> the engine's attention layer, whose code writes the cache.
        block_tokens: tokens a block.

    Raises:
        UnsupportedModel: a tensor is not laid out as the engine's own code writes it.
    """
    planes: list[PlaneView] = []
    owners: dict[int, str] = {}
    blocks: set[int] = set()
    known: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
    for spec in layout.parts[0].layers:
        if spec.name not in caches:
            raise UnsupportedModel(f"vLLM registered no KV cache for layer {spec.name}")
        cache = caches[spec.name]
        if cache.data_ptr() in owners:
            raise UnsupportedModel(f"layers {owners[cache.data_ptr()]} and {spec.name} share one KV cache")
        owners[cache.data_ptr()] = spec.name
        _check_tensor(spec, cache, block_tokens)
        blocks.add(int(cache.shape[0]))
        signature = (tuple(cache.shape[1:]), cache.stride(), cache.dtype, spec.plane_dims)
        if signature not in known:
            known[signature] = _probe(spec, cache, layers[spec.name], block_tokens)
        planes += _views(spec, cache, known[signature])
    if len(blocks) != 1:
        raise UnsupportedModel(f"layers have different numbers of KV blocks: {sorted(blocks)}")
    return EngineCache(block_tokens, blocks.pop(), tuple(planes))


def _check_tensor(spec: LayerSpec, cache: torch.Tensor, block_tokens: int) -> None:
    if cache.device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(
            f"layer {spec.name} keeps its KV on {cache.device}: only CPU and CUDA are known"
        )
    wanted = (spec.kv_heads, block_tokens, sum(spec.plane_dims))
    if tuple(cache.shape[1:]) != wanted or min(cache.stride()) < 0:
        raise UnsupportedModel(
            f"layer {spec.name}: KV cache of shape {tuple(cache.shape)} and strides {cache.stride()}, "
            f"expected [blocks, {', '.join(map(str, wanted))}]"
        )
    if cache.element_size() != spec.item_bytes:
        raise UnsupportedModel(f"layer {spec.name}: KV cache of {cache.dtype}, expected {spec.dtype}")


def _probe(
    spec: LayerSpec, cache: torch.Tensor, layer: Any, block_tokens: int
) -> tuple[list[int], list[int]]:
    """Offsets, in elements, of K and V from the start of a (block, head), by [token * dim + d].

    Each element of a block is given its own number, a few bits at a time, through the engine's own write;
    what is then read from the second of two scratch blocks of the same strides says where each went.
    """
    key_dim, value_dim = spec.plane_dims
    columns = key_dim + value_dim
    heads, region = spec.kv_heads, block_tokens * columns
    scratch = torch.empty_strided(
        (2, *cache.shape[1:]), cache.stride(), dtype=cache.dtype, device=cache.device
    )
    scratch.zero_()
    numbers = torch.arange(1, heads * region + 1, dtype=torch.int64, device=cache.device).view(heads, region)
    slots = torch.arange(block_tokens, 2 * block_tokens, dtype=torch.int64, device=cache.device)
    found = torch.zeros_like(numbers)
    for shift in range(0, int(numbers.max()).bit_length(), _PROBE_BITS):
        digits = (numbers >> shift) & ((1 << _PROBE_BITS) - 1)
        key, value = digits[:, : block_tokens * key_dim], digits[:, block_tokens * key_dim :]
        layer.impl.do_kv_cache_update(
            layer,
            _by_token(key, key_dim).to(_compute_dtype(cache)),
            _by_token(value, value_dim).to(_compute_dtype(cache)),
            scratch,
            slots,
        )
        found |= _numbers_in(scratch[1]).reshape(heads, region) << shift
    by_head = (found - torch.arange(heads, device=cache.device).view(heads, 1) * region).cpu()
    once = torch.equal(by_head[0].sort().values, numbers[0].cpu()) and bool((by_head == by_head[0]).all())
    if not once or bool(_numbers_in(scratch[0]).any()):
        raise UnsupportedModel(
            f"layer {spec.name}: the engine does not write each element of a block exactly once, "
            "head by head, where the strides of its cache say"
        )
    place = torch.arange(region, dtype=torch.int64)
    offsets = torch.empty(region, dtype=torch.int64)
    offsets[by_head[0] - 1] = place // columns * cache.stride(2) + place % columns * cache.stride(3)
    return offsets[: block_tokens * key_dim].tolist(), offsets[block_tokens * key_dim :].tolist()


def _by_token(of_heads: torch.Tensor, dim: int) -> torch.Tensor:
    """[head][token * dim + d] as engines compute it: [token][head][d]."""
    heads = of_heads.shape[0]
    return of_heads.reshape(heads, -1, dim).transpose(0, 1).contiguous()


def _numbers_in(scratch: torch.Tensor) -> torch.Tensor:
    """What was written to a scratch block, as whole numbers."""
    values = scratch.contiguous()
    if values.dtype == torch.uint8:  # how vLLM holds fp8
        values = values.view(torch.float8_e4m3fn)
    return values.float().to(torch.int64)


def _compute_dtype(cache: torch.Tensor) -> torch.dtype:
    if cache.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return cache.dtype
    if cache.is_cuda and cache.dtype in (torch.uint8, torch.float8_e4m3fn):
        return torch.bfloat16
    raise UnsupportedModel(f"a KV cache of {cache.dtype} on {cache.device} is not supported in this version")


def _views(spec: LayerSpec, cache: torch.Tensor, offsets: tuple[list[int], list[int]]) -> list[PlaneView]:
    item = cache.element_size()
    views = []
    for dim, table in zip(spec.plane_dims, offsets, strict=True):
        token_step, dim_step = (
            table[dim] - table[0] if len(table) > dim else 0,
            table[1] - table[0] if dim > 1 else 0,
        )
        affine = all(
            at == table[0] + (i // dim) * token_step + (i % dim) * dim_step for i, at in enumerate(table)
        )
        views.append(
            PlaneView(
                pointer=cache.data_ptr() + (table[0] * item if affine else 0),
                stride_block=cache.stride(0) * item,
                stride_head=cache.stride(1) * item,
                stride_token=token_step * item,
                stride_dim=dim_step * item,
                table=None if affine else array("i", table).tobytes(),
            )
        )
    return views
