"""Every byte of a chunk has one place, one owner, and the same meaning for every reader."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.layout import (
    ALIGNMENT,
    CODEC_RAW,
    FORMAT_VERSION,
    SUB_BLOCK_ALIGNMENT,
    ChunkLayout,
    LayerSpec,
    Part,
    PartKind,
    chunk_tokens_for,
    writer_of,
)
from kvstrata.core.packing import can_pack, packed_bytes
from tests.core.layouts import DTYPES, SMALL, WIDE, layouts, one_part

GOLDEN = Path(__file__).parent / "golden"
FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
KEY = bytes(range(32))


# ---------------------------------------------------------------------------------------- where bytes lie


@given(layouts)
def test_sub_blocks_follow_each_other_and_fill_the_slot(layout: ChunkLayout) -> None:
    end = layout.payload_offset
    for before, after in zip(layout.sub_blocks, layout.sub_blocks[1:], strict=False):
        end = before.offset + before.nbytes
        unit = ALIGNMENT if before.part != after.part else SUB_BLOCK_ALIGNMENT
        assert after.offset == -(-end // unit) * unit
    last = layout.sub_blocks[-1]
    assert layout.sub_blocks[0].offset == layout.payload_offset
    assert layout.payload_bytes == last.offset + last.nbytes - layout.payload_offset
    assert layout.slot_bytes - ALIGNMENT < last.offset + last.nbytes <= layout.slot_bytes


@given(layouts)
def test_header_tables_and_payload_do_not_meet(layout: ChunkLayout) -> None:
    assert len(layout.header(KEY)) == layout.checksum_offset
    assert layout.checksum_offset % 8 == 0
    assert layout.checksum_offset + 8 * layout.sub_block_count <= layout.payload_offset


@given(layouts)
def test_parts_and_slots_start_on_pages(layout: ChunkLayout) -> None:
    first = {sub_block.part: sub_block.offset for sub_block in reversed(layout.sub_blocks)}
    assert all(offset % ALIGNMENT == 0 for offset in first.values())
    assert layout.slot_bytes % ALIGNMENT == 0


def stored_bytes(layout: ChunkLayout, layer: LayerSpec, dim: int) -> int:
    raw = layout.chunk_tokens * dim * layer.item_bytes
    if layout.codec == CODEC_RAW or not can_pack(layout.chunk_tokens, dim, layer.dtype):
        return raw
    packed = packed_bytes(layout.chunk_tokens, dim)
    assert packed < raw
    return packed


@given(layouts)
def test_sub_blocks_are_every_layer_head_and_plane_in_order(layout: ChunkLayout) -> None:
    expected = [
        (part_index, layer_index, head, plane, stored_bytes(layout, layer, dim))
        for part_index, part in enumerate(layout.parts)
        for layer_index, layer in enumerate(part.layers)
        for head in range(layer.kv_heads)
        for plane, dim in enumerate(layer.plane_dims)
    ]
    found = [(s.part, s.layer, s.head, s.plane, s.nbytes) for s in layout.sub_blocks]
    assert found == expected
    assert [s.index for s in layout.sub_blocks] == list(range(layout.sub_block_count))


# -------------------------------------------------------------------------------------- digest and header


@given(layouts, layouts)
def test_layouts_have_equal_digests_exactly_if_they_place_the_same_bytes(
    one: ChunkLayout, other: ChunkLayout
) -> None:
    assert (one.digest == other.digest) == (one == other)


def changed_layers() -> list[LayerSpec]:
    layer = SMALL.parts[0].layers[0]
    return [
        dataclasses.replace(layer, kv_heads=4),
        dataclasses.replace(layer, plane_dims=(8, 16)),
        dataclasses.replace(layer, plane_dims=(16, 8)),
        dataclasses.replace(layer, plane_dims=(16,)),
        dataclasses.replace(layer, dtype="float16"),
    ]


def changed_layouts() -> list[ChunkLayout]:
    first, second = SMALL.parts
    variants = [
        ChunkLayout(16, (Part(first.kind, (layer, *first.layers[1:])), second)) for layer in changed_layers()
    ]
    return [
        *variants,
        dataclasses.replace(SMALL, chunk_tokens=17),
        dataclasses.replace(SMALL, codec=1),
        dataclasses.replace(SMALL, parts=(second, first)),
        dataclasses.replace(SMALL, parts=(first,)),
        dataclasses.replace(SMALL, parts=(dataclasses.replace(first, kind=PartKind.WINDOW), second)),
        dataclasses.replace(SMALL, parts=(Part(first.kind, first.layers[::-1]), second)),
        dataclasses.replace(
            SMALL, parts=(Part(first.kind, first.layers[:1]), Part(first.kind, first.layers[1:]), second)
        ),
    ]


def test_every_change_of_a_layout_changes_its_digest() -> None:
    digests = {layout.digest for layout in [SMALL, *changed_layouts()]}
    assert len(digests) == 1 + len(changed_layouts())


def test_names_of_layers_place_no_byte() -> None:
    renamed = tuple(dataclasses.replace(layer, name="x") for layer in SMALL.parts[0].layers)
    other = ChunkLayout(16, (Part(PartKind.FULL, renamed), SMALL.parts[1]))
    assert other.digest == SMALL.digest


@given(layouts)
def test_a_header_follows_from_layout_and_key_alone(layout: ChunkLayout) -> None:
    again = dataclasses.replace(layout)
    assert layout.header(KEY) == again.header(KEY)
    assert layout.header(KEY) != layout.header(bytes(32))
    assert KEY in layout.header(KEY)
    assert layout.digest in layout.header(KEY)


def described(layout: ChunkLayout) -> dict[str, Any]:
    """A layout's byte format, as the golden file holds it."""
    header = layout.header(KEY)
    return {
        "layout": dataclasses.asdict(layout),
        "key": KEY.hex(),
        "digest": layout.digest.hex(),
        "header": [header[start : start + 32].hex() for start in range(0, len(header), 32)],
        "checksum_offset": layout.checksum_offset,
        "checksum_bytes": 8 * layout.sub_block_count,
        "payload_offset": layout.payload_offset,
        "payload_bytes": layout.payload_bytes,
        "slot_bytes": layout.slot_bytes,
        "sub_blocks": [[sub_block.offset, sub_block.nbytes] for sub_block in layout.sub_blocks],
    }


@pytest.mark.parametrize("name", ["raw", "packed"])
def test_the_byte_format_is_the_one_in_the_golden_file(name: str) -> None:
    """It may change only with FORMAT_VERSION, and with new golden files beside the old ones."""
    layout = {"raw": SMALL, "packed": WIDE}[name]
    golden = GOLDEN / f"chunk_v{FORMAT_VERSION}_{name}.json"
    assert json.loads(json.dumps(described(layout))) == json.loads(golden.read_text())


def test_packed_or_not_a_chunk_is_named_by_its_content() -> None:
    assert WIDE.raw.digest != WIDE.digest
    assert WIDE.raw.raw is WIDE.raw
    assert dataclasses.replace(WIDE, codec=CODEC_RAW).digest == WIDE.raw.digest


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_has_the_number_and_the_size_that_the_format_gives_it(dtype: str) -> None:
    layer = LayerSpec("layer", 3, (8,), dtype)
    (row,) = re.findall(rf"^\| (\d+) \| {dtype} \| (\d) \|$", FORMAT.read_text(), re.MULTILINE)
    header = ChunkLayout(16, (Part(PartKind.FULL, (layer,)),)).header(KEY)
    _, _, number, _, _ = struct.unpack_from("<HBBHH", header, 96 + 24)
    assert (number, layer.item_bytes) == tuple(map(int, row))


# ------------------------------------------------------------------------------------ who writes which byte


@pytest.mark.parametrize(
    ("kv_heads", "tp_size"),
    [
        (heads, ranks)
        for heads in (1, 2, 3, 4, 6, 8)
        for ranks in (1, 2, 3, 4, 6, 8, 16)
        if heads % ranks == 0 or ranks % heads == 0
    ],
)
@pytest.mark.parametrize("planes", [1, 2])
def test_every_sub_block_has_a_writer_that_holds_its_head(kv_heads: int, tp_size: int, planes: int) -> None:
    layout = one_part(kv_heads, planes, layer_count=16)
    for sub_block in layout.sub_blocks:
        rank = writer_of(layout, tp_size, sub_block)
        assert 0 <= rank < tp_size
        # An engine gives rank r the heads from r * heads / ranks: the writer must have this one.
        held = max(1, kv_heads // tp_size)
        first = rank * kv_heads // tp_size
        assert first <= sub_block.head < first + held


@pytest.mark.parametrize(("kv_heads", "tp_size"), [(8, 1), (8, 4), (8, 8), (2, 8), (1, 4), (1, 16)])
@pytest.mark.parametrize("planes", [1, 2])
def test_ranks_share_the_writing(kv_heads: int, tp_size: int, planes: int) -> None:
    layout = one_part(kv_heads, planes, layer_count=16)
    ranks = [writer_of(layout, tp_size, sub_block) for sub_block in layout.sub_blocks]
    counts = [ranks.count(rank) for rank in range(tp_size)]
    assert min(counts) > 0
    assert max(counts) == min(counts)


@given(layouts, st.sampled_from([2, 4, 6, 8]))
def test_ranks_share_the_writing_of_all_parts(layout: ChunkLayout, tp_size: int) -> None:
    written: Counter[tuple[int, int]] = Counter()  # (heads of the layer, rank)
    for sub_block in layout.sub_blocks:
        heads = layout.parts[sub_block.part].layers[sub_block.layer].kv_heads
        if tp_size % heads == 0:
            written[heads, writer_of(layout, tp_size, sub_block)] += 1
    for heads in {heads for heads, _ in written}:
        shares = [written[heads, rank] for rank in range(tp_size)]
        assert max(shares) - min(shares) <= 1


def test_a_part_goes_on_with_the_turn_of_the_one_before() -> None:
    layer = LayerSpec("layer", 1, (8,), "bfloat16")
    other = LayerSpec("other", 2, (8,), "bfloat16")  # between them, and counted apart
    parts = (Part(PartKind.LATENT, (layer, other)), Part(PartKind.DRAFT, (layer, other, layer)))
    layout = ChunkLayout(16, parts)
    writers = [writer_of(layout, 2, s) for s in layout.sub_blocks if parts[s.part].layers[s.layer] is layer]
    assert writers == [0, 1, 0]


def test_more_replicas_than_sub_blocks_leaves_some_without_work() -> None:
    layout = one_part(kv_heads=1, planes=1, layer_count=2)
    assert [writer_of(layout, 4, sub_block) for sub_block in layout.sub_blocks] == [0, 1]


@pytest.mark.parametrize(("kv_heads", "tp_size"), [(6, 4), (4, 6), (3, 2), (2, 3), (8, 3)])
def test_parts_of_heads_are_refused(kv_heads: int, tp_size: int) -> None:
    layout = one_part(kv_heads, planes=2, layer_count=1)
    with pytest.raises(UnsupportedModel, match=f"{kv_heads} KV heads over {tp_size} ranks"):
        writer_of(layout, tp_size, layout.sub_blocks[0])


# --------------------------------------------------------------------------------- what cannot be laid out


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"dtype": "float4"}, "'float4' is not one of bfloat16"),
        ({"kv_heads": 0}, "0 KV heads"),
        ({"plane_dims": ()}, "plane sizes"),
        ({"plane_dims": (8, 0)}, "plane sizes"),
        # The layer table has two 16-bit sizes of planes: what it cannot tell apart must not be laid out.
        ({"plane_dims": (8, 8, 8)}, "plane sizes"),
        ({"plane_dims": (70_000,)}, "plane sizes"),
        ({"kv_heads": 70_000}, "70000 KV heads"),
    ],
)
def test_a_layer_that_cannot_be_laid_out_is_refused(fields: dict[str, Any], why: str) -> None:
    layer = {"name": "0", "kv_heads": 1, "plane_dims": (8, 8), "dtype": "bfloat16"}
    with pytest.raises(UnsupportedModel, match=why):
        LayerSpec(**{**layer, **fields})


@pytest.mark.parametrize(
    ("tokens", "parts"), [(0, SMALL.parts), (16, ()), (16, (Part(PartKind.FULL, ()), SMALL.parts[0]))]
)
def test_an_empty_chunk_is_refused(tokens: int, parts: tuple[Part, ...]) -> None:
    with pytest.raises(UnsupportedModel):
        ChunkLayout(tokens, parts)


@pytest.mark.parametrize(("wanted", "block", "tokens"), [(256, 16, 256), (250, 16, 256), (1, 528, 528)])
def test_a_chunk_is_whole_engine_blocks(wanted: int, block: int, tokens: int) -> None:
    assert chunk_tokens_for(wanted, block) == tokens
