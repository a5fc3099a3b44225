"""An engine: vLLM's busy loop around a real `SchedulerConnector`, its workers, and those who ask it.

It steps only while there is something to do and sleeps otherwise, as vLLM does: nobody but a new
request, an abort or a reset wakes it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.core.config import ClientConfig
from kvstrata.core.keys import KeyChain
from kvstrata.core.lives import ProcessId
from tests.sim.blocks import BLOCK_TOKENS
from tests.sim.client import CALL_DEADLINE_S, SimClient
from tests.sim.clock import Process
from tests.sim.requests import At, Results, SimRequest, Step
from tests.sim.scheduler import SimScheduler, Traits
from tests.sim.worker import SimWorker

if TYPE_CHECKING:
    from tests.sim.world import World

CHUNK_TOKENS = 2 * BLOCK_TOKENS
LOAD_DEADLINE_S = 2.0
LEASE_IDLE_S = LOAD_DEADLINE_S / 2 + 1.1  # how long a request may queue with a lease
REQUESTS_MAX = 12


class SimIdentity:
    """Stands in for `kvstrata.connector.vllm.identity.Identity`; notes what each key means."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self._generation = ""
        self._generations = itertools.count(1)
        self._ready = engine.world.clock.now + engine.random.choice([0.0, 0.0, 1.0])

    def new_generation(self) -> None:
        self._generation = f"{self._engine.name}/{next(self._generations)}"

    def namespace(self, request: SimRequest) -> bytes | None:
        world = self._engine.world
        if world.clock.now < self._ready:
            return None  # the weights are still being read
        name = repr((min(self._engine.slot_sizes), self._generation, request.cache_salt))
        namespace = hashlib.blake2b(name.encode(), digest_size=32).digest()
        for i, key in enumerate(KeyChain(namespace, CHUNK_TOKENS).extend(request.script)):
            meant = tuple(request.truth[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS])
            if world.meaning.setdefault(key, meant) != meant:
                world.wrong.append(f"{request.request_id}: chunk {i} has the key of another KV")
        return namespace

    def extras(self, request: SimRequest, chunk_tokens: int) -> dict[int, bytes]:
        return {}


class SimEngine:
    """One life of an engine: a scheduler process and its workers.

    `slot_sizes`: bytes of a chunk's slot, the usual one first; where there are two, the smaller is packed.
    """

    def __init__(
        self,
        world: World,
        name: str,
        slot_sizes: tuple[int, ...],
        traits: Traits,
        connector: type[SchedulerConnector],
    ) -> None:
        self.world, self.name, self.slot_sizes = world, name, slot_sizes
        self.random = world.clock.random
        self.device_copies = self.random.random() < 0.5
        self.process = Process(world.clock)
        self.workers: list[SimWorker] = []
        self.client = SimClient(self)
        self.workers += [SimWorker(self, rank, traits.blocks) for rank in range(traits.ranks)]
        config = ClientConfig(
            lookup_wait=self.random.choice([0.0, 0.001, 0.001, 0.01]),
            call_deadline=CALL_DEADLINE_S,
            load_deadline=LOAD_DEADLINE_S,
        )
        self.connector = connector(
            cast(Any, self.client),
            cast(Any, SimIdentity(self)),
            CHUNK_TOKENS,
            BLOCK_TOKENS,
            traits.ranks,
            config,
        )
        self.scheduler = SimScheduler(self.connector, traits, self.random, self._judge)
        self._depth = traits.depth
        self._weights = min(slot_sizes)
        self._numbers = itertools.count(1)
        self._input: deque[Callable[[], None]] = deque()
        self._aborts: deque[SimRequest] = deque()
        self._in_flight: deque[Step] = deque()
        self._asleep, self._blocked, self._reset_at_load = False, False, False
        self.forsaken: set[int] = set()  # saves (jobs) that were under way when the memory went
        self._leases: dict[int, tuple[SimRequest, float]] = {}  # of requests that queue, and since when
        self.process.later(0.0, self._turn)
        self._requests_come()

    @property
    def processes(self) -> list[ProcessId]:
        """All that say hello to the store."""
        return [self.client.side, *(worker.side for worker in self.workers)]

    @property
    def at_rest(self) -> bool:
        """It sleeps, and nothing is under way."""
        return self._asleep and self.client.settled and all(worker.idle for worker in self.workers)

    @property
    def loaded_tokens(self) -> float:
        return float(self.connector.stats.data.get("loaded_tokens", 0))

    # --- the busy loop -----------------------------------------------------------------------

    def _turn(self) -> None:
        """Hear what has come and plan a step; wait for the oldest one unless one more may be planned."""
        while self._input:
            self._input.popleft()()
        more = self.scheduler.has_requests()
        if more and len(self._in_flight) < self._depth:
            step = self.scheduler.schedule()
            self._check_leases()
            self._in_flight.append(step)
            if self._reset_at_load and step.work.loads:
                self._reset_at_load = False
                self._input.append(self._reset)
            for worker in self.workers:
                worker.run(partial(worker.execute, step))
            if len(self._in_flight) < self._depth:
                self.process.later(0.0, self._turn)
                return
        if self._in_flight:
            self._blocked = True
            self._end_step()
        elif self._input:
            self.process.later(0.0, self._turn)
        else:
            self._asleep = True
            self.world.seen["slept"] += 1

    def step_ended(self, step: Step, results: Results) -> None:
        """A worker has ended a step."""
        step.results.append(results)
        self._end_step()

    def _end_step(self) -> None:
        """The oldest step is over once all workers have ended it."""
        if self._blocked and len(self._in_flight[0].results) == len(self.workers):
            self._blocked = False
            while self._aborts:
                self._finish(self._aborts.popleft())
            self.scheduler.update(self._in_flight.popleft())
            self.process.later(0.0, self._turn)

    # --- those who ask -----------------------------------------------------------------------

    def wants(self, what: Callable[[], None]) -> None:
        """Put it into the engine's input queue, and wake it."""
        self._input.append(what)
        if self._asleep:
            self._check_sleep()
            self._asleep = False
            self.process.later(0.0, self._turn)

    def _requests_come(self) -> None:
        """Some at once, then none for a while; some of them are aborted later, some at once."""
        if self.world.quiet or not self.process.alive:
            return
        for _ in range(self.random.choice([1, 1, 2, 3, 8])):
            if len(self.scheduler.requests) + len(self._input) < REQUESTS_MAX:
                request, asleep = self._new_request(), self._asleep
                self.wants(partial(self._add, request))
                fate = self.random.random()
                if fate < 0.1:
                    self.world.seen["aborted_at_once"] += asleep
                    self.abort(request)
                elif fate < 0.25:
                    self.world.clock.after(self.random.expovariate(3.0), partial(self.abort, request))
        seconds = self.random.choice([0.05, 0.3, 0.3, 1.5])
        self.world.clock.after(self.random.uniform(0.5, 1.5) * seconds, self._requests_come)

    def _new_request(self) -> SimRequest:
        """A prompt that begins like others, and an answer that is sometimes the document's own next words."""
        document = self.random.choice(self.world.documents)
        shortest = self.random.choice([1, CHUNK_TOKENS, len(document) // 2])
        prompt, answer = self.random.randint(shortest, len(document)), self.random.choice([1, 4, 16])
        script = document[: prompt + answer]
        if self.random.random() < 0.5:
            script = script[:prompt]
        script += [self.random.randrange(1000) for _ in range(prompt + answer - len(script))]
        return SimRequest(
            request_id=f"{self.name}-{next(self._numbers)}",
            script=script,
            prompt=prompt,
            truth=self.world.truth.of(self._weights, script),
            longest=len(script) + self.random.choice([0, 9]),
            cache_salt="salt" if self.random.random() < 0.05 else None,
            skip_reading_prefix_cache=self.random.random() < 0.03,
            resumable=self.random.random() < 0.02,
        )

    def ask(self, script: list[int]) -> None:
        """Compute `script`, of which the engine itself remembers nothing."""
        self.scheduler.pool.forget()
        request = SimRequest(f"{self.name}-{next(self._numbers)}", script, len(script) - 1, [], len(script))
        self.wants(partial(self._add, request))

    def _add(self, request: SimRequest) -> None:
        request.truth = self.world.truth.of(self._weights, request.script)  # they may have changed meanwhile
        self.scheduler.add(request)

    def abort(self, request: SimRequest) -> None:
        self._aborts.append(request)
        self.wants(partial(self._finish, request))

    def _finish(self, request: SimRequest) -> None:
        if request.request_id in self.scheduler.requests:
            self.world.seen["aborted_while_loading"] += request.at is At.LOADING
            self.scheduler.finish(request)

    def reset(self) -> None:
        """Somebody has changed the weights, or only wants the cache forgotten: now, or when a load begins."""
        if self.random.random() < 0.5:
            self.wants(self._reset)
        else:
            self._reset_at_load = True

    def _reset(self) -> None:
        running_too = self.random.random() < 0.5
        loading = any(request.at is At.LOADING for request in self.scheduler.waiting)
        self.world.seen["reset_while_loading"] += loading and not running_too
        if self.scheduler.reset(running_too, self._new_weights):
            self._lose_memory()

    def _lose_memory(self) -> None:
        """As vLLM does it in its own process: an engine sleeps after a reset, whatever is being saved."""
        self.forsaken.update(self.connector._link.saves.saves)
        for worker in self.workers:
            worker.cache.lose()

    def _new_weights(self) -> None:
        self.world.seen["new_weights"] += 1
        self._weights = self.world.new_weights()
        for request in self.scheduler.requests.values():
            request.truth = self.world.truth.of(self._weights, request.script)

    # --- what must hold ----------------------------------------------------------------------

    def _judge(self, request: SimRequest) -> None:
        """A request that was computed to its end stands on its own KV, whatever was copied meanwhile."""
        for worker in self.workers:
            if not worker.cache.holds(request.blocks, request.truth, request.num_tokens - 1):
                self.world.wrong.append(f"{request.request_id} ends on wrong KV on rank {worker.rank}")

    def _check_sleep(self) -> None:
        """An engine that sleeps owes the store nothing: nobody could say when it wakes."""
        client = self.world.store.planner.clients.get(self.name)
        if self.client.settled and client is not None and (client.leases or client.jobs):
            self.world.wrong.append(
                f"{self.name} slept with leases {[*client.leases]}, jobs {[*client.jobs]}"
            )

    def _check_leases(self) -> None:
        """A request that queues keeps no lease for long."""
        now, before = self.world.clock.now, self._leases
        self._leases = {}
        for lookup in self.connector._link.lookups.held_since(math.inf):
            request = cast(SimRequest, self.connector._tracked[lookup.request_id].request)
            self._leases[lookup.lease] = request, before[lookup.lease][1] if lookup.lease in before else now
        given_back = [request for lease, (request, _) in before.items() if lease not in self._leases]
        self.world.seen["gave_back_and_queues"] += sum(r.at is At.WAITING for r in given_back)
        for lease, (request, since) in self._leases.items():
            if now - since > LEASE_IDLE_S:
                self.world.wrong.append(f"{request.request_id} queues with lease {lease} since {since:.4f}")

    def close(self) -> None:
        """Count what it has seen."""
        self.world.seen["preempted"] += self.scheduler.preempted
        self.world.seen.update(self.connector.stats.data)
