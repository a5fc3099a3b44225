"""The scheduler side's way to the store: one call at a time, a deadline, `Lost` instead of an error.

A model of `kvstrata.controller.client.NodeClient`, with the clock of the simulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstrata.controller.client import Answer, Call, Lost
from kvstrata.core.events import Action, GrowPool, Refused, Why
from tests.sim.store import SCHEDULER

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine
    from tests.sim.store import SimStore

CALL_DEADLINE_S = 1.0


class SimClient:
    """`session`: epoch of the store that answers; None while everything is a miss."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine, self._process = engine, engine.process
        self.rank = SCHEDULER
        self.session: bytes | None = None
        self.answers: deque[tuple[bytes, Call, Answer]] = deque()
        self.seq = 0
        self._store: SimStore | None = None
        self._calls: deque[tuple[bytes, Call]] = deque()
        self._waiting: object | None = None  # of the call that is under way
        self._connect()
        self._process.later(1.0, self._check_side)

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def post(self, epoch: bytes, call: Call) -> None:
        self._calls.append((epoch, call))
        self._send_next()

    def side_broke(self) -> None:
        """The store has closed the connection; an idle client notices within a second."""
        self._store = None

    # --- sessions ----------------------------------------------------------------------------

    def _connect(self) -> None:
        store = self._engine.world.store
        if self._store is not store:
            store.hello(self._engine, SCHEDULER)
            self._store = store
        self._request(
            lambda: store.open(self._engine), lambda opened: self._opened(store, opened), self._lost
        )

    def _opened(self, store: SimStore, opened: object) -> None:
        if opened and self._store is store:
            self.session = store.epoch
            self._send_next()
        else:
            self._lost()

    def _lost(self) -> None:
        """The call failed: so do all that wait, and there is no session for a while."""
        self.session = None
        while self._calls:
            self.answers.append((*self._calls.popleft(), Lost()))
        self._process.later(self._engine.world.clock.random.uniform(0.2, 1.0), self._connect)

    def _check_side(self) -> None:
        alive = self._store is not None and self._store.alive
        if not alive and self.session is not None and self._waiting is None:
            self._lost()
        self._process.later(1.0, self._check_side)

    # --- calls -------------------------------------------------------------------------------

    def _send_next(self) -> None:
        if self._waiting is not None or self.session is None or not self._calls:
            return
        epoch, call = self._calls.popleft()
        store = self._store
        if epoch != self.session or store is None:
            self.answers.append((epoch, call, Lost()))
            self._send_next()
            return

        def answered(answer: object) -> None:
            self.answers.append((epoch, call, answer))  # type: ignore[arg-type]
            if answer == Refused(Why.UNKNOWN_CLIENT):
                self._lost()  # the store wants to be told again who asks
            self._send_next()

        def lost() -> None:
            self.answers.append((epoch, call, Lost()))
            self._engine.world.seen["lost_calls"] += 1
            self._lost()

        self._request(lambda: _only(store.apply(call)), answered, lost)

    def _request(
        self, at_store: Callable[[], object], answered: Callable[[object], None], lost: Callable[[], None]
    ) -> None:
        """One RPC to the store that is running now, over the lossy network."""
        store, network = self._engine.world.store, self._engine.world.network
        self._waiting = ticket = object()

        def deliver() -> None:
            if not store.alive or store is not self._engine.world.store:
                return
            answer = at_store()
            network.send(lambda: self._process.run(lambda: arrived(answer)))

        def arrived(answer: object) -> None:
            if self._waiting is ticket:
                self._waiting = None
                answered(answer)

        def overdue() -> None:
            if self._waiting is ticket:
                self._waiting = None
                lost()

        network.send(lambda: store.run(deliver))
        self._process.later(CALL_DEADLINE_S, overdue)


def _only(answers: list[Action]) -> Action:
    (answer,) = answers
    assert not isinstance(answer, GrowPool)
    return answer
