"""Gather and scatter do, byte for byte, what the reference does; nothing else is written."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from array import array
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.core.layout import ChunkLayout
from kvstrata.cuda_ext.native import (
    NO_BLOCK,
    CopyEngine,
    DoesNotFit,
    EngineCache,
    Library,
    PlaneView,
    load_library,
)
from tests.cuda_ext import engines, reference
from tests.cuda_ext.cases import DTYPES, KEY, Case, Slot, case_of, cases, layout_of
from tests.cuda_ext.reference import Rank

SOURCE = Path(__file__).resolve().parents[2] / "cuda_ext" / "copy_cpu.cpp"
MANY = settings(max_examples=120, deadline=None)
arrangement = pytest.mark.parametrize("arrange", engines.ARRANGEMENTS, ids=lambda each: each.__name__)


def expected_slot(case: Case, before: bytes) -> bytearray:
    slot = bytearray(before)
    reference.gather(case.layout, case.planes, case.rank, case.block_ids, KEY, slot)
    return slot


def check_gather(case: Case, library: Library) -> None:
    slot = Slot(case.layout)
    engine_before = [storage.clone() for storage in case.storages()]
    try:
        expected = expected_slot(case, slot.raw)
    except reference.Misfit as misfit:
        with pytest.raises(DoesNotFit) as found:
            case.engine(library).gather(slot.address, case.block_ids, KEY)
        assert found.value.sub_block_index == misfit.args[0]
        return
    case.engine(library).gather(slot.address, case.block_ids, KEY)
    assert slot.raw == expected
    assert all(map(torch.equal, case.storages(), engine_before))


def full_slot(layout: ChunkLayout) -> Slot:
    """A good slot of another engine that holds the whole model."""
    blocks = layout.chunk_tokens
    before = Slot(layout).raw
    for seed in itertools.count(5):
        whole = case_of(layout, [engines.separate_nhd], 1, blocks, seed=seed)
        with contextlib.suppress(reference.Misfit):
            return Slot(layout, bytes(expected_slot(whole, before)))
    raise AssertionError("unreachable")


def check_scatter(case: Case, library: Library, skipped: Collection[int] = ()) -> None:
    """`skipped`: places in the chunk whose block takes no part."""
    slot = full_slot(case.layout)
    wanted = case.copy()
    ids = [NO_BLOCK if i in skipped else block for i, block in enumerate(case.block_ids)]
    reference.scatter(case.layout, wanted, case.rank, ids, bytearray(slot.raw))
    before = slot.raw
    case.engine(library).scatter(slot.address, ids, KEY)
    for plane, want in zip(case.planes, wanted, strict=True):
        if plane and want:
            assert torch.equal(plane.storage, want.storage)
    assert slot.raw == before


@MANY
@given(case=cases())
def test_gather_is_the_reference_gather(library: Library, case: Case) -> None:
    check_gather(case, library)


@MANY
@given(case=cases(), data=st.data())
def test_scatter_is_the_reference_scatter(library: Library, case: Case, data: st.DataObject) -> None:
    check_scatter(case, library, data.draw(st.sets(st.integers(0, len(case.block_ids) - 1))))


@arrangement
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_real_models(library: Library, arrange: engines.Arrangement, dtype: str) -> None:
    case = case_of(layout_of(2, (64, 64), dtype, 64, layers=1), [arrange], 32, 4, seed=1)
    check_gather(case, library)
    check_scatter(case, library, skipped=[0])


@pytest.fixture(scope="module")
def old_compiler_s_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Built as by GCC 11, which has no `__builtin_shufflevector`."""
    path = tmp_path_factory.mktemp("gcc11") / "copy.so"
    missing = ["-D__has_builtin(x)=0", "-D__builtin_shufflevector=missing_before_gcc_12", "-DKVS_CLONES="]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", *missing]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(SOURCE), "-o", str(path)], check=True)
    return load_library(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiler_without_shufflevector_transposes_as_well(
    old_compiler_s_library: Library, dtype: str
) -> None:
    case = case_of(layout_of(2, (40, 64), dtype, 48), [engines.transposed_keys], 24, 4, seed=4)
    check_gather(case, old_compiler_s_library)
    check_scatter(case, old_compiler_s_library)


@arrangement
def test_latents_have_one_plane(library: Library, arrange: engines.Arrangement) -> None:
    case = case_of(layout_of(1, (72,), "bfloat16", 32), [arrange], 16, 3, seed=2)
    check_gather(case, library)
    check_scatter(case, library, skipped=[1])


@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 1)])
def test_blocks_that_take_no_part_are_not_written(library: Library, skipped: tuple[int, ...]) -> None:
    for arrange in engines.ARRANGEMENTS:
        case = case_of(layout_of(2, (8, 8), "bfloat16", 8), [arrange], 4, 3, seed=len(skipped))
        check_scatter(case, library, skipped)


@pytest.mark.parametrize(("kv_heads", "tp_size"), [(4, 1), (4, 2), (4, 4), (2, 8), (1, 4)])
def test_ranks_together_write_the_chunk_that_one_rank_writes(
    library: Library, kv_heads: int, tp_size: int
) -> None:
    layout = layout_of(kv_heads, (16, 24), "bfloat16", 16, layers=3)
    whole = case_of(layout, [engines.separate_nhd], 8, 5, seed=9)
    slot, expected = Slot(layout), expected_slot(whole, Slot(layout).raw)
    for rank in range(tp_size):
        share = share_of(whole, Rank(tp_size, rank))
        share.engine(library).gather(slot.address, share.block_ids, KEY)
    assert slot.raw == expected
    library.verify(slot.address, layout, KEY)


def test_two_ranks_read_what_four_wrote(library: Library) -> None:
    layout = layout_of(4, (16, 16), "float32", 16)
    whole = case_of(layout, [engines.joined], 8, 4, seed=3)
    slot = Slot(layout)
    for rank in range(4):
        share = share_of(whole, Rank(4, rank))
        share.engine(library).gather(slot.address, share.block_ids, KEY)
    for rank in range(2):
        want = share_of(whole, Rank(2, rank))
        got = case_of(layout, [engines.transposed_keys], 4, 9, Rank(2, rank), seed=rank)
        got.engine(library).scatter(slot.address, got.block_ids, KEY)
        for mine, theirs in zip(got.planes, want.planes, strict=True):
            assert mine and theirs
            for head in range(2):
                rows = torch.cat([mine.rows(block, head) for block in got.block_ids])
                assert torch.equal(rows, torch.cat([theirs.rows(block, head) for block in want.block_ids]))


def share_of(whole: Case, rank: Rank) -> Case:
    """The case of one rank, whose heads hold what the same heads of `whole` hold."""
    share = case_of(whole.layout, [engines.separate_hnd], whole.block_tokens, whole.num_blocks, rank, seed=1)
    kv_heads = whole.layout.parts[0].layers[0].kv_heads
    for mine, theirs in zip(share.planes, whole.planes, strict=True):
        for head in range(kv_heads):
            local = rank.local_head(kv_heads, head)
            if local is not None:
                for block in range(whole.num_blocks):
                    assert mine and theirs
                    mine.write_rows(block, local, theirs.rows(block, head))
    return Case(whole.layout, share.planes, rank, whole.block_tokens, whole.num_blocks, list(whole.block_ids))


class TestRefusals:
    """What could make the native side touch a wrong byte is a ValueError before it is called."""

    layout = layout_of(2, (8, 8), "bfloat16", 16)

    def case(self) -> Case:
        return case_of(self.layout, [engines.separate_nhd], 8, 4)

    @pytest.mark.parametrize("bad", [-2, 4, 1 << 40])
    def test_block_ids_outside_the_cache(self, library: Library, bad: int) -> None:
        case, slot = self.case(), full_slot(self.layout)
        engine = case.engine(library)
        before = slot.raw
        for ids in ([bad, 0], [0, bad]):
            with pytest.raises(ValueError, match=rf"block ids .*{bad}.* are outside 0 \.\. 3"):
                engine.gather(slot.address, ids, KEY)
            with pytest.raises(ValueError, match=f"{bad}"):
                engine.scatter(slot.address, ids, KEY)
        assert slot.raw == before

    def test_a_gather_needs_every_block(self, library: Library) -> None:
        with pytest.raises(ValueError, match=r"block ids -1 \.\. 0 are outside"):
            self.case().engine(library).gather(Slot(self.layout).address, [0, NO_BLOCK], KEY)

    def test_a_wrong_number_of_blocks(self, library: Library) -> None:
        with pytest.raises(ValueError, match="a chunk is 2 engine blocks, got 3"):
            self.case().engine(library).gather(Slot(self.layout).address, [0, 1, 2], KEY)

    def test_a_key_of_another_length(self, library: Library) -> None:
        with pytest.raises(ValueError, match="a key has 32 bytes, got 31"):
            self.case().engine(library).gather(Slot(self.layout).address, [0, 1], KEY[:31])

    def test_a_cache_that_does_not_fit_the_layout(self, library: Library) -> None:
        views = tuple(plane.view() if plane else None for plane in self.case().planes)
        with pytest.raises(ValueError, match="not whole blocks of 5"):
            CopyEngine(self.layout, EngineCache(5, 4, views), library)
        with pytest.raises(ValueError, match="the layout has 4 planes, the engine's cache 3"):
            CopyEngine(self.layout, EngineCache(8, 4, views[:3]), library)

    @pytest.mark.parametrize(
        ("table", "fault"),
        [
            (range(64), None),
            (range(63), "bytes"),
            ([-1, *range(63)], "negative"),
            ([0] * 64, "repeated"),
            ([*range(63), 64], "the offset 64, outside"),
            ([*range(63), 2**31 - 1], "the offset 2147483647, outside"),
        ],
    )
    def test_a_table_that_does_not_fit_its_block(
        self, library: Library, table: list[int], fault: str | None
    ) -> None:
        plane = self.case().planes[0]
        assert plane
        entries = torch.tensor(list(table), dtype=torch.int32)
        view = reference.Plane(plane.storage, 0, (64, 0, 0, 0), 8, 8, entries).view()
        cache = EngineCache(8, 4, (view,) * 4)
        if fault is None:
            CopyEngine(self.layout, cache, library)
        else:
            with pytest.raises(ValueError, match=fault):
                CopyEngine(self.layout, cache, library)

    @pytest.mark.parametrize(
        ("block", "head", "most"),
        [
            (128, 64, 63),  # [block][head][...]
            (160, 80, 79),  # with gaps
            (64, 256, 63),  # [head][block][...]
            (128, 8, 119),  # [block][token][head][dim]: the last head's region ends with the block
            (-128, -64, 63),
        ],
    )
    def test_a_table_reaches_as_far_as_the_strides_leave_room(
        self, library: Library, block: int, head: int, most: int
    ) -> None:
        views = []
        for last in (most, most + 1):
            table = array("i", [*range(63), last]).tobytes()
            views.append(PlaneView(1 << 20, 2 * block, 2 * head, 0, 0, table))
        good, bad = views
        CopyEngine(self.layout, EngineCache(8, 4, (good,) * 4), library)
        with pytest.raises(ValueError, match=f"the offset {most + 1}, outside"):
            CopyEngine(self.layout, EngineCache(8, 4, (good, good, good, bad)), library)


def test_an_engine_loads_the_library_by_itself() -> None:
    case = case_of(layout_of(1, (8,), "bfloat16", 4), [engines.separate_nhd], 4, 1)
    view = case.planes[0]
    assert view
    slot = Slot(case.layout)
    expected = expected_slot(case, slot.raw)
    engine = CopyEngine(case.layout, EngineCache(4, 1, (view.view(), *(None for _ in case.planes[1:]))))
    engine.gather(slot.address, [0], KEY)
    first = case.layout.sub_blocks[0]
    assert slot.raw[first.offset :][: first.nbytes] == expected[first.offset :][: first.nbytes]
    assert load_library().checksum(b"", 0) != 0
