"""The client's end of the side socket; and a worker's map of segments, which stays connected and says bye.

The map's own thread waits on its socket; it costs nothing while nothing happens. A worker's
mappings are kept by (store epoch, segment) and unmapped once nobody uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvstrata.controller.paths import runtime_paths
from kvstrata.controller.side import (
    MAX_MESSAGE,
    Hello,
    receive_match,
    receive_message,
    send_match,
    send_message,
)
from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import KVStrataError
from kvstrata.storage_backends.host import MappedSegment, map_segment, unmap_segment

log = logging.getLogger("kvstrata.client")

_WELCOME_DEADLINE_S = 5.0


class Registration(Protocol):
    """Makes mapped segments known to a device."""

    def add(self, mapping: MappedSegment) -> None:
        """Raises OSError or KVStrataError: the segment cannot be used."""

    def remove(self, mapping: MappedSegment) -> None: ...


class _NoDevice:
    def add(self, mapping: MappedSegment) -> None: ...

    def remove(self, mapping: MappedSegment) -> None: ...


def worker_segments(
    config: NodeConfig, client: str, rank: int, registration: Registration | None = None
) -> SegmentMap:
    """The segments of one worker of the engine `client`.

    Raises:
        ConfigError: the runtime folder cannot hold sockets.
    """
    return SegmentMap(lambda: runtime_paths(config).side, Hello(client, "worker", rank), registration)


class SideConnection:
    """One side connection: `hello` is said and answered when the constructor returns.

    Raises:
        OSError: nobody listens at `path`, or it hung up.
    """

    def __init__(self, path: Path, hello: Hello) -> None:
        self.ended = False  # set by who waited for an answer and saw the end
        self._room = ctypes.create_string_buffer(MAX_MESSAGE)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        pidfd = os.pidfd_open(os.getpid())
        try:
            self._sock.settimeout(_WELCOME_DEADLINE_S)
            self._sock.connect(str(path))
            fields = {
                "client": hello.client,
                "role": hello.role,
                "rank": hello.rank,
                "protocol": hello.protocol,
            }
            send_message(self._sock, {"hello": fields}, [pidfd])
            try:
                answer = receive_message(self._sock)
            except ValueError as error:
                raise ConnectionError(f"not a node store's answer: {error}") from error
            self.epoch = _welcome(answer[0] if answer and isinstance(answer[0], dict) else {})
            self._sock.settimeout(None)
        except BaseException:
            self._sock.close()
            raise
        finally:
            os.close(pidfd)

    def receive(self) -> tuple[dict[str, object], list[int]] | None:
        """The next message; None when the store is gone or `close` was called."""
        try:
            received = receive_message(self._sock)
        except (OSError, ValueError):
            return None
        return None if received is None or isinstance(received[0], bytes) else (received[0], received[1])

    def send(self, message: dict[str, object]) -> None:
        """Raises OSError when the store is gone."""
        send_message(self._sock, message)

    def ask(self, question: bytes) -> None:
        """Send a question; never waits. Raises OSError: the store is gone, or does not read."""
        send_match(self._sock, question)

    def answer(self) -> bytes | None:
        """The answer to the oldest question that has none, if it is there."""
        return receive_match(self._sock, self._room)

    def fileno(self) -> int:
        return self._sock.fileno()

    def readable(self) -> bool:
        """Whether there is something to read, its end included."""
        look = select.poll()
        look.register(self._sock, select.POLLIN)
        return bool(look.poll(0))

    def alive(self) -> bool:
        """Whether the store still holds its end, whatever is still to be read."""
        look = select.poll()
        look.register(self._sock, select.POLLRDHUP)
        return not look.poll(0)  # errors and hang-ups are always reported

    def close(self, bye: bool) -> None:
        """End the connection; `bye` promises that no copy of this process touches the pool any more."""
        try:
            self._sock.setblocking(False)  # a store that stands still reads it later
            if bye:
                self._make_room()
                self.send({"bye": True})
        except OSError:
            log.debug("the node store was gone before the bye")
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # for who waits for a message in another thread
        self._sock.close()

    def _make_room(self) -> None:
        """For the bye, behind questions that may fill the socket: without it claims would stay."""
        room = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * room)


def _welcome(message: dict[str, Any]) -> bytes:
    """The store's epoch. Raises ConnectionError if this is no welcome."""
    try:
        return bytes.fromhex(message["welcome"]["epoch"])
    except (KeyError, TypeError, ValueError):
        raise ConnectionError("the node store refused the hello; its log says why") from None


@dataclass(slots=True)
class _Counted:
    mapping: MappedSegment
    users: int = 0


@dataclass(slots=True)
class _StoreSegments:
    """Segments of one store process. `over`: that process is gone, unmap what nobody uses."""

    segments: dict[int, _Counted] = field(default_factory=dict)
    over: bool = False


class SegmentMap:
    """A worker's mapped segments, kept up to date by a thread.

    Args:
        side_socket: finds its path; asked again at each attempt.
        hello: who this worker is.
        registration: told of each new mapping, and before it goes.
        retry_s: seconds between attempts to connect.
    """

    def __init__(
        self,
        side_socket: Callable[[], Path],
        hello: Hello,
        registration: Registration | None = None,
        retry_s: float = 0.5,
    ) -> None:
        self._side_socket, self._hello = side_socket, hello
        self._registration, self._retry_s = registration or _NoDevice(), retry_s
        self._stores: dict[bytes, _StoreSegments] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connection: SideConnection | None = None
        self._trouble, self._failures = "", 0  # since the last connection
        self._thread = threading.Thread(target=self._run, name="kvstrata-side", daemon=True)
        self._thread.start()

    @contextmanager
    def use(self, epoch: bytes, segment: int) -> Iterator[MappedSegment | None]:
        """The mapping of `segment` of store `epoch`, kept mapped inside the `with`; None if there is none."""
        with self._lock:
            store = self._stores.get(epoch)
            mapped = store.segments.get(segment) if store else None
            if mapped is not None:
                mapped.users += 1
        try:
            yield mapped.mapping if mapped else None
        finally:
            if mapped is not None:
                with self._lock:
                    mapped.users -= 1
                    self._sweep()

    def close(self) -> None:
        """Say bye and unmap. The caller has finished all copies."""
        self._closing.set()
        with self._lock:
            connection = self._connection
        if connection is not None:
            connection.close(bye=True)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                connection = SideConnection(self._side_socket(), self._hello)
            except (OSError, KVStrataError) as error:
                self._cannot_connect(error)
                continue
            self._trouble, self._failures = "", 0
            with self._lock:
                self._connection = connection
                self._stores.setdefault(connection.epoch, _StoreSegments()).over = False
            while not self._closing.is_set() and (received := connection.receive()) is not None:
                self._handle(connection, *received)
            connection.close(bye=self._closing.is_set())
            with self._lock:
                self._connection = None
                self._stores[connection.epoch].over = True
                self._sweep()
            self._closing.wait(self._retry_s)

    def _cannot_connect(self, error: Exception) -> None:
        """Say each new reason once, and ask less and less often; then wait.

        That nobody listens (yet) is for the scheduler side's client to say, and passes soon.
        """
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            self._failures = 0
        elif str(error) != self._trouble:
            self._trouble = str(error)
            log.warning("this worker cannot save or load for now: no connection to the node store: %s", error)
        self._closing.wait(self._retry_s * 2 ** min(self._failures, 3))
        self._failures += 1

    def _handle(self, connection: SideConnection, message: dict[str, object], fds: list[int]) -> None:
        try:
            offered = message.get("segment")
            if not isinstance(offered, dict) or len(fds) > 1:
                log.warning("unexpected side message %s", sorted(message))
                return
            segment, nbytes = int(offered["id"]), int(offered["nbytes"])
            if not fds:
                log.warning("segment %d did not arrive: raise this process's limit of open files", segment)
            usable = bool(fds) and self._take(connection.epoch, segment, fds[0], nbytes)
            connection.send({"registered" if usable else "unusable": segment})
        except (OSError, KeyError, TypeError, ValueError) as error:
            log.warning("an offer of the node store came to nothing: %s", error)
        finally:
            for fd in fds:
                os.close(fd)

    def _take(self, epoch: bytes, segment: int, fd: int, nbytes: int) -> bool:
        """Map an offered segment; False if that cannot be done now. The store offers it again later."""
        with self._lock:
            if segment in self._stores[epoch].segments:
                return True  # kept by a copy over a reconnection to the same store
        try:
            mapping = self._map(fd, nbytes)
        except (OSError, KVStrataError, RuntimeError, ValueError) as error:
            log.warning("segment %d of the host pool is not usable: %s", segment, error)
            return False
        with self._lock:
            self._stores[epoch].segments[segment] = _Counted(mapping)
        return True

    def _map(self, fd: int, nbytes: int) -> MappedSegment:
        mapping = map_segment(fd, nbytes)
        try:
            self._registration.add(mapping)
        except BaseException:
            unmap_segment(mapping)
            raise
        return mapping

    def _sweep(self) -> None:
        """Unmap what belongs to a store that is gone and nobody copies. The lock is held."""
        for epoch, store in list(self._stores.items()):
            if not store.over:
                continue
            for segment, mapped in list(store.segments.items()):
                if not mapped.users:
                    self._registration.remove(mapped.mapping)
                    unmap_segment(mapped.mapping)
                    del store.segments[segment]
            if not store.segments:
                del self._stores[epoch]
