"""The node store's process: `python -m kvstrata.controller.node`, usually started by an engine.

It reads its configuration (one JSON line) from standard input. With `--daemon` it detaches:
engines end their descendants when they end, and the cache is meant to outlive them.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstrata.controller.node.service import NodeService
from kvstrata.controller.node.store import NodeStore
from kvstrata.controller.paths import RuntimePaths, group_id, runtime_paths
from kvstrata.core.config import AUTO, Config, HostConfig, build_config
from kvstrata.core.errors import ConfigError, KVStrataError
from kvstrata.core.units import format_size
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc

log = logging.getLogger("kvstrata.node")

_AUTO_SHARE = 4  # a quarter of what is available
_CGROUP_FILES = (  # limit, usage, prefix of the figures that count the groups inside: versions 2 and 1
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_LOG_BYTES_MAX = 16 << 20


def main(argv: list[str] | None = None) -> int:
    """Run a node store until it ends by itself or is told to. Exit status 0, or 1 with a message."""
    parser = argparse.ArgumentParser(prog="python -m kvstrata.controller.node", description=__doc__)
    parser.add_argument(
        "--daemon", action="store_true", help="detach from the caller, log to the runtime folder"
    )
    options = parser.parse_args(argv)
    try:
        config = build_config(("standard input", json.loads(sys.stdin.readline() or "{}")))
        paths = runtime_paths(config.node)
        has = memory()
        pool_bytes = choose_pool_bytes(config.host, has)
    except (KVStrataError, OSError, json.JSONDecodeError) as error:
        print(f"kvstrata node: {error}", file=sys.stderr)
        return 1
    if options.daemon:
        _detach(paths.log)
    logging.basicConfig(
        level=config.node.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    lock = _lock(paths.lock)
    if lock is None:
        log.info("another node store serves %s", paths.folder)
        return 0
    if pool_bytes > has.available:
        log.warning(
            "host.size is %s, and only %s of memory are available now: it may run out as the pool grows",
            format_size(pool_bytes),
            format_size(has.available),
        )
    try:
        asyncio.run(_serve(config, pool_bytes, paths, lock))
    finally:
        os.close(lock)
    return 0


async def _serve(config: Config, pool_bytes: int, paths: RuntimePaths, lock: int) -> None:
    def still_ours() -> bool:
        os.utime(lock)  # whoever tidies /tmp removes what nobody has touched for days
        return _is_at(lock, paths.lock)

    store = NodeStore(config, paths, pool_bytes, still_ours)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, store.ending.set)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    node_pb2_grpc.add_NodeStoreServicer_to_server(NodeService(store), server)
    await _start(server, paths, config.node.group)
    log.info(
        "node store %d: pool of up to %s, sockets in %s", os.getpid(), format_size(pool_bytes), paths.folder
    )
    try:
        await store.run()
    finally:
        await server.stop(grace=0.5)
        if store.still_ours():
            paths.control.unlink(missing_ok=True)
        log.info("node store %d ended", os.getpid())


async def _start(server: grpc.aio.Server, paths: RuntimePaths, group: str) -> None:
    """Serve at `paths.control`.

    When gRPC stops it unlinks the name that it has bound, though another store's socket may have it by
    then. So it binds a name of its own, no longer than the real one because socket addresses are short.
    """
    bound = paths.folder / str(os.getpid())
    old_umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{bound}")
    finally:
        os.umask(old_umask)
    if group:
        os.chown(bound, -1, group_id(group))
        bound.chmod(0o660)
    await server.start()
    bound.rename(paths.control)


@dataclass(frozen=True, slots=True)
class Memory:
    """What this process could take, in bytes: the machine's, or less under a cgroup limit."""

    total: int
    available: int  # now


def memory(root: Path = Path("/")) -> Memory:
    """As the kernel tells it below `root`."""
    machine = _numbers(root / "proc/meminfo")
    total, available = machine["MemTotal:"] << 10, machine["MemAvailable:"] << 10  # in KiB there
    for limit, used in _cgroups(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def choose_pool_bytes(host: HostConfig, has: Memory) -> int:
    """How large the pool may grow.

    Raises:
        ConfigError: the machine will never have that much. The text is the same at every attempt, so
            that an engine, which goes on trying, tells its user once.
    """
    if host.size == AUTO:
        return has.available // _AUTO_SHARE
    if host.size > has.total:
        raise ConfigError(
            f"host.size is {format_size(host.size)}, and this machine, or the cgroup that this runs in, has "
            f"{format_size(has.total)} of memory: make it smaller, or leave it out for a quarter of what "
            "is available when the node store starts"
        )
    return host.size


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each memory cgroup around this process that has a limit."""
    of_this_process = root / "proc/self/cgroup"
    lines = of_this_process.read_text().splitlines() if of_this_process.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers  # version 2 has no controllers here
        inner = top / path.strip("/")
        for group in (inner, *(above for above in inner.parents if above.is_relative_to(top))):
            for limit, usage, prefix in _CGROUP_FILES:
                if not (group / limit).exists() or (text := (group / limit).read_text().strip()) == "max":
                    continue
                kinds = _numbers(group / "memory.stat")
                # The page cache counts as used, and a model's weights fill it; the kernel gives it back.
                cache = kinds[f"{prefix}active_file"] + kinds[f"{prefix}inactive_file"]
                yield int(text), int((group / usage).read_text()) - cache


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number; 0 for what is not there."""
    lines = path.read_text().splitlines() if path.exists() else []
    return defaultdict(int, ((words[0], int(words[1])) for words in map(str.split, lines)))


def _detach(log_file: Path) -> None:
    """Become nobody's child: a second fork, a session of its own, no inherited descriptor."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    # The engine may have pinned the thread that started us; the store belongs on any core.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if log_file.exists() and log_file.stat().st_size > _LOG_BYTES_MAX:
        log_file.replace(log_file.with_suffix(".log.old"))
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 20 else 1 << 20)


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        there = path.stat()
    except OSError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _lock(path: Path) -> int | None:
    """The lock that makes this the only node store of the folder; None if another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


if __name__ == "__main__":
    sys.exit(main())
