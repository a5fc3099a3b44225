"""The scheduler side's client: one thread speaks gRPC, the caller never waits for the network.

The caller posts calls and collects answers from a queue; a call costs it about 0.1 ms. While
the store is absent, slow or restarting `session` is None and the caller treats everything as a miss.
Calls that fail are answered with `Lost`: the store may or may not have seen them, so the caller
gives back by id what they might have taken.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstrata import __version__
from kvstrata.controller.client.segments import SideConnection
from kvstrata.controller.node.launch import start_node
from kvstrata.controller.paths import RuntimePaths, runtime_paths
from kvstrata.controller.side import Hello
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
_IDLE_CHECK_S = 1.0  # how soon an idle engine notices that the store has ended
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer: the store was gone, or slower than the deadline."""


@dataclass(frozen=True, slots=True)
class Session:
    """One stretch of being connected. Leases and jobs belong to the store process, known by its epoch."""

    epoch: bytes


Call = Match | Update
Answer = Matched | Updated | Refused | Lost


class NodeClient:
    """Connects, reconnects, starts the store if need be, and carries calls.

    Args:
        config: the engine's configuration; it also configures a store that has to be started.
        client: unique name of this engine's life.
        slot_bytes: size of one chunk's slot.
        workers: processes of the engine that copy.
        notify: told once of each new trouble, in words for the user.
    """

    def __init__(
        self,
        config: Config,
        client: str,
        slot_bytes: int,
        workers: int,
        notify: Callable[[str], None] = log.warning,
    ) -> None:
        self._config, self.client, self._slot_bytes, self._workers = config, client, slot_bytes, workers
        self._notify = notify
        self._calls: queue.SimpleQueue[tuple[Session, Call] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Session, Call, Answer]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._session: Session | None = None
        self._side: SideConnection | None = None
        self._last_trouble = ""
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
    def session(self) -> Session | None:
        """The current connection; None while everything is a miss."""
        return self._session

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def post(self, session: Session, call: Call) -> None:
        """Send `call`; its answer arrives with `collect`. Calls go out in the order of posting."""
        self._calls.put((session, call))

    def collect(self, wait_s: float = 0.0) -> tuple[Session, Call, Answer] | None:
        """The next answer; waits up to `wait_s` seconds for it."""
        try:
            return self._answers.get(timeout=wait_s) if wait_s > 0 else self._answers.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Say bye to the store: everything this client held is free. Waits for the thread."""
        self._closing.set()
        self._calls.put(None)
        self._thread.join(timeout=self._config.client.call_deadline + 2)

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
                    "start one with `kvstrata node`"
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
                slot_bytes=self._slot_bytes,
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
                + ". Set them alike, or use another node.runtime_dir"
            )
        if why_from_wire(reply.refused) is Why.POOL_TOO_SMALL:
            raise NodeUnavailable(
                f"one chunk of this model needs {format_size(self._slot_bytes)}, the host pool has "
                f"{format_size(reply.pool_bytes)}: raise host.size or lower chunk.tokens"
            )
        pool, chunk = format_size(reply.pool_bytes), format_size(self._slot_bytes)
        log.info("kvstrata: connected to the node store: host pool of up to %s, %s a chunk", pool, chunk)
        return Session(reply.store_epoch)

    def _serve(self, stub: node_pb2_grpc.NodeStoreStub, session: Session) -> None:
        while True:
            try:
                item = self._calls.get(timeout=_IDLE_CHECK_S)
            except queue.Empty:
                if not self._side_alive():
                    raise ConnectionResetError("the node store has ended") from None
                continue
            if item is None:
                return
            of_session, call = item
            if of_session.epoch != session.epoch:
                self._answers.put((of_session, call, Lost()))
                continue
            try:
                answer = _send(stub, call, self._slot_bytes, self._config.client.call_deadline)
            except grpc.RpcError:
                self._session = None
                self._answers.put((session, call, Lost()))
                raise
            self._answers.put((session, call, answer))
            if isinstance(answer, Refused) and answer.why is Why.UNKNOWN_CLIENT:
                raise ConnectionResetError("the node store wants this engine to introduce itself again")
            if isinstance(answer, Refused) and answer.why is Why.STOPPED and not self._side_alive():
                raise ConnectionResetError("the node store has hung up on this engine")

    def _fail_waiting_calls(self) -> None:
        while True:
            try:
                item = self._calls.get_nowait()
            except queue.Empty:
                return
            if item is None:  # close() was called
                self._calls.put(None)
                return
            self._answers.put((item[0], item[1], Lost()))

    def _side_alive(self) -> bool:
        return self._side is not None and self._side.alive()

    def _drop_side(self, bye: bool) -> None:
        if self._side is not None:
            self._side.close(bye)
            self._side = None

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
        if text != self._last_trouble:
            self._last_trouble = text or ""
            self._notify(f"kvstrata is not used for now, every lookup is a miss: {text}")


def _send(stub: node_pb2_grpc.NodeStoreStub, call: Call, slot_bytes: int, deadline_s: float) -> Answer:
    if isinstance(call, Match):
        request = pb.MatchRequest(
            client=call.client, seq=call.seq, lease=call.lease, keys=b"".join(call.keys)
        )
        reply = stub.Match(request, timeout=deadline_s)
        if reply.refused:
            return Refused(why_from_wire(reply.refused))
        return Matched(tuple(Slot(s.segment, s.offset, slot_bytes) for s in reply.slots), reply.being_written)
    update = stub.Update(_update_request(call), timeout=deadline_s)
    if update.refused:
        return Refused(why_from_wire(update.refused))
    return Updated(
        tuple(
            Slot(grant.slot.segment, grant.slot.offset, slot_bytes)
            if grant.HasField("slot")
            else why_from_wire(grant.why)
            for grant in update.grants
        )
    )


def _update_request(call: Update) -> pb.UpdateRequest:
    return pb.UpdateRequest(
        client=call.client,
        seq=call.seq,
        reserve=[pb.Reservation(job=job, key=key) for job, key in call.reserve],
        committed=call.committed,
        aborted=call.aborted,
        released=call.released,
        corrupt=call.corrupt,
        used=[b"".join(keys) for keys in call.used],
        leases_held=call.leases_held,
        jobs_held=call.jobs_held,
    )
