"""Hundreds of simulated hosts, each with its own misfortunes: no wrong KV, nothing leaks, books are right.

A failure names its seed; `replay(seed)` runs it again, event by event.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import REPO
from tests.sim.world import Run, replay

SEEDS = 150

# What a run of all seeds must have met, or it proves little.
SEEN_AT_LEAST = {
    # engines
    "loaded_tokens": 10_000,
    "saved_chunks": 4000,
    "unpackable": 500,
    "flushed": 100,
    "handed_over": 100,
    "aborted_when_handed_over": 5,
    "preempted": 100,
    "slept": 1000,
    "aborted_at_once": 50,  # by the one who had woken the engine
    "aborted_while_loading": 20,
    "reset_while_loading": 10,
    "new_weights": 30,
    "gave_back_and_queues": 200,  # leases that were too old
    "slow_lookups": 30,
    "lost_matches": 80,
    "lost_updates": 200,
    "failed_loads": 80,
    "failed_saves": 80,
    "corrupt_chunks": 50,
    "asked_in_peace": 100,
    # the host
    "crash": 200,
    "killed_while_copying": 20,
    "stop": 200,
    "leave": 50,
    "restart_store": 50,
    "break_connection": 50,
    # the store
    "committed_chunks": 4000,
    "evicted_chunks": 2000,
    "overdue_slots": 200,
    "late_commits": 30,
    "reclaimed_claims": 200,
    "refused_full": 300,
    "refused_not_ready": 100,
    "refused_quarantine": 10,
    "refused_stale": 30,
    "refused_stopped": 5,
    "refused_unknown_client": 30,
}


def fingerprint(run: Run) -> str:
    return hashlib.blake2b(repr((run.trace, run.wrong, run.seen)).encode()).hexdigest()


def test_no_seed_breaks_a_promise() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        print(f"tests.sim.world.replay({seed})")  # shown if it raises something
        run = replay(seed)
        seen += run.seen
        assert not run.wrong, f"tests.sim.world.replay({seed}): " + "\n".join(run.wrong[:5])
    rare = {name: seen[name] for name, least in SEEN_AT_LEAST.items() if seen[name] < least}
    assert not rare, f"too rare to prove anything: {rare}"


@pytest.mark.parametrize("seed", [3, 1_000_003])
def test_a_seed_is_the_same_run_every_time(seed: int) -> None:
    assert fingerprint(replay(seed)) == fingerprint(replay(seed))
    assert fingerprint(replay(seed)) != fingerprint(replay(seed + 1))


def test_a_seed_is_the_same_run_in_another_process() -> None:
    """Not even the order of a set of strings, which every process draws anew, may decide anything."""
    seeds = range(10)
    program = (
        "from tests.sim.test_replay import fingerprint, replay\n"
        f"print(*(fingerprint(replay(seed)) for seed in {seeds}))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env={
            "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
            "PYTHONPATH": str(REPO),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert elsewhere.split() == [fingerprint(replay(seed)) for seed in seeds]
