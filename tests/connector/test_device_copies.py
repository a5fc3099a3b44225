"""What of a load processors verify ahead of its copies. The pipes are stand-ins, the chunks are real."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest

from kvstrata.connector import device_copies
from kvstrata.connector.device_copies import DeviceCopies
from kvstrata.connector.jobs import ChunkCopy, LoadJob
from kvstrata.controller.client import MappedSegment
from kvstrata.cuda_ext.device import Chunk, Rest
from kvstrata.cuda_ext.native import Library, load_library
from tests.conftest import REPO
from tests.cuda_ext import engines
from tests.cuda_ext.cases import Slot, case_of, layout_of

SOON_S = 10.0
CHUNKS = 24
LAYOUT = layout_of(2, (64, 64), "bfloat16", 32)


class Pipe:
    """Moves nothing; `play` is the test's."""

    def __init__(self, play: Callable[[Rest | None], None], ahead_bytes: int) -> None:
        self._play, self.ahead_bytes = play, ahead_bytes

    def load(
        self, chunks: Sequence[Chunk], after: int, expires: float, rest: Rest | None
    ) -> tuple[int, None]:
        self._play(rest)
        return len(chunks), None

    def close(self) -> None: ...


class Pool:
    """Memory with stored chunks in it."""

    def __init__(self, library: Library) -> None:
        self.in_use = 0
        self.slots = [Slot(LAYOUT) for _ in range(CHUNKS)]
        engine = case_of(LAYOUT, [engines.joined], 16, 2).engine(library)
        for i, slot in enumerate(self.slots):
            engine.gather(slot.address, [0, 1], bytes([i]) * 32)

    @contextmanager
    def use(self, epoch: bytes, segment: int) -> Iterator[MappedSegment | None]:
        self.in_use += 1
        try:
            yield MappedSegment(0, 1 << 62)
        finally:
            self.in_use -= 1

    def job(self) -> LoadJob:
        chunks = [
            ChunkCopy(bytes([i]) * 32, 0, slot.address, LAYOUT.slot_bytes, (0, 1))
            for i, slot in enumerate(self.slots)
        ]
        return LoadJob(1, b"store", tuple(chunks), 1e9)


@pytest.fixture
def pool() -> Pool:
    return Pool(load_library())


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released for each chunk that was verified; they are verified one by one."""
    count, are_good = threading.Semaphore(0), DeviceCopies._are_good

    def counted(copies: DeviceCopies, chunks: Sequence[Chunk]) -> bool:
        assert len(chunks) == 1
        try:
            return are_good(copies, chunks)
        finally:
            count.release()

    monkeypatch.setattr(DeviceCopies, "_are_good", counted)
    monkeypatch.setattr(device_copies, "_VERIFIED_AT_ONCE", LAYOUT.slot_bytes)
    return count


def wait_for(count: threading.Semaphore, times: int) -> None:
    for _ in range(times):
        assert count.acquire(timeout=SOON_S)


def until_sure(rest: Rest, first: int) -> None:
    """A verdict may be counted a moment before it is out."""
    over = threading.Event()
    timer = threading.Timer(SOON_S, over.set)
    timer.start()
    while not rest.is_sure(first):
        assert not over.is_set()
    timer.cancel()


def play(
    pool: Pool,
    script: Callable[[DeviceCopies, Rest | None], None],
    idle: bool = True,
    ahead_bytes: int = 1 << 30,
) -> int:
    """Load all chunks with a pipe that does what `script` says; returns how often it was handed over."""
    copies: DeviceCopies
    pipe = cast(Any, Pipe(lambda rest: script(copies, rest), ahead_bytes))
    copies = DeviceCopies(pipe, pipe, pool, [LAYOUT])
    copies.engine_idle = idle
    handed_over: list[None] = []
    report = copies.load(pool.job(), None, lambda: handed_over.append(None))
    assert report.ok and not pool.in_use
    copies.close()
    return len(handed_over)


def test_all_but_the_first_chunk_may_be_the_rest(pool: Pool) -> None:
    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None and rest.first == 1
        until_sure(rest, 1)
        rest.handed_over()

    assert play(pool, script) == 1


@pytest.mark.parametrize("by", ["the pipe", "the link"])
def test_the_rest_is_bounded(pool: Pool, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Nothing is gained by more than comes while the engine gets ready, and it would wait for it."""
    most = 5 * LAYOUT.slot_bytes + 1
    monkeypatch.setattr(device_copies, "_SLOWEST", most / 0.01 if by == "the link" else 1e12)

    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None and rest.first == CHUNKS - 5

    assert play(pool, script, ahead_bytes=most if by == "the pipe" else 1 << 40) == 0


def test_many_chunks_are_verified_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict on some of them is one on all: sure from where the first of its chunks begins."""
    tasks: list[list[int]] = []

    def never(copies: DeviceCopies, chunks: Sequence[Chunk]) -> bool:
        tasks.append([chunk.key[0] for chunk in chunks])
        return chunks[-1].key[0] > 10

    monkeypatch.setattr(DeviceCopies, "_are_good", never)
    monkeypatch.setattr(device_copies, "_VERIFIED_AT_ONCE", 5 * LAYOUT.slot_bytes)

    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None
        until_sure(rest, 9)  # 9 to 13 are one task
        assert not rest.is_sure(8)

    play(pool, script)
    assert sorted(number for task in tasks for number in task)[-15:] == list(range(9, CHUNKS))
    assert max(map(len, tasks)) == 5


def test_nobody_is_sure_of_a_damaged_chunk_or_of_those_before(
    pool: Pool, verified: threading.Semaphore
) -> None:
    damaged = CHUNKS - 4
    pool.slots[damaged].flip(LAYOUT.payload_offset + 40)

    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None
        wait_for(verified, CHUNKS - 1)
        for first in range(1, damaged + 1):
            assert not rest.is_sure(first)
        until_sure(rest, damaged + 1)

    play(pool, script)


def test_nobody_is_sure_of_a_slot_with_another_chunk(pool: Pool, verified: threading.Semaphore) -> None:
    pool.slots[-1].flip(30)

    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None
        wait_for(verified, CHUNKS - 1)
        assert not rest.is_sure(CHUNKS - 1)

    play(pool, script)


def test_nothing_is_handed_over_to_a_busy_engine(pool: Pool) -> None:
    def busy(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is None

    def busy_by_now(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None
        until_sure(rest, 1)
        copies.engine_idle = False
        assert not rest.is_sure(1)

    play(pool, busy, idle=False)
    play(pool, busy_by_now)


def test_what_the_copies_have_passed_is_not_verified(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the memory stays mapped until nobody reads it."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    seen: list[int] = []

    def slow(copies: DeviceCopies, chunks: Sequence[Chunk]) -> bool:
        seen.append(chunks[0].key[0])
        begun.release()
        assert gate.wait(SOON_S) and pool.in_use
        return True

    monkeypatch.setattr(DeviceCopies, "_are_good", slow)
    monkeypatch.setattr(device_copies, "_VERIFYING_THREADS", 2)

    def script(copies: DeviceCopies, rest: Rest | None) -> None:
        assert rest is not None
        wait_for(begun, 2)
        assert not rest.is_sure(CHUNKS - 3)
        threading.Timer(0.1, gate.set).start()

    play(pool, script)
    assert set(seen) <= {CHUNKS - 3, CHUNKS - 2, CHUNKS - 1}


def test_without_a_gpu_the_message_says_what_is_missing() -> None:
    program = (
        "from kvstrata.connector.device_copies import open_pipes\n"
        "from kvstrata.core.errors import KVStrataError\n"
        "from kvstrata.cuda_ext.native import EngineCache, PlaneView\n"
        "from tests.cuda_ext.cases import layout_of\n"
        "cache = EngineCache(16, 10, (PlaneView(0, 0, 0, 128, 2),) * 4)\n"
        "try:\n"
        "    open_pipes(layout_of(1, (64, 64), 'bfloat16', 32), cache, 0, 1 << 20)\n"
        "except KVStrataError as error:\n"
        "    print(error)\n"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join([str(REPO), *sys.path])}
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert any(advice in said for advice in ("NVIDIA driver", "CUDA_VISIBLE_DEVICES", "nvcc")), said
