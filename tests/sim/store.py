"""The node store process: the real planner, fed and obeyed as `controller/node` does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstrata.core.audit import audit
from kvstrata.core.events import (
    Action,
    ClientOpened,
    Event,
    GrowPool,
    GrowthFailed,
    SegmentAdded,
    SegmentRegistered,
    Tick,
    Update,
)
from kvstrata.core.lives import SCHEDULER, Lives, ProcessId
from kvstrata.core.planner import Planner
from tests.sim.clock import Process
from tests.sim.memory import Memory, Range

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine
    from tests.sim.world import World

TICK_S = 1.0
AGAIN_S = 5.0  # until a segment that a worker could not map is offered again


class SimStore(Process):
    """One life of the node store."""

    def __init__(self, world: World, planner: Planner, epoch: bytes) -> None:
        super().__init__(world.clock)
        self.world, self.planner, self.epoch = world, planner, epoch
        self.memory = Memory(world.wrong)
        self.engines: dict[str, SimEngine] = {}  # that have said hello
        self.lives = Lives()
        self._sent: set[tuple[str, int, int]] = set()  # engine, rank, segment
        self._tick()

    def apply(self, event: Event) -> list[Action]:
        """Feed one event; make segments; note everything; the audit must find nothing."""
        self._note_commits(event)
        actions = self.planner.step(event, self.clock.now)
        self.world.trace.append((self.clock.now, self.epoch, event, actions))
        for problem in audit(self.planner):
            self.world.wrong.append(f"audit: {problem}")
        answers: list[Action] = []
        for action in actions:
            self.world.note(event, action)
            if isinstance(action, GrowPool):
                self.later(self.clock.random.uniform(0.01, 0.3), self._made(action))
            else:
                answers.append(action)
        return answers

    def _made(self, action: GrowPool) -> Callable[[], None]:
        def made() -> None:
            if self.world.network.faulty and self.clock.random.random() < 0.01:
                self.apply(GrowthFailed())
                return
            segment = len(self.planner.slots.segments)
            self.apply(SegmentAdded(segment, action.nbytes, action.slot_bytes))
            self.offer_segments()

        return made

    def _tick(self) -> None:
        before = self._overdue()
        self.apply(Tick())
        self.world.seen["overdue_slots"] += self._overdue() - before
        self.later(TICK_S, self._tick)

    def _note_commits(self, event: Event) -> None:
        """What is about to become visible must have been written."""
        client = self.planner.clients.get(event.client) if isinstance(event, Update) else None
        if client is None or not isinstance(event, Update) or event.seq <= client.seq:
            return
        claims = [client.jobs[job] for job in event.committed if job in client.jobs]
        self.world.seen["late_commits"] += sum(claim.overdue for claim in claims)
        for claim in claims:
            entry, slot = claim.entries[0], claim.entries[0].slot
            where = Range.of(slot.segment, slot.offset, slot.nbytes, 0, 1)
            if not claim.overdue and not self.memory.holds(where, entry.key):
                self.world.wrong.append(f"{event.client} commits {entry.key!r}, which is not in {where}")

    def _overdue(self) -> int:
        return sum(self.planner.overdue_slots(client) for client in self.planner.clients.values())

    # --- side connections: in order, never lost ----------------------------------------------

    def hello(self, engine: SimEngine, process: ProcessId) -> None:
        """A process of an engine has connected, or is back after its connection broke."""
        self.engines[engine.name] = engine
        self._sent = {sent for sent in self._sent if ("worker", sent[1]) != process or sent[0] != engine.name}
        self._apply_all(self.lives.arrived(engine.name, process))
        self.offer_segments()

    def hears(self, name: str, process: ProcessId) -> bool:
        """Whether that connection is open."""
        return self.lives.is_open(name, process)

    def hang_up(self, name: str, process: ProcessId) -> bool:
        """One connection breaks, its process lives. False: there is none."""
        events = self.lives.ended(name, process)
        self._apply_all(events)
        return bool(events)

    def disconnected(self, engine: SimEngine) -> None:
        """All connections of an engine have ended."""
        for process in engine.processes:
            self._apply_all(self.lives.ended(engine.name, process))

    def gone(self, engine: SimEngine) -> None:
        """All processes of an engine have, and no device works for them any more."""
        if self.engines.pop(engine.name, None):
            for process in engine.processes:
                self._apply_all(self.lives.done(engine.name, process))

    def _apply_all(self, events: list[Event]) -> None:
        for event in events:
            self.apply(event)

    def open(self, engine: SimEngine) -> bool:
        """Open comes after the hello: one that arrives when its sender is gone opens nothing."""
        if not self.lives.is_open(engine.name, SCHEDULER):
            return False
        self.apply(ClientOpened(engine.name, engine.slot_sizes, len(engine.workers)))
        self.lives.open(engine.name)
        self.offer_segments()
        return True

    def offer_segments(self) -> None:
        for name in sorted(self.lives.opened):
            for worker in self.engines[name].workers:
                if not self.lives.is_open(name, ("worker", worker.rank)):
                    continue
                for segment in self.planner.slots.segments:
                    if (name, worker.rank, segment) not in self._sent:
                        self._sent.add((name, worker.rank, segment))
                        worker.offered(self, segment)

    def unusable(self, name: str, rank: int, segment: int) -> None:
        def again() -> None:
            self._sent.discard((name, rank, segment))
            self.offer_segments()

        self.later(AGAIN_S, again)

    def registered(self, name: str, rank: int, segment: int) -> None:
        self.apply(SegmentRegistered(name, rank, segment))
