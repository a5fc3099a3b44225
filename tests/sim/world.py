"""One simulated host: its engines, its node store, and the misfortunes that a seed brings."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from kvstrata.connector import store_link
from kvstrata.connector.vllm import scheduler
from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.core.catalogue import State
from kvstrata.core.events import Action, Event, Refused, Updated, Why
from kvstrata.core.planner import Limits, Planner
from tests.sim.blocks import Truth
from tests.sim.client import SimClient
from tests.sim.clock import Clock
from tests.sim.engine import CHUNK_TOKENS, SimEngine
from tests.sim.memory import CELL
from tests.sim.network import Network
from tests.sim.scheduler import Traits
from tests.sim.store import SimStore
from tests.sim.worker import SimWorker

SLOT_SIZES = (2 * CELL, 3 * CELL)
RUN_S = 12.0
QUIET_S = 60.0
CALM_S = 6.0  # until the last weights are read and the last segments are mapped
CLAIM_DEADLINE_S = 2.0


@dataclass(frozen=True)
class Run:
    """What became of one seed."""

    seed: int
    wrong: list[str]  # every broken promise, as sentences
    seen: Counter[str]
    trace: list[tuple[Any, ...]]


class World:
    def __init__(self, seed: int, planner: type[Planner], connector: type[SchedulerConnector]) -> None:
        self.clock = Clock(seed)
        self.random = self.clock.random
        self.network = Network(self.clock)
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.quiet = False
        self.truth = Truth()
        self.meaning: dict[bytes, tuple[int, ...]] = {}  # of each key: the KV of its tokens
        self._weights = itertools.count(1000)  # weights that are only one engine's have larger numbers
        begin = [self.random.randrange(1000) for _ in range(CHUNK_TOKENS)]
        self.documents = [self._document(begin) for _ in range(self.random.randint(2, 6))]
        self._planner_type, self._connector_type = planner, connector
        self._names, self._epochs = itertools.count(1), itertools.count(1)
        slots = self.random.choice([8, 12, 16, 24, 48])
        self._limits = Limits(
            pool_bytes=slots * SLOT_SIZES[0] + self.random.choice([0, CELL]),
            segment_bytes=self.random.choice([4, 6, 8]) * SLOT_SIZES[0],
            claim_deadline_s=CLAIM_DEADLINE_S,
        )
        self._sizes = SLOT_SIZES if self.random.random() < 0.25 else SLOT_SIZES[:1]
        self._packs = self.random.random() < 0.4
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

    def _document(self, begin: list[int]) -> list[int]:
        """Some begin alike, and then go different ways."""
        tokens = [self.random.randrange(1000) for _ in range(self.random.randint(20, 56))]
        return begin + tokens[len(begin) :] if self.random.random() < 0.5 else tokens

    def new_weights(self) -> int:
        return next(self._weights)

    # --- what happens ------------------------------------------------------------------------

    def _new_store(self) -> SimStore:
        epoch = next(self._epochs).to_bytes(8, "big")
        return SimStore(self, self._planner_type(self._limits), epoch)

    def _start_engine(self) -> None:
        name = f"engine{next(self._names)}"
        size = self.random.choice(self._sizes)
        sizes: tuple[int, ...] = (size, size + CELL) if self._packs else (size,)
        if self._packs and self.random.random() < 0.2:
            sizes = sizes[::-1]  # it packs nothing itself
        traits = Traits.draw(self.random)
        self.engines.append(SimEngine(self, name, sizes, traits, self._connector_type))

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
            self._reset: 2,
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

    def late_mismatch(self, engine: SimEngine) -> None:
        """KV that was handed over came damaged: the engine ends itself before anybody sees an answer."""
        self.seen["late_mismatch"] += 1
        if engine in self.engines:
            self.engines.remove(engine)
            self._end(engine, killed=True)

    def _leave(self) -> None:
        """An orderly end: what was begun is finished, then every process says bye."""
        if self.engines:
            engine = self.engines.pop(self.random.randrange(len(self.engines)))
            engine.process.alive = False
            for worker in engine.workers:
                worker.close()
            self._bye(engine)

    def _bye(self, engine: SimEngine) -> None:
        if any(worker.copy is not None for worker in engine.workers):
            self.clock.after(0.01, lambda: self._bye(engine))
        else:
            self._end(engine, killed=False)

    def _end(self, engine: SimEngine, killed: bool) -> None:
        engine.process.alive = False
        engine.close()
        store = self.store
        seconds = max([worker.kill() for worker in engine.workers])
        heard = self.random.uniform(0, seconds + 0.01)
        self.clock.after(heard, lambda: store.run(lambda: store.disconnected(engine)))
        gone = max(heard, seconds + self.random.uniform(0, 0.05))
        self.clock.after(gone, lambda: store.run(lambda: store.gone(engine)))
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
        self.seen.update(self.store.planner.counters)
        self.store = self._new_store()

    def _break_connection(self) -> None:
        """The store hangs up on a process of a living engine, which comes back."""
        if self.engines:
            engine = self.random.choice(self.engines)
            ends: list[SimClient | SimWorker] = [engine.client, *engine.workers]
            end = self.random.choice(ends)
            if self.store.hang_up(engine.name, end.side):
                end.side_broke()

    def _reset(self) -> None:
        if self.engines:
            self.random.choice(self.engines).reset()

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
        if not self.wrong:
            self.clock.run(until=self.clock.now + CALM_S)
            for engine in self.engines:
                self._check_works(engine)
        self.seen.update(self.store.planner.counters)
        for engine in self.engines:
            engine.close()

    def _at_rest(self) -> bool:
        alive = {engine.name for engine in self.engines}
        return set(self.store.planner.clients) <= alive and all(engine.at_rest for engine in self.engines)

    def _check_at_rest(self) -> None:
        """Nothing leaks: once nobody wants anything, everything but what is stored is free."""
        planner = self.store.planner
        for engine in self.engines:
            if not engine.at_rest:
                self.wrong.append(f"{engine.name} does not come to rest: {engine.scheduler.requests}")
        for client in planner.clients.values():
            if client.leases or client.jobs:
                self.wrong.append(f"{client.id} still holds leases {[*client.leases]}, jobs {[*client.jobs]}")
        for entry in planner.catalogue:
            if entry.state is not State.READY or entry.readers:
                self.wrong.append(f"{entry.key!r} is {entry.state.value} with {entry.readers} readers")
        used = sum(segment.used for segment in planner.slots.segments.values())
        if used != len(planner.catalogue):
            self.wrong.append(f"{used} slots in use for {len(planner.catalogue)} chunks")

    def _check_works(self, engine: SimEngine) -> None:
        """Whatever has happened before: what an engine computes in peace it loads when it is asked again."""
        client = self.store.planner.clients[engine.name]
        segments = [self.store.planner.slots.segments[segment] for segment in client.usable]
        for size in client.slot_sizes:
            if sum(segment.total for segment in segments if segment.slot_bytes == size) < 3:
                return
        script = [self.random.randrange(1000) for _ in range(3 * CHUNK_TOKENS + 2)]
        before = engine.loaded_tokens
        # Of two slot sizes one may need a segment of the other's, with some of the chunks in it.
        for _ in range(2 if len(client.slot_sizes) == 1 else 4):
            engine.ask(script)
            self.clock.run(until=self.clock.now + QUIET_S, finished=self._at_rest)
        self.seen["asked_in_peace"] += 1
        if engine.loaded_tokens < before + 3 * CHUNK_TOKENS:
            self.wrong.append(f"{engine.name} does not find what it has computed in peace")


def replay(
    seed: int,
    planner: type[Planner] = Planner,
    connector: type[SchedulerConnector] = SchedulerConnector,
) -> Run:
    """Run the host that `seed` describes. The same seed is the same run, event by event."""
    world = World(seed, planner, connector)
    with (
        patch.multiple(scheduler, time=world.clock, _USED_EVERY=2),
        patch.multiple(store_link, time=world.clock, _UNANSWERED_MAX=4),
    ):
        world.run()
    return Run(seed, world.wrong, world.seen, world.trace)
