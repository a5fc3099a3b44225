"""Engines that never rest, that ask a lot at once, or that were refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvstrata.controller.cli_node import stop
from kvstrata.controller.client import NodeClient
from kvstrata.core.events import Match, Update, Why
from kvstrata.core.slots import Slot
from tests.controller.stores import MIB, Engine, RunningStore, config_for, key, wait_for

StartStore = Callable[..., RunningStore]
StartEngine = Callable[..., Engine]


def test_a_busy_engine_that_was_hung_up_on_comes_back(node_store: StartStore, engines: StartEngine) -> None:
    """It is never idle: an Update goes out as soon as the one before it is answered."""
    store = node_store()
    engine = engines(store.config, "busy")
    engine.reserve(key(24))
    side = engine.client._side
    assert side is not None
    side._sock.send(b"not a message")
    wait_for("the store to hang up", lambda: (store.engine(engine.name) or {}).get("stopped"))

    def served() -> bool:
        (grant,) = busy_update(engine, key(25))
        return isinstance(grant, Slot)

    wait_for("it to be served again", served, 5.0)
    engine.update(committed=list(engine.jobs))
    assert len(getattr(engine.match(key(24)), "slots", ())) == 1


def busy_update(engine: Engine, wanted: bytes) -> list[Slot | Why]:
    """An Update whose answer may get lost with the connection."""
    job = engine.number()
    call = Update(engine.name, engine.client.next_seq(), reserve=((job, wanted, engine.slot_bytes),))
    engine.client.post(engine.session(), call)
    while (got := engine.client.collect(5.0)) is not None and got[1] is not call:
        pass
    grants = list(getattr(got and got[2], "grants", [Why.OTHER]))
    if isinstance(grants[0], Slot):
        engine.jobs[job] = wanted
    return grants


def test_who_waits_for_answers_sees_the_store_s_end_at_once(
    node_store: StartStore, engines: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.controller.client.node._IDLE_CHECK_S", 60.0)
    store = node_store()
    engine = engines(store.config, "idle")
    engine.save(key(1))  # from here on the client's thread waits for the next call, not for the store
    store.kill()
    wait_for("the end of the session", lambda: engine.client.collect(0.01) or engine.client.session is None)
    assert engine.client.session is None


def test_waiting_at_a_side_socket_s_end_is_waiting(
    node_store: StartStore, engines: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's thread may be slow to notice: the engine's must not spin until it does."""
    store = node_store()
    engine = engines(store.config, "patient")
    engine.save(key(1))
    monkeypatch.setattr(NodeClient, "_side_alive", lambda self: True)
    waits: list[float] = []
    wait = engine.client._wait

    def counted(timeout_s: float) -> None:
        waits.append(timeout_s)
        wait(timeout_s)

    monkeypatch.setattr(engine.client, "_wait", counted)
    store.kill()
    since, busy_since = time.monotonic(), time.thread_time()
    assert engine.client.collect(0.5) is None
    assert time.monotonic() - since >= 0.5
    assert len(waits) <= 5
    assert time.thread_time() - busy_since < 0.1
    assert engine.client.session is not None, "or the thread has noticed, and this shows nothing"


def test_a_question_that_is_answered_soon_keeps_the_gil(
    node_store: StartStore, engines: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lets go of it waits 5 ms for a thread that computes, as vLLM's do when requests come in."""
    monkeypatch.setattr("kvstrata.controller.client.node._SPIN_S", 5.0)
    engine = engines(node_store().config, "crowded")
    engine.save(key(1))
    waits: list[float] = []
    monkeypatch.setattr(engine.client, "_wait", waits.append)
    for _ in range(20):
        assert len(getattr(engine.match(key(1)), "slots", ())) == 1
    assert waits == []
    assert engine.client.collect(0.01) is None, "there is no question under way any more"
    assert waits


def test_an_engine_that_was_refused_does_not_keep_the_store(node_store: StartStore) -> None:
    """It has other settings, goes on asking, and its user has to end the store."""
    store = node_store()
    other = config_for(store.paths.folder, host={"size": 32 * MIB, "segment_size": 32 * MIB})
    refused = Engine(other, "other settings")
    wait_for("it to be refused", lambda: refused.troubles)
    assert "kvstrata node --stop" in refused.troubles[0]
    stop(store.paths, force=False)
    assert not store.running
    refused.close()


@pytest.mark.parametrize("keys", [760, 1500])
def test_a_burst_of_long_hits_is_answered(node_store: StartStore, engines: StartEngine, keys: int) -> None:
    """More questions, and longer answers, than sockets hold, and nobody reads between them."""
    store = node_store(host={"size": 16 * MIB, "segment_size": 16 * MIB})
    engine = engines(store.config, "burst", slot_bytes=4096)
    document = [key(1000 + i) for i in range(keys)]
    engine.reserve(document[0])
    assert all(isinstance(grant, Slot) for grant in engine.update(reserve=document[1:]))
    engine.update(committed=list(engine.jobs))
    session = engine.session()
    for _ in range(32):
        lease = engine.number()
        engine.client.post(session, Match(engine.name, engine.client.next_seq(), lease, tuple(document)))
    found = []
    while len(found) < 32 and (got := engine.client.collect(5.0)):
        found.append(len(getattr(got[2], "slots", ())))
    assert found == [keys] * 32
    assert engine.client.session == session
