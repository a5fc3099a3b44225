"""How large a pool may grow: what the machine or a cgroup has. And what fits in as it grows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.controller.client import NodeClient
from kvstrata.controller.node.__main__ import Memory, choose_pool_bytes, memory
from kvstrata.controller.node.launch import start_node
from kvstrata.controller.node.store import NodeStore
from kvstrata.controller.paths import RuntimePaths
from kvstrata.core.config import HostConfig
from kvstrata.core.errors import ConfigError, NodeUnavailable
from kvstrata.core.events import ClientOpened, GrowPool
from tests.controller.stores import MIB, SLOT, Engine, RunningStore, config_for, key, wait_for

GIB = 1 << 30
V1_NO_LIMIT = (1 << 63) - 4096


def machine(root: Path, groups: str = "", **files: str) -> Path:
    """A root folder of a machine with 64 GiB, 48 of them available; `files` lie in sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {48 << 20} kB\nHugePages_Total: 0\n"
    )
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_this_machine_has_memory() -> None:
    has = memory()
    assert 0 < has.available <= has.total


@pytest.mark.parametrize("groups", ["", "0::/\n", "4:memory:/box\n0::/\n"])
def test_without_a_limit_it_is_the_machine_s(tmp_path: Path, groups: str) -> None:
    assert memory(machine(tmp_path, groups)) == Memory(64 * GIB, 48 * GIB)


def test_a_container_has_what_its_cgroup_allows(tmp_path: Path) -> None:
    files = {
        "memory.max": f"{16 * GIB}",
        "memory.current": f"{10 * GIB}",
        "memory.stat": "anon 1\nfile 1\ninactive_file 0\nactive_file 0",
    }
    assert memory(machine(tmp_path, "0::/\n", **files)) == Memory(16 * GIB, 6 * GIB)


def test_a_full_page_cache_is_available(tmp_path: Path) -> None:
    files = {
        "memory.max": f"{16 * GIB}",
        "memory.current": f"{16 * GIB}",
        "memory.stat": f"inactive_file {3 * GIB}\nactive_file {4 * GIB}",
    }
    assert memory(machine(tmp_path, "0::/\n", **files)) == Memory(16 * GIB, 7 * GIB)


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "a/b/c/memory.max": "max",
        "a/b/c/memory.current": "5",
        "a/b/memory.max": f"{8 * GIB}",
        "a/b/memory.current": f"{9 * GIB}",  # as after a limit was lowered
        "a/memory.max": f"{32 * GIB}",
        "a/memory.current": f"{9 * GIB}",
    }
    assert memory(machine(tmp_path, "0::/a/b/c\n", **files)) == Memory(8 * GIB, 0)


def test_the_older_cgroups_count_too(tmp_path: Path) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": f"{8 * GIB}",
        "memory/box/memory.usage_in_bytes": f"{5 * GIB}",
        "memory/box/memory.stat": f"active_file 7\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}",
        "memory/memory.limit_in_bytes": f"{V1_NO_LIMIT}",
        "memory/memory.usage_in_bytes": f"{20 * GIB}",
    }
    root = machine(tmp_path, "9:pids:/\n4:memory:/box\n0::/\n", **files)
    assert memory(root) == Memory(8 * GIB, 5 * GIB)


def test_a_container_may_not_see_where_its_group_lies(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{8 * GIB}",
        "memory/memory.usage_in_bytes": f"{5 * GIB}",
    }
    assert memory(machine(tmp_path, "4:memory:/docker/4f2a\n", **files)) == Memory(8 * GIB, 3 * GIB)


def test_left_out_it_is_a_quarter_of_what_is_available() -> None:
    assert choose_pool_bytes(HostConfig(), Memory(64 * GIB, 8 * GIB)) == 2 * GIB


def test_what_is_not_available_now_may_be_later() -> None:
    assert choose_pool_bytes(HostConfig(size=64 * GIB), Memory(64 * GIB, 8 * GIB)) == 64 * GIB


def test_more_than_the_machine_has_is_refused_with_both_sizes() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_pool_bytes(HostConfig(size=65 * GIB), Memory(64 * GIB, 8 * GIB))
    message = str(caught.value)
    assert message.startswith("host.size is 65.0 GiB, and this machine, or the cgroup")
    assert "has 64.0 GiB of memory: make it smaller, or leave it out" in message


# ------------------------------------------------------------------------------- where the user reads it


def test_a_store_of_more_memory_than_there_is_does_not_start(runtime_dir: Path) -> None:
    with pytest.raises(NodeUnavailable, match=r"host\.size is 64\.0 TiB, and this machine"):
        start_node(config_for(runtime_dir, host={"size": "64TiB"}))
    assert not (runtime_dir / "node.sock").exists()


def test_an_engine_is_told_once_why_no_store_starts(
    runtime_dir: Path, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between attempts nobody listens; that is no news, and its node.log says nothing."""
    monkeypatch.setattr("kvstrata.controller.client.node._START_PATIENCE_S", 0.1)
    monkeypatch.setattr("kvstrata.controller.client.node._AUTOSTART_EVERY_S", 1.0)
    attempts = []
    monkeypatch.setattr(
        "kvstrata.controller.client.node.start_node",
        lambda config: (attempts.append(config), start_node(config)),
    )
    engine = engines(config_for(runtime_dir, host={"size": "64TiB"}, node={"autostart": True}), "greedy")
    wait_for("three attempts", lambda: len(attempts) >= 3)
    assert engine.client.session is None
    (trouble,) = engine.troubles
    assert "kvstrata is not used until this changes, every lookup is a miss" in trouble
    assert "host.size is 64.0 TiB" in trouble


def test_a_store_says_in_its_log_that_memory_is_short(runtime_dir: Path) -> None:
    size = memory().total // MIB * MIB  # never all of it is available
    store = RunningStore.start(config_for(runtime_dir, host={"size": size}))
    store.stop()
    assert "of memory are available now: it may run out as the pool grows" in store.log


@pytest.mark.parametrize("error", [OSError("no memory"), RuntimeError("can't start new thread")])
def test_whatever_kept_the_pool_from_growing_is_logged_and_it_is_tried_again(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(nbytes: int, should_stop: Callable[[], bool]) -> int:
        raise error

    async def scenario() -> NodeStore:
        store = NodeStore(config_for(runtime_dir), RuntimePaths(runtime_dir), 8 * MIB)
        store.pool.make_segment = fail  # type: ignore[method-assign]
        store.apply(ClientOpened("engine", (SLOT,), 1))
        assert store._growth is not None
        await asyncio.wait([store._growth])
        await asyncio.sleep(0)  # for the callback that logs
        return store

    with caplog.at_level(logging.ERROR, "kvstrata.node"):
        store = asyncio.run(scenario())
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) is isinstance(error, RuntimeError)
    later = time.monotonic() + 31
    assert store.planner.step(ClientOpened("engine", (SLOT,), 1), later) == [GrowPool(4 * MIB, SLOT)]


# ------------------------------------------------------------------------- slots larger than a segment


def test_an_engine_whose_chunks_fit_no_segment_is_told_so_once(
    node_store: Callable[..., RunningStore], engines: Callable[..., Engine]
) -> None:
    store = node_store()
    engines(store.config, "small").save(*map(key, range(1, 6)))  # all segments are made then
    engine = engines(store.config, "large", slot_bytes=5 * SLOT)
    wait_for("a word about it", lambda: engine.troubles)
    time.sleep(1.0)  # it goes on asking
    (trouble,) = engine.troubles
    assert (
        "one chunk of this model needs 5.0 MiB, the host pool's segments have up to 4.0 MiB: set "
        f"host.segment_size to {5 * MIB} bytes or more, or lower chunk.tokens, and end the running node "
        "store (kvstrata node --stop: what it stores is lost)" in trouble
    )
    assert engine.client.session is None


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((SLOT, 5 * SLOT), "kvstrata does not keep some chunks: one that does not pack needs 5.0 MiB"),
        ((5 * SLOT, SLOT), "kvstrata stores nothing of this engine: a chunk needs 5.0 MiB"),
    ],
)
def test_an_engine_is_served_whose_largest_chunks_alone_fit_no_segment_and_told_once(
    node_store: Callable[..., RunningStore],
    engines: Callable[..., Engine],
    sizes: tuple[int, ...],
    says: str,
) -> None:
    store = node_store()
    engines(store.config, "small").save(*map(key, range(1, 6)))
    said: list[str] = []
    client = NodeClient(store.config, "both", sizes, 1, notify=said.append)
    try:
        epoch = wait_for("a session", lambda: client.session).epoch
        (warning,) = wait_for("a word about it", lambda: said)
        assert warning.startswith(says)
        assert "segments have up to 4.0 MiB: set host.segment_size" in warning
        client._drop_side(bye=False)
        wait_for("the end of the session", lambda: client.session is None)
        assert wait_for("another session", lambda: client.session).epoch == epoch
        assert [text for text in said if says in text] == [warning]
    finally:
        client.close()
