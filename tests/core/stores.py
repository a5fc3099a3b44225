"""A planner in the hands of a test: its pool grows at once, its clients number their calls themselves."""

from __future__ import annotations

import itertools

from kvstrata.core.audit import audit
from kvstrata.core.events import (
    Action,
    ClientGone,
    ClientOpened,
    ClientResumed,
    ClientStopped,
    GrowPool,
    GrowthFailed,
    Match,
    Matched,
    Refused,
    SegmentAdded,
    SegmentRegistered,
    Tick,
    Update,
    Updated,
    Why,
)
from kvstrata.core.planner import Limits, Planner
from kvstrata.core.slots import Slot

SLOT = 64  # bytes; what they hold does not matter here


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def keys(*numbers: int) -> tuple[bytes, ...]:
    return tuple(key(number) for number in numbers)


class Store:
    """A planner with `slots` slots in segments of `per_segment`."""

    def __init__(self, slots: int = 8, per_segment: int = 4, **limits: float) -> None:
        self.planner = Planner(Limits(slots * SLOT, per_segment * SLOT, **limits))  # type: ignore[arg-type]
        self.now = 0.0
        self.can_grow = True
        self.slow = False  # what is asked for is left to the test to make
        self.asked: list[GrowPool] = []
        self._segments = itertools.count()

    def step(self, event: object) -> list[Action]:
        """Feed one event; make segments that are asked for; the audit must find nothing."""
        answers = []
        for action in self.planner.step(event, self.now):  # type: ignore[arg-type]
            if isinstance(action, GrowPool):
                self.asked.append(action)
                if not self.slow:
                    self.planner.step(self._grown(action), self.now)
            else:
                answers.append(action)
        assert audit(self.planner) == []
        return answers

    def _grown(self, action: GrowPool) -> SegmentAdded | GrowthFailed:
        if not self.can_grow:
            return GrowthFailed()
        return SegmentAdded(next(self._segments), action.nbytes, action.slot_bytes)

    def engine(self, name: str = "engine", slot_bytes: int = SLOT, workers: int = 1) -> Engine:
        """An engine whose workers register every segment."""
        engine = Engine(self, name, slot_bytes, workers)
        assert engine.open() == []
        engine.register_all()
        return engine

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.step(Tick())

    @property
    def free(self) -> int:
        return sum(len(segment.free) for segment in self.planner.slots.segments.values())

    @property
    def total(self) -> int:
        return sum(segment.total for segment in self.planner.slots.segments.values())


class Engine:
    """One client that never loses an answer."""

    def __init__(self, store: Store, name: str, slot_bytes: int, workers: int) -> None:
        self.store, self.name, self.slot_bytes, self.workers = store, name, slot_bytes, workers
        self.seq = 0
        self.numbers = itertools.count(1)
        self.leases: set[int] = set()
        self.jobs: dict[int, bytes] = {}

    def open(self) -> list[Action]:
        return self.store.step(ClientOpened(self.name, (self.slot_bytes,), self.workers))

    def register_all(self) -> None:
        for segment in list(self.store.planner.slots.segments):
            for rank in range(self.workers):
                self.store.step(SegmentRegistered(self.name, rank, segment))

    def match(self, *numbers: int) -> list[Slot]:
        """Lease a prefix; the lease is the last number in `leases`."""
        answer = self.ask(*numbers)
        assert isinstance(answer, Matched), answer
        return list(answer.slots)

    def ask(self, *numbers: int) -> Action:
        self.seq += 1
        lease = next(self.numbers)
        (answer,) = self.store.step(Match(self.name, self.seq, lease, keys(*numbers)))
        if isinstance(answer, Matched) and answer.slots:
            self.leases.add(lease)
        return answer

    def tell(
        self,
        reserve: tuple[int, ...] = (),
        committed: tuple[int, ...] = (),
        aborted: tuple[int, ...] = (),
        released: tuple[int, ...] = (),
        corrupt: tuple[bytes, ...] = (),
        used: tuple[tuple[bytes, ...], ...] = (),
    ) -> list[Slot | Why]:
        """An Update; `reserve` are key numbers, `jobs` knows the granted ones afterwards."""
        self.seq += 1
        for job in (*committed, *aborted):
            self.jobs.pop(job, None)
        self.leases -= set(released)
        asked = [(next(self.numbers), key(number), self.slot_bytes) for number in reserve]
        event = Update(
            client=self.name,
            seq=self.seq,
            reserve=tuple(asked),
            committed=committed,
            aborted=aborted,
            released=released,
            corrupt=corrupt,
            used=used,
            leases_held=len(self.leases),
            jobs_held=len(self.jobs),
        )
        answer = self.store.step(event)[0]
        if isinstance(answer, Refused):
            return [answer.why]
        assert isinstance(answer, Updated)
        self.jobs |= {
            job: wanted
            for (job, wanted, _), grant in zip(asked, answer.grants, strict=True)
            if isinstance(grant, Slot)
        }
        return list(answer.grants)

    def reserve(self, *numbers: int) -> list[Slot | Why]:
        return self.tell(reserve=numbers)

    def save(self, *numbers: int) -> None:
        """Reserve and commit; every chunk must be granted."""
        before = set(self.jobs)
        grants = self.reserve(*numbers)
        self.register_all()  # the pool may have grown
        assert all(isinstance(grant, Slot) for grant in grants), grants
        self.tell(committed=tuple(set(self.jobs) - before))

    def resume(self) -> None:
        self.store.step(ClientResumed(self.name))

    def stop(self) -> None:
        self.store.step(ClientStopped(self.name))

    def die(self) -> None:
        self.store.step(ClientGone(self.name))
