"""Time and chance. Nothing in a simulated host happens but by way of this clock."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from contextlib import suppress


class Killed(Exception):
    """A process was killed in the middle of something."""


class Clock:
    """Calls in the order of their times; equal times in the order in which they were asked for."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._order = itertools.count()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (self.now + seconds, next(self._order), call))

    def run(self, until: float, finished: Callable[[], bool] = lambda: False) -> None:
        """Let time pass up to `until`, or up to the moment at which `finished` says so.

        A call may itself let time pass: whatever comes due meanwhile happens inside it.
        """
        while self._calls and self._calls[0][0] <= until and not finished():
            self.now, _, call = heapq.heappop(self._calls)
            call()
        self.now = max(self.now, until) if not finished() else self.now

    def monotonic(self) -> float:
        """So that it can take the place of the `time` module."""
        return self.now


class Process:
    """Something that can be stopped (SIGSTOP), go on, and be killed."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.alive = True
        self.stopped = False
        self._put_off: list[Callable[[], None]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Do `call` after `seconds`; once it goes on, if it is stopped by then; never, if it is dead."""
        self.clock.after(seconds, lambda: self.run(call))

    def run(self, call: Callable[[], None]) -> None:
        if self.alive and self.stopped:
            self._put_off.append(call)
        elif self.alive:
            with suppress(Killed):
                call()

    def spend(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """It waits, or computes, up to `seconds`, while everybody else goes on. A stop comes afterwards.

        Raises:
            Killed: somebody has killed it meanwhile.
        """
        self.clock.run(self.clock.now + seconds, enough)
        if not self.alive:
            raise Killed

    def go_on(self) -> None:
        self.stopped = False
        put_off, self._put_off = self._put_off, []
        for call in put_off:
            self.later(0.0, call)
