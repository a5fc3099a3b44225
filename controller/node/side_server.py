"""The store's end of the side socket: lives of clients, segments to workers, answers to questions.

What the end of a connection or of a process means is said in `core/lives.py`; here it is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstrata.controller.side import Hello, receive_message, send_match, send_message
from kvstrata.core.events import Event, SegmentRegistered
from kvstrata.core.lives import SCHEDULER, Lives, ProcessId

log = logging.getLogger("kvstrata.node")

_ACCEPT_PAUSE_S = 1.0
_HELLO_DEADLINE_S = 10.0  # twice what a client waits for the answer to its hello
_AGAIN_S = 5.0  # until a segment that a worker could not use is offered again; doubled each time
_AGAIN_MAX_S = 300.0


@dataclass(slots=True)
class Offer:
    """A segment that a worker was sent; to be sent once more at `again_at`, on the monotonic clock."""

    pause_s: float
    again_at: float = math.inf


@dataclass(eq=False, slots=True)
class Connection:
    """With one process of a client, once it has said hello."""

    sock: socket.socket
    hello: Hello | None = None
    pidfd: int | None = None
    open: bool = True
    offers: dict[int, Offer] = field(default_factory=dict)  # by segment
    behind: bool = False  # its socket did not take all that it should have

    @property
    def worker(self) -> Hello | None:
        """Who it is, if it is a worker."""
        return self.hello if self.hello is not None and self.hello.role == "worker" else None


class SideServer:
    """Accepts side connections on `path` and turns what happens on them into planner events."""

    def __init__(
        self,
        path: Path,
        epoch: bytes,
        apply: Callable[[Event], object],
        segments: Callable[[], list[tuple[int, int, int]]],
        mode: int,
        gid: int | None,
        answer: Callable[[str, bytes], bytes],
        hello_deadline_s: float = _HELLO_DEADLINE_S,
        again_s: float = _AGAIN_S,
    ) -> None:
        """`segments` lists (id, nbytes, descriptor) of what workers should have.

        `answer` takes a client's name and its question; it raises ValueError if that is none.
        """
        self._answer = answer
        self._hello_deadline_s, self._again_s = hello_deadline_s, again_s
        self._path, self._epoch, self._apply, self._segments = path, epoch, apply, segments
        self._mode, self._gid = mode, gid
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._connections: dict[tuple[str, ProcessId], Connection] = {}  # the newest of each process
        self.lives = Lives()

    def start(self) -> None:
        """Bind and listen. The lock file guarantees that a leftover socket is nobody's."""
        self._path.unlink(missing_ok=True)
        old_umask = os.umask(0o177)
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(old_umask)
        if self._gid is not None:
            os.chown(self._path, -1, self._gid)
        self._path.chmod(self._mode)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._listen()

    def close(self, unlink: bool = True) -> None:
        """Hang up on everybody; `unlink` the socket unless it is another store's by now."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        self._listener.close()
        if unlink:
            self._path.unlink(missing_ok=True)
        for connection in self._connections.values():
            self._forget_process(connection)
            if connection.open:
                _hang_up(connection)

    def has_scheduler(self, client: str) -> bool:
        """Whether the scheduler side of `client` is connected."""
        return self.lives.is_open(client, SCHEDULER)

    def client_opened(self, client: str) -> None:
        """From now on the client's workers get segments."""
        self.lives.open(client)
        self.offer_segments()

    def offer_segments(self) -> None:
        """Send every worker the segments that it has not been sent, or could not use a while ago.

        Called at each change, and now and then for what did not fit a socket.
        """
        opened = self.lives.opened
        for connection in self._connections.values():
            if connection.open and connection.worker and connection.worker.client in opened:
                self._send_segments(connection)

    def _send_segments(self, connection: Connection) -> None:
        now = time.monotonic()
        for segment, nbytes, fd in self._segments():
            offer = connection.offers.get(segment)
            if offer is not None and now < offer.again_at:
                continue
            try:
                send_message(connection.sock, {"segment": {"id": segment, "nbytes": nbytes}}, [fd])
            except OSError as error:  # full buffer or gone: the reader side notices the latter
                if not connection.behind:
                    log.warning("cannot send segment %d to %s yet: %s", segment, connection.hello, error)
                connection.behind = True
                return
            connection.offers.setdefault(segment, Offer(self._again_s)).again_at = math.inf
        connection.behind = False

    def _unusable(self, connection: Connection, segment: int) -> None:
        """Offer it again later, ever more seldom: what it lacked, memory or a limit, may be there by then."""
        offer = connection.offers.get(segment)
        if offer is None:
            raise ValueError(f"segment {segment} was not offered")
        log.warning("%s cannot use segment %d: again in %.0f s", connection.hello, segment, offer.pause_s)
        offer.again_at = time.monotonic() + offer.pause_s
        offer.pause_s = min(2 * offer.pause_s, _AGAIN_MAX_S)

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, most likely: the listener stays readable
            log.error("cannot accept a side connection, pausing: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener.fileno())
            loop.call_later(_ACCEPT_PAUSE_S, self._listen)
            return
        sock.setblocking(False)
        connection = Connection(sock)
        loop = asyncio.get_running_loop()
        loop.add_reader(sock.fileno(), self._readable, connection)
        loop.call_later(self._hello_deadline_s, self._expect_hello, connection)

    def _expect_hello(self, connection: Connection) -> None:
        """Whoever has not said it by now would keep a descriptor for ever."""
        if connection.open and connection.hello is None:
            log.warning("a side connection said no hello in %.0f s", self._hello_deadline_s)
            self._ended(connection)

    def _readable(self, connection: Connection) -> None:
        try:
            received = receive_message(connection.sock)
        except (BlockingIOError, ConnectionResetError):  # reset: it left offers unread; its bye still comes
            return
        except (OSError, ValueError, RecursionError) as error:
            log.warning("side connection of %s: %s", connection.hello, error)
            received = None
        if received is None:
            self._ended(connection)
            return
        message, fds = received
        try:
            self._handle(connection, message, fds)
        except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            log.warning("refused side message of %s: %s", connection.hello, error)
            self._ended(connection)
        finally:
            for fd in fds:
                if fd != connection.pidfd:
                    os.close(fd)

    def _handle(self, connection: Connection, message: dict[str, Any] | bytes, fds: list[int]) -> None:
        if isinstance(message, bytes):
            if connection.hello is None or connection.worker:
                raise ValueError("only the scheduler side of an engine asks questions")
            self._send_answer(connection, self._answer(connection.hello.client, message))
        elif "hello" in message and connection.hello is None:
            hello = Hello.parse(message["hello"])
            if len(fds) != 1 or "Pid:" not in Path(f"/proc/self/fdinfo/{fds[0]}").read_text():
                raise ValueError("a hello brings exactly one pidfd")
            # First of all: who has given up waiting for it gets nothing, and leaves nothing here.
            send_message(connection.sock, {"welcome": {"epoch": self._epoch.hex()}})
            connection.hello, connection.pidfd = hello, fds[0]
            name = hello.client, hello.process
            if earlier := self._connections.pop(name, None):
                if earlier.open:  # the news of its end are still behind what it said before
                    self._ended(earlier)
                self._forget_process(earlier)  # its connection broke: the process now answers on this one
            self._connections[name] = connection
            self._apply_all(self.lives.arrived(*name))
            asyncio.get_running_loop().add_reader(fds[0], self._done, connection)
            self.offer_segments()
        elif "registered" in message and (worker := connection.worker):
            self._apply(SegmentRegistered(worker.client, worker.rank, int(message["registered"])))
        elif "unusable" in message and connection.worker:
            self._unusable(connection, int(message["unusable"]))
        elif "bye" in message:
            self._done(connection)
        else:
            raise ValueError(f"unexpected message {sorted(message)}")

    def _send_answer(self, connection: Connection, answer: bytes) -> None:
        """While the client has no room for an answer, no more of its questions are read."""
        loop, fd = asyncio.get_running_loop(), connection.sock.fileno()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its bye is still to be read
                send_match(connection.sock, answer)
        except BlockingIOError:
            loop.remove_reader(fd)
            loop.add_writer(fd, self._has_room, connection, answer)

    def _has_room(self, connection: Connection, answer: bytes) -> None:
        loop, fd = asyncio.get_running_loop(), connection.sock.fileno()
        loop.remove_writer(fd)
        loop.add_reader(fd, self._readable, connection)
        try:
            self._send_answer(connection, answer)
        except OSError as error:  # as on the first try
            log.warning("cannot answer %s: %s", connection.hello, error)
            self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        """The stream is over; its process may live."""
        if connection.open:
            connection.open = False
            _hang_up(connection)
        if hello := connection.hello:
            self._apply_all(self.lives.ended(hello.client, hello.process))

    def _done(self, connection: Connection) -> None:
        """Its process has exited, or said that it copies no more."""
        self._ended(connection)
        self._forget_process(connection)
        if hello := connection.hello:
            del self._connections[hello.client, hello.process]
            self._apply_all(self.lives.done(hello.client, hello.process))

    def _apply_all(self, events: list[Event]) -> None:
        for event in events:
            self._apply(event)

    def _forget_process(self, connection: Connection) -> None:
        if connection.pidfd is not None:
            asyncio.get_running_loop().remove_reader(connection.pidfd)
            os.close(connection.pidfd)
            connection.pidfd = None


def _hang_up(connection: Connection) -> None:
    loop, fd = asyncio.get_running_loop(), connection.sock.fileno()
    loop.remove_reader(fd)
    loop.remove_writer(fd)
    connection.sock.close()
