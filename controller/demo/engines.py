"""Stock `vllm serve` processes, with and without kvstrata: how they are started, and that they end.

Rule of this file: every process ends with the `Fleet`, by its id, whatever happened in between; and
nothing of the user's own node store or configuration is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.controller.cli_node import end_node_store
from kvstrata.controller.demo.client import Answer, RequestFailed, ask, is_healthy
from kvstrata.controller.paths import RuntimePaths
from kvstrata.core.errors import KVStrataError

HOST = "127.0.0.1"
MODEL_NAME = "demo"

PLAIN = ""
KVSTRATA = "KVStrataConnector"
ZEROED_LOADS = "ZeroedLoadsConnector"
_MODULES = {KVSTRATA: "kvstrata.connector.vllm", ZEROED_LOADS: "kvstrata.connector.vllm.drill"}

# Room for one document and its answers, but not for two: each next document evicts the one before
# it, so that "evicted" is what happens to a busy engine, not a call of ours.
_CACHE_TOKENS = 2432
_CONTEXT_TOKENS = 2048
_CPU_BLOCK_TOKENS = 128
_GPU_BLOCK_TOKENS = 16
_GPU_SHARE = 0.28  # three engines share the GPU for a while

_READY_S = 600.0
_END_S = 20.0  # to end in order
_LEAVE_S = 3.0  # when nobody waits for what it still does
_LOOK_EVERY_S = 0.25
_LOG_LINES = 25


class EngineFailed(KVStrataError):
    """An engine ended, or never got ready."""


@dataclass(slots=True)
class Engine:
    """One running `vllm serve`."""

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def failed(self, what: str) -> EngineFailed:
        """The error that says so, with the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return EngineFailed(
            f"the engine {self.name!r} {what}. The end of its log:\n  "
            + "\n  ".join(lines)
            + f"\nAll logs are kept in {self.log.parent}"
        )

    def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Its answer to `prompt`. Raises EngineFailed."""
        try:
            return ask(self.port, MODEL_NAME, prompt, max_tokens)
        except RequestFailed as error:
            raise self.failed(f"failed: {error}") from error

    def ask_to_end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def end(self, grace_s: float = _END_S) -> None:
        """End it and what it started. They share a process group that nobody else is in."""
        self.ask_to_end()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # Those that outlive it for a moment give its shared memory back.
        deadline = time.monotonic() + _LEAVE_S
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                threading.Event().wait(_LOOK_EVERY_S)
            os.killpg(self.process.pid, signal.SIGKILL)


class Fleet:
    """The engines of one demo and their node store; a context manager that ends them all.

    Args:
        model: folder of the model.
        folder: a private one with a short path, for logs and sockets.
        gpu: whether this Python's vLLM runs on a GPU.
        first_port: the first of several in a row; None for any free ones.
    """

    def __init__(self, model: Path, folder: Path, gpu: bool, first_port: int | None) -> None:
        self._model, self._folder, self._gpu = model, folder, gpu
        self._next_port = first_port
        self._engines: list[Engine] = []
        self._seats = _seats()
        self._scratch = folder / "tmp"
        self.paths = RuntimePaths(folder / "node")

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        # An impatient second Ctrl-C must not leave processes behind; this takes seconds at most.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.end(*self._engines, grace_s=_LEAVE_S)
            end_node_store(self.paths)
            shutil.rmtree(self._scratch, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def start(self, name: str, connector: str, seat: int) -> Engine:
        """Start `vllm serve`; it gets ready in the background.

        Args:
            name: for messages and the log.
            connector: PLAIN, KVSTRATA or ZEROED_LOADS.
            seat: 0 or 1: engines on different seats share no core.
        """
        port = self._port()
        self._scratch.mkdir(exist_ok=True)
        log = self._folder / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(port, connector),
                env=self._environment(seat),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        engine = Engine(name, port, log, process)
        self._engines.append(engine)
        return engine

    def wait_ready(self, engines: Iterable[Engine], tick: Callable[[int], None]) -> None:
        """Until all of them answer; `tick(1)` for each that does, `tick(0)` while time passes.

        Raises:
            EngineFailed: one ended, or takes far too long.
        """
        deadline = time.monotonic() + _READY_S
        for engine in engines:
            while not is_healthy(engine.port):
                try:
                    status = engine.process.wait(_LOOK_EVERY_S)
                except subprocess.TimeoutExpired:
                    tick(0)
                else:
                    raise engine.failed(f"ended with status {status} before it was ready")
                if time.monotonic() > deadline:
                    raise engine.failed(f"was not ready after {_READY_S:.0f} s")
            tick(1)

    def end(self, *engines: Engine, grace_s: float = _END_S) -> None:
        """End these engines; the node store stays."""
        for engine in engines:
            engine.ask_to_end()
        for engine in engines:
            engine.end(grace_s)
            self._engines.remove(engine)

    def _command(self, port: int, connector: str) -> list[str]:
        block = _GPU_BLOCK_TOKENS if self._gpu else _CPU_BLOCK_TOKENS
        flags: dict[str, Any] = {
            "--host": HOST,
            "--port": port,
            "--served-model-name": MODEL_NAME,
            "--max-model-len": _CONTEXT_TOKENS,
            "--block-size": block,
            "--num-gpu-blocks-override": 1 + _CACHE_TOKENS // block,  # block 0 is never used
            "--uvicorn-log-level": "warning",
        }
        if self._gpu:
            flags["--gpu-memory-utilization"] = _GPU_SHARE
        if connector:
            flags["--kv-transfer-config"] = json.dumps(self._transfer_config(connector))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self._model)]
        command += ["--enforce-eager", "--enable-prompt-tokens-details"]
        return command + [str(word) for pair in flags.items() for word in pair]

    def _transfer_config(self, connector: str) -> dict[str, Any]:
        return {
            "kv_connector": connector,
            "kv_connector_module_path": _MODULES[connector],
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                # Longer than an engine takes to start again; it ends soon if nobody ends it.
                "node": {"runtime_dir": str(self.paths.folder), "idle_exit": "5min"},
                "host": {"size": "4GiB" if self._gpu else "1GiB"},
                # What an engine computes on top of zeros must not be stored under honest keys.
                "client": {"save": connector != ZEROED_LOADS},
            },
        }

    def _environment(self, seat: int) -> dict[str, str]:
        environment = dict(os.environ)
        for name in ("KVSTRATA_CONFIG", "VLLM_RPC_BASE_PATH"):
            environment.pop(name, None)
        environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": HOST}
        # vLLM leaves sockets there, and starts only if their paths are short: the user's may be long.
        environment["TMPDIR"] = str(self._scratch)
        if not self._gpu:
            cores = self._seats[seat]
            environment |= {
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "OMP_NUM_THREADS": str(len(cores)),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
        return environment

    def _port(self) -> int:
        if self._next_port is not None:
            self._next_port += 1
            return self._next_port - 1
        return free_port()


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _seats() -> tuple[list[int], list[int]]:
    """Two equal halves of this process's cores, for two engines; with a single core both get it.

    Equal, because the number of threads decides in which order an engine adds up, and so its last bits.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    return cores[:half], cores[-half:]
