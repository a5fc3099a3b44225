"""Exact packing: every bit comes back, sizes are fixed, and what does not fit is refused."""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout
from kvstrata.core.packing import can_pack, escapes_max, packed_bytes
from kvstrata.cuda_ext.native import ChecksumMismatch, DoesNotFit, HeaderMismatch, Library
from tests.cuda_ext import engines, packing
from tests.cuda_ext.cases import KEY, Case, Slot, case_of, layout_of

TOKENS, DIM = 32, 16
LAYOUT = layout_of(1, (DIM, DIM), "bfloat16", TOKENS, layers=1, codec=CODEC_PACKED)
SPECIAL = {
    "zero": 0x0000,
    "minus zero": 0x8000,
    "the least subnormal": 0x0001,
    "a subnormal": 0x807F,
    "infinity": 0x7F80,
    "minus infinity": 0xFF80,
    "a quiet NaN": 0x7FC0,
    "a NaN with a payload": 0xFFAB,
    "the largest": 0x7F7F,
    "the least normal": 0x0080,
}


def engine_with(bits: list[int]) -> Case:
    """An engine whose keys are `bits`, in token order; its values are tame."""
    case = case_of(LAYOUT, [engines.separate_nhd], TOKENS, 1)
    keys = case.planes[0]
    assert keys
    patterns = struct.unpack(f"<{len(bits)}h", struct.pack(f"<{len(bits)}H", *bits))
    keys.write_rows(0, 0, torch.tensor(patterns, dtype=torch.int16).view(TOKENS, DIM))
    return case


def round_trip(library: Library, case: Case) -> Slot:
    slot = Slot(LAYOUT)
    case.engine(library).gather(slot.address, [0], KEY)
    library.verify(slot.address, LAYOUT, KEY)
    target = case_of(LAYOUT, [engines.any_strides], TOKENS, 1, seed=77)
    target.engine(library).scatter(slot.address, [0], KEY)
    for plane, other in zip(case.planes, target.planes, strict=True):
        assert plane and other and torch.equal(plane.rows(0, 0), other.rows(0, 0))
    return slot


def tame(seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [
        draw.choice((0, 0x8000)) | draw.randrange(112, 126) << 7 | draw.randrange(128) for _ in range(512)
    ]


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_ordinary_number_comes_back(library: Library, name: str) -> None:
    bits = tame()
    bits[37] = SPECIAL[name]
    if name == "the largest":  # it becomes its channel's base, and all others lie too far below
        with pytest.raises(DoesNotFit):
            round_trip(library, engine_with(bits))
    else:
        round_trip(library, engine_with(bits))


@pytest.mark.parametrize("name", SPECIAL)
def test_a_channel_of_nothing_else_comes_back_or_is_refused(library: Library, name: str) -> None:
    bits = tame()
    bits[3::DIM] = [SPECIAL[name]] * TOKENS
    if name in (
        "zero",
        "minus zero",
        "the least subnormal",
        "a subnormal",
        "the largest",
        "the least normal",
    ):
        round_trip(library, engine_with(bits))
    else:  # Inf and NaN never become a base: here they are more escapes than fit
        with pytest.raises(DoesNotFit):
            round_trip(library, engine_with(bits))


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_any_bits_come_back_or_are_refused_as_the_reference_says(
    library: Library, wild: list[int], draw: random.Random
) -> None:
    bits = tame(draw.randrange(1000))
    for pattern in wild:
        bits[draw.randrange(len(bits))] = pattern
    expected = packing.pack(bits, DIM)
    case = engine_with(bits)
    if expected is None:
        with pytest.raises(DoesNotFit) as refused:
            round_trip(library, case)
        assert refused.value.sub_block_index == 0
        return
    assert packing.unpack(expected, len(bits), DIM) == bits
    first = LAYOUT.sub_blocks[0]
    assert round_trip(library, case).raw[first.offset :][: first.nbytes] == expected


@pytest.mark.parametrize("escapes", range(3))
def test_the_table_holds_what_it_says(library: Library, escapes: int) -> None:
    assert escapes_max(TOKENS, DIM) == 1
    bits = tame()
    for i in range(escapes):
        bits[100 + i] = 1 << 7
    if escapes <= 1:
        round_trip(library, engine_with(bits))
    else:
        with pytest.raises(DoesNotFit, match="sub-block 0 is spread too widely"):
            round_trip(library, engine_with(bits))


def test_a_refused_gather_leaves_no_chunk(library: Library) -> None:
    slot = Slot(LAYOUT, bytes(LAYOUT.slot_bytes))
    bits = [draw << 7 for draw in random.Random(5).choices(range(1, 255), k=512)]
    with pytest.raises(DoesNotFit):
        engine_with(bits).engine(library).gather(slot.address, [0], KEY)
    with pytest.raises(HeaderMismatch):
        library.verify(slot.address, LAYOUT, KEY)


def test_every_flipped_bit_of_a_packed_chunk_is_found(library: Library) -> None:
    bits = tame()
    bits[5] = SPECIAL["infinity"]
    slot = round_trip(library, engine_with(bits))
    for one in LAYOUT.sub_blocks:
        for byte in range(one.offset, one.offset + one.nbytes):
            slot.flip(byte, byte % 8)
            with pytest.raises(ChecksumMismatch):
                library.verify(slot.address, LAYOUT, KEY)
            slot.flip(byte, byte % 8)


@given(st.integers(1, 64), st.integers(1, 300))
def test_sizes_are_those_of_the_reference(tokens: int, dim: int) -> None:
    if can_pack(tokens, dim, "bfloat16"):
        bits = [120 << 7] * (tokens * dim)
        packed = packing.pack(bits, dim)
        assert packed is not None and len(packed) == packed_bytes(tokens, dim)
        assert escapes_max(tokens, dim) == packing.escape_words(tokens * dim) - 1


def test_only_bf16_of_a_shape_that_fits_is_packed() -> None:
    assert can_pack(256, 128, "bfloat16")
    for tokens, dim, dtype in (
        (256, 128, "float16"),
        (256, 128, "float8_e4m3fn"),
        (1, 24, "bfloat16"),
        (256, 8, "bfloat16"),
        (16, 17, "bfloat16"),
        (65536, 1024, "bfloat16"),
    ):
        assert not can_pack(tokens, dim, dtype)


def test_a_chunk_of_a_common_model_is_stored_in_three_quarters() -> None:
    def chunk(codec: int) -> ChunkLayout:
        return layout_of(8, (128, 128), "bfloat16", 256, layers=32, codec=codec)

    ratio = chunk(CODEC_RAW).slot_bytes / chunk(CODEC_PACKED).slot_bytes
    assert math.isclose(ratio, 1.316, abs_tol=0.001)
    assert chunk(CODEC_PACKED).raw.digest == chunk(CODEC_RAW).digest != chunk(CODEC_PACKED).digest
