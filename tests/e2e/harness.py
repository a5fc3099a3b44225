"""Engine processes, node stores and prompts for the end-to-end tests."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvstrata.controller.paths import RuntimePaths
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc
from tests.conftest import HAS_GPU

CHUNK = 256
TIE = 0.1  # nats; of a wrong answer some token is worse by several
VOCABULARY = 1000
_SCRIPT = Path(__file__).with_name("engine_process.py")


class EngineError(RuntimeError):
    """The engine said no; the text is what it said."""


class EngineProcess:
    """A real engine in a process of its own."""

    def __init__(
        self, log: Path, options: dict[str, Any], env: dict[str, str] | None = None, core: int | None = None
    ):
        self.log = log
        self._out = log.open("ab")
        self._temporary = tempfile.mkdtemp(prefix="kvs-", dir="/tmp")  # vLLM leaves sockets and folders there
        command = [sys.executable, str(_SCRIPT), json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._out, text=True,
            env=os.environ | {"TMPDIR": self._temporary} | (env or {}),
        )  # fmt: skip
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})

    def ready(self) -> EngineProcess:
        """Wait until it can be asked. Raises EngineError if it did not start."""
        self._answer()
        return self

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"the engine died: {self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["ok"]

    def do(self, name: str, **arguments: Any) -> Any:
        """Run a command of `engine_process.Engine` and return its result."""
        self.send(name, **arguments)
        return self._answer()

    receive = _answer

    def ask(self, *prompts: Any, **arguments: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.do("ask", prompts=list(prompts), **arguments)
        return answers

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._tidy()

    def close(self) -> None:
        """Shut down in order; kill what does not."""
        if self.process.poll() is None:
            try:
                self.do("shutdown")
                self.process.wait(30)
            except (EngineError, OSError, subprocess.TimeoutExpired):
                self.kill()
        self._tidy()

    def _tidy(self) -> None:
        self._out.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Host:
    """One host's worth of processes: any number of engines and the node store they start."""

    def __init__(self, runtime_dir: Path, model: Path, logs: Path) -> None:
        self.paths = RuntimePaths(runtime_dir)
        self._model, self._logs = model, logs
        self._engines: list[EngineProcess] = []

    def connector(self, extra: dict[str, Any] | None = None, **transfer: Any) -> dict[str, Any]:
        """A complete `--kv-transfer-config` for this host."""
        tree: dict[str, Any] = {"host": {"size": "128MiB"}, "node": {"idle_exit": "120s"}}
        for section, values in (extra or {}).items():
            tree[section] = tree.get(section, {}) | values
        tree["node"]["runtime_dir"] = str(self.paths.folder)
        return {
            "kv_connector": "KVStrataConnector",
            "kv_connector_module_path": "kvstrata.connector.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": tree,
        } | transfer

    def start(
        self, plain: bool = False, extra: dict[str, Any] | None = None, **options: Any
    ) -> EngineProcess:
        """An engine that is still starting; `plain` without the plug-in."""
        transfer = options.pop("transfer", {})
        process_options = {name: options.pop(name) for name in ("env", "core") if name in options}
        if not plain:
            options["kv_transfer_config"] = self.connector(extra, **transfer)
        options.setdefault("model", str(self._model))
        engine = EngineProcess(self._logs / f"engine-{len(self._engines)}.log", options, **process_options)
        self._engines.append(engine)
        return engine

    @contextmanager
    def engine(self, **options: Any) -> Iterator[EngineProcess]:
        """An engine that is connected (unless plain), closed at the end."""
        engine = self.start(**options).ready()
        if not options.get("plain"):
            self.wait_connected(engine)
        yield engine
        engine.close()

    def wait_connected(self, engine: EngineProcess) -> None:
        """Until the engine can save: connected, and its worker has mapped a segment of the pool."""
        wait_for(lambda: engine.do("connected"), 20, "the engine to connect to its node store")
        name = engine.do("client_name")

        def mapped() -> bool:
            try:
                clients = self.stats()["clients"]
            except grpc.RpcError:  # one store is gone, the next one not yet there
                return False
            return any(c["id"] == name and c["usable_segments"] for c in clients)

        wait_for(mapped, 20, "the worker to map the pool")

    # --- the node store ----------------------------------------------------------------------

    @property
    def node_pid(self) -> int:
        return int(self.paths.lock.read_text())

    def stats(self) -> dict[str, Any]:
        with self._stub() as stub:
            stats: dict[str, Any] = json.loads(stub.Stats(pb.StatsRequest(), timeout=5).json)
            return stats

    def problems(self) -> list[str]:
        """What `kvstrata check` would print."""
        with self._stub() as stub:
            return list(stub.Check(pb.CheckRequest(), timeout=5).problems)

    @contextmanager
    def checked_all_the_while(self) -> Iterator[None]:
        """`kvstrata check` every few milliseconds while the body runs: it never has anything to say."""
        over, found, times = threading.Event(), set[str](), 0

        def look() -> None:
            nonlocal times
            while not over.wait(0.02):
                found.update(self.problems())
                times += 1

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            looked = thread.is_alive() and times > 0
            over.set()
            thread.join()
        assert looked
        assert found == set()

    @contextmanager
    def _stub(self) -> Iterator[node_pb2_grpc.NodeStoreStub]:
        with grpc.insecure_channel(f"unix:{self.paths.control}") as channel:
            yield node_pb2_grpc.NodeStoreStub(channel)

    def quiet(self) -> dict[str, Any]:
        """Wait until no lease, job or quarantined slot is left; return the statistics."""

        def settled() -> bool:
            stats = self.stats()
            held = sum(c["leases"] + c["jobs"] for c in stats["clients"])
            return held == 0 and not any(stats["chunks"][s] for s in ("reserved", "evicting", "quarantined"))

        wait_for(settled, 10, "the node store's books to close")
        assert self.problems() == []
        return self.stats()

    def close(self) -> None:
        for engine in self._engines:
            engine.kill()  # also those that ended by themselves: they leave folders
        if self.paths.lock.exists() and (text := self.paths.lock.read_text().strip()):
            end_process(int(text))


def end_process(pid: int) -> None:
    """Terminate a node store by its pid, and see it go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.05)


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def tokens(seed: int, count: int) -> list[int]:
    """A random prompt; different seeds share no chunk."""
    dice = random.Random(seed)
    return [dice.randrange(3, VOCABULARY) for _ in range(count)]


@dataclass(frozen=True)
class Book:
    """Right answers, from an engine without the plug-in; by whatever a test calls its prompts.

    On a GPU plain vLLM itself answers some prompts differently in another batch: its kernels round
    differently there, and the two likeliest tokens may be as good as equal. There an answer is right if
    each of its tokens is as likely as the likeliest, but for `TIE`.
    """

    plain: EngineProcess
    prompts: dict[Any, list[int]]
    answers: dict[Any, list[int]]

    @classmethod
    def write(cls, plain: EngineProcess, prompts: dict[Any, list[int]], max_tokens: int) -> Book:
        found = plain.ask(*prompts.values(), max_tokens=max_tokens)
        return cls(plain, prompts, {key: one["tokens"] for key, one in zip(prompts, found, strict=True)})

    def check(self, key: Any, answer: list[int]) -> None:
        assert answer == self.answers[key] or (HAS_GPU and self.could_be(key, answer)), f"answer to {key}"

    def could_be(self, key: Any, answer: list[int]) -> bool:
        """Whether each token could be the next one."""
        if len(answer) != len(self.answers[key]):
            return False
        given = [self.prompts[key] + answer[:count] for count in range(len(answer))]
        for token, asked in zip(answer, self.plain.ask(*given, max_tokens=1), strict=True):
            likely = dict(asked["logprobs"][0])
            if likely.get(token, -math.inf) < max(likely.values()) - TIE:
                return False
        return True


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """Tokens and log-probabilities are equal to the last bit."""
    return [(a["tokens"], a["logprobs"]) for a in left] == [(a["tokens"], a["logprobs"]) for a in right]
