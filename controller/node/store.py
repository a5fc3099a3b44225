"""The node store's heart: feeds events to the planner and carries out what it answers."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvstrata.controller.node.questions import answer_packet
from kvstrata.controller.node.side_server import SideServer
from kvstrata.controller.paths import RuntimePaths, group_id
from kvstrata.core.audit import audit
from kvstrata.core.catalogue import State
from kvstrata.core.config import AUTO, Config
from kvstrata.core.events import Action, Event, GrowPool, GrowthFailed, SegmentAdded, Tick
from kvstrata.core.planner import Limits, Planner
from kvstrata.core.units import format_size
from kvstrata.storage_backends.host import HostPool

log = logging.getLogger("kvstrata.node")

_TICK_S = 1.0


class NodeStore:
    """One host's pool, catalogue and clients. Everything runs on one event loop but pre-faulting."""

    def __init__(
        self,
        config: Config,
        paths: RuntimePaths,
        pool_bytes: int,
        still_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """`still_ours` tells whether the runtime folder has not been taken away meanwhile."""
        self.config = config
        self.still_ours = still_ours
        self.epoch = secrets.token_bytes(8)
        self.pool = HostPool()
        self.planner = Planner(_limits(config, pool_bytes), config.host.policy)
        gid = group_id(config.node.group) if config.node.group else None
        self.side = SideServer(
            paths.side,
            self.epoch,
            self.apply,
            self._segments,
            mode=0o660 if config.node.group else 0o600,
            gid=gid,
            answer=lambda client, question: answer_packet(self.apply, client, question),
        )
        self.ending = asyncio.Event()
        self._growth: asyncio.Task[None] | None = None
        self._stop_growth = False

    def apply(self, event: Event) -> list[Action]:
        """Feed one event; carry out what concerns the store itself, return the answers."""
        answers: list[Action] = []
        for action in self.planner.step(event, time.monotonic()):
            if isinstance(action, GrowPool):
                self._growth = asyncio.get_running_loop().create_task(self._grow(action))
                self._growth.add_done_callback(_log_fault)
            else:
                answers.append(action)
        return answers

    async def run(self) -> None:
        """Serve until told to end or until nobody has been connected for `node.idle_exit`."""
        self.side.start()
        idle_since = time.monotonic()
        try:
            while not self.ending.is_set():
                self.apply(Tick())
                self.side.offer_segments()
                if not self.still_ours():
                    log.error("the runtime folder was removed or taken over: ending")
                    break
                if self.side.lives.serves:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > self.config.node.idle_exit:
                    log.info("no client for %.0f s: ending", self.config.node.idle_exit)
                    break
                try:
                    await asyncio.wait_for(self.ending.wait(), _TICK_S)
                except asyncio.TimeoutError:
                    continue
        finally:
            self._stop_growth = True
            if self._growth is not None:
                await asyncio.wait([self._growth])
            self.side.close(unlink=self.still_ours())
            self.pool.close()

    async def _grow(self, action: GrowPool) -> None:
        outcome: Event = GrowthFailed()  # whatever happens: the planner asks for nothing before it knows
        try:
            segment = await asyncio.to_thread(
                self.pool.make_segment, action.nbytes, lambda: self._stop_growth
            )
            log.info("host pool: segment %d of %s", segment, format_size(action.nbytes))
            outcome = SegmentAdded(segment, action.nbytes, action.slot_bytes)
        except OSError as error:
            log.error("the host pool stays at %s: %s", format_size(self.pool.nbytes), error)
        finally:
            self.apply(outcome)
        self.side.offer_segments()

    def _segments(self) -> list[tuple[int, int, int]]:
        return [
            (segment.id, segment.nbytes, self.pool.descriptor(segment.id))
            for segment in self.planner.slots.segments.values()
        ]

    def problems(self) -> list[str]:
        """What `kvstrata check` reports: contradictions in the books, empty when there are none."""
        return audit(self.planner)

    def stats(self) -> dict[str, Any]:
        """Sizes and counters as plain data."""
        planner = self.planner
        states = {state.value: 0 for state in State}
        sizes: Counter[int] = Counter()
        for entry in planner.catalogue:
            states[entry.state.value] += 1
            sizes[entry.slot.nbytes] += 1
        return {
            "pid": os.getpid(),
            "epoch": self.epoch.hex(),
            "pool": {
                "configured_bytes": planner.limits.pool_bytes,
                "made_bytes": planner.pool_bytes,
                "segments": len(planner.slots.segments),
                "slots": sum(segment.total for segment in planner.slots.segments.values()),
                "slots_free": sum(len(segment.free) for segment in planner.slots.segments.values()),
            },
            "chunks": states,
            "chunks_by_slot_bytes": {str(nbytes): count for nbytes, count in sorted(sizes.items())},
            "clients": [
                {
                    "id": client.id,
                    "stopped": client.stopped,
                    "leases": len(client.leases),
                    "jobs": len(client.jobs),
                    "overdue_slots": planner.overdue_slots(client),
                    "usable_segments": len(client.usable),
                }
                for client in planner.clients.values()
            ],
            "counters": dict(planner.counters),
        }


def _log_fault(growth: asyncio.Task[None]) -> None:
    """An error that `_grow` does not expect would be seen by nobody."""
    if not growth.cancelled() and (error := growth.exception()):
        log.error("the host pool could not grow", exc_info=error)


def _limits(config: Config, pool_bytes: int) -> Limits:
    segment = config.host.segment_size
    if segment == AUTO:
        segment = (1 << 30) if pool_bytes >= (16 << 30) else min(256 << 20, pool_bytes // 4)
    return Limits(pool_bytes=pool_bytes, segment_bytes=min(segment, pool_bytes))
