"""One arm of the serving bench as its parent sees it: a process that answers one command at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstrata.controller.cli_node import end_node_store
from kvstrata.controller.paths import RuntimePaths
from kvstrata.core.errors import KVStrataError

_MODULE = "kvstrata.connector.vllm.bench_arm"
_READY_S = 400.0
_ANSWER_S = 120.0
_END_S = 5.0
_LOG_LINES = 15

Prompt = tuple[int, str]  # tokens, name


class ArmFailed(KVStrataError):
    """The arm's process ended, or did not answer in time."""


class Arm:
    """Starts the process at once; `wait_ready` before the first command.

    Args:
        name: as in `bench_arm.ARMS`.
        folder: of its own, with a short path; its log is kept there.
        options: more of the process's arguments.
    """

    def __init__(self, name: str, folder: Path, options: Sequence[str]) -> None:
        self.name, self.folder = name, folder
        self._replies, theirs = os.pipe()
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", _MODULE, name, "--replies", str(theirs)]
            self._process = subprocess.Popen(
                [*command, "--folder", str(folder), *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                start_new_session=True,
            )
        os.close(theirs)
        self._unread = b""

    def wait_ready(self) -> float:
        """Seconds that the engine took to start. Raises ArmFailed."""
        return float(self._answer(_READY_S)["ready_s"])

    def ask(self, *prompts: Prompt) -> dict[str, Any]:
        """See `bench_arm.Arm.ask`; all methods raise ArmFailed."""
        answer: dict[str, Any] = self.do("ask", prompts=prompts)
        return answer

    def do(self, what: str, **arguments: Any) -> Any:
        """Any command."""
        self.send(what, **arguments)
        return self.receive()

    def send(self, what: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed("ended") from None

    def receive(self) -> Any:
        """The answer to what was sent."""
        return self._answer(_ANSWER_S)

    def close(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._replies)
        end_node_store(RuntimePaths(self.folder))

    def _answer(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise self._failed(f"did not answer in {timeout_s:.0f} s")
            read = os.read(self._replies, 1 << 20)
            if not read:
                raise self._failed("ended")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _failed(self, how: str) -> ArmFailed:
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return ArmFailed(f"{self.name} {how}; the end of its log:\n{end}")
