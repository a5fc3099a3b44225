"""A load that fails costs a recompute, once: never an error, a wrong answer, a stall or a leak."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.harness import CHUNK, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = tokens(21, 3 * CHUNK + 50)


def damage_pool(pid: int, step: int = 4096) -> int:
    """Flip a bit in every page of the store's segments; returns how many were flipped."""
    flipped = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            fd = os.open(descriptor, os.O_RDWR) if "memfd:kvstrata" in os.readlink(descriptor) else None
        except FileNotFoundError:  # closed since it was listed
            continue
        if fd is None:
            continue
        for offset in range(0, os.fstat(fd).st_size, step):
            byte = os.pread(fd, 1, offset + 100)
            os.pwrite(fd, bytes([byte[0] ^ 0x10]), offset + 100)
            flipped += 1
        os.close(fd)
    return flipped


def test_damaged_chunks_are_refused_dropped_and_written_anew(host: Host) -> None:
    with host.engine() as engine:
        (cold,) = engine.ask(PROMPT)
        assert engine.do("reset_gpu_cache")
        free = engine.do("free_blocks")
        host.quiet()
        assert damage_pool(host.node_pid)

        started = time.monotonic()
        (recomputed,) = engine.ask(PROMPT)
        took = time.monotonic() - started
        engine.do("settle")
        counters = engine.do("counters")

        assert recomputed["tokens"] == cold["tokens"]
        assert took < 5  # one failed load and one recompute, on an idle engine
        assert counters["failed_loads"] == 1
        assert counters["corrupt_chunks"] == 1
        assert host.quiet()["counters"]["corrupt_chunks"] == 1
        assert engine.do("reset_gpu_cache")
        assert engine.do("free_blocks") == free
        assert set(engine.do("books").values()) == {0}

        # The damaged first chunk was stored again; those after it are found damaged in their turn.
        for healed in (1, 2, 3):
            assert engine.do("reset_gpu_cache")
            (again,) = engine.ask(PROMPT)
            engine.do("settle")
            assert again["tokens"] == cold["tokens"]
            assert engine.do("counters")["failed_loads"] == min(1 + healed, 3)
        host.quiet()


def test_a_store_that_hangs_costs_a_moment_and_no_answer(host: Host) -> None:
    with host.engine(extra={"client": {"call_deadline": "300ms"}}) as engine:
        (cold,) = engine.ask(PROMPT)
        assert engine.do("reset_gpu_cache")
        os.kill(host.node_pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            (first,) = engine.ask(PROMPT)
            took = time.monotonic() - started
            engine.do("settle")
            assert engine.do("reset_gpu_cache")
            (second,) = engine.ask(tokens(22, 3 * CHUNK))
        finally:
            os.kill(host.node_pid, signal.SIGCONT)

        assert first["tokens"] == cold["tokens"]
        assert first["cached"] == second["cached"] == 0
        assert took < 5
        host.wait_connected(engine)
        assert engine.do("reset_gpu_cache")
        (hit,) = engine.ask(PROMPT)
        assert hit["cached"] == 3 * CHUNK
        assert hit["tokens"] == cold["tokens"]
        engine.do("settle")
        host.quiet()
