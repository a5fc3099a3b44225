"""A worker process: computes steps, and copies between blocks and slots, one at a time, loads before saves.

On a device a copy that was begun goes on without its process: it ends on time while the process is
stopped, and even when it was killed. On a CPU it stands still with it. A load on a device may be handed
over while its last chunk is being copied; steps that compute then come after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvstrata.connector.jobs import ChunkCopy, LoadJob, Report, SaveJob
from kvstrata.connector.vllm.metadata import WorkDone
from tests.sim.blocks import TORN, DeviceCache
from tests.sim.clock import Process
from tests.sim.memory import Memory, Range
from tests.sim.requests import Results, Step

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine
    from tests.sim.store import SimStore

STEP_S = 0.03
IDLE_STEP_S = 0.01
FAILING = 0.004  # share of copies that cannot be begun
SLOW = 0.05  # share of copies that take long
UNUSABLE = 0.02  # share of segments that cannot be mapped at first


@dataclass
class Copy:
    """One chunk on its way; `until`: when it ends, if nothing stops it."""

    memory: Memory
    where: Range
    writes: bool
    until: float


class SimWorker(Process):
    def __init__(self, engine: SimEngine, rank: int, blocks: int) -> None:
        super().__init__(engine.world.clock)
        self.engine, self.rank = engine, rank
        self.side = ("worker", rank)  # who it is on the side socket
        self.store: SimStore | None = None  # whose side socket it is connected to
        self.copy: Copy | None = None
        self.cache = DeviceCache(blocks)
        self._mapped: dict[tuple[bytes, int], Memory] = {}
        self._unmapped: set[bytes] = set()  # stores whose connection broke once
        self._steps: deque[Step] = deque()
        self._step: Step | None = None
        self._awaited: set[int] = set()  # flushed saves, or loads handed over, that the step comes after
        self._verified: int | None = None  # the load whose last chunk is being copied, and sure to be right
        self._handed_over: set[int] = set()
        self._loads: deque[LoadJob] = deque()
        self._saves: dict[int, SaveJob] = {}
        self._requests: dict[int, tuple[str, LoadJob]] = {}
        self._running: int | None = None  # the job whose copy is under way
        self._reports: list[Report] = []
        self._connect()

    @property
    def idle(self) -> bool:
        return self._running is None and not (self._loads or self._saves or self._step)

    # --- segments ----------------------------------------------------------------------------

    def _connect(self) -> None:
        """Follow the store that is running, as a worker's side thread does."""
        store = self.engine.world.store
        if self.store is not store:
            self.side_broke()
            self.store = store
            store.hello(self.engine, self.side)
        self.later(0.5, self._connect)

    def side_broke(self) -> None:
        """What that store has offered is unmapped, until it offers it again."""
        if self.store is not None:
            self._unmapped.add(self.store.epoch)
            self._mapped = {at: memory for at, memory in self._mapped.items() if at[0] != self.store.epoch}
        self.store = None

    def offered(self, store: SimStore, segment: int) -> None:
        def mapped() -> None:
            if self.store is not store:
                return
            faulty = self.engine.world.network.faulty
            usable = not faulty or self.clock.random.random() > UNUSABLE
            if usable:
                self._mapped[store.epoch, segment] = store.memory
            answer = store.registered if usable else store.unusable
            store.run(partial(answer, self.engine.name, self.rank, segment))

        self.later(self.clock.random.uniform(0.001, 0.4), mapped)

    # --- steps -------------------------------------------------------------------------------

    def execute(self, step: Step) -> None:
        self._steps.append(step)
        self._next_step()

    def _next_step(self) -> None:
        if self._step is None and self._steps:
            step = self._step = self._steps.popleft()
            self._saves.update((save.job, save) for save in step.work.saves)
            self._awaited = {job for job in step.work.flush if job in self._saves or job == self._running}
            self.engine.world.seen["flushed"] += bool(self._awaited)
            self._awaited |= self._followed(step)
            if self._awaited:
                self._next()
            else:
                self._compute(step)

    def _followed(self, step: Step) -> set[int]:
        """Loads that were handed over and have not ended yet: what the step computes comes after them."""
        under_way = {self._running} if self._running is not None else set()
        return under_way & self._handed_over if step.scheduled else set()

    def _compute(self, step: Step) -> None:
        """What the step overwrites is copied: the loads and the forward pass begin."""
        for request_id, load in step.work.loads:
            self._requests[load.job] = (request_id, load)
            self._loads.append(load)
        self._next()
        for part in step.scheduled:
            self.cache.put(part.blocks, part.start, [TORN] * len(part.contents))
        usual = STEP_S if step.scheduled else IDLE_STEP_S
        self.later(usual * self.clock.random.uniform(0.5, 1.5), partial(self._computed, step))

    def _computed(self, step: Step) -> None:
        for part in step.scheduled:
            self.cache.put(part.blocks, part.start, part.contents)
        for part in step.scheduled:
            if part.admitted and not self.cache.holds(part.blocks, part.truth, part.start):
                who = f"{self.engine.name}/{self.rank}"
                self.engine.world.wrong.append(f"{who} starts {part.request.request_id} on wrong KV")
        results = self._results()
        if not step.scheduled and self._verified is not None and self.clock.random.random() < 0.5:
            results.loaded.append(self._hand_over(self._verified))
            self._verified = None
        self.engine.process.run(partial(self.engine.step_ended, step, results))
        self._step = None
        self._next_step()

    def _hand_over(self, job: int) -> str:
        """The request that goes on, unless somebody aborts it just then."""
        self._handed_over.add(job)
        self.engine.world.seen["handed_over"] += 1
        request_id = self._requests[job][0]
        if self.clock.random.random() < 0.1:
            self.engine.world.seen["aborted_when_handed_over"] += 1
            self.engine.abort(self.engine.scheduler.requests[request_id])
        return request_id

    def _results(self) -> Results:
        """What has ended since the last step, as `WorkerConnector` says it."""
        results, done = Results(), WorkDone()
        for report in self._reports:
            if report.job not in self._requests:
                done.saved[report.job] = 1
                if not report.ok:
                    done.unsaved.add(report.job)
                if report.does_not_fit:
                    done.unpackable.add(report.job)
                continue
            request_id, load = self._requests.pop(report.job)
            if report.job not in self._handed_over:
                results.loaded.append(request_id)
            self._handed_over.discard(report.job)
            done.loaded[report.job] = 1
            if not report.ok:
                done.failed_from[report.job] = report.failed_from
                missing = load.chunks[report.failed_from :]
                results.bad_blocks.update(block for chunk in missing for block in chunk.blocks if block >= 0)
            if report.corrupt is not None:
                done.corrupt.add(report.corrupt)
        self._reports.clear()
        results.done = done if done else None
        return results

    # --- jobs --------------------------------------------------------------------------------

    def close(self) -> None:
        """Begin nothing any more."""
        self._loads.clear()
        self._saves.clear()
        self._steps.clear()
        self._awaited.clear()

    def _next(self) -> None:
        if self._running is not None or not self.alive:
            return
        urgent = next((job for job in self._saves if job in self._awaited), None)
        if urgent is not None:
            self._save(self._saves.pop(urgent))
        elif self._loads:
            self._load(self._loads.popleft(), 0)
        elif self._saves:
            self._save(self._saves.pop(next(iter(self._saves))))

    def _ended(self, report: Report) -> None:
        self._running = self._verified = None
        if report.job in self._handed_over and not report.ok:
            self.engine.world.late_mismatch(self.engine)
            return
        self._reports.append(report)
        if report.job in self._awaited:
            self._awaited.discard(report.job)
            if not self._awaited and self._step is not None:
                self._compute(self._step)
        self._next()

    def _save(self, job: SaveJob) -> None:
        world, blocks = self.engine.world, job.chunk.blocks
        whole = self.cache.read(blocks) == world.meaning[job.chunk.key]
        versions = self.cache.versions(blocks)
        fits = not self._packed(job.chunk) or job.chunk.key[0] % 2 == 0
        world.seen["unpackable"] += not fits

        def ended(copy: Copy) -> None:
            right = whole and versions == self.cache.versions(blocks)
            copy.memory.end_write(copy.where, job.chunk.key if right and fits else None)
            if not right and job.job not in self.engine.forsaken:
                world.wrong.append(f"{self._name(job.job)} saved other bytes than its chunk's")

        self._running = job.job
        report = Report(job.job, ok=fits, does_not_fit=not fits)
        if not self._begin(job.epoch, job.chunk, True, ended, lambda: self._ended(report)):
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
            if good:
                self.cache.put(chunk.blocks, 0, meant)

        def next_chunk() -> None:
            if good:
                self._load(job, index + 1)
            else:
                self._ended(Report(job.job, ok=False, failed_from=index, corrupt=chunk.key))

        self._running = job.job
        meant = self.engine.world.meaning[chunk.key]
        self.cache.put(chunk.blocks, 0, [TORN] * len(meant))
        memory = self._mapped.get((job.epoch, chunk.segment))
        began = memory.begin_read(self._range(chunk)) if memory else []
        too_late = self.clock.now > job.expires
        if too_late or not self._begin(job.epoch, chunk, False, ended, next_chunk):
            self._ended(Report(job.job, ok=False, failed_from=index))
        elif memory is not None and self.engine.device_copies and index == len(job.chunks) - 1:
            self._verified = job.job if memory.is_good(self._range(chunk), chunk.key) else None

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
        if memory is None and epoch not in self._unmapped:
            self.engine.world.wrong.append(f"{self._name(0)} got a slot in a segment that it has not mapped")
        random, faulty = self.clock.random, self.engine.world.network.faulty
        if memory is None or (faulty and random.random() < FAILING):
            return False
        slow = faulty and random.random() < SLOW
        seconds = random.uniform(0.1, 2.0) if slow else random.uniform(0.0005, 0.01)
        copy = self.copy = Copy(memory, self._range(chunk), writes, self.clock.now + seconds)
        if writes:
            memory.begin_write(copy.where, self._name(chunk.offset))

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

    def _packed(self, chunk: ChunkCopy) -> bool:
        sizes = self.engine.slot_sizes
        return len(sizes) > 1 and chunk.nbytes == min(sizes)

    def _range(self, chunk: ChunkCopy) -> Range:
        engine = self.engine
        return Range.of(chunk.segment, chunk.offset, chunk.nbytes, self.rank, len(engine.workers))

    def _name(self, job: int) -> str:
        return f"{self.engine.name}/{self.rank} (job {job}) at {self.clock.now:.4f}"
