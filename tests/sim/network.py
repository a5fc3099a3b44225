"""The way between an engine and its node store: messages get lost, come late, and overtake each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.clock import Clock


@dataclass
class Network:
    clock: Clock
    faulty: bool = True
    lost: float = 0.003  # share of messages, each way
    late: float = 0.01  # share of messages that take seconds

    def send(self, deliver: Callable[[], None]) -> None:
        """Deliver one message, later or never."""
        random = self.clock.random
        if not self.faulty:
            self.clock.after(0.0005, deliver)
        elif random.random() > self.lost:
            slow = random.random()
            if slow < self.late:
                self.clock.after(random.uniform(0.3, 6.0), deliver)
            elif slow < 0.1:
                self.clock.after(random.uniform(0.001, 0.05), deliver)
            else:
                self.clock.after(random.uniform(0.0001, 0.001), deliver)
