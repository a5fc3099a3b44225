"""Lives and deaths: of engines, seen from the node store, and of the node store itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvstrata.controller.client import Lost, MappedSegment, NodeClient
from kvstrata.core.config import as_tree
from kvstrata.core.events import Match, Matched, Refused, Why
from tests.conftest import REPO
from tests.controller.stores import (
    MIB,
    PATIENCE_S,
    Engine,
    EngineProcess,
    RunningStore,
    config_for,
    exited,
    key,
    wait_for,
)

StartStore = Callable[..., RunningStore]
StartEngine = Callable[..., Engine]
StartProcess = Callable[..., EngineProcess]
SECONDS = 3.0  # "within seconds", with room for a busy machine


def claims(store: RunningStore, name: str) -> tuple[int, int] | None:
    engine = store.engine(name)
    return engine and (engine["leases"], engine["jobs"])


def is_stopped(store: RunningStore, name: str) -> bool:
    engine = store.engine(name)
    return engine is not None and engine["stopped"]


# ------------------------------------------------------------------------------------------ engines


def test_a_killed_engine_holds_nothing_within_seconds(
    shared_store: RunningStore, processes: StartProcess, engines: StartEngine
) -> None:
    engine = processes(shared_store.config, "killed")
    engine.do("save", 1)
    engine.do("match", 1)
    engine.do("reserve", 2, 3)
    assert claims(shared_store, "killed") == (1, 2)
    engine.signal(signal.SIGKILL)
    wait_for("its claims to be freed", lambda: shared_store.engine("killed") is None, SECONDS)
    facts = shared_store.facts()
    assert facts["chunks"] == {"reserved": 0, "ready": 1, "evicting": 0, "quarantined": 0}
    assert shared_store.problems() == []
    heir = engines(shared_store.config, "heir")
    heir.reserve(key(2), key(3))
    answer = heir.match(key(1), key(2))
    assert isinstance(answer, Matched)
    assert len(answer.slots) == 1, "what it stored stays, what it was writing does not"


def test_a_stopped_engine_keeps_its_slots(shared_store: RunningStore, processes: StartProcess) -> None:
    engine = processes(shared_store.config, "stopped")
    engine.do("reserve", 10, 11)
    engine.signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert claims(shared_store, "stopped") == (0, 2)
    assert not is_stopped(shared_store, "stopped")
    engine.signal(signal.SIGCONT)
    assert len(engine.do("save")) == 0  # commits what it had reserved
    assert claims(shared_store, "stopped") == (0, 0)
    assert len(engine.do("match", 10, 11)) == 2


def test_the_end_of_a_connection_stops_grants_and_frees_nothing(
    shared_store: RunningStore, processes: StartProcess, engines: StartEngine
) -> None:
    engine = engines(shared_store.config, "torn")
    engine.reserve(key(20))
    other = processes(shared_store.config, "torn", rank=1)
    other.signal(signal.SIGKILL)  # one of its workers: the engine is no longer whole
    wait_for("the store to notice", lambda: is_stopped(shared_store, "torn"), SECONDS)
    assert engine.update(reserve=[key(21)]) == [Why.STOPPED]
    assert engine.match(key(20)) == Refused(Why.STOPPED)
    assert claims(shared_store, "torn") == (0, 1)
    engine.update(committed=list(engine.jobs))
    assert claims(shared_store, "torn") == (0, 0)
    assert shared_store.problems() == []


def break_connection(store: RunningStore, engine: Engine) -> None:
    """The store hangs up on the engine's worker, which comes back by itself."""
    connection = engine.segments[0]._connection
    assert connection is not None
    connection._sock.send(b"not a message")
    wait_for("the store to hang up", lambda: is_stopped(store, engine.name), SECONDS)


def test_an_engine_whose_worker_comes_back_is_served_again(
    node_store: StartStore, engines: StartEngine
) -> None:
    store = node_store()
    engine = engines(store.config, "returning")
    engine.reserve(key(22))
    break_connection(store, engine)
    assert engine.match(key(22)) == Refused(Why.STOPPED)
    engine.update(committed=list(engine.jobs))
    wait_for("it to be introduced again", lambda: not is_stopped(store, "returning"))
    wait_for("it to map the pool again", lambda: (store.engine("returning") or {}).get("usable_segments"))
    assert engine.match(key(22)) != Matched((), being_written=False)


def test_a_bye_frees_everything_though_a_connection_once_broke(
    node_store: StartStore, engines: StartEngine
) -> None:
    store = node_store()
    engine = engines(store.config, "scarred")
    engine.reserve(key(23))
    break_connection(store, engine)
    worker = engine.segments[0]
    wait_for("the worker to come back", lambda: worker._connection)
    engine.close()
    wait_for("its claims to be freed", lambda: store.engine("scarred") is None, 1.0)


def test_after_bye_nothing_is_held(shared_store: RunningStore, processes: StartProcess) -> None:
    engine = processes(shared_store.config, "polite")
    engine.do("reserve", 30)
    engine.do("match", 1)
    assert engine.do("close") == []
    assert engine.process.poll() is None
    wait_for("its claims to be freed", lambda: shared_store.engine("polite") is None, SECONDS)
    assert shared_store.facts()["chunks"]["reserved"] == 0


def test_an_engine_that_is_closed_in_its_first_moments_leaves_nothing(
    shared_store: RunningStore, engines: StartEngine
) -> None:
    for number in range(24):
        engine = engines(shared_store.config, f"hasty{number}")
        time.sleep(0.002 * (number % 8))
        engine.close()
    wait_for("all to be forgotten", lambda: shared_store.facts()["clients"] == [], SECONDS)


@pytest.mark.parametrize(("questions", "keys"), [(1, 1), (32, 512)])
def test_an_engine_that_is_closed_while_the_store_does_not_answer_leaves_nothing(
    node_store: StartStore, engines: StartEngine, questions: int, keys: int
) -> None:
    """Also where its questions fill the socket, so that nothing more fits in."""
    store = node_store(client={"call_deadline": 0.3})
    engine = engines(store.config, "cut off")
    engine.reserve(key(1))
    os.kill(store.pid, signal.SIGSTOP)
    try:
        asked = tuple(key(1 + i) for i in range(keys))
        for lease in range(questions):
            question = Match("cut off", engine.client.next_seq(), 100 + lease, asked)
            engine.client.post(engine.session(), question)
        assert engine.client.collect(PATIENCE_S) is not None
        engine.close()
    finally:
        os.kill(store.pid, signal.SIGCONT)
    wait_for("its claims to be freed", lambda: store.engine("cut off") is None, SECONDS)


def test_an_engine_is_gone_when_all_its_processes_are(
    shared_store: RunningStore, processes: StartProcess
) -> None:
    engine = processes(shared_store.config, "two")
    worker = processes(shared_store.config, "two", rank=1)
    engine.do("reserve", 40)
    engine.signal(signal.SIGKILL)
    wait_for("the store to notice", lambda: is_stopped(shared_store, "two"), SECONDS)
    assert claims(shared_store, "two") == (0, 1), "its worker may still be copying"
    worker.signal(signal.SIGKILL)
    wait_for("its claims to be freed", lambda: shared_store.engine("two") is None, SECONDS)


def test_two_engines_die_at_once_and_a_third_has_the_pool(
    shared_store: RunningStore, processes: StartProcess, engines: StartEngine
) -> None:
    dying = [processes(shared_store.config, f"dying{number}") for number in range(2)]
    for number, engine in enumerate(dying):
        engine.do("reserve", *range(50 + 3 * number, 53 + 3 * number))
    for engine in dying:
        engine.signal(signal.SIGKILL)
    third = engines(shared_store.config, "third")
    slots = third.reserve(*(key(60 + number) for number in range(8)))
    assert len(set(slots)) == 8
    assert shared_store.problems() == []


# ------------------------------------------------------------------------------- how the store is started


def open_by(pid: int) -> set[str]:
    """What a process holds open; it may close some of it while we look."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(entry))
    return held


STARTER = """
import sys, time
from tests.controller.stores import config_for
from kvstrata.controller.node.launch import start_node
from pathlib import Path
start_node(config_for(Path(sys.argv[1])))
print("started", flush=True)
time.sleep(600)
"""


def test_it_outlives_its_starter_and_the_starter_s_process_group(runtime_dir: Path) -> None:
    store = RunningStore(config_for(runtime_dir))
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(runtime_dir)],
        stdout=subprocess.PIPE,
        cwd=REPO,
        start_new_session=True,
    )
    try:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        store.wait_until_up()
        process = psutil.Process(store.pid)
        assert os.getpgid(store.pid) != os.getpgid(starter.pid)
        assert os.getsid(store.pid) not in (os.getsid(0), os.getsid(starter.pid))
        assert process.ppid() != starter.pid
        os.killpg(starter.pid, signal.SIGKILL)
        starter.wait(timeout=PATIENCE_S)
        assert store.stats() is not None
        assert process.cwd() == "/"
    finally:
        starter.kill()
        starter.wait(timeout=PATIENCE_S)
        starter.stdout.close()  # type: ignore[union-attr]
        store.stop()


def test_it_inherits_no_descriptor_and_no_setting_of_its_starter(runtime_dir: Path) -> None:
    config = config_for(runtime_dir)
    store = RunningStore(config)
    reading, writing = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-m", "kvstrata.controller.node", "--daemon"],
            input=json.dumps(as_tree(config)) + "\n",
            text=True,
            pass_fds=[writing],
            timeout=PATIENCE_S,
            check=True,
        )
        store.wait_until_up()
        os.close(writing)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b"", "somebody still holds the other end"
        held = open_by(store.pid)
        assert os.readlink(f"/proc/self/fd/{reading}") not in held
        assert {"/dev/null", str(store.paths.log), str(store.paths.lock)} <= held
        assert len(psutil.Process(store.pid).cpu_affinity() or ()) == os.cpu_count()
    finally:
        os.close(reading)
        store.stop()


def test_an_engine_s_environment_does_not_reach_it(
    node_store: StartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SOMETHING", "1")
    environment = psutil.Process(node_store().pid).environ()
    assert "VLLM_SOMETHING" not in environment
    assert "PATH" in environment


# ----------------------------------------------------------------------------------- how the store ends


def test_it_ends_when_nobody_has_come_for_a_while(node_store: StartStore, engines: StartEngine) -> None:
    store = node_store(node={"idle_exit": 1})
    pidfd = os.pidfd_open(store.pid)
    engine = engines(store.config, "engine")
    engine.session()
    assert not exited(pidfd, 2.2), "an engine is there"
    engine.close()
    assert exited(pidfd, 10)
    os.close(pidfd)
    assert not store.paths.control.exists()
    assert not store.paths.side.exists()
    assert "no client for 1 s: ending" in store.log


def test_sigterm_ends_it_in_the_middle_of_making_its_pool(
    node_store: StartStore, engines: StartEngine
) -> None:
    store = node_store(host={"size": 1024 * MIB, "segment_size": 1024 * MIB})
    engines(store.config, "engine").session()
    store.stop()
    assert "ended" in store.log
    assert "Traceback" not in store.log


def test_a_folder_is_free_again_after_a_kill(node_store: StartStore) -> None:
    store = node_store()
    first = store.pid
    store.kill()
    assert store.paths.control.exists()
    again = RunningStore.start(store.config)
    assert again.pid != first
    assert again.problems() == []


# ---------------------------------------------------------------------- the engine's side of a store's death


def test_a_killed_store_is_noticed_and_replaced(node_store: StartStore, engines: StartEngine) -> None:
    store = node_store(node={"autostart": True})
    engine = engines(store.config, "engine", workers=2)
    engine.save(key(1))
    old = engine.session()
    first = store.pid
    store.kill()
    wait_for("the engine to notice", lambda: engine.client.session is None, 2.5)
    new = wait_for("a new store", lambda: engine.client.session, 10)
    assert new.epoch != old.epoch
    assert store.pid != first
    engine.jobs.clear()
    engine.reserve(key(2))  # its workers have mapped the new pool
    assert engine.match(key(1)) == Matched((), being_written=False)
    assert store.problems() == []
    assert engine.troubles in (
        [],
        [
            "kvstrata is not used until this changes, every lookup is a miss: "
            "the node store has ended, or hung up on this engine"
        ],
    )


def test_calls_to_a_dead_store_are_lost_not_stuck(node_store: StartStore, engines: StartEngine) -> None:
    store = node_store()
    engine = engines(store.config, "engine")
    session = engine.session()
    store.kill()
    calls = [Match("engine", engine.client.next_seq(), lease, (key(1),)) for lease in range(5)]
    for call in calls:
        engine.client.post(session, call)
    for call in calls:
        answer = engine.client.collect(PATIENCE_S)
        assert answer == (session, call, Lost())


def test_a_store_that_does_not_answer_counts_as_absent_until_it_does(
    node_store: StartStore, engines: StartEngine
) -> None:
    store = node_store(client={"call_deadline": 0.5})
    engine = engines(store.config, "engine")
    engine.save(key(1))
    session = engine.session()
    call = Match("engine", engine.client.next_seq(), 99, (key(1),))
    os.kill(store.pid, signal.SIGSTOP)
    try:
        engine.client.post(session, call)
        assert engine.client.collect(PATIENCE_S) == (session, call, Lost())
        assert engine.client.session is None
    finally:
        os.kill(store.pid, signal.SIGCONT)
    assert engine.session().epoch == session.epoch
    engine.update(released=[99])  # the store may have seen the call after all
    assert claims(store, "engine") == (0, 0)
    assert engine.match(key(1)) != Matched((), being_written=False)


def test_segments_of_a_dead_store_stay_mapped_while_they_are_used(
    node_store: StartStore, engines: StartEngine
) -> None:
    store = node_store()
    engine = engines(store.config, "engine")
    (slot,) = engine.reserve(key(1))
    epoch = engine.session().epoch
    (segments,) = engine.segments

    def mapping() -> MappedSegment | None:
        with segments.use(epoch, slot.segment) as found:
            return found

    with segments.use(epoch, slot.segment) as used:
        assert used is not None
        store.kill()
        wait_for("the engine to notice", lambda: engine.client.session is None, 2.5)
        assert mapping() == used
    wait_for("it to be unmapped", lambda: mapping() is None)


def test_a_store_whose_folder_was_taken_away_ends(node_store: StartStore) -> None:
    store = node_store()
    pid = store.pid
    store.paths.lock.unlink()
    wait_for("the store to end", lambda: not Path(f"/proc/{pid}").exists(), SECONDS)
    assert "taken over" in store.log


def test_a_store_that_another_has_replaced_takes_nothing_of_it_away(node_store: StartStore) -> None:
    store = node_store()
    old = os.pidfd_open(store.pid)
    store.paths.lock.unlink()
    again = RunningStore.start(store.config)
    assert exited(old)
    os.close(old)
    again.wait_until_up()
    assert {path.name for path in again.paths.folder.iterdir()} == {
        "node.lock",
        "node.log",
        "node.sock",
        "side.sock",
    }


def test_an_engine_is_told_when_its_store_does_not_start(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.controller.client.node._START_PATIENCE_S", 0.5)
    (runtime_dir / "node.log").mkdir()  # the daemon cannot open its log
    told: list[str] = []
    config = config_for(runtime_dir, node={"autostart": True})
    client = NodeClient(config, "hopeful", (1 << 20,), 1, told.append)
    wait_for("the engine to be told", lambda: told, SECONDS)
    client.close()
    assert "node.log says why" in told[0]
