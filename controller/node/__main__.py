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
from pathlib import Path

import grpc

from kvstrata.controller.node.service import NodeService
from kvstrata.controller.node.store import NodeStore
from kvstrata.controller.paths import RuntimePaths, group_id, runtime_paths
from kvstrata.core.config import AUTO, Config, build_config
from kvstrata.core.errors import KVStrataError
from kvstrata.core.units import format_size
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc

log = logging.getLogger("kvstrata.node")

_AUTO_SHARE = 4  # a quarter of what is available
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
    try:
        asyncio.run(_serve(config, paths, lock))
    finally:
        os.close(lock)
    return 0


async def _serve(config: Config, paths: RuntimePaths, lock: int) -> None:
    pool_bytes = config.host.size
    if pool_bytes == AUTO:
        pool_bytes = available_memory() // _AUTO_SHARE
    store = NodeStore(config, paths, pool_bytes, lambda: _is_at(lock, paths.lock))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, store.ending.set)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    node_pb2_grpc.add_NodeStoreServicer_to_server(NodeService(store), server)
    paths.control.unlink(missing_ok=True)
    old_umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{paths.control}")
    finally:
        os.umask(old_umask)
    if config.node.group:
        os.chown(paths.control, -1, group_id(config.node.group))
        paths.control.chmod(0o660)
    await server.start()
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


def available_memory() -> int:
    """Bytes this process could still take: the machine's, or less under a cgroup limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


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
