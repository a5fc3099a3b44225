"""The scheduler side's client: the caller posts calls, collects answers, and never waits for the network.

Updates go over gRPC, on a thread. Questions (Match) go over the side socket, on the caller's own thread:
a thread that another one keeps from the GIL would add 10 ms to each. Those for which the socket has no room
go over gRPC, too. While the store is absent, slow or restarting `session` is None and the caller treats
everything as a miss. Calls that fail are answered with `Lost`: the store may or may not have seen them, so
the caller gives back by id what they might have taken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from kvstrata import __version__
from kvstrata.controller.client.segments import SideConnection
from kvstrata.controller.node.launch import start_node
from kvstrata.controller.paths import RuntimePaths, runtime_paths
from kvstrata.controller.side import QUESTION_KEYS_MAX, Hello
from kvstrata.controller.wire import PROTOCOL, why_from_wire
from kvstrata.core.config import Config, as_tree
from kvstrata.core.errors import KVStrataError, NodeUnavailable
from kvstrata.core.events import Match, Matched, Refused, Update, Updated, Why
from kvstrata.core.slots import Slot
from kvstrata.core.units import format_size
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc

log = logging.getLogger("kvstrata.client")

_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_AUTOSTART_EVERY_S = 10.0
_START_PATIENCE_S = 15.0  # how long a store may take to start before the user hears of it
_SPIN_S = 0.0003  # most questions are answered in less; a thread that sleeps may get the GIL back 5 ms later
_IDLE_CHECK_S = 1.0  # how soon an idle engine notices that the store has ended
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer: the store was gone, or slower than the deadline."""


@dataclass(frozen=True, slots=True)
class Session:
    """One stretch of being connected. Leases and jobs belong to the store process, known by its epoch."""

    epoch: bytes


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question under way. `at`: monotonic seconds."""

    session: Session
    call: Match
    at: float


Call = Match | Update
Answer = Matched | Updated | Refused | Lost


class NodeClient:
    """Connects, reconnects, starts the store if need be, and carries calls.

    Args:
        config: the engine's configuration; it also configures a store that has to be started.
        client: unique name of this engine's life.
        slot_sizes: of chunks as this engine stores them, in bytes; the usual one first.
        workers: processes of the engine that copy.
        notify: told once of each new trouble, in words for the user.
    """

    def __init__(
        self,
        config: Config,
        client: str,
        slot_sizes: tuple[int, ...],
        workers: int,
        notify: Callable[[str], None] = log.warning,
    ) -> None:
        self._config, self.client, self._slot_sizes, self._workers = config, client, slot_sizes, workers
        self._notify = notify
        # None: the thread shall look at what has changed.
        self._calls: queue.SimpleQueue[tuple[Session, Call] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Session, Call, Answer]] = queue.SimpleQueue()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable: there may be answers
        self._lock = threading.Lock()  # of the side connection and the next two
        self._asked: dict[int, _Asked] = {}  # by lease, oldest first
        self._taken_in: deque[tuple[Session, Call, Answer]] = deque()  # answers that were read early
        self._closing = threading.Event()
        self._session: Session | None = None
        self._side: SideConnection | None = None
        self._last_trouble = self._last_warning = ""
        self._failures = 0  # since the last session
        self._down_since: float | None = None
        self._last_start = -_AUTOSTART_EVERY_S
        self._folder: Path | None = None  # of the store's sockets
        self._cannot_start = ""  # why the last attempt failed at once
        self._seq = 0
        self._thread = threading.Thread(target=self._run, name="kvstrata-client", daemon=True)
        self._thread.start()

    # --- the caller's side -------------------------------------------------------------------

    @property
    def slot_sizes(self) -> tuple[int, ...]:
        """Bytes of the slots that this engine can use, the usual one first."""
        return self._slot_sizes

    @property
    def session(self) -> Session | None:
        """The current connection; None while everything is a miss."""
        return self._session

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def post(self, session: Session, call: Call) -> None:
        """Send `call`; its answer arrives with `collect`. Questions may overtake Updates, nothing else."""
        if isinstance(call, Match) and len(call.keys) <= QUESTION_KEYS_MAX:
            self._ask(session, call)
        else:
            self._calls.put((session, call))

    def collect(self, wait_s: float = 0.0) -> tuple[Session, Call, Answer] | None:
        """The next answer; waits up to `wait_s` seconds for it."""
        began = time.monotonic()
        deadline = began + wait_s
        while True:
            try:
                return self._answers.get_nowait()
            except queue.Empty:
                pass
            if answered := self._read_answer():
                return answered
            now = time.monotonic()
            if now >= deadline:
                return None
            if not self._asked or now - began > _SPIN_S:
                self._wait(deadline - now)

    def close(self) -> None:
        """Say bye to the store: everything this client held is free. Waits for the thread."""
        self._closing.set()
        self._calls.put(None)
        self._thread.join(timeout=self._config.client.call_deadline + 2)
        if not self._thread.is_alive() and self._news >= 0:
            news, self._news = self._news, -1
            os.close(news)

    # --- questions: on the caller's thread -----------------------------------------------------

    def _ask(self, session: Session, call: Match) -> None:
        request = pb.MatchRequest(client=call.client, lease=call.lease, keys=b"".join(call.keys))
        with self._lock:
            if self._side is not None and self._side.epoch == session.epoch:
                self._take_in()  # or a burst of questions would fill the socket with their answers
                try:
                    self._side.ask(request.SerializeToString())
                except BlockingIOError:  # the store is behind with reading
                    self._calls.put((session, call))
                    return
                except OSError:
                    log.debug("the node store has hung up")
                else:
                    self._asked[call.lease] = _Asked(session, call, time.monotonic())
                    return
        self._answers.put((session, call, Lost()))

    def _read_answer(self) -> tuple[Session, Call, Answer] | None:
        with self._lock:
            self._take_in()
            return self._taken_in.popleft() if self._taken_in else None

    def _take_in(self) -> None:
        """Read all answers that are there. The lock is held."""
        while self._side is not None and (data := self._side.answer()) is not None:
            try:
                reply = pb.MatchReply.FromString(data)
            except DecodeError:
                continue
            if asked := self._asked.pop(reply.lease, None):  # or it comes too late
                self._taken_in.append((asked.session, asked.call, _matched(reply)))

    def _wait(self, timeout_s: float) -> None:
        """Until there may be an answer, or the store has hung up."""
        waiting = select.poll()
        waiting.register(self._news, select.POLLIN)
        with self._lock:
            side = self._side
            if side is not None and not side.ended:  # an end stays readable: nobody could wait on it
                waiting.register(side.fileno(), select.POLLIN | select.POLLRDHUP)
        happened = waiting.poll(timeout_s * 1e3)
        if side is not None and any(fd != self._news and seen & ~select.POLLIN for fd, seen in happened):
            side.ended = True
            self._calls.put(None)  # the thread ends the session at once
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news)

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._keep_connected()
        finally:
            if not self._closing.is_set():  # an error that nobody foresaw: the thread's traceback says which
                self._notify("kvstrata is not used any more: its client ended with an error, see the log")

    def _keep_connected(self) -> None:
        while not self._closing.is_set():
            try:
                paths = runtime_paths(self._config.node)
                self._folder = paths.folder
                self._connected(paths)
            except (KVStrataError, OSError, grpc.RpcError) as error:
                self._trouble(error)
                self._failures += 1
            finally:
                self._session = None
                self._fail_waiting_calls()
            self._closing.wait(_RETRY_S[min(self._failures, len(_RETRY_S) - 1)])
        self._drop_side(bye=True)

    def _connected(self, paths: RuntimePaths) -> None:
        """One session, from connecting to the first failed call."""
        if self._side is None:
            self._side = self._connect_side(paths)
        with grpc.insecure_channel(f"unix:{paths.control}", options=_CHANNEL_OPTIONS) as channel:
            stub = node_pb2_grpc.NodeStoreStub(channel)
            try:
                session = self._open_here(stub, self._side)
                self._session = session
                self._last_trouble, self._failures, self._down_since = "", 0, None
                self._serve(stub, session)
            finally:
                if not self._closing.is_set() and not self._side_alive():
                    self._drop_side(bye=False)

    def _connect_side(self, paths: RuntimePaths) -> SideConnection:
        hello = Hello(self.client, "scheduler", 0)
        try:
            return SideConnection(paths.side, hello)
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._config.node.autostart:
                raise NodeUnavailable(
                    f"no node store at {paths.folder} and node.autostart is off: "
                    f"start one with `kvstrata node --runtime-dir {paths.folder}`"
                ) from None
            if time.monotonic() - self._last_start > _AUTOSTART_EVERY_S:
                self._last_start = time.monotonic()
                self._start()
            if self._cannot_start:
                raise NodeUnavailable(self._cannot_start) from None
            raise

    def _start(self) -> None:
        try:
            start_node(self._config)
            self._cannot_start = ""
        except NodeUnavailable as error:
            self._cannot_start = str(error)

    def _open_here(self, stub: node_pb2_grpc.NodeStoreStub, side: SideConnection) -> Session:
        """Open at the store that `side` is connected to. Another one may have taken its place meanwhile."""
        try:
            session = self._open(stub)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self._drop_side(bye=False)
            raise
        if session.epoch != side.epoch:
            self._drop_side(bye=False)
            raise ConnectionResetError("the node store was replaced by another one")
        return session

    def _open(self, stub: node_pb2_grpc.NodeStoreStub) -> Session:
        reply = stub.Open(
            pb.OpenRequest(
                protocol=PROTOCOL,
                client=self.client,
                slot_bytes=self._slot_sizes,
                workers=self._workers,
                config_json=json.dumps(as_tree(self._config)),
                version=__version__,
            ),
            timeout=self._config.client.call_deadline,
            wait_for_ready=True,
        )
        if reply.conflicts:
            raise NodeUnavailable(
                "the running node store was started with other settings: "
                + "; ".join(reply.conflicts)
                + ". Set them alike, or end the running one (kvstrata node --stop: what it stores is lost), "
                "or use another node.runtime_dir"
            )
        if why_from_wire(reply.refused) is Why.POOL_TOO_SMALL:
            most = max(self._slot_sizes)  # room for less would only lead to the next complaint
            raise NodeUnavailable(
                f"one chunk of this model needs {format_size(most)}, {_no_room(most, reply)}"
            )
        self._mind_largest(reply)
        pool, chunk = format_size(reply.pool_bytes), format_size(self._slot_sizes[0])
        log.info("kvstrata: connected to the node store: host pool of up to %s, %s a chunk", pool, chunk)
        return Session(reply.store_epoch)

    def _mind_largest(self, reply: pb.OpenReply) -> None:
        """Without room for the largest chunks the others are of use still. Said once."""
        usual, largest = self._slot_sizes[0], max(self._slot_sizes)
        if not 0 < reply.slot_bytes_max < largest:  # 0: the store does not tell
            return
        if reply.slot_bytes_max < usual:  # it may still load what others have packed
            text = f"stores nothing of this engine: a chunk needs {format_size(largest)}"
        else:
            text = f"does not keep some chunks: one that does not pack needs {format_size(largest)}"
        text = f"kvstrata {text}, {_no_room(largest, reply)}"
        if text != self._last_warning:
            self._last_warning = text
            self._notify(text)

    def _answered(self, session: Session, call: Call, answer: Answer) -> None:
        self._answers.put((session, call, answer))
        os.eventfd_write(self._news, 1)

    def _is_overdue(self) -> bool:
        """Whether the store owes an answer to a question for too long."""
        with self._lock:
            oldest = next(iter(self._asked.values()), None)
            if oldest is None or time.monotonic() - oldest.at < self._config.client.call_deadline:
                return False
            return self._side is None or not self._side.readable()

    def _serve(self, stub: node_pb2_grpc.NodeStoreStub, session: Session) -> None:
        while True:
            if self._is_overdue():
                self._session = None
                self._lose_questions()
                raise ConnectionResetError("the node store does not answer questions")
            if not self._side_alive():  # looked at after each call too: a busy engine is never idle
                raise ConnectionResetError("the node store has ended, or hung up on this engine")
            try:
                item = self._calls.get(timeout=_IDLE_CHECK_S)
            except queue.Empty:
                continue
            if item is None:
                if self._closing.is_set():
                    return
                continue
            of_session, call = item
            if of_session.epoch != session.epoch:
                self._answered(of_session, call, Lost())
                continue
            try:
                answer = _send(stub, call, self._config.client.call_deadline)
            except grpc.RpcError:
                self._session = None
                self._answered(session, call, Lost())
                raise
            self._answered(session, call, answer)
            if isinstance(answer, Refused) and answer.why is Why.UNKNOWN_CLIENT:
                raise ConnectionResetError("the node store wants this engine to introduce itself again")

    def _fail_waiting_calls(self) -> None:
        while True:
            try:
                item = self._calls.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                self._answered(item[0], item[1], Lost())

    def _side_alive(self) -> bool:
        return self._side is not None and self._side.alive()

    def _drop_side(self, bye: bool) -> None:
        with self._lock:
            side, self._side = self._side, None
            if side is not None:
                side.close(bye)
        self._lose_questions()

    def _lose_questions(self) -> None:
        """Nobody waits for their answers any more. One whose lease is given back gets nothing later."""
        with self._lock:
            lost = list(self._asked.values())
            self._asked.clear()
        for asked in lost:
            self._answered(asked.session, asked.call, Lost())

    def _trouble(self, error: Exception) -> None:
        text = (
            error.details()
            if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call)
            else str(error)
        )
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):  # nobody listens (yet)
            self._down_since = self._down_since or time.monotonic()
            if time.monotonic() - self._down_since < _START_PATIENCE_S:
                return
            text = f"no node store answers in {self._folder}; its node.log says why"
        if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            seconds = self._config.client.call_deadline
            text = f"the node store in {self._folder} did not answer within {seconds:g} s; it is asked again"
        if text != self._last_trouble:
            self._last_trouble = text or ""
            self._notify(f"kvstrata is not used until this changes, every lookup is a miss: {text}")


def _no_room(slot_bytes: int, reply: pb.OpenReply) -> str:
    """Why the store has no slots so large, and what to change."""
    if slot_bytes > reply.pool_bytes:
        return f"the host pool has {format_size(reply.pool_bytes)}: raise host.size or lower chunk.tokens"
    return (
        f"the host pool's segments have up to {format_size(reply.slot_bytes_max)}: set host.segment_size to "
        f"{slot_bytes} bytes or more, or lower chunk.tokens, and end the running node store "
        "(kvstrata node --stop: what it stores is lost)"
    )


def _send(stub: node_pb2_grpc.NodeStoreStub, call: Call, deadline_s: float) -> Answer:
    if isinstance(call, Match):
        request = pb.MatchRequest(
            client=call.client, seq=call.seq, lease=call.lease, keys=b"".join(call.keys)
        )
        return _matched(stub.Match(request, timeout=deadline_s))
    update = stub.Update(_update_request(call), timeout=deadline_s)
    if update.refused:
        return Refused(why_from_wire(update.refused))
    if len(update.grants) != len(call.reserve):
        return Lost()  # nobody can say what was granted: it is given back by id
    return Updated(
        tuple(
            Slot(grant.slot.segment, grant.slot.offset, grant.slot.nbytes)
            if grant.HasField("slot")
            else why_from_wire(grant.why)
            for grant in update.grants
        )
    )


def _matched(reply: pb.MatchReply) -> Answer:
    if reply.refused:
        return Refused(why_from_wire(reply.refused))
    slots = tuple(map(Slot, reply.segments, reply.offsets, reply.nbytes))
    return Matched(slots, reply.being_written)


def _update_request(call: Update) -> pb.UpdateRequest:
    return pb.UpdateRequest(
        client=call.client,
        seq=call.seq,
        reserve=[pb.Reservation(job=job, key=key, nbytes=nbytes) for job, key, nbytes in call.reserve],
        committed=call.committed,
        aborted=call.aborted,
        released=call.released,
        corrupt=call.corrupt,
        used=[b"".join(keys) for keys in call.used],
        leases_held=call.leases_held,
        jobs_held=call.jobs_held,
        drawn=call.drawn,
    )
