"""The checksum: frozen values, and the changes that it must see."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstrata.cuda_ext.native import Library
from tests.cuda_ext.reference import checksum

FAST = settings(max_examples=200, deadline=None)
seeds = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("data", "seed", "value"),
    [
        (b"", 0, 0x0000000000000001),
        (b"", 1, 0x7AB40E090F363A7D),
        (b"\0", 0, 0x3BD80EF6A8AE684F),
        (bytes(8), 0, 0x197BCFFE69E3A9BF),
        (b"kvstrata", 0, 0x84CABF731E7ED316),
        (b"kvstrata" * 8, 2**64 - 1, 0x85773227FA061A3F),
        (bytes(range(256)) * 16, 0x0123456789ABCDEF, 0xBA20923F68581292),
        (bytes(range(251)), 7, 0xB5F0C6B25A14C39D),
    ],
)
def test_values_are_frozen(library: Library, data: bytes, seed: int, value: int) -> None:
    assert library.checksum(data, seed) == checksum(data, seed) == value


@FAST
@given(data=st.binary(max_size=300), seed=seeds)
def test_it_is_the_reference(library: Library, data: bytes, seed: int) -> None:
    assert library.checksum(data, seed) == checksum(data, seed)


def test_it_is_the_reference_on_whole_sub_blocks(library: Library) -> None:
    data = random.Random(1).randbytes(1 << 17)
    for nbytes in (1 << 17, (1 << 17) - 1, 40_000, 32_768, 1_023):
        for start in (0, 1, 8, 13):
            part = data[start : start + nbytes]
            assert library.checksum(part, 7) == checksum(part, 7)


def test_every_kind_of_buffer_gives_the_same(library: Library) -> None:
    data = random.Random(2).randbytes(1001)
    writable, frozen = memoryview(bytearray(data)), memoryview(data)
    kinds = (bytearray(data), writable, frozen, frozen[:].cast("b"))
    assert {library.checksum(kind, 3) for kind in kinds} == {library.checksum(data, 3)}
    assert library.checksum(writable[8:], 3) == library.checksum(data[8:], 3)
    empty = {
        library.checksum(kind, 3) for kind in (b"", bytearray(), memoryview(b""), memoryview(bytearray()))
    }
    assert empty == {checksum(b"", 3)}
    with pytest.raises((TypeError, BufferError)):
        library.checksum(writable[::2], 3)


@FAST
@given(data=st.binary(min_size=1, max_size=300), seed=seeds, where=st.data())
def test_every_changed_byte_changes_it(
    library: Library, data: bytes, seed: int, where: st.DataObject
) -> None:
    changed = bytearray(data)
    changed[where.draw(st.integers(0, len(data) - 1))] ^= where.draw(st.integers(1, 255))
    assert library.checksum(changed, seed) != library.checksum(data, seed)


@FAST
@given(data=st.binary(min_size=16, max_size=300), seed=seeds, where=st.data())
def test_swapped_words_change_it(library: Library, data: bytes, seed: int, where: st.DataObject) -> None:
    words = [data[i : i + 8] for i in range(0, len(data), 8)]
    last = len(data) // 8 - 1
    i, j = where.draw(st.integers(0, last)), where.draw(st.integers(0, last))
    assume(words[i] != words[j])
    before = library.checksum(data, seed)
    words[i], words[j] = words[j], words[i]
    assert library.checksum(b"".join(words), seed) != before


@FAST
@given(data=st.binary(min_size=2, max_size=300), seed=seeds, by=st.integers(1, 299))
def test_moved_data_change_it(library: Library, data: bytes, seed: int, by: int) -> None:
    moved = data[by % len(data) :] + data[: by % len(data)]
    assume(moved != data)
    assert library.checksum(moved, seed) != library.checksum(data, seed)


@FAST
@given(data=st.binary(max_size=100), seed=seeds, other=seeds)
def test_another_seed_changes_it(library: Library, data: bytes, seed: int, other: int) -> None:
    assume(seed != other)
    assert library.checksum(data, seed) != library.checksum(data, other)


def test_length_counts_and_zeros_are_data(library: Library) -> None:
    values = [library.checksum(bytes(nbytes), seed) for nbytes in range(0, 4096, 3) for seed in (0, 1)]
    assert 0 not in values
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("index", range(8))
def test_neither_half_of_a_word_hides_the_other(library: Library, index: int) -> None:
    """Where a half of x = word ^ key is 0, so is the product of the halves; the other half still counts."""
    key = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    values = (0, 1, 0x80000000, 0xFFFFFFFF, 12345)
    low_is_zero = [key & 0xFFFFFFFF | value << 32 for value in values]
    high_is_zero = [key >> 32 << 32 | value for value in values]
    for words in (low_is_zero, high_is_zero):
        found = {library.checksum(bytes(8 * index) + word.to_bytes(8, "little"), 0) for word in words}
        assert len(found) == len(values)


def test_a_flipped_input_bit_flips_half_of_the_output(library: Library) -> None:
    draw = random.Random(4)
    flips = []
    for _ in range(500):
        data = bytearray(draw.randbytes(256))
        before = library.checksum(data, 5)
        data[draw.randrange(256)] ^= 1 << draw.randrange(8)
        flips.append((before ^ library.checksum(data, 5)).bit_count())
    assert 30 < sum(flips) / len(flips) < 34
    assert min(flips) > 10
