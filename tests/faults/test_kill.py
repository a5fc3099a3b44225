"""Processes killed under load: no wrong answer, no error to the user, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import CHUNK, Book, EngineError, EngineProcess, Host, tokens, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PREFIXES = [tokens(61 + i, 3 * CHUNK) for i in range(4)]
ROUNDS = 6
SHAPE: dict[str, Any] = {"num_gpu_blocks_override": 96, "max_model_len": 1024}
POOL = {"host": {"size": "32MiB", "segment_size": "16MiB"}}


def prompts(seed: int) -> list[list[int]]:
    """More prefixes than the GPU cache holds, so that every round loads and saves."""
    dice = random.Random(seed)
    return [dice.choice(PREFIXES) + tokens(dice.randrange(1000), 20) for _ in range(10)]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Book]:
    host = Host(tmp_path_factory.mktemp("plain"), tiny_model, tmp_path_factory.mktemp("logs"))
    asked = {(seed, number): one for seed in range(ROUNDS) for number, one in enumerate(prompts(seed))}
    with host.engine(plain=True, **SHAPE) as engine:
        yield Book.write(engine, asked, max_tokens=8)
    host.close()


def begin(engine: EngineProcess, seed: int) -> None:
    engine.send("storm", prompts=prompts(seed), seed=seed, aborts=0.0)


def check(result: dict[str, Any], right: Book, seed: int) -> None:
    assert {int(number) for number in result["finished"]} == set(range(len(prompts(seed))))
    for number, answer in result["finished"].items():
        right.check((seed, int(number)), answer)


def test_the_node_store_is_killed_under_load(host: Host, right: Book) -> None:
    dice = random.Random(1)
    with host.engine(extra=POOL, **SHAPE) as engine:
        killed = 0
        for seed in range(ROUNDS):
            begin(engine, seed)
            time.sleep(dice.uniform(0.0, 0.4))
            os.kill(host.node_pid, signal.SIGKILL)
            killed += 1
            check(engine.receive(), right, seed)
            host.wait_connected(engine)  # a new store was started meanwhile
        loaded = engine.do("loaded_tokens")

        begin(engine, 0)
        check(engine.receive(), right, 0)
        begin(engine, 0)
        check(engine.receive(), right, 0)

        assert killed == ROUNDS
        assert engine.do("loaded_tokens") > loaded  # and it is used again
        engine.do("settle")
        assert set(engine.do("books").values()) == {0}
        host.quiet()


def test_an_engine_is_killed_under_load_beside_another(host: Host, right: Book) -> None:
    dice = random.Random(2)
    with host.engine(extra=POOL, **SHAPE) as survivor:
        victim = host.start(extra=POOL, **SHAPE).ready()
        for seed in range(3):
            host.wait_connected(victim)
            begin(victim, seed)
            begin(survivor, seed)
            time.sleep(dice.uniform(0.1, 0.6))
            victim.kill()
            check(survivor.receive(), right, seed)
            survivor.do("settle")
            wait_for(lambda: len(host.stats()["clients"]) == 1, 10, "the store to notice the death")
            host.quiet()
            if seed < 2:
                victim = host.start(extra=POOL, **SHAPE).ready()
        for seed in range(3):
            begin(survivor, seed)
            check(survivor.receive(), right, seed)
        assert survivor.do("counters")["failed_loads"] == 0
        survivor.do("settle")
        host.quiet()


def claims(host: Host) -> dict[str, int]:
    """Leases and jobs that the store has on its books, by engine."""
    return {client["id"]: client["leases"] + client["jobs"] for client in host.stats()["clients"]}


def stop_with_claims(host: Host, victim: EngineProcess, name: str) -> int:
    """Stop `victim` in the middle of a copy, or between its grant and its report. Returns its claims."""
    victim.process.send_signal(signal.SIGSTOP)
    while not (held := claims(host)[name]):
        victim.process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
        victim.process.send_signal(signal.SIGSTOP)
    return held


def test_a_stopped_engine_keeps_its_slots_until_it_is_gone(host: Host, right: Book) -> None:
    with host.engine(extra=POOL, **SHAPE) as survivor:
        host.wait_connected(survivor)
        others = claims(host)
        victim = host.start(extra=POOL, **SHAPE).ready()
        host.wait_connected(victim)
        (name,) = claims(host).keys() - others.keys()
        begin(victim, 0)
        held = stop_with_claims(host, victim, name)
        for seed in range(3):
            begin(survivor, seed)
            check(survivor.receive(), right, seed)
        assert host.problems() == []
        assert claims(host)[name] >= held

        victim.process.send_signal(signal.SIGCONT)
        try:
            check(victim.receive(), right, 0)
        finally:
            victim.kill()
        wait_for(lambda: len(host.stats()["clients"]) == 1, 10, "the store to notice the death")
        survivor.do("settle")
        host.quiet()


def test_a_killed_engine_leaves_a_warm_cache(host: Host, right: Book) -> None:
    engine = host.start(extra=POOL, **SHAPE).ready()
    host.wait_connected(engine)
    begin(engine, 1)
    check(engine.receive(), right, 1)
    engine.do("settle")
    engine.kill()
    with pytest.raises((EngineError, OSError)):
        engine.do("connected")
    host.quiet()

    with host.engine(extra=POOL, **SHAPE) as restarted:
        begin(restarted, 1)
        check(restarted.receive(), right, 1)
        assert restarted.do("counters")["loaded_tokens"] > 0
