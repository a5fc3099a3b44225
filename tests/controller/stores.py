"""Real node store processes and engines to talk to them, for tests."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from kvstrata.controller.client import Answer, NodeClient, SegmentMap, Session, worker_segments
from kvstrata.controller.node.launch import start_node
from kvstrata.controller.paths import RuntimePaths
from kvstrata.core.config import Config, as_tree, build_config
from kvstrata.core.events import Match, Refused, Update, Updated, Why
from kvstrata.core.slots import Slot
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc
from tests.conftest import REPO

MIB = 1 << 20
SLOT = MIB
PATIENCE_S = 30.0  # for what takes a moment on an idle machine

T = TypeVar("T")


def wait_for(what: str, condition: Callable[[], T], seconds: float = PATIENCE_S) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return value


def config_for(folder: Path, **sections: dict[str, Any]) -> Config:
    """A small pool in `folder`; calls may take their time, since a test's machine may be busy."""
    host = {"size": 8 * MIB, "segment_size": 4 * MIB, **sections.pop("host", {})}
    node = {"runtime_dir": str(folder), "autostart": False, **sections.pop("node", {})}
    client = {"call_deadline": 10.0, **sections.pop("client", {})}
    return build_config(("test", {"host": host, "node": node, "client": client, **sections}))


def exited(pidfd: int, seconds: float = PATIENCE_S) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


class RunningStore:
    """A node store process in its own runtime folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.paths = RuntimePaths(Path(config.node.runtime_dir))

    @classmethod
    def start(cls, config: Config) -> RunningStore:
        store = cls(config)
        start_node(config)
        store.wait_until_up()
        return store

    def wait_until_up(self) -> None:
        wait_for(f"a node store in {self.paths.folder}: {self.log[-2000:]}", lambda: self.stats() is not None)

    @property
    def log(self) -> str:
        return self.paths.log.read_text() if self.paths.log.exists() else ""

    @property
    def pid(self) -> int:
        return int(self.paths.lock.read_text())

    @property
    def running(self) -> bool:
        """Whether any node store holds the folder's lock."""
        try:
            fd = os.open(self.paths.lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def call(self, name: str, request: Any, seconds: float = 10.0) -> Any:
        """One RPC on a connection of its own. Raises grpc.RpcError."""
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.paths.control}", options=options) as channel:
            return getattr(node_pb2_grpc.NodeStoreStub(channel), name)(request, timeout=seconds)

    def stats(self) -> dict[str, Any] | None:
        """None while nobody answers."""
        try:
            tree: dict[str, Any] = json.loads(self.call("Stats", pb.StatsRequest()).json)
        except grpc.RpcError:
            return None
        return tree

    def facts(self) -> dict[str, Any]:
        stats = self.stats()
        assert stats is not None, self.log[-2000:]
        return stats

    def engine(self, name: str) -> dict[str, Any] | None:
        """What the store has on its books for one client."""
        return next((client for client in self.facts()["clients"] if client["id"] == name), None)

    def problems(self) -> list[str]:
        return list(self.call("Check", pb.CheckRequest()).problems)

    def kill(self) -> None:
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            assert exited(pidfd)
        finally:
            os.close(pidfd)

    def stop(self) -> None:
        """End whichever process serves the folder now, and see that it leaves nothing."""
        if not self.running:
            return
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGTERM)
            if not exited(pidfd, 20.0):
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"node store {pid} did not end: {self.log[-3000:]}")
        finally:
            os.close(pidfd)
        assert not self.running
        assert not self.paths.control.exists()
        assert not self.paths.side.exists()


class Engine:
    """An engine without a model: a scheduler side and workers, in the test's process."""

    def __init__(self, config: Config, name: str, workers: int = 1, slot_bytes: int = SLOT) -> None:
        self.name, self.slot_bytes = name, slot_bytes
        self.troubles: list[str] = []
        self.segments: list[SegmentMap] = [
            worker_segments(config.node, name, rank) for rank in range(workers)
        ]
        self.client = NodeClient(config, name, (slot_bytes,), workers, notify=self.troubles.append)
        self.numbers = 0
        self.leases: set[int] = set()
        self.jobs: dict[int, bytes] = {}

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def session(self) -> Session:
        return wait_for(f"a session of {self.name}: {self.troubles}", lambda: self.client.session)

    def answer(self, call: Match | Update) -> Answer:
        self.client.post(self.session(), call)
        answer = self.client.collect(PATIENCE_S)
        assert answer is not None
        assert answer[1] is call
        return answer[2]

    def match(self, *keys: bytes) -> Answer:
        lease = self.number()
        answer = self.answer(Match(self.name, self.client.next_seq(), lease, keys))
        if getattr(answer, "slots", ()):
            self.leases.add(lease)
        return answer

    def update(
        self,
        reserve: Iterable[bytes] = (),
        committed: Iterable[int] = (),
        aborted: Iterable[int] = (),
        released: Iterable[int] = (),
        corrupt: Iterable[bytes] = (),
    ) -> list[Slot | Why]:
        committed, aborted, released = list(committed), list(aborted), list(released)
        asked = {self.number(): key for key in reserve}
        for job in (*committed, *aborted):
            self.jobs.pop(job, None)
        self.leases -= set(released)
        answer = self.answer(
            Update(
                client=self.name,
                seq=self.client.next_seq(),
                reserve=tuple((job, key, self.slot_bytes) for job, key in asked.items()),
                committed=tuple(committed),
                aborted=tuple(aborted),
                released=tuple(released),
                corrupt=tuple(corrupt),
                leases_held=len(self.leases),
                jobs_held=len(self.jobs),
                drawn=self.numbers,
            )
        )
        if isinstance(answer, Refused):
            return [answer.why]
        assert isinstance(answer, Updated), answer
        granted = zip(asked.items(), answer.grants, strict=True)
        self.jobs |= {job: key for (job, key), grant in granted if isinstance(grant, Slot)}
        return list(answer.grants)

    def reserve(self, *keys: bytes) -> list[Slot]:
        """Slots for all `keys`, as soon as the workers have registered the pool."""
        slots = []
        for key in keys:

            def granted(key: bytes = key) -> Slot | None:
                (grant,) = self.update(reserve=[key])
                return grant if isinstance(grant, Slot) else None

            slots.append(wait_for(f"a slot for {self.name}", granted))
        return slots

    def save(self, *keys: bytes) -> list[Slot]:
        slots = self.reserve(*keys)
        self.update(committed=list(self.jobs))
        return slots

    def close(self) -> None:
        for segments in self.segments:
            segments.close()
        self.client.close()


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class EngineProcess:
    """`tests.controller.engine_process`: to be killed, stopped, or asked by `do`."""

    def __init__(self, config: Config, name: str, rank: int | None = None) -> None:
        arguments = [json.dumps(as_tree(config)), name, *([] if rank is None else [str(rank)])]
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.controller.engine_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        assert self.answer() == "up"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.name} has died"
        return json.loads(line)

    def do(self, what: str, *keys: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "keys": keys}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """However it was left: stopped, running or dead."""
        self.process.kill()
        self.process.wait(timeout=PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
