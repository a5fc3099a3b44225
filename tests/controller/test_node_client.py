"""An engine's end of the wire: whatever the other end is or is not, nothing escapes and nothing hangs."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.controller.client import MappedSegment, NodeClient, SegmentMap
from kvstrata.controller.client.node import _send
from kvstrata.controller.side import Hello
from kvstrata.core.config import Config
from kvstrata.core.events import Match, Refused, Update, Updated
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.storage_backends.host import unmap_segment
from tests.controller.stores import SLOT, Engine, RunningStore, config_for, key, wait_for

StartEngine = Callable[..., Engine]
EPOCH = b"epoch 1."
WELCOME = {"welcome": {"epoch": EPOCH.hex()}}

unhandled = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


# ------------------------------------------------------------------------------------- no store


def test_without_a_store_everything_is_a_miss_and_it_is_said_once(
    config: Config, engines: StartEngine
) -> None:
    engine = engines(config, "engine")
    wait_for("a word about it", lambda: engine.troubles)
    time.sleep(1.5)
    assert engine.client.session is None
    assert engine.client.collect() is None
    (trouble,) = engine.troubles
    assert f"no node store at {config.node.runtime_dir} and node.autostart is off" in trouble
    assert f"start one with `kvstrata node --runtime-dir {config.node.runtime_dir}`" in trouble


def test_a_store_is_started_when_there_is_none(runtime_dir: Path, engines: StartEngine) -> None:
    config = config_for(runtime_dir, node={"autostart": True})
    store = RunningStore(config)
    try:
        first, second = engines(config, "first"), engines(config, "second")
        first.save(key(1))
        second.reserve(key(2))
        assert first.session().epoch == second.session().epoch
        assert getattr(second.match(key(1)), "slots", ())
        assert first.troubles == second.troubles == []
        for engine in (first, second):
            engine.close()
    finally:
        store.stop()


def test_a_store_that_cannot_be_started_is_said_once(runtime_dir: Path, engines: StartEngine) -> None:
    config = config_for(runtime_dir / "file", node={"autostart": True})
    (runtime_dir / "file").touch()
    engine = engines(config, "engine")
    wait_for("a word about it", lambda: engine.troubles)
    time.sleep(1.0)
    (trouble,) = engine.troubles
    assert f"{runtime_dir / 'file'} is not a folder" in trouble


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_close_does_not_wait_for_a_store_that_never_comes(config: Config, after_s: float) -> None:
    client = NodeClient(config, "engine", (SLOT,), 1, notify=lambda text: None)
    time.sleep(after_s)
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 2.0
    assert not client._thread.is_alive()


# --------------------------------------------------------------------------------- a store that lies


class FakeSide:
    """Answers hellos on a side socket as a test wants. `hellos` counts them."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], None]) -> None:
        self.hellos = 0
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, name="fake-side", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
                self._open.append(sock)
                _, fds, _, _ = socket.recv_fds(sock, 4096, 4)
                for fd in fds:
                    os.close(fd)
                self.hellos += 1
                self._answer(sock)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            sock.close()


@pytest.fixture
def fake_side(runtime_dir: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], FakeSide]]:
    started: list[FakeSide] = []

    def start(answer: Callable[[socket.socket], None]) -> FakeSide:
        started.append(FakeSide(runtime_dir / "side.sock", answer))
        return started[-1]

    yield start
    for fake in started:
        fake.close()


def says(data: bytes) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        sock.send(data)
        sock.close()

    return answer


StartFake = Callable[[Callable[[socket.socket], None]], FakeSide]
WELCOMES = [
    pytest.param(b"", id="hangs up"),
    pytest.param(b"no JSON", id="no JSON"),
    pytest.param(b"{}", id="empty"),
    pytest.param(b'{"welcome": 7}', id="a number"),
]


@unhandled
@pytest.mark.parametrize("data", WELCOMES)
def test_the_scheduler_side_asks_again_whatever_the_welcome_was(
    config: Config, fake_side: StartFake, data: bytes
) -> None:
    fake = fake_side(says(data))
    client = NodeClient(config, "engine", (SLOT,), 1, notify=lambda text: None)
    wait_for("a second hello", lambda: fake.hellos >= 2, 1.5)
    assert client.session is None
    client.close()


@unhandled
@pytest.mark.parametrize("data", WELCOMES)
def test_a_worker_asks_again_whatever_the_welcome_was(
    runtime_dir: Path, fake_side: StartFake, data: bytes
) -> None:
    fake = fake_side(says(data))
    segments = SegmentMap(lambda: runtime_dir / "side.sock", Hello("engine", "worker", 0), retry_s=0.05)
    wait_for("a second hello", lambda: fake.hellos >= 2, 1.0)
    segments.close()


@unhandled
def test_a_worker_says_once_why_it_cannot_connect(
    runtime_dir: Path, fake_side: StartFake, caplog: pytest.LogCaptureFixture
) -> None:
    fake = fake_side(says(b"{}"))
    segments = SegmentMap(lambda: runtime_dir / "side.sock", Hello("engine", "worker", 0), retry_s=0.01)
    wait_for("a third hello", lambda: fake.hellos >= 3, 2.0)
    segments.close()
    assert len([one for one in caplog.messages if "cannot save or load for now" in one]) == 1


class Stub:
    """A control plane that answers what a test wants."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    def Match(self, request: pb.MatchRequest, timeout: float) -> Any:
        return self._reply

    Update = Match


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        (Match("engine", 1, 1, ()), pb.MatchReply(refused=99)),
        (Update("engine", 1), pb.UpdateReply(refused=99)),
        (Update("engine", 1, reserve=((1, key(1), SLOT),)), pb.UpdateReply(grants=[pb.Grant(why=99)])),
    ],
    ids=["match", "update", "grant"],
)
def test_a_reason_that_only_a_newer_store_knows_is_a_refusal(call: Match | Update, reply: Any) -> None:
    answer = _send(Stub(reply), call, 1.0)  # type: ignore[arg-type]
    assert isinstance(answer, Refused | Updated)


# ---------------------------------------------------------------------------------- segments of a worker


class Noting:
    """A registration that tells of each new mapping."""

    def __init__(self, on_mapped: Callable[[MappedSegment], None]) -> None:
        self.add = on_mapped

    def remove(self, mapping: MappedSegment) -> None:
        """Nothing was done."""


class Worker:
    """A segment map that talks to a fake store over `sock`."""

    def __init__(
        self, fake_side: StartFake, folder: Path, on_mapped: Callable[[MappedSegment], None]
    ) -> None:
        self._sockets: list[socket.socket] = []
        fake_side(self._welcome)
        self.map = SegmentMap(
            lambda: folder / "side.sock", Hello("engine", "worker", 0), Noting(on_mapped), retry_s=0.05
        )
        wait_for("the hello", lambda: self._sockets)

    def _welcome(self, sock: socket.socket) -> None:
        sock.settimeout(1.0)
        sock.send(json.dumps(WELCOME).encode())
        self._sockets.append(sock)

    @property
    def sock(self) -> socket.socket:
        return self._sockets[-1]

    def offer(self, message: Any, *fds: int) -> None:
        socket.send_fds(self.sock, [json.dumps(message).encode()], list(fds))

    def said(self) -> Any:
        return json.loads(self.sock.recv(4096))

    def mapping(self, segment: int, epoch: bytes = EPOCH) -> MappedSegment | None:
        with self.map.use(epoch, segment) as mapping:
            return mapping

    def reconnect(self) -> None:
        before = len(self._sockets)
        self.sock.close()
        wait_for("the worker to come back", lambda: len(self._sockets) > before)


@pytest.fixture
def memory() -> Iterator[int]:
    """A descriptor of memory that a store might offer; `mappings` counts who maps it."""
    fd = os.memfd_create("kvstrata-test")
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


def mappings(memory: int) -> list[MappedSegment]:
    """Where this process maps `memory`."""
    inode = str(os.fstat(memory).st_ino)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [tuple(int(part, 16) for part in fields[0].split("-")) for fields in lines if fields[4] == inode]
    return [MappedSegment(first, last - first) for first, last in ranges]


@pytest.fixture
def worker(fake_side: StartFake, runtime_dir: Path, memory: int) -> Iterator[Worker]:
    worker = Worker(fake_side, runtime_dir, lambda mapping: None)
    yield worker
    worker.map.close()
    assert mappings(memory) == []


def segment(number: int, nbytes: int = 4096) -> dict[str, Any]:
    return {"segment": {"id": number, "nbytes": nbytes}}


def test_an_offered_segment_is_mapped_and_registered(worker: Worker, memory: int) -> None:
    worker.offer(segment(3), memory)
    assert worker.said() == {"registered": 3}
    mapping = worker.mapping(3)
    assert mapping is not None
    assert mapping.nbytes == 4096
    assert worker.mapping(4) is None
    assert worker.mapping(3, b"epoch 2.") is None


def test_a_segment_is_announced_once_it_is_registered_with_the_device(
    fake_side: StartFake, runtime_dir: Path, memory: int
) -> None:
    registered: list[MappedSegment] = []
    worker = Worker(fake_side, runtime_dir, registered.append)
    worker.offer(segment(0), memory)
    assert worker.said() == {"registered": 0}
    assert registered == [worker.mapping(0)]
    worker.map.close()


def test_what_is_no_offer_is_passed_over(worker: Worker, memory: int) -> None:
    worker.offer({"news": 1})
    worker.offer({"segment": 7}, memory)
    worker.offer(segment(2), memory, memory)
    worker.offer(segment(3), memory)
    assert worker.said() == {"registered": 3}
    assert [worker.mapping(number) is not None for number in range(4)] == [False, False, False, True]


def test_a_segment_whose_descriptor_did_not_arrive_is_called_unusable(worker: Worker, memory: int) -> None:
    """As when the process has too many open files: the kernel drops the descriptor, not the message."""
    worker.offer(segment(1))
    assert worker.said() == {"unusable": 1}
    worker.offer(segment(1), memory)
    assert worker.said() == {"registered": 1}


def test_a_segment_that_cannot_be_mapped_is_called_unusable(worker: Worker, memory: int) -> None:
    reading, writing = os.pipe()
    worker.offer(segment(1), reading)
    assert worker.said() == {"unusable": 1}
    assert worker.mapping(1) is None
    worker.offer(segment(1), memory)
    assert worker.said() == {"registered": 1}
    os.close(reading)
    os.close(writing)


@unhandled
@pytest.mark.parametrize("offer", [{"id": 1}, {"id": "x", "nbytes": 1}])
def test_an_offer_with_other_fields_is_passed_over(worker: Worker, memory: int, offer: Any) -> None:
    worker.offer({"segment": offer}, memory)
    worker.offer(segment(3), memory)
    assert worker.said() == {"registered": 3}


@unhandled
@pytest.mark.parametrize("error", [OSError("cannot pin"), RuntimeError("cannot pin")])
def test_a_segment_that_the_device_refuses_is_neither_registered_nor_kept(
    fake_side: StartFake, runtime_dir: Path, memory: int, error: Exception
) -> None:
    def refuse_first(mapping: MappedSegment) -> None:
        if mapping.nbytes == 2048:
            raise error

    worker = Worker(fake_side, runtime_dir, refuse_first)
    worker.offer(segment(1, nbytes=2048), memory)
    worker.offer(segment(2), memory)
    try:
        assert worker.said() == {"unusable": 1}
        assert worker.said() == {"registered": 2}
        assert worker.mapping(1) is None
        assert mappings(memory) == [worker.mapping(2)]
    finally:
        worker.map.close()


def test_segments_of_a_lost_connection_are_unmapped_once_nobody_uses_them(
    worker: Worker, memory: int
) -> None:
    for number in (1, 2):
        worker.offer(segment(number), memory)
        worker.said()
    with worker.map.use(EPOCH, 1) as mapping:
        worker.reconnect()
        wait_for("the other to be unmapped", lambda: mappings(memory) == [mapping])
        assert worker.mapping(1) == mapping


def test_a_segment_offered_again_while_it_is_used_is_mapped_once(worker: Worker, memory: int) -> None:
    worker.offer(segment(1), memory)
    worker.said()
    with worker.map.use(EPOCH, 1):
        worker.reconnect()
        worker.offer(segment(1), memory)
        worker.said()
    mapped = len(mappings(memory))
    worker.map.close()
    left = mappings(memory)
    for mapping in left:  # so that the fixture finds the house in order
        unmap_segment(mapping)
    assert (mapped, left) == (1, [])


def test_a_real_store_s_segments_arrive_and_go(shared_store: RunningStore, engines: StartEngine) -> None:
    def pools() -> list[str]:
        return [
            line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:kvstrata " in line
        ]

    assert pools() == []
    engine = engines(shared_store.config, "engine", workers=2)
    (slot,) = engine.reserve(key(1))
    epoch = engine.session().epoch
    for segments in engine.segments:
        with segments.use(epoch, slot.segment) as mapping:
            assert mapping is not None
            assert slot.offset + slot.nbytes <= mapping.nbytes
    engine.close()
    assert pools() == []
    engine.close()
