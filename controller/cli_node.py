"""What the command line has to do with a node store: run it, end it, ask it.

An answer that does not come within seconds counts as no node store.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from kvstrata.controller.client.config_file import read_yaml
from kvstrata.controller.paths import RuntimePaths, runtime_paths
from kvstrata.core.config import Config, as_tree, build_config
from kvstrata.core.errors import KVStrataError, NodeUnavailable
from kvstrata.core.units import format_size
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc

_ANSWER_S = 5.0
_END_S = 15.0
_LOOK_EVERY_S = 0.05

# What `kvstrata stats` calls a chunk's states, and what became of chunks that are not there (any more).
_STATES = {
    "ready": "stored",
    "reserved": "being written",
    "evicting": "evicted but still read",
    "quarantined": "held for a writer that hangs",
}
_LOSSES = {
    "evicted_chunks": "evicted",
    "refused_full": "refused for want of room",
    "aborted_chunks": "given up by their writer",
    "corrupt_chunks": "found damaged",
}


class StillInUse(KVStrataError):
    """Engines are connected to the node store that should end."""


def run(options: argparse.Namespace) -> int:
    """`kvstrata node`, `check` or `stats`."""
    config = load_config(options.config, options.runtime_dir)
    paths = runtime_paths(config.node, create=False)
    if options.command == "check":
        return _check(paths, options.json)
    if options.command == "stats" or options.status:
        _print_stats(paths, stats(paths), options.json)
        return 0
    if options.force and not options.stop:
        raise StillInUse("--force goes with --stop")
    if options.stop:
        stop(paths, options.force)
        _print(options.json, {"ended": True}, f"the node store in {paths.folder} has ended")
        return 0
    return _serve(config, paths)


def load_config(file: Path | None, runtime_dir: str | None) -> Config:
    """The configuration of `file`, or else of `KVSTRATA_CONFIG`; `runtime_dir` goes before what it says.

    Raises:
        ConfigError: the file cannot be read, or says something that is not allowed.
    """
    if file is None and (name := os.environ.get("KVSTRATA_CONFIG")):
        file = Path(name)
    config = build_config((str(file), read_yaml(file))) if file is not None else Config()
    if runtime_dir is None:
        return config
    folder = str(Path(runtime_dir).expanduser().absolute())
    return dataclasses.replace(config, node=dataclasses.replace(config.node, runtime_dir=folder))


# ------------------------------------------------------------------------------------------- asking


@contextmanager
def _stub(paths: RuntimePaths) -> Iterator[node_pb2_grpc.NodeStoreStub]:
    """The node store's calls. Raises NodeUnavailable if there is none, or one of them fails."""
    if not paths.control.exists():
        raise NodeUnavailable(_nobody(paths))
    with grpc.insecure_channel(f"unix:{paths.control}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield node_pb2_grpc.NodeStoreStub(channel)
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise NodeUnavailable(_nobody(paths)) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise NodeUnavailable(
                    f"the node store in {paths.folder} did not answer within {_ANSWER_S:.0f} s: "
                    f"its log, if an engine started it, is {paths.log}"
                ) from error
            raise NodeUnavailable(f"the node store in {paths.folder} refused: {error.details()}") from error


def _nobody(paths: RuntimePaths) -> str:
    return (
        f"no node store runs in {paths.folder}: engines start one where node.runtime_dir says; "
        "name that folder with --runtime-dir, or their configuration with --config"
    )


def stats(paths: RuntimePaths) -> dict[str, Any]:
    """Sizes and counters of the running node store. Raises NodeUnavailable."""
    with _stub(paths) as stub:
        tree: dict[str, Any] = json.loads(stub.Stats(pb.StatsRequest(), timeout=_ANSWER_S).json)
    return tree


def problems(paths: RuntimePaths) -> list[str]:
    """Contradictions in the books of the running node store. Raises NodeUnavailable."""
    with _stub(paths) as stub:
        return list(stub.Check(pb.CheckRequest(), timeout=_ANSWER_S).problems)


def stop(paths: RuntimePaths, force: bool) -> None:
    """Ask the running node store to end, and wait until it has.

    Raises:
        StillInUse: engines are connected, and `force` is not set.
        NodeUnavailable: there is none, or it does not end.
    """
    with _stub(paths) as stub:
        ending = stub.Shutdown(pb.ShutdownRequest(force=force), timeout=_ANSWER_S).ending
    if not ending:
        raise StillInUse(
            f"engines are connected to the node store in {paths.folder}: end them first, "
            "or say --force (they go on, and start a new and empty one unless node.autostart is off)"
        )
    deadline = time.monotonic() + _END_S
    while _locked(paths.lock):
        if time.monotonic() > deadline:
            raise NodeUnavailable(
                f"the node store {paths.lock.read_text().strip()} in {paths.folder} has not ended "
                f"after {_END_S:.0f} s: end that process"
            )
        threading.Event().wait(_LOOK_EVERY_S)


def end_node_store(paths: RuntimePaths) -> None:
    """Whatever it takes: when this returns, no node store of `paths` is left. Engines go on without it."""
    try:
        stop(paths, force=True)
    except NodeUnavailable:
        if _locked(paths.lock) and (pid := paths.lock.read_text().strip()):  # alive but deaf
            os.kill(int(pid), signal.SIGKILL)


def _locked(lock: Path) -> bool:
    """Whether a node store lives: it holds its lock until its process ends."""
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# --------------------------------------------------------------------------------------- answering


def _check(paths: RuntimePaths, as_json: bool) -> int:
    found = problems(paths)
    text = "\n".join(found) if found else f"the books of the node store in {paths.folder} are right"
    _print(as_json, {"problems": found}, text)
    return 1 if found else 0


def _print_stats(paths: RuntimePaths, tree: dict[str, Any], as_json: bool) -> None:
    _print(as_json, {"folder": str(paths.folder), **tree}, _stats_text(paths, tree))


def _stats_text(paths: RuntimePaths, tree: dict[str, Any]) -> str:
    pool, clients, counters = tree["pool"], tree["clients"], Counter(tree["counters"])
    made, most = pool["made_bytes"], pool["configured_bytes"]
    chunks = {word: tree["chunks"][state] for state, word in _STATES.items()}
    rows = {
        "pool": f"{format_size(made)} of up to {format_size(most)} taken{_percent(made, most)}, "
        f"{_share(pool['slots'] - pool['slots_free'], pool['slots'], 'slots in use')}",
        "chunks": ", ".join(f"{n:,} {word}" for word, n in chunks.items() if n or word == "stored"),
        "lookups": f"{counters.pop('lookups', 0):,} since the start, "
        + _share(counters.pop("hit_chunks", 0), counters.pop("lookup_chunks", 0), "chunks found in the pool"),
        "saves": f"{counters.pop('committed_chunks', 0):,} chunks saved since the start"
        + "".join(f", {counters.pop(name):,} {word}" for name, word in _LOSSES.items() if counters[name]),
        "also": _counts({name: count for name, count in counters.items() if count}),
        "engines": str(len(clients)),
    }
    lines = [f"node store {tree['pid']} in {paths.folder}"]
    lines += [f"  {name:10}{text}" for name, text in rows.items() if text]
    for client in clients:
        claims = _counts({name: client[name] for name in ("leases", "jobs", "overdue_slots")})
        lines.append(f"    {client['id']}: {claims}{', stopped' if client['stopped'] else ''}")
    return "\n".join(lines)


def _share(part: int, whole: int, what: str) -> str:
    return f"{part:,} of {whole:,} {what}{_percent(part, whole)}"


def _percent(part: int, whole: int) -> str:
    return f" ({part / whole:.0%})" if whole else ""


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(numbers.items()))


def _print(as_json: bool, tree: dict[str, Any], text: str) -> None:
    print(json.dumps(tree, indent=1) if as_json else text)


# ----------------------------------------------------------------------------------------- serving


def _serve(config: Config, paths: RuntimePaths) -> int:
    """Become a node store; its log goes to this terminal. Returns only if one runs already."""
    try:
        running = stats(paths)
    except NodeUnavailable:
        running = None
    if running is not None:
        print(
            f"kvstrata node: node store {running['pid']} runs in {paths.folder} already: "
            "end it with `kvstrata node --stop`",
            file=sys.stderr,
        )
        return 1
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:  # a configuration is far smaller than a pipe's buffer
        pipe.write(json.dumps(as_tree(config)) + "\n")
    os.dup2(reader, 0)
    os.execv(sys.executable, [sys.executable, "-m", "kvstrata.controller.node"])
