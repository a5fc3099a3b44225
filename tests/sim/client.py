"""The scheduler side's way to the store: Updates one at a time with a deadline, questions beside them.

A model of `kvstrata.controller.client.NodeClient`, with its face and the clock of the simulation. What
the real one does on a thread happens here while the scheduler side waits, or just looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstrata.controller.client import Answer, Call, Lost, Session
from kvstrata.core.events import Action, GrowPool, Match, Refused, Why
from kvstrata.core.lives import SCHEDULER, ProcessId

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine
    from tests.sim.store import SimStore

CALL_DEADLINE_S = 1.0
_LOOK_S = 5e-6  # between two looks at `session` the client's thread may have changed it


class SimClient:
    def __init__(self, engine: SimEngine) -> None:
        self._engine, self._process = engine, engine.process
        self.client = engine.name
        self.slot_sizes = engine.slot_sizes
        self.side: ProcessId = SCHEDULER  # who it is on the side socket
        self._session: Session | None = None
        self._answers: deque[tuple[Session, Call, Answer]] = deque()
        self._seq = 0
        self._store: SimStore | None = None
        self._calls: deque[tuple[Session, Call]] = deque()
        self._waiting: object | None = None  # of the call that is under way
        self._questions: dict[int, tuple[Session, Match, float]] = {}  # by lease: when asked
        self._connection = object()  # another one after each hello
        self._arrival = 0.0  # of the last question at the store: they come in order
        self._connect()
        self._process.later(1.0, self._check_side)

    # --- the caller's side -------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        self._process.spend(_LOOK_S)
        return self._session

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def post(self, session: Session, call: Call) -> None:
        if isinstance(call, Match):
            self._ask(session, call)
            return
        self._calls.append((session, call))
        self._send_next()

    def collect(self, wait_s: float = 0.0) -> tuple[Session, Call, Answer] | None:
        if wait_s > 0 and not self._answers:
            self._process.spend(wait_s, lambda: bool(self._answers))
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        """Nothing to do: the world says bye for its engines."""

    # --- for the simulation ------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Connected to the store that is running, with no call under way."""
        connected = self._session is not None and self._session.epoch == self._engine.world.store.epoch
        return connected and self._waiting is None and not self._calls and not self._questions

    def side_broke(self) -> None:
        """The store has closed the connection; an idle client notices within a second."""
        self._store = None

    # --- sessions ----------------------------------------------------------------------------

    def _connect(self) -> None:
        store = self._engine.world.store
        if self._store is not store:
            self._lose_questions()
            store.hello(self._engine, SCHEDULER)
            self._store, self._connection = store, object()
        self._request(
            lambda: store.open(self._engine), lambda opened: self._opened(store, opened), self._lost
        )

    def _opened(self, store: SimStore, opened: object) -> None:
        if opened and self._store is store:
            self._session = Session(store.epoch)
            self._send_next()
        else:
            self._lost()

    def _lost(self) -> None:
        """The call failed: so do all that wait, and there is no session for a while."""
        self._session = None
        while self._calls:
            self._answers.append((*self._calls.popleft(), Lost()))
        self._process.later(self._engine.world.clock.random.uniform(0.2, 1.0), self._connect)

    def _check_side(self) -> None:
        alive = self._store is not None and self._store.alive
        oldest = next(iter(self._questions.values()), None)
        overdue = oldest is not None and self._process.clock.now - oldest[2] > CALL_DEADLINE_S
        if not alive or overdue:
            self._lose_questions()
        if (not alive or overdue) and self._session is not None and self._waiting is None:
            self._lost()
        self._process.later(1.0, self._check_side)

    # --- questions: in order, lost only with their connection ---------------------------------

    def _ask(self, session: Session, call: Match) -> None:
        clock, store, connection = self._process.clock, self._store, self._connection
        if store is None or store.epoch != session.epoch:
            self._answers.append((session, call, Lost()))
            return
        self._questions[call.lease] = session, call, clock.now
        luck = clock.random.random() if self._engine.world.network.faulty else 1.0
        slowest = 2.5 if luck < 0.01 else 0.2 if luck < 0.05 else 5e-4
        self._arrival = max(self._arrival, clock.now + clock.random.uniform(5e-5, slowest))

        def deliver() -> None:
            if store.alive and store.hears(self._engine.name, SCHEDULER) and connection is self._connection:
                answer = _only(store.apply(replace(call, seq=0)))
                clock.after(
                    clock.random.uniform(5e-5, 5e-4), lambda: self._process.run(lambda: arrived(answer))
                )

        def arrived(answer: object) -> None:
            if self._questions.pop(call.lease, None) is not None:
                self._answers.append((session, call, answer))  # type: ignore[arg-type]

        clock.after(self._arrival - clock.now, lambda: store.run(deliver))

    def _lose_questions(self) -> None:
        self._engine.world.seen["lost_matches"] += len(self._questions)
        for session, call, _ in self._questions.values():
            self._answers.append((session, call, Lost()))
        self._questions.clear()

    # --- calls -------------------------------------------------------------------------------

    def _send_next(self) -> None:
        if self._waiting is not None or self._session is None or not self._calls:
            return
        session, call = self._calls.popleft()
        store = self._store
        if session.epoch != self._session.epoch or store is None:
            self._answers.append((session, call, Lost()))
            self._send_next()
            return

        def answered(answer: object) -> None:
            self._answers.append((session, call, answer))  # type: ignore[arg-type]
            if answer == Refused(Why.UNKNOWN_CLIENT):
                self._lost()  # the store wants to be told again who asks
            self._send_next()

        def lost() -> None:
            self._answers.append((session, call, Lost()))
            self._engine.world.seen["lost_updates"] += 1
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
