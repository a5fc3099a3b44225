"""A worker process: copies between blocks and slots, one at a time, loads before saves.

On a device a copy that was begun goes on without its process: it ends on time while the process is
stopped, and even when it was killed. On a CPU it stands still with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstrata.connector.transfer import ChunkCopy, LoadJob, Report, SaveJob
from tests.sim.clock import Process
from tests.sim.memory import Memory, Range

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine
    from tests.sim.store import SimStore


@dataclass
class Copy:
    """One chunk on its way; `until`: when it ends, if nothing stops it."""

    memory: Memory
    where: Range
    writes: bool
    until: float


class SimWorker(Process):
    def __init__(self, engine: SimEngine, rank: int) -> None:
        super().__init__(engine.world.clock)
        self.engine, self.rank = engine, rank
        self.store: SimStore | None = None  # whose side socket it is connected to
        self.copy: Copy | None = None
        self._mapped: dict[tuple[bytes, int], Memory] = {}
        self._loads: deque[LoadJob] = deque()
        self._saves: dict[int, SaveJob] = {}
        self._urgent: set[int] = set()
        self._busy = False
        self._connect()

    # --- segments ----------------------------------------------------------------------------

    def _connect(self) -> None:
        """Follow the store that is running, as a worker's side thread does."""
        store = self.engine.world.store
        if self.store is not store:
            self.store = store
            store.hello(self.engine, self.rank)
        self.later(0.5, self._connect)

    def side_broke(self) -> None:
        self.store = None

    def offered(self, store: SimStore, segment: int) -> None:
        def registered() -> None:
            self._mapped[store.epoch, segment] = store.memory
            store.run(lambda: store.registered(self.engine.name, self.rank, segment))

        self.later(self.clock.random.uniform(0.001, 0.4), registered)

    # --- jobs --------------------------------------------------------------------------------

    def submit(
        self, loads: Iterable[LoadJob] = (), saves: Iterable[SaveJob] = (), urgent: Iterable[int] = ()
    ) -> None:
        """`urgent` saves come first: the engine waits for them, to overwrite their blocks."""
        self._loads.extend(loads)
        self._saves.update((save.job, save) for save in saves)
        self._urgent.update(urgent)
        self._next()

    def drop_queue(self) -> None:
        self._loads.clear()
        self._saves.clear()

    def _next(self) -> None:
        if self._busy or not self.alive:
            return
        urgent = next((job for job in self._saves if job in self._urgent), None)
        if urgent is not None:
            self._save(self._saves.pop(urgent))
        elif self._loads:
            self._load(self._loads.popleft(), 0)
        elif self._saves:
            self._save(self._saves.pop(next(iter(self._saves))))

    def _ended(self, report: Report) -> None:
        self._busy = False
        self.engine.reported(self.rank, report)
        self._next()

    def _save(self, job: SaveJob) -> None:
        source = self.engine.source(job.chunk)
        versions = self.engine.block_versions(job.chunk.blocks)

        def ended(copy: Copy) -> None:
            unchanged = versions == self.engine.block_versions(job.chunk.blocks)
            copy.memory.end_write(copy.where, source if unchanged else None)

        begun = self._begin(job.epoch, job.chunk, True, ended, lambda: self._ended(Report(job.job, ok=True)))
        if not begun:
            self._ended(Report(job.job, ok=False))

    def _load(self, job: LoadJob, index: int) -> None:
        if index == len(job.chunks):
            self._ended(Report(job.job, ok=True))
            return
        chunk = job.chunks[index]
        good = True

        def ended(copy: Copy) -> None:
            nonlocal good
            good = copy.memory.end_read(copy.where, chunk.key, began, self._name(job.job))

        def next_chunk() -> None:
            if good:
                self._load(job, index + 1)
            else:
                self._ended(Report(job.job, ok=False, failed_from=index, corrupt=chunk.key))

        memory = self._mapped.get((job.epoch, chunk.segment))
        began = memory.begin_read(self._range(chunk)) if memory else []
        too_late = self.clock.now > job.expires
        if too_late or not self._begin(job.epoch, chunk, False, ended, next_chunk):
            self._ended(Report(job.job, ok=False, failed_from=index))

    # --- one chunk ---------------------------------------------------------------------------

    def _begin(
        self,
        epoch: bytes,
        chunk: ChunkCopy,
        writes: bool,
        ended: Callable[[Copy], None],
        told: Callable[[], None],
    ) -> bool:
        memory = self._mapped.get((epoch, chunk.segment))
        if memory is None:
            self.engine.world.wrong.append(f"{self._name(0)} got a slot in a segment that it has not mapped")
            return False
        random = self.clock.random
        seconds = random.uniform(0.1, 2.0) if random.random() < 0.02 else random.uniform(0.0005, 0.01)
        copy = self.copy = Copy(memory, self._range(chunk), writes, self.clock.now + seconds)
        if writes:
            memory.begin_write(copy.where, self._name(chunk.offset))
        self._busy = True

        def ends() -> None:
            self.copy = None
            ended(copy)
            self.run(told)

        if self.engine.device_copies:
            self.clock.after(seconds, ends)
        else:
            self.later(seconds, ends)
        return True

    def kill(self) -> float:
        """Returns seconds until nothing of it touches memory any more."""
        self.alive = False
        if self.copy is None:
            return 0.0
        self.engine.world.seen["killed_while_copying"] += 1
        if self.engine.device_copies:
            return self.copy.until - self.clock.now
        if self.copy.writes:
            self.copy.memory.break_off(self.copy.where)
        return 0.0

    def _range(self, chunk: ChunkCopy) -> Range:
        engine = self.engine
        return Range.of(chunk.segment, chunk.offset, engine.slot_bytes, self.rank, len(engine.workers))

    def _name(self, job: int) -> str:
        return f"{self.engine.name}/{self.rank} (job {job}) at {self.clock.now:.4f}"
