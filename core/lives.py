"""Which processes of each engine are connected to the node store, and what follows from that for its slots.

An engine, here a client, is one scheduler process and its workers. A process whose connection ends may still
be copying; only when it has exited, or said that it copies no more, is it done:

                arrived         ended
    (not there) ───────► OPEN ─────────► BROKEN      done, from any state: DONE
                          ▲                │
                          └──── arrived ───┘
"""

from __future__ import annotations

import enum

from kvstrata.core.events import ClientGone, ClientResumed, ClientStopped, Event, WorkerDisconnected

ProcessId = tuple[str, int]  # role, "scheduler" or "worker", and rank

SCHEDULER: ProcessId = ("scheduler", 0)


class Life(enum.Enum):
    """See the drawing above."""

    OPEN = "open"
    BROKEN = "broken"
    DONE = "done"


class Lives:
    """The processes of every client. Each change returns the planner's events, in their order."""

    def __init__(self) -> None:
        self._clients: dict[str, dict[ProcessId, Life]] = {}
        self._opened: set[str] = set()

    @property
    def opened(self) -> set[str]:
        """Clients that are served: their scheduler side has introduced itself, and was not refused."""
        return self._opened & set(self._clients)

    @property
    def serves(self) -> bool:
        """Whether a process of a client that is served is connected."""
        return any(Life.OPEN in self._clients[client].values() for client in self.opened)

    def is_open(self, client: str, process: ProcessId) -> bool:
        """Whether that process is connected."""
        return self._clients.get(client, {}).get(process) is Life.OPEN

    def open(self, client: str) -> None:
        """It is served from now on."""
        self._opened.add(client)

    def arrived(self, client: str, process: ProcessId) -> list[Event]:
        """It has connected. If it was connected before, that connection has ended now at the latest."""
        events = self.ended(client, process)
        processes = self._clients.setdefault(client, {})
        processes[process] = Life.OPEN
        if all(life is Life.OPEN for life in processes.values()):
            events.append(ClientResumed(client))
        return events

    def ended(self, client: str, process: ProcessId) -> list[Event]:
        """Its connection is over: nothing more is granted, and what it may be copying stays."""
        if not self.is_open(client, process):
            return []
        self._clients[client][process] = Life.BROKEN
        role, rank = process
        stopped: list[Event] = [ClientStopped(client)]
        return stopped + ([WorkerDisconnected(client, rank)] if role == "worker" else [])

    def done(self, client: str, process: ProcessId) -> list[Event]:
        """It copies no more: it said so, or it has exited. When all have, the client is gone."""
        events = self.ended(client, process)
        processes = self._clients.get(client, {})
        if process not in processes:
            return []
        processes[process] = Life.DONE
        if all(life is Life.DONE for life in processes.values()):
            del self._clients[client]
            self._opened.discard(client)
            events.append(ClientGone(client))
        return events
