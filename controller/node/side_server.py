"""The store's end of the side socket: lives of clients, segments to workers.

A client is an engine: one scheduler process and its workers, each with a connection. The
store hears `stopped` at the first connection that ends without a bye, and `gone` when every
process of the client has exited or said bye.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstrata.controller.side import Hello, receive_message, send_message
from kvstrata.core.events import ClientGone, ClientResumed, ClientStopped, Event, SegmentRegistered

log = logging.getLogger("kvstrata.node")

_ACCEPT_PAUSE_S = 1.0
_HELLO_DEADLINE_S = 10.0  # twice what a client waits for the answer to its hello


@dataclass(eq=False, slots=True)
class Connection:
    """One process of a client. `done`: it exited or said that its copies are finished."""

    sock: socket.socket
    hello: Hello | None = None
    pidfd: int | None = None
    open: bool = True
    done: bool = False
    sent: set[int] = field(default_factory=set)


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
        hello_deadline_s: float = _HELLO_DEADLINE_S,
    ) -> None:
        """`segments` lists (id, nbytes, descriptor) of what workers should have."""
        self._hello_deadline_s = hello_deadline_s
        self._path, self._epoch, self._apply, self._segments = path, epoch, apply, segments
        self._mode, self._gid = mode, gid
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.connections: dict[str, list[Connection]] = {}
        self.opened: set[str] = set()  # clients that the control plane has opened

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
        for connections in list(self.connections.values()):
            for connection in connections:
                self._forget_process(connection)
                if connection.open:
                    loop.remove_reader(connection.sock.fileno())
                    connection.sock.close()

    @property
    def live(self) -> int:
        """Connections that are open."""
        return sum(connection.open for group in self.connections.values() for connection in group)

    def has_scheduler(self, client: str) -> bool:
        """Whether the scheduler side of `client` is connected."""
        group = self.connections.get(client, ())
        return any(c.open and c.hello is not None and c.hello.role == "scheduler" for c in group)

    def client_opened(self, client: str) -> None:
        """From now on the client's workers get segments."""
        self.opened.add(client)
        self.offer_segments()

    def offer_segments(self) -> None:
        """Send every worker the segments that it has not been sent."""
        for client in self.opened & set(self.connections):
            for connection in self.connections[client]:
                if connection.open and connection.hello is not None and connection.hello.role == "worker":
                    self._send_segments(connection)

    def _send_segments(self, connection: Connection) -> None:
        for segment, nbytes, fd in self._segments():
            if segment in connection.sent:
                continue
            try:
                send_message(connection.sock, {"segment": {"id": segment, "nbytes": nbytes}}, [fd])
            except OSError as error:  # full buffer or gone: the reader side notices the latter
                log.warning("cannot send segment %d to %s: %s", segment, connection.hello, error)
                return
            connection.sent.add(segment)

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

    def _handle(self, connection: Connection, message: dict[str, Any], fds: list[int]) -> None:
        if "hello" in message and connection.hello is None:
            hello = Hello.parse(message["hello"])
            if len(fds) != 1 or "Pid:" not in Path(f"/proc/self/fdinfo/{fds[0]}").read_text():
                raise ValueError("a hello brings exactly one pidfd")
            connection.hello, connection.pidfd = hello, fds[0]
            group = self.connections.setdefault(hello.client, [])
            for earlier in [member for member in group if _same_process(member, hello) and not member.open]:
                self._forget_process(earlier)  # its connection broke: the process now answers on this one
                group.remove(earlier)
            group.append(connection)
            if all(member.open for member in group):
                self._apply(ClientResumed(hello.client))
            asyncio.get_running_loop().add_reader(fds[0], self._exited, connection)
            send_message(connection.sock, {"welcome": {"epoch": self._epoch.hex()}})
            self.offer_segments()
        elif "registered" in message and connection.hello is not None:
            self._apply(
                SegmentRegistered(connection.hello.client, connection.hello.rank, int(message["registered"]))
            )
        elif "bye" in message:
            connection.done = True
            self._ended(connection)
        else:
            raise ValueError(f"unexpected message {sorted(message)}")

    def _ended(self, connection: Connection) -> None:
        """The stream is over: no new grants; claims stay until the process answers or exits."""
        if connection.open:
            connection.open = False
            asyncio.get_running_loop().remove_reader(connection.sock.fileno())
            connection.sock.close()
        if connection.hello is not None:
            self._apply(ClientStopped(connection.hello.client))
            self._settle(connection)

    def _exited(self, connection: Connection) -> None:
        connection.done = True
        if connection.open:
            self._ended(connection)
        else:
            self._settle(connection)

    def _settle(self, connection: Connection) -> None:
        assert connection.hello is not None
        client = connection.hello.client
        if connection.done:
            self._forget_process(connection)
        group = self.connections.get(client)
        if group and all(member.done for member in group):
            del self.connections[client]
            self.opened.discard(client)
            self._apply(ClientGone(client))

    def _forget_process(self, connection: Connection) -> None:
        if connection.pidfd is not None:
            asyncio.get_running_loop().remove_reader(connection.pidfd)
            os.close(connection.pidfd)
            connection.pidfd = None


def _same_process(connection: Connection, hello: Hello) -> bool:
    """A client's name is that of one engine's life, so role and rank name one process of it."""
    known = connection.hello
    return known is not None and (known.role, known.rank) == (hello.role, hello.rank)
