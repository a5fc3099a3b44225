"""The CUDA kernels do, bit for bit, what their CPU twin does; on a GPU only."""

from __future__ import annotations

import dataclasses
import mmap
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout
from kvstrata.cuda_ext.device import (
    Chunk,
    DeviceError,
    DeviceLibrary,
    DevicePipe,
    Rest,
    load_device_library,
)
from kvstrata.cuda_ext.native import (
    NO_BLOCK,
    ChecksumMismatch,
    DoesNotFit,
    EngineCache,
    HeaderMismatch,
    Library,
    PlaneView,
    tensor_parallel_slice,
)
from tests.cuda_ext import engines, reference
from tests.cuda_ext.cases import Case, Slot, case_of, cases, layout_of
from tests.cuda_ext.reference import Plane

pytestmark = pytest.mark.gpu

NEVER = time.monotonic() + 1e6
STAGING = 1 << 17  # so that small chunks move in pieces, too
codecs = pytest.mark.parametrize("codec", [CODEC_RAW, CODEC_PACKED], ids=["raw", "packed"])


class Pinned:
    """Slots in memory that CUDA knows, filled with poison."""

    def __init__(self, library: DeviceLibrary, layout: ChunkLayout, slots: int) -> None:
        self.layout, self._library = layout, library
        self.bytes = torch.frombuffer(mmap.mmap(-1, layout.slot_bytes * slots), dtype=torch.uint8)
        self.bytes.fill_(0x5A)
        library.register(0, self.bytes.data_ptr(), self.bytes.numel())

    def address(self, slot: int) -> int:
        return self.bytes.data_ptr() + slot * self.layout.slot_bytes

    def slot(self, slot: int) -> torch.Tensor:
        return self.bytes[slot * self.layout.slot_bytes :][: self.layout.slot_bytes]

    def close(self) -> None:
        self._library.unregister(0, self.bytes.data_ptr())


@pytest.fixture(scope="session")
def device() -> DeviceLibrary:
    torch.cuda.init()
    return load_device_library()


def on_gpu(case: Case) -> tuple[list[Plane | None], EngineCache]:
    """The case's engine with its cache on the GPU."""
    storages = {storage.data_ptr(): storage.cuda() for storage in case.storages()}
    planes = [plane and plane.on(storages[plane.storage.data_ptr()]) for plane in case.planes]
    heads, writes = tensor_parallel_slice(case.layout, case.rank.tp_size, case.rank.rank)
    views = tuple(plane.view() if plane else None for plane in planes)
    torch.cuda.synchronize()
    return planes, EngineCache(case.block_tokens, case.num_blocks, views, heads, writes)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def described_by_strides(case: Case) -> bool:
    return all(plane is None or plane.table is None for plane in case.planes)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(case=cases().filter(described_by_strides))
def test_save_and_load_are_the_reference(device: DeviceLibrary, case: Case) -> None:
    planes, cache = on_gpu(case)
    if not any(cache.planes) or not any(cache.writes or [True]):
        return
    pinned = Pinned(device, case.layout, 1)
    pipes = [DevicePipe(case.layout, cache, 0, STAGING, gathers, device) for gathers in (True, False)]
    expected = bytearray(pinned.slot(0).numpy().tobytes())
    try:
        (misfit,) = pipes[0].save([Chunk(pinned.address(0), tuple(case.block_ids), key(9))], 0)
        try:
            reference.gather(case.layout, case.planes, case.rank, case.block_ids, key(9), expected)
        except reference.Misfit:
            assert isinstance(misfit, DoesNotFit)
            return
        assert misfit is None
        assert pinned.slot(0).numpy().tobytes() == expected
        if case.rank.tp_size > 1:
            return  # what other ranks hold is not in the slot
        ids = [NO_BLOCK if i % 3 == 1 else block for i, block in enumerate(case.block_ids)]
        wanted = case.copy()
        for plane, want in zip(planes, wanted, strict=True):
            if plane and want:
                plane.storage.fill_(3)
                want.storage.fill_(3)
        torch.cuda.synchronize()
        reference.scatter(case.layout, wanted, case.rank, ids, expected)
        assert pipes[1].load([Chunk(pinned.address(0), tuple(ids), key(9))], 0, NEVER) == (1, None)
        for plane, want in zip(planes, wanted, strict=True):
            if plane and want:
                assert torch.equal(plane.storage.cpu(), want.storage)
    finally:
        for pipe in pipes:
            pipe.close()
        pinned.close()


CHUNKS = 40
SHAPE = {"kv_heads": 4, "dims": (128, 128), "dtype": "bfloat16", "chunk_tokens": 256, "layers": 5}


class Serving:
    """An engine with many chunks, packed or not, and what CUDA and the CPU twin make of them."""

    def __init__(self, device: DeviceLibrary, codec: int) -> None:
        self.layout = layout_of(**SHAPE, codec=codec)  # type: ignore[arg-type]
        blocks = CHUNKS * 16 + 3
        self.case = case_of(self.layout, [engines.joined], 16, blocks)
        self.planes, cache = on_gpu(self.case)
        self.pinned = Pinned(device, self.layout, CHUNKS)
        self.save = DevicePipe(self.layout, cache, 0, 8 << 20, True, device)
        self.load = DevicePipe(self.layout, cache, 0, 8 << 20, False, device)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.chunks = [
            Chunk(self.pinned.address(i), tuple(order[i * 16 :][:16]), key(i)) for i in range(CHUNKS)
        ]

    def poison(self) -> None:
        for plane in self.planes:
            assert plane
            plane.storage.fill_(7)
        torch.cuda.synchronize()

    def blocks_equal(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these chunks' blocks hold what they held at first."""
        return all(
            plane and was and torch.equal(plane.rows(block, head).cpu(), was.rows(block, head))
            for chunk in chunks
            for block in chunk.block_ids
            for plane, was in zip(self.planes, self.case.planes, strict=True)
            for head in range(4)
        )

    def close(self) -> None:
        self.save.close()
        self.load.close()
        self.pinned.close()


@pytest.fixture(params=[CODEC_RAW, CODEC_PACKED], ids=["raw", "packed"])
def serving(device: DeviceLibrary, request: pytest.FixtureRequest) -> Iterator[Serving]:
    made = Serving(device, request.param)
    yield made
    made.close()


def test_many_chunks_are_the_twins_and_come_back(serving: Serving, library: Library) -> None:
    assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
    twin = serving.case.engine(library)
    for i in (0, 1, CHUNKS // 2, CHUNKS - 1):
        slot = Slot(serving.layout, b"\x5a" * serving.layout.slot_bytes)
        twin.gather(slot.address, serving.chunks[i].block_ids, serving.chunks[i].key)
        assert serving.pinned.slot(i).numpy().tobytes() == slot.raw
    serving.poison()
    assert serving.load.load(serving.chunks, 0, NEVER) == (CHUNKS, None)
    assert serving.blocks_equal(serving.chunks[::7])


def test_a_damaged_chunk_ends_the_load_and_is_named(serving: Serving) -> None:
    serving.save.save(serving.chunks, 0)
    victim = serving.layout.sub_blocks[11]
    serving.pinned.slot(17)[victim.offset + 100] ^= 4
    done, why = serving.load.load(serving.chunks, 0, NEVER)
    assert done == 17 and isinstance(why, ChecksumMismatch) and why.sub_block_index == 11
    serving.pinned.slot(17)[victim.offset + 100] ^= 4
    serving.pinned.slot(5)[0] ^= 1
    done, why = serving.load.load(serving.chunks, 0, NEVER)
    assert done == 5 and isinstance(why, HeaderMismatch)


def test_nothing_of_a_damaged_sub_block_is_written(serving: Serving) -> None:
    serving.save.save(serving.chunks[:1], 0)
    victim = serving.layout.sub_blocks[0]  # head 0 of the first layer's keys
    serving.pinned.slot(0)[victim.offset] ^= 1
    serving.poison()
    serving.load.load(serving.chunks[:1], 0, NEVER)
    keys = serving.planes[0]
    assert keys and all((keys.rows(block, 0) == 7).all() for block in serving.chunks[0].block_ids)


def test_no_chunk_is_begun_past_the_deadline(serving: Serving) -> None:
    serving.save.save(serving.chunks, 0)
    serving.poison()
    assert serving.load.load(serving.chunks, 0, time.monotonic() - 1) == (0, None)
    keys = serving.planes[0]
    assert keys and (keys.storage == 7).all()


def test_a_copy_waits_for_the_engines_event(serving: Serving) -> None:
    """The engine writes blocks late: a save behind its event has the new bytes."""
    keys = serving.planes[0]
    assert keys
    for _ in range(5):
        engine = torch.cuda.Stream()
        event = torch.cuda.Event()
        with torch.cuda.stream(engine):
            torch.cuda._sleep(50_000_000)  # some 30 ms
            keys.storage.copy_(keys.storage ^ -32768)  # every sign
            event.record()
        assert serving.save.save(serving.chunks, event.cuda_event) == [None] * CHUNKS
        before = keys.storage.clone()
        serving.poison()
        assert serving.load.load(serving.chunks, 0, NEVER)[0] == CHUNKS
        blocks = [block for chunk in serving.chunks for block in chunk.block_ids]
        rows = before.view(-1, keys.strides[0])[blocks]
        assert torch.equal(keys.storage.view(-1, keys.strides[0])[blocks], rows)


@codecs
def test_both_ways_at_once(device: DeviceLibrary, codec: int) -> None:
    one, other = Serving(device, codec), Serving(device, codec)
    one.save.save(one.chunks, 0)
    one.poison()
    thread = threading.Thread(target=lambda: [other.save.save(other.chunks, 0) for _ in range(5)])
    thread.start()
    for _ in range(5):
        assert one.load.load(one.chunks, 0, NEVER) == (CHUNKS, None)
    thread.join()
    assert one.blocks_equal(one.chunks[::9])
    other.poison()
    assert other.load.load(other.chunks, 0, NEVER) == (CHUNKS, None)
    assert other.blocks_equal(other.chunks[::9])
    one.close()
    other.close()


def test_a_chunk_that_does_not_fit_is_told_from_those_that_do(device: DeviceLibrary) -> None:
    serving = Serving(device, CODEC_PACKED)
    keys = serving.planes[0]
    assert keys
    block = serving.chunks[3].block_ids[0]
    keys.storage.view(-1, keys.strides[0])[block] = torch.randint(
        -32768, 32767, (keys.strides[0],), dtype=torch.int16, device="cuda"
    )
    torch.cuda.synchronize()
    outcome = serving.save.save(serving.chunks[:6], 0)
    assert [isinstance(one, DoesNotFit) for one in outcome] == [False, False, False, True, False, False]
    done, why = serving.load.load(serving.chunks[:6], 0, NEVER)
    assert done == 3 and isinstance(why, HeaderMismatch)
    serving.close()


@pytest.mark.parametrize("codec", [CODEC_RAW, CODEC_PACKED], ids=["raw first", "packed first"])
def test_both_ways_of_storing_go_through_one_pipe(device: DeviceLibrary, codec: int) -> None:
    """An engine that packs loads what another one has stored raw, and the other way round."""
    serving = Serving(device, codec)
    slots = Pinned(device, serving.layout.raw, CHUNKS)
    chunks = [
        dataclasses.replace(chunk, slot_address=slots.address(i), way=i // 3 % 2)
        for i, chunk in enumerate(serving.chunks)
    ]
    assert serving.save.save(chunks, 0) == [None] * CHUNKS
    for i, chunk in enumerate(chunks):
        header = serving.layout.ways[chunk.way].header(chunk.key)
        assert slots.slot(i)[: len(header)].numpy().tobytes() == header
    serving.poison()
    assert serving.load.load(chunks, 0, NEVER) == (CHUNKS, None)
    assert serving.blocks_equal(chunks[::5])
    slots.close()
    serving.close()


def test_blocks_are_overwritten_only_when_they_have_been_read(serving: Serving) -> None:
    """What a flush does: the engine's stream goes on as soon as the bytes are in staging memory."""
    stream = torch.cuda.Stream()

    def overwrite() -> None:
        serving.save.hold(stream.cuda_stream)
        with torch.cuda.stream(stream):
            for plane in serving.planes:
                assert plane
                plane.storage.fill_(9)

    assert serving.save.save(serving.chunks, 0, overwrite) == [None] * CHUNKS
    torch.cuda.synchronize()
    assert not serving.blocks_equal(serving.chunks[:1])
    assert serving.load.load(serving.chunks, 0, NEVER) == (CHUNKS, None)
    assert serving.blocks_equal(serving.chunks)


class TestHandingOver:
    """A load whose last chunks are relied on before they have come."""

    def test_a_stream_that_is_held_finds_all_of_it(self, serving: Serving) -> None:
        assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
        stream, found = torch.cuda.Stream(), []

        def use() -> None:
            serving.load.follow(stream.cuda_stream)
            with torch.cuda.stream(stream):  # in the stream's order, without waiting here
                for plane in serving.planes:
                    assert plane
                    found.append(plane.storage.clone())

        for _ in range(20):
            serving.poison()
            found.clear()
            rest = Rest(CHUNKS // 2, lambda first: first >= CHUNKS - 9, use)
            assert serving.load.load(serving.chunks, 0, NEVER, rest) == (CHUNKS, None)
            torch.cuda.synchronize()
            assert serving.blocks_equal(serving.chunks[::7])
            for plane, then in zip(serving.planes, found, strict=True):
                assert plane
                assert torch.equal(plane.storage, then)

    @pytest.mark.parametrize("of_the_rest", [False, True])
    def test_not_if_a_chunk_is_damaged_before(self, serving: Serving, of_the_rest: bool) -> None:
        """In the rest it is the caller who would have seen it; the outcome tells all the same."""
        assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
        told: list[bool] = []
        bad = CHUNKS - 2 if of_the_rest else 3
        serving.pinned.slot(bad)[serving.layout.payload_offset + 77] ^= 4
        rest = Rest(CHUNKS // 2, lambda first: first >= CHUNKS - 9, lambda: told.append(True))
        done, why = serving.load.load(serving.chunks, 0, NEVER, rest)
        assert done == bad and isinstance(why, ChecksumMismatch)
        assert told == [True] * of_the_rest

    def test_not_if_nobody_is_sure(self, serving: Serving) -> None:
        assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
        serving.poison()
        rest = Rest(CHUNKS // 2, lambda first: False, lambda: pytest.fail("handed over"))
        assert serving.load.load(serving.chunks, 0, NEVER, rest) == (CHUNKS, None)
        assert serving.blocks_equal(serving.chunks[::7])

    @pytest.mark.parametrize("other", [5, CHUNKS - 3])
    def test_not_if_a_slot_holds_another_chunk(self, serving: Serving, other: int) -> None:
        assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
        serving.pinned.slot(other)[30] ^= 1
        rest = Rest(CHUNKS // 2, lambda first: first >= CHUNKS - 9, lambda: pytest.fail("handed over"))
        done, why = serving.load.load(serving.chunks, 0, NEVER, rest)
        assert done == other and isinstance(why, HeaderMismatch)

    def test_the_loads_of_two_threads_do_not_mix(self, serving: Serving) -> None:
        """Each in two parts: the second one's may not come between the first one's."""
        assert serving.save.save(serving.chunks, 0) == [None] * CHUNKS
        serving.poison()
        parts = [serving.chunks[:20], serving.chunks[20:]]
        outcomes: list[object] = [None, None]

        def run(i: int) -> None:
            rest = Rest(12, lambda first: first > 14, lambda: None)
            outcomes[i] = serving.load.load(parts[i], 0, NEVER, rest)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == [(20, None), (20, None)]
        assert serving.blocks_equal(serving.chunks[::7])


class TestRefusals:
    def test_memory_that_cuda_does_not_know(self, device: DeviceLibrary) -> None:
        with pytest.raises(DeviceError, match="CUDA error"):
            device.unregister(0, 1 << 20)

    def test_too_little_memory_for_staging(self, device: DeviceLibrary) -> None:
        layout = layout_of(8, (128, 128), "bfloat16", 4096, layers=1)
        views = (PlaneView(0, 0, 0, 256, 2),) * 2
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - (16 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(DeviceError, match="out of memory"):
            DevicePipe(layout, EngineCache(16, 10, views), 0, 1 << 30, True, device)
        del hog
        torch.cuda.empty_cache()

    def test_blocks_that_no_strides_describe(self, device: DeviceLibrary) -> None:
        case = case_of(layout_of(2, (8, 8), "bfloat16", 8), [engines.packed_pairs], 4, 3)
        views = tuple(plane.view() if plane else None for plane in case.planes)
        with pytest.raises(ValueError, match="no strides describe"):
            DevicePipe(case.layout, EngineCache(4, 3, views), 0, STAGING, True, device)

    def test_block_ids_outside_the_cache(self, device: DeviceLibrary) -> None:
        serving = Serving(device, CODEC_RAW)
        bad = Chunk(serving.chunks[0].slot_address, (10_000,) * 16, key(0))
        with pytest.raises(ValueError, match="outside"):
            serving.save.save([bad], 0)
        serving.close()
