"""An engine: its scheduler side steps through requests as `connector/vllm/scheduler.py` does.

The books are the real ones. Requests are prefixes of a few documents; one chunk is two blocks, and a
block knows which half of which chunk was computed into it last.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from kvstrata.connector.books import Outbox, Save, SaveBook, Stage
from kvstrata.connector.transfer import ChunkCopy, LoadJob, Report
from kvstrata.controller.client import Answer, Lost
from kvstrata.core.events import Match, Matched, Update, Updated
from kvstrata.core.slots import Slot
from tests.sim.client import CALL_DEADLINE_S, SimClient
from tests.sim.clock import Process
from tests.sim.worker import SimWorker

if TYPE_CHECKING:
    from tests.sim.world import World

BLOCKS_A_CHUNK = 2
LOAD_DEADLINE_S = 2.0
STEP_S = 0.03
RUNNING_MAX = 4


class At(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"


@dataclass
class Lookup:
    lease: int
    epoch: bytes
    posted: float
    slots: tuple[Slot, ...] | None = None


@dataclass(eq=False)
class Request:
    keys: list[bytes]
    at: At = At.WAITING
    lookup: Lookup | None = None
    asked: bool = False
    may_load: bool = True
    aborted: bool = False
    computed: int = 0  # chunks
    next_save: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Loading:
    request: Request
    lease: int
    epoch: bytes
    chunks: int
    failed_from: int
    ranks_ended: int = 0


class SimEngine:
    """One life of an engine: a scheduler process and its workers."""

    def __init__(self, world: World, name: str, slot_bytes: int, ranks: int, blocks: int) -> None:
        self.world, self.name, self.slot_bytes = world, name, slot_bytes
        self.random = world.clock.random
        self.device_copies = self.random.random() < 0.5
        self.process = Process(world.clock)
        self.workers: list[SimWorker] = []
        self.client = SimClient(self)
        self.workers += [SimWorker(self, rank) for rank in range(ranks)]
        self.requests: list[Request] = []
        self.saves, self.outbox = SaveBook(), Outbox()
        self._update: Update | None = None
        self._epoch: bytes | None = None
        self._numbers = itertools.count(1)
        self._lookups: dict[int, Request] = {}
        self._unanswered: set[int] = set()  # leases asked for that nobody wants any more
        self._loading: dict[int, Loading] = {}
        self._new_loads: list[LoadJob] = []
        self._free = deque(range(blocks))
        self._contents: list[tuple[bytes, int] | None] = [None] * blocks
        self._versions = [0] * blocks
        self._reports: list[Report] = []
        self._copying: set[tuple[int, int]] = set()  # (rank, job) of saves that the workers have
        self._flushing: set[tuple[int, int]] = set()  # those that the step waits for
        self._to_compute: list[tuple[Request, int]] = []
        self.process.later(STEP_S, self._step)

    @property
    def at_rest(self) -> bool:
        """Nothing is under way and the store has been told everything."""
        busy = self.requests or self._loading or self.saves or self.outbox
        asking = self._update or self._unanswered or self.client.answers
        return self.client.session == self.world.store.epoch and not (busy or asking)

    # --- one step ----------------------------------------------------------------------------

    def _step(self) -> None:
        self._follow(self.client.session)
        self._collect()
        self._take_reports()
        self._arrive()
        taken = self._schedule()
        flush = self._flush_overwritten(taken)
        for request in self.requests:
            self._save_complete(request)
        saves = self.saves.dispatch()
        self._copying |= {(worker.rank, save.job) for worker in self.workers for save in saves}
        self._flushing = {(rank, job) for rank, job in self._copying if job in flush}
        for worker in self.workers if saves or flush else ():
            worker.run(partial(worker.submit, saves=saves, urgent=flush))
        self.world.seen["flushed"] += bool(flush)
        self._send_update()
        if not self._flushing:
            self._compute()

    def _compute(self) -> None:
        """The step's forward pass: from here on the taken blocks hold other bytes."""
        loads, self._new_loads = self._new_loads, []
        for load in loads:
            for chunk in load.chunks:
                self._write_blocks(chunk.blocks, None)
        for worker in self.workers if loads else ():
            worker.run(partial(worker.submit, loads=loads))
        for request, chunk in self._to_compute:
            self._write_blocks(_blocks_of(request, chunk), request.keys[chunk])
        self._to_compute.clear()
        self.process.later(STEP_S * self.random.uniform(0.5, 1.5), self._step)

    def reported(self, rank: int, report: Report) -> None:
        self._reports.append(report)
        self._copying.discard((rank, report.job))
        if (rank, report.job) in self._flushing:
            self._flushing.discard((rank, report.job))
            if not self._flushing:
                self.process.run(self._compute)

    # --- blocks ------------------------------------------------------------------------------

    def source(self, chunk: ChunkCopy) -> bytes | None:
        """The chunk whose KV lies in these blocks; None if it is no whole chunk."""
        held = [self._contents[block] for block in chunk.blocks]
        first = held[0]
        whole = first is not None and held == [(first[0], half) for half in range(BLOCKS_A_CHUNK)]
        return first[0] if whole and first is not None else None

    def block_versions(self, blocks: Iterable[int]) -> list[int]:
        return [self._versions[block] for block in blocks]

    def _write_blocks(self, blocks: Iterable[int], key: bytes | None) -> None:
        for half, block in enumerate(blocks):
            self._contents[block] = None if key is None else (key, half)
            self._versions[block] += 1

    def _allocate(self, request: Request, chunks: int) -> list[int] | None:
        wanted = chunks * BLOCKS_A_CHUNK
        if len(self._free) < wanted:
            return None
        blocks = [self._free.popleft() for _ in range(wanted)]
        request.blocks += blocks
        return blocks

    def _let_blocks_go(self, request: Request) -> None:
        self._free.extend(request.blocks)
        request.blocks = []
        request.computed = 0

    # --- requests ----------------------------------------------------------------------------

    def _arrive(self) -> None:
        if self.world.quiet or len(self.requests) >= 8 or self.random.random() > 0.5:
            return
        document = self.random.randrange(self.world.documents)
        length = self.random.randint(1, self.world.document_chunks)
        keys = [f"{self.slot_bytes}/{document}/{i}".encode().ljust(32, b".") for i in range(length)]
        request = Request(keys)
        self.requests.append(request)
        self._look_up(request)

    def _look_up(self, request: Request) -> None:
        session = self.client.session
        request.asked = True
        if session is None or not request.may_load:
            return
        self._follow(session)
        lease = next(self._numbers)
        request.lookup = Lookup(lease, session, self.world.clock.now)
        self._lookups[lease] = request
        self.client.post(session, Match(self.name, self.client.next_seq(), lease, tuple(request.keys)))

    def _schedule(self) -> list[int]:
        """Move every request on; returns the blocks that this step overwrites."""
        taken: list[int] = []
        for request in list(self.requests):
            if request.at is At.LOADING:
                request.aborted = request.aborted or self.random.random() < 0.01
            elif self.random.random() < 0.01:
                self._end(request)
            elif request.at is At.RUNNING and self.random.random() < 0.02:
                self._preempt(request)
            elif request.at is At.WAITING:
                taken += self._admit(request)
            else:
                taken += self._advance(request)
        return taken

    def _admit(self, request: Request) -> list[int]:
        running = sum(other.at is not At.WAITING for other in self.requests)
        if not request.asked:
            self._look_up(request)
        lookup = request.lookup
        if lookup is not None and lookup.slots is None:
            if self.world.clock.now - lookup.posted < CALL_DEADLINE_S:
                return []
            self._release(request)
            lookup = None
        if running >= RUNNING_MAX:
            return []
        chunks = len(lookup.slots) if lookup and lookup.slots else 0
        blocks = self._allocate(request, chunks)
        if blocks is None:
            return []
        request.at = At.RUNNING
        if chunks and lookup is not None:
            self._start_load(request, lookup)
        return blocks

    def _start_load(self, request: Request, lookup: Lookup) -> None:
        chunks = tuple(
            ChunkCopy(request.keys[i], slot.segment, slot.offset, _blocks_of(request, i))
            for i, slot in enumerate(lookup.slots or ())
        )
        job = next(self._numbers)
        self._new_loads.append(LoadJob(job, lookup.epoch, chunks, lookup.posted + LOAD_DEADLINE_S))
        self._loading[job] = Loading(request, lookup.lease, lookup.epoch, len(chunks), len(chunks))
        del self._lookups[lookup.lease]
        request.lookup, request.at = None, At.LOADING
        self.world.seen["loads"] += 1

    def _advance(self, request: Request) -> list[int]:
        if request.computed == len(request.keys):
            self._end(request)
            return []
        blocks = self._allocate(request, 1)
        if blocks is None:
            self._preempt(self.random.choice([r for r in self.requests if r.at is At.RUNNING]))
            return []
        self._to_compute.append((request, request.computed))
        request.computed += 1
        return blocks

    def _preempt(self, request: Request) -> None:
        self._to_compute = [(other, chunk) for other, chunk in self._to_compute if other is not request]
        self._let_blocks_go(request)
        self._release(request)
        request.at, request.asked = At.WAITING, False

    def _end(self, request: Request) -> None:
        self.requests.remove(request)
        self._release(request)
        self._to_compute = [(other, chunk) for other, chunk in self._to_compute if other is not request]
        self._let_blocks_go(request)
        if request.next_save:
            self.outbox.used.append(tuple(request.keys[: request.next_save]))

    # --- saves -------------------------------------------------------------------------------

    def _save_complete(self, request: Request) -> None:
        if self._epoch is None:
            return
        for chunk in range(request.next_save, request.computed):
            key = request.keys[chunk]
            if key not in self.saves:
                save = Save(next(self._numbers), key, _blocks_of(request, chunk), self._epoch)
                self.saves.want(save)
                self.outbox.reserve.append((save.job, save.key))
        request.next_save = max(request.next_save, request.computed)

    def _flush_overwritten(self, taken: Iterable[int]) -> list[int]:
        flush = []
        for save in self.saves.overwritten(taken):
            if save.stage is Stage.WANTED:
                self._give_up(save)
            else:
                flush.append(save.job)
        return flush

    def _give_up(self, save: Save) -> None:
        self.saves.drop(save.job)
        if (save.job, save.key) in self.outbox.reserve:
            self.outbox.reserve.remove((save.job, save.key))
        else:
            self.outbox.aborted.append(save.job)

    # --- what workers and store say ------------------------------------------------------------

    def _take_reports(self) -> None:
        reports, self._reports = self._reports, []
        for report in reports:
            if report.job in self._loading:
                self._load_ended(self._loading[report.job], report)
            elif save := self.saves.saves.get(report.job):
                save.ranks_ended += 1
                if not report.ok:
                    save.slot = None
                if save.ranks_ended == len(self.workers):
                    self.saves.drop(save.job)
                    if save.epoch == self._epoch:
                        (self.outbox.committed if save.slot else self.outbox.aborted).append(save.job)

    def _load_ended(self, loading: Loading, report: Report) -> None:
        loading.ranks_ended += 1
        if not report.ok:
            loading.failed_from = min(loading.failed_from, report.failed_from)
        if report.corrupt is not None:
            self.outbox.corrupt.append(report.corrupt)
            self.world.seen["corrupt"] += 1
        if loading.ranks_ended < len(self.workers):
            return
        del self._loading[report.job]
        if loading.epoch == self._epoch:
            self.outbox.released.append(loading.lease)
        request = loading.request
        good = request.computed = loading.failed_from
        request.at = At.RUNNING
        for chunk in range(good):
            self._write_blocks(_blocks_of(request, chunk), request.keys[chunk])
        if good < loading.chunks:
            request.may_load = False
            request.next_save = min(request.next_save, good)
            failed = request.blocks[good * BLOCKS_A_CHUNK :]
            request.blocks = request.blocks[: good * BLOCKS_A_CHUNK]
            self._free.extend(failed)
        if request.aborted:
            self._end(request)

    def _collect(self) -> None:
        while self.client.answers:
            epoch, call, answer = self.client.answers.popleft()
            if isinstance(call, Match):
                self._match_answered(epoch, call, answer)
                continue
            if call is self._update:
                self._update = None
            if epoch != self._epoch:
                continue
            if isinstance(answer, Lost):
                self.outbox.take_back(call)
            if isinstance(answer, Updated):
                for (job, _), grant in zip(call.reserve, answer.grants, strict=True):
                    if isinstance(grant, Slot):
                        self.saves.grant(job, grant)
                    else:
                        self.saves.drop(job)
            else:
                for job, _ in call.reserve:
                    self.saves.drop(job)

    def _match_answered(self, epoch: bytes, call: Match, answer: Answer) -> None:
        request = self._lookups.get(call.lease)
        lookup = request.lookup if request else None
        slots = answer.slots if isinstance(answer, Matched) else ()
        self._unanswered.discard(call.lease)
        if request is None or lookup is None or lookup.lease != call.lease or epoch != self._epoch:
            if epoch == self._epoch and (slots or isinstance(answer, Lost)):
                self.outbox.released.append(call.lease)
            return
        lookup.slots = slots
        request.next_save = max(request.next_save, len(slots))
        if not slots:
            del self._lookups[call.lease]
            if isinstance(answer, Lost):
                self.outbox.released.append(call.lease)

    def _release(self, request: Request) -> None:
        lookup, request.lookup = request.lookup, None
        if lookup is None or lookup.lease not in self._lookups:
            return
        del self._lookups[lookup.lease]
        if lookup.epoch == self._epoch:
            if lookup.slots:
                self.outbox.released.append(lookup.lease)
            else:
                self._unanswered.add(lookup.lease)

    def _follow(self, epoch: bytes | None) -> None:
        if epoch is None:
            for save in self.saves.of_other_stores(None):
                self._give_up(save)
            return
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self.outbox.clear()
        self._update = None
        for save in self.saves.of_other_stores(epoch):
            self.saves.drop(save.job)
        for request in list(self._lookups.values()):
            request.lookup = None
        self._lookups.clear()
        self._unanswered.clear()

    def _send_update(self) -> None:
        session = self.client.session
        if session is None or self._update is not None or not self.outbox or session != self._epoch:
            return
        saves = self.saves.saves.values()
        leases = len(self._lookups) + len(self._unanswered)
        leases += sum(loading.epoch == self._epoch for loading in self._loading.values())
        jobs = sum(save.stage is not Stage.WANTED and save.epoch == self._epoch for save in saves)
        self._update = self.outbox.take(self.name, self.client.next_seq(), leases, jobs)
        self.client.post(session, self._update)


def _blocks_of(request: Request, chunk: int) -> tuple[int, ...]:
    return tuple(request.blocks[chunk * BLOCKS_A_CHUNK : (chunk + 1) * BLOCKS_A_CHUNK])
