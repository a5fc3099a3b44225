"""Layouts for tests: one small example, and a strategy for all kinds."""

from __future__ import annotations

import hypothesis.strategies as st

from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout, LayerSpec, Part, PartKind

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")

# Two parts, four layers, an MLA layer among them: the layout of the golden file.
SMALL = ChunkLayout(
    chunk_tokens=16,
    parts=(
        Part(PartKind.FULL, (LayerSpec("0", 2, (8, 8), "bfloat16"), LayerSpec("1", 2, (8, 4), "int8"))),
        Part(PartKind.LATENT, (LayerSpec("2", 1, (24,), "float16"), LayerSpec("3", 1, (24,), "float16"))),
    ),
)

# What can be packed beside what cannot: the layout of the other golden file.
WIDE = ChunkLayout(
    chunk_tokens=32,
    parts=(
        Part(
            PartKind.FULL, (LayerSpec("0", 2, (64, 64), "bfloat16"), LayerSpec("1", 1, (8, 24), "bfloat16"))
        ),
        Part(PartKind.LATENT, (LayerSpec("2", 1, (48,), "float8_e4m3fn"),)),
    ),
    codec=CODEC_PACKED,
)

_planes = st.one_of(st.tuples(st.integers(1, 80)), st.tuples(st.integers(1, 80), st.integers(1, 80)))
layers = st.builds(
    LayerSpec,
    name=st.just("layer"),
    kv_heads=st.integers(1, 8),
    plane_dims=_planes,
    dtype=st.sampled_from(DTYPES),
)
parts = st.builds(
    Part, kind=st.sampled_from(PartKind), layers=st.lists(layers, min_size=1, max_size=4).map(tuple)
)
layouts = st.builds(
    ChunkLayout,
    chunk_tokens=st.integers(1, 64),
    parts=st.lists(parts, min_size=1, max_size=3).map(tuple),
    codec=st.sampled_from((CODEC_RAW, CODEC_PACKED)),
)


def one_part(kv_heads: int, planes: int, layer_count: int) -> ChunkLayout:
    """`layer_count` equal layers."""
    layer = LayerSpec("layer", kv_heads, (8,) * planes, "bfloat16")
    return ChunkLayout(16, (Part(PartKind.FULL, (layer,) * layer_count),))
