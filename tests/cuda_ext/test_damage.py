"""A slot that is not what was gathered is refused, and what is damaged is never written to an engine."""

from __future__ import annotations

import struct

import pytest
import torch

from kvstrata.core.layout import SubBlock
from kvstrata.cuda_ext.native import NO_BLOCK, ChecksumMismatch, ChunkMismatch, HeaderMismatch, Library
from tests.cuda_ext import engines, reference
from tests.cuda_ext.cases import KEY, Case, Slot, case_of, layout_of

LAYOUT = layout_of(2, (5, 3), "bfloat16", 6)
SUB_BLOCKS = LAYOUT.sub_blocks


@pytest.fixture
def case() -> Case:
    return case_of(LAYOUT, [engines.transposed_keys], 3, 3)


@pytest.fixture
def slot(library: Library, case: Case) -> Slot:
    slot = Slot(LAYOUT)
    case.engine(library).gather(slot.address, case.block_ids, KEY)
    library.verify(slot.address, LAYOUT, KEY)
    return slot


def bytes_that_count() -> list[int]:
    table_end = LAYOUT.checksum_offset + 8 * LAYOUT.sub_block_count
    payload = [byte for one in SUB_BLOCKS for byte in range(one.offset, one.offset + one.nbytes)]
    return [*range(table_end), *payload]


def owner_of(byte: int) -> SubBlock | None:
    """The sub-block whose payload or table entry has this byte; None in the header."""
    for one in SUB_BLOCKS:
        entry = LAYOUT.checksum_offset + 8 * one.index
        if one.offset <= byte < one.offset + one.nbytes or entry <= byte < entry + 8:
            return one
    return None


def test_every_flipped_bit_is_found(library: Library, case: Case, slot: Slot) -> None:
    engine = case.engine(library)
    for byte in bytes_that_count():
        for bit in range(8):
            slot.flip(byte, bit)
            with pytest.raises(ChunkMismatch) as scattered:
                engine.scatter(slot.address, case.block_ids, KEY)
            with pytest.raises(ChunkMismatch) as verified:
                library.verify(slot.address, LAYOUT, KEY)
            for found in (scattered.value, verified.value):
                owner = owner_of(byte)
                if owner is None:
                    assert isinstance(found, HeaderMismatch)
                else:
                    assert isinstance(found, ChecksumMismatch)
                    assert found.sub_block_index == owner.index
            slot.flip(byte, bit)
    library.verify(slot.address, LAYOUT, KEY)


@pytest.mark.parametrize("damaged", SUB_BLOCKS, ids=lambda one: f"sub-block {one.index}")
def test_nothing_of_a_damaged_sub_block_is_written(
    library: Library, case: Case, slot: Slot, damaged: SubBlock
) -> None:
    # The damage is in the first block, which would not even have been written.
    slot.flip(damaged.offset)
    target = case_of(LAYOUT, [engines.joined], 2, 4, seed=8)
    wanted = target.copy()
    ids = [NO_BLOCK, *target.block_ids[1:]]
    reference.scatter(LAYOUT, wanted, target.rank, ids, bytearray(slot.raw), stop_at=damaged.index)
    with pytest.raises(ChecksumMismatch) as found:
        target.engine(library).scatter(slot.address, ids, KEY)
    assert found.value.sub_block_index == damaged.index
    for plane, want in zip(target.planes, wanted, strict=True):
        assert plane and want and torch.equal(plane.storage, want.storage)


def test_nothing_is_written_when_the_header_is_wrong(library: Library, slot: Slot) -> None:
    target = case_of(LAYOUT, [engines.separate_hnd], 3, 3, seed=4)
    before = [storage.clone() for storage in target.storages()]
    slot.flip(0)
    with pytest.raises(HeaderMismatch):
        target.engine(library).scatter(slot.address, target.block_ids, KEY)
    assert all(map(torch.equal, target.storages(), before))


def swap(slot: Slot, a: int, b: int, nbytes: int) -> None:
    one, other = slot.raw[a : a + nbytes], slot.raw[b : b + nbytes]
    slot.write(a, other)
    slot.write(b, one)


def test_swapped_sub_blocks_are_found(library: Library, slot: Slot) -> None:
    for one in SUB_BLOCKS:
        for other in SUB_BLOCKS[one.index + 1 :]:
            if one.nbytes == other.nbytes:
                swap(slot, one.offset, other.offset, one.nbytes)
                with pytest.raises(ChecksumMismatch) as found:
                    library.verify(slot.address, LAYOUT, KEY)
                assert found.value.sub_block_index == one.index
                swap(slot, one.offset, other.offset, one.nbytes)


def test_sub_blocks_that_changed_places_with_their_entries_are_found(library: Library, slot: Slot) -> None:
    first, second = next(
        (a, b) for a in SUB_BLOCKS for b in SUB_BLOCKS[a.index + 1 :] if a.nbytes == b.nbytes
    )
    swap(slot, first.offset, second.offset, first.nbytes)
    swap(slot, LAYOUT.checksum_offset + 8 * first.index, LAYOUT.checksum_offset + 8 * second.index, 8)
    with pytest.raises(ChecksumMismatch):
        library.verify(slot.address, LAYOUT, KEY)


def test_swapped_tokens_are_found(library: Library, slot: Slot) -> None:
    row = 5 * 2
    for token in range(5):
        start = SUB_BLOCKS[0].offset + token * row
        swap(slot, start, start + row, row)
        with pytest.raises(ChecksumMismatch):
            library.verify(slot.address, LAYOUT, KEY)
        swap(slot, start, start + row, row)


def test_another_key_is_another_chunk(library: Library, case: Case, slot: Slot) -> None:
    for byte in range(32):
        other = bytearray(KEY)
        other[byte] ^= 1
        with pytest.raises(HeaderMismatch):
            case.engine(library).scatter(slot.address, case.block_ids, bytes(other))


def test_the_checksums_know_the_key_even_if_the_header_was_replaced(library: Library, slot: Slot) -> None:
    other = bytes([KEY[0] ^ 1, *KEY[1:]])
    slot.write(0, LAYOUT.header(other))
    with pytest.raises(ChecksumMismatch) as found:
        library.verify(slot.address, LAYOUT, other)
    assert found.value.sub_block_index == 0


def test_another_layout_is_refused(library: Library, slot: Slot) -> None:
    longer = layout_of(2, (5, 3), "bfloat16", 12)
    bigger = Slot(longer, slot.raw.ljust(longer.slot_bytes, b"\0"))
    with pytest.raises(HeaderMismatch):
        library.verify(bigger.address, longer, KEY)


def test_a_zeroed_slot_is_refused(library: Library) -> None:
    slot = Slot(LAYOUT, bytes(LAYOUT.slot_bytes))
    with pytest.raises(HeaderMismatch):
        library.verify(slot.address, LAYOUT, KEY)
    slot.write(0, LAYOUT.header(KEY))
    with pytest.raises(ChecksumMismatch):
        library.verify(slot.address, LAYOUT, KEY)


def test_a_missing_sub_block_is_found(library: Library, slot: Slot) -> None:
    for one in SUB_BLOCKS:
        whole = slot.raw
        slot.write(one.offset, bytes(one.nbytes))
        with pytest.raises(ChecksumMismatch):
            library.verify(slot.address, LAYOUT, KEY)
        slot.write(0, whole)


def test_the_table_is_what_the_format_says(library: Library, slot: Slot) -> None:
    (seed,) = struct.unpack_from("<Q", KEY)
    for one in SUB_BLOCKS:
        data = slot.raw[one.offset : one.offset + one.nbytes]
        (entry,) = struct.unpack_from("<Q", slot.raw, LAYOUT.checksum_offset + 8 * one.index)
        own = seed + one.index & 0xFFFF_FFFF_FFFF_FFFF
        assert entry == library.checksum(data, own) == reference.checksum(data, own)
