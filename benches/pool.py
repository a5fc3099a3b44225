"""What a full host pool takes of the host's memory, compared with what was configured.

    python benches/pool.py

A real node store process, and this process in the place of an engine: it asks for slots, maps the
segments, writes every byte and commits, until the pool is full and the store evicts. Shared memory
counts in the RSS of every process that maps it, so the figure is the sum of both processes'
proportional shares (PSS) of the pool's segments. What the node store takes beside its pool is apart.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import Any

from common import keep, node_store, parser

from kvstrata.controller.cli_node import stats
from kvstrata.controller.client import NodeClient, SegmentMap, Session, worker_segments
from kvstrata.controller.paths import RuntimePaths
from kvstrata.controller.results import Figure
from kvstrata.core.config import Config
from kvstrata.core.events import Update, Updated
from kvstrata.core.slots import Slot

POOL_BYTES = 1 << 30
SLOT_BYTES = 5_902_336  # one chunk of SmolLM2-135M: 256 tokens, 30 layers
BATCH = 8
OVERFILL = 1.5  # times the pool that is written, so that slots are evicted and reused
DEADLINE_S = 120.0
CLIENT = "bench/1"
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ .*?(/memfd:kvstrata.*)?$")


def pss_bytes(pid: int) -> tuple[int, int]:
    """Proportional share of a process's memory: (of the pool's segments, of everything else)."""
    pool = other = 0
    of_pool = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            of_pool = found[1] is not None
        elif line.startswith("Pss:"):
            nbytes = int(line.split()[1]) << 10
            pool, other = (pool + nbytes, other) if of_pool else (pool, other + nbytes)
    return pool, other


class Engine:
    """As much of an engine as fills a pool: scheduler side and worker in one process."""

    def __init__(self, config: Config) -> None:
        self._client = NodeClient(config, CLIENT, (SLOT_BYTES,), workers=1)
        self._segments: SegmentMap = worker_segments(config.node, CLIENT, 0)
        self._next = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._segments.close()
        self._client.close()

    def save_some(self) -> int:
        """Reserve, write and commit a few chunks; return how many the store had room for."""
        session = self._session()
        jobs = range(self._next, self._next + BATCH)
        self._next += BATCH
        reserve = tuple((job, job.to_bytes(32, "big"), SLOT_BYTES) for job in jobs)
        answer = self._call(session, reserve=reserve)
        written = []
        for job, grant in zip(jobs, answer.grants, strict=True):
            if isinstance(grant, Slot):
                with self._segments.use(session.epoch, grant.segment) as mapping:
                    assert mapping is not None, "a slot was granted in a segment that is not mapped"
                    ctypes.memset(mapping.address + grant.offset, 0xA5, SLOT_BYTES)
                written.append(job)
        self._call(session, committed=tuple(written))
        return len(written)

    def _session(self) -> Session:
        deadline = time.monotonic() + DEADLINE_S
        while (session := self._client.session) is None:
            if time.monotonic() > deadline:
                raise SystemExit("pool: the node store does not answer")
            time.sleep(0.01)
        return session

    def _call(
        self,
        session: Session,
        reserve: tuple[tuple[int, bytes, int], ...] = (),
        committed: tuple[int, ...] = (),
    ) -> Updated:
        seq = self._client.next_seq()
        self._client.post(session, Update(CLIENT, seq, reserve=reserve, committed=committed))
        got = self._client.collect(DEADLINE_S)
        if got is None or not isinstance(got[2], Updated):
            raise SystemExit(f"pool: the node store answered {got[2] if got else 'nothing'}")
        return got[2]


def fill(engine: Engine, paths: RuntimePaths) -> dict[str, Any]:
    """Write more than the pool holds; return the store's numbers once it is full."""
    deadline = time.monotonic() + DEADLINE_S
    written = 0
    while True:
        written += engine.save_some()
        now = stats(paths)
        full = now["pool"]["made_bytes"] == POOL_BYTES and not now["pool"]["slots_free"]
        if full and written * SLOT_BYTES > OVERFILL * POOL_BYTES:
            return now
        if time.monotonic() > deadline:
            raise SystemExit(f"pool: not full after {DEADLINE_S:.0f} s: {now['pool']}")


def main() -> None:
    options = parser(__doc__, "pool").parse_args()
    with node_store(POOL_BYTES) as node, Engine(node.config) as engine:
        now = fill(engine, node.paths)
        in_node, beside = pss_bytes(node.pid)
        in_engine, _ = pss_bytes(os.getpid())
    figures = [
        Figure("pool.rss_over_configured", round((in_node + in_engine) / POOL_BYTES, 4), "", "<= 1.05"),
        Figure("pool.usable_share", round(now["pool"]["slots"] * SLOT_BYTES / POOL_BYTES, 4)),
        Figure("pool.node_process_mib", round(beside / 2**20, 1), "MiB"),
    ]
    samples = {
        "configured_bytes": POOL_BYTES,
        "slot_bytes": SLOT_BYTES,
        "pool_pss_bytes": {"node_store": in_node, "engine": in_engine},
        "chunks": now["chunks"],
        "counters": now["counters"],
    }
    keep(options.json, "pool", figures, samples)


if __name__ == "__main__":
    main()
