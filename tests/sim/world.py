"""One simulated host: its engines, its node store, and the misfortunes that a seed brings."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvstrata.core.catalogue import State
from kvstrata.core.events import Action, Event, Refused, Updated, Why
from kvstrata.core.planner import Limits, Planner
from tests.sim.clock import Clock
from tests.sim.engine import SimEngine
from tests.sim.memory import CELL
from tests.sim.network import Network
from tests.sim.store import SimStore

SLOT_SIZES = (2 * CELL, 3 * CELL)
RUN_S = 12.0
QUIET_S = 60.0
CLAIM_DEADLINE_S = 2.0


@dataclass(frozen=True)
class Run:
    """What became of one seed."""

    seed: int
    wrong: list[str]  # every broken promise, as sentences
    seen: Counter[str]
    trace: list[tuple[Any, ...]]


class World:
    def __init__(self, seed: int, planner: type[Planner] = Planner) -> None:
        self.clock = Clock(seed)
        self.random = self.clock.random
        self.network = Network(self.clock)
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.quiet = False
        self.documents = self.random.randint(2, 4)
        self.document_chunks = self.random.randint(3, 7)
        self._planner_type = planner
        self._names, self._epochs = itertools.count(1), itertools.count(1)
        slots = self.random.choice([8, 12, 16, 24, 48])
        self._limits = Limits(
            pool_bytes=slots * SLOT_SIZES[0] + self.random.choice([0, CELL]),
            segment_bytes=self.random.choice([4, 6, 8]) * SLOT_SIZES[0],
            claim_deadline_s=CLAIM_DEADLINE_S,
        )
        self._sizes = SLOT_SIZES if self.random.random() < 0.25 else SLOT_SIZES[:1]
        self.engines: list[SimEngine] = []
        self.store = self._new_store()
        for _ in range(self.random.randint(2, 3)):
            self._start_engine()
        self.clock.after(self.random.uniform(0, 2), self._misfortune)

    def note(self, event: Event, action: Action) -> None:
        """Count what a run has seen, so that a test can tell whether it has seen enough."""
        if isinstance(action, Refused):
            self.seen[f"refused_{action.why.value}"] += 1
        elif isinstance(action, Updated):
            self.seen.update(f"refused_{grant.value}" for grant in action.grants if isinstance(grant, Why))

    # --- what happens ------------------------------------------------------------------------

    def _new_store(self) -> SimStore:
        epoch = next(self._epochs).to_bytes(8, "big")
        return SimStore(self, self._planner_type(self._limits), epoch)

    def _start_engine(self) -> None:
        name = f"engine{next(self._names)}"
        size = self.random.choice(self._sizes)
        blocks = self.random.choice([24, 32, 64])
        self.engines.append(SimEngine(self, name, size, self.random.choice([1, 2]), blocks))

    def _misfortune(self) -> None:
        if self.quiet:
            return
        kinds = {
            self._crash: 4,
            self._stop: 4,
            self._restart_store: 1,
            self._break_connection: 1,
            self._flip_bits: 3,
            self._leave: 1,
        }
        happens = self.random.choices(list(kinds), list(kinds.values()))[0]
        self.seen[happens.__name__.strip("_")] += 1
        happens()
        self.clock.after(self.random.expovariate(1.0), self._misfortune)

    def _crash(self) -> None:
        """kill -9: the store hears of it in its own time, and last when no device works for it any more."""
        if self.engines:
            engine = self.engines.pop(self.random.randrange(len(self.engines)))
            self._end(engine, killed=True)

    def _leave(self) -> None:
        """An orderly end: what was begun is finished, then every process says bye."""
        if self.engines:
            engine = self.engines.pop(self.random.randrange(len(self.engines)))
            engine.process.alive = False
            for worker in engine.workers:
                worker.drop_queue()
            self._bye(engine)

    def _bye(self, engine: SimEngine) -> None:
        if any(worker.copy is not None for worker in engine.workers):
            self.clock.after(0.01, lambda: self._bye(engine))
        else:
            self._end(engine, killed=False)

    def _end(self, engine: SimEngine, killed: bool) -> None:
        engine.process.alive = False
        store = self.store
        seconds = max([worker.kill() for worker in engine.workers])
        heard = self.random.uniform(0, seconds + 0.01)
        self.clock.after(heard, lambda: store.run(lambda: store.disconnected(engine.name)))
        gone = max(heard, seconds + self.random.uniform(0, 0.05))
        self.clock.after(gone, lambda: store.run(lambda: store.gone(engine.name)))
        if not self.quiet:
            self.clock.after(self.random.uniform(0, 2), self._start_engine)

    def _stop(self) -> None:
        """SIGSTOP, of the whole engine or of some of its processes; often past every deadline."""
        if not self.engines:
            return
        engine = self.random.choice(self.engines)
        processes = [engine.process, *engine.workers]
        stopped = processes if self.random.random() < 0.6 else [self.random.choice(processes)]
        seconds = self.random.choice([0.3, 2.0, 4.0, 6.0])
        for process in stopped:
            process.stopped = True
            self.clock.after(seconds, process.go_on)

    def _restart_store(self) -> None:
        """The store is gone with all its books; who maps its segments keeps them."""
        self.store.alive = False
        self.store = self._new_store()

    def _break_connection(self) -> None:
        """The store hangs up on a process of a living engine, which comes back."""
        if self.engines:
            engine = self.random.choice(self.engines)
            end = self.random.choice([engine.client, *engine.workers])
            if self.store.hang_up(engine.name, end.rank):
                end.side_broke()

    def _flip_bits(self) -> None:
        cells = list(self.store.memory.contents)
        if cells:
            self.store.memory.flip(self.random.choice(cells))

    # --- the run -----------------------------------------------------------------------------

    def run(self) -> None:
        self.clock.run(until=RUN_S)
        self.quiet = True
        self.network.faulty = False
        for engine in self.engines:
            for process in (engine.process, *engine.workers):
                if process.stopped:
                    process.go_on()
        self.clock.run(until=RUN_S + QUIET_S, finished=self._at_rest)
        self._check_at_rest()

    def _at_rest(self) -> bool:
        alive = {engine.name for engine in self.engines}
        return set(self.store.planner.clients) <= alive and all(engine.at_rest for engine in self.engines)

    def _check_at_rest(self) -> None:
        """Nothing leaks: once nobody wants anything, everything but what is stored is free."""
        planner = self.store.planner
        for engine in self.engines:
            if not engine.at_rest:
                self.wrong.append(f"{engine.name} does not come to rest: {engine.requests}, {engine.outbox}")
        for client in planner.clients.values():
            if client.leases or client.jobs:
                self.wrong.append(f"{client.id} still holds {client.leases} {client.jobs}")
        for entry in planner.catalogue:
            if entry.state is not State.READY or entry.readers:
                self.wrong.append(f"{entry.key!r} is {entry.state.value} with {entry.readers} readers")
        used = sum(segment.used for segment in planner.slots.segments.values())
        if used != len(planner.catalogue):
            self.wrong.append(f"{used} slots in use for {len(planner.catalogue)} chunks")
        self.seen.update(planner.counters)


def replay(seed: int, planner: type[Planner] = Planner) -> Run:
    """Run the host that `seed` describes. The same seed is the same run, event by event."""
    world = World(seed, planner)
    world.run()
    return Run(seed, world.wrong, world.seen, world.trace)
