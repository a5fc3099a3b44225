"""The store's end of the side socket: what workers are offered, when again, what ends with a connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstrata.controller.node.side_server import SideServer
from kvstrata.controller.node.store import NodeStore
from kvstrata.controller.paths import RuntimePaths
from kvstrata.controller.side import (
    MAX_MESSAGE,
    PROTOCOL,
    receive_message,
    send_match,
    send_message,
)
from kvstrata.core.events import (
    ClientGone,
    ClientResumed,
    ClientStopped,
    Event,
    SegmentRegistered,
    WorkerDisconnected,
)
from tests.controller.stores import MIB, config_for

AGAIN_S = 0.1
NAME = "engine"


class Process:
    """A process of an engine, with one side connection."""

    def __init__(self, path: Path, role: str = "worker", rank: int = 0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(path))
        self.sock.setblocking(False)
        pidfd = os.pidfd_open(os.getpid())
        send_message(
            self.sock, {"hello": {"client": NAME, "role": role, "rank": rank, "protocol": PROTOCOL}}, [pidfd]
        )
        os.close(pidfd)

    def say(self, message: dict[str, Any]) -> None:
        send_message(self.sock, message)

    def take(self) -> Any:
        """The next message, if one is there."""
        try:
            received = receive_message(self.sock)
        except BlockingIOError:
            return None
        assert received is not None, "the store hung up"
        message, fds = received
        for fd in fds:
            os.close(fd)
        return message

    async def next(self) -> Any:
        while (message := self.take()) is None:
            await asyncio.sleep(0.01)
        return message

    async def offer(self, server: SideServer) -> int:
        """The next segment that is offered, with somebody who asks for it all the time."""
        while (message := self.take()) is None:
            server.offer_segments()
            await asyncio.sleep(0.01)
        return int(message["segment"]["id"])

    async def hung_up(self) -> bool:
        return await asyncio.get_running_loop().sock_recv(self.sock, 1) == b""


@asynccontextmanager
async def serving(
    path: Path, events: list[Event], segments: list[tuple[int, int, int]]
) -> AsyncIterator[SideServer]:
    def answer(client: str, question: bytes) -> bytes:
        if question == b"nonsense":
            raise ValueError("not a question")
        return client.encode() + b" asked " + question

    server = SideServer(path, bytes(8), events.append, lambda: segments, 0o600, None, answer, again_s=AGAIN_S)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("kvstrata-test")
    yield fd
    os.close(fd)


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "side.sock"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


# ------------------------------------------------------------------------------------------- offers


def test_what_does_not_fit_a_socket_is_sent_once_it_does(
    runtime_dir: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 500
    offers = [(number, 4096, memory) for number in range(count)]
    monkeypatch.setattr(NodeStore, "_segments", lambda self: offers)

    async def scenario() -> None:
        store = NodeStore(config_for(runtime_dir), RuntimePaths(runtime_dir), 8 * MIB)
        running = asyncio.create_task(store.run())
        await asyncio.sleep(0)
        worker = Process(runtime_dir / "side.sock")
        assert "welcome" in await worker.next()
        store.side.client_opened(NAME)
        (connection,) = store.side._connections.values()
        assert len(connection.offers) < count, "too few to fill a socket"
        offered = [await worker.next() for _ in range(count)]
        assert [message["segment"]["id"] for message in offered] == list(range(count))
        store.ending.set()
        await running
        worker.sock.close()

    run(scenario())


def test_a_segment_that_a_worker_cannot_use_is_offered_again_after_a_while(path: Path, memory: int) -> None:
    async def scenario() -> None:
        async with serving(path, [], [(0, 4096, memory), (1, 4096, memory)]) as server:
            worker = Process(path)
            await worker.next()
            server.client_opened(NAME)
            assert [await worker.offer(server), await worker.offer(server)] == [0, 1]
            for pause_s in (AGAIN_S, 2 * AGAIN_S):
                since = time.monotonic()
                worker.say({"unusable": 1})
                assert await worker.offer(server) == 1
                assert time.monotonic() - since >= pause_s
            worker.say({"registered": 1})
            await asyncio.sleep(5 * AGAIN_S)
            server.offer_segments()
            assert worker.take() is None
            worker.sock.close()

    run(scenario())


@pytest.mark.parametrize("segment", [1, -1, 10**30, "x", None])
def test_only_what_was_offered_can_be_unusable(path: Path, memory: int, segment: Any) -> None:
    async def scenario() -> None:
        async with serving(path, [], [(0, 4096, memory)]) as server:
            worker = Process(path)
            await worker.next()
            server.client_opened(NAME)
            await worker.offer(server)
            worker.say({"unusable": segment})
            assert await worker.hung_up()
            worker.sock.close()

    run(scenario())


@pytest.mark.parametrize("message", [{"registered": 0}, {"unusable": 0}])
def test_only_a_worker_speaks_of_segments(path: Path, memory: int, message: dict[str, Any]) -> None:
    async def scenario() -> None:
        events: list[Event] = []
        async with serving(path, events, [(0, 4096, memory)]) as server:
            scheduler = Process(path, role="scheduler")
            await scheduler.next()
            server.client_opened(NAME)
            scheduler.say(message)
            assert await scheduler.hung_up()
            assert events == [ClientResumed(NAME), ClientStopped(NAME)]
            scheduler.sock.close()

    run(scenario())


# ------------------------------------------------------------------------------ the end of a connection


def test_registrations_end_with_the_worker_s_connection(path: Path) -> None:
    async def scenario() -> None:
        events: list[Event] = []
        async with serving(path, events, []):
            scheduler, worker = Process(path, role="scheduler"), Process(path, rank=3)
            await scheduler.next()
            await worker.next()
            events.clear()
            worker.sock.close()
            scheduler.sock.close()
            while len(events) < 3:
                await asyncio.sleep(0.01)
            assert events == [ClientStopped(NAME), WorkerDisconnected(NAME, 3), ClientStopped(NAME)]

    run(scenario())


def test_what_a_broken_connection_still_says_does_not_count_for_the_new_one(path: Path) -> None:
    async def scenario() -> None:
        events: list[Event] = []
        async with serving(path, events, []) as server:
            broken = Process(path)
            await broken.next()
            for segment in range(1, 30):
                broken.say({"registered": segment})
            broken.sock.close()
            back = Process(path)  # its hello is read before the last of those
            await back.next()
            back.say({"registered": 100})
            while SegmentRegistered(NAME, 0, 100) not in events:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            last = len(events) - events[::-1].index(WorkerDisconnected(NAME, 0))
            assert events[last:] == [ClientResumed(NAME), SegmentRegistered(NAME, 0, 100)]
            assert [c.open for c in server._connections.values()] == [True]
            back.sock.close()

    run(scenario())


@pytest.mark.parametrize("role", ["scheduler", "worker"])
def test_only_the_scheduler_side_asks_questions(path: Path, role: str) -> None:
    async def run() -> None:
        async with serving(path, [], []):
            process = Process(path, role)
            await process.next()  # the welcome
            send_match(process.sock, b"what is there?")
            if role == "worker":
                assert await process.hung_up()
                return
            assert await process.next() == b"engine asked what is there?"
            process.sock.close()

    asyncio.run(run())


@pytest.mark.parametrize("question", [b"nonsense", b"x" * (MAX_MESSAGE + 1)], ids=["nonsense", "too long"])
def test_what_is_no_question_ends_the_connection(path: Path, question: bytes) -> None:
    async def run() -> None:
        async with serving(path, [], []):
            process = Process(path, "scheduler")
            await process.next()
            send_match(process.sock, question)
            assert await process.hung_up()

    asyncio.run(run())


def test_a_bye_behind_a_question_is_heard_though_nobody_takes_the_answer(path: Path) -> None:
    events: list[Event] = []

    async def run() -> None:
        async with serving(path, events, []) as server:
            process = Process(path, "scheduler")
            await process.next()
            send_match(process.sock, b"what is there?")
            process.say({"bye": True})
            process.sock.close()
            while ClientGone(NAME) not in events:
                await asyncio.sleep(0.01)
            assert not server._connections

    asyncio.run(asyncio.wait_for(run(), 10))


def test_who_is_slow_to_take_answers_loses_none(path: Path) -> None:
    """An engine in a long step: the store keeps the answer for which there is no room, and reads on later."""

    async def run() -> None:
        async with serving(path, [], []):
            process = Process(path, "scheduler")
            await process.next()
            questions = [f"{number:04}".encode() * 4096 for number in range(60)]
            asked = 0
            for _ in range(100):  # until neither socket takes anything more
                with contextlib.suppress(BlockingIOError):
                    while asked < len(questions):
                        send_match(process.sock, questions[asked])
                        asked += 1
                await asyncio.sleep(0.001)
            assert 20 < asked < len(questions), "both buffers have to be full for this to show anything"
            for question in questions[:asked]:
                assert await process.next() == b"engine asked " + question
            send_match(process.sock, b"what is there?")
            assert await process.next() == b"engine asked what is there?"
            process.sock.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_answer_that_cannot_be_sent_later_either_ends_the_connection(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[OSError] = [BlockingIOError(), OSError(errno.ENOBUFS, "no buffers")]

    def fail(sock: socket.socket, body: bytes) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("kvstrata.controller.node.side_server.send_match", fail)
    events: list[Event] = []

    async def run() -> None:
        async with serving(path, events, []):
            process = Process(path, "scheduler")
            await process.next()
            send_match(process.sock, b"what is there?")
            assert await process.hung_up()
            process.sock.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert errors == []
    assert events == [ClientResumed(NAME), ClientStopped(NAME)]


def test_who_has_given_up_waiting_for_a_welcome_leaves_nothing(path: Path) -> None:
    """As an engine that is closed while the store stands still."""

    async def scenario() -> None:
        events: list[Event] = []
        async with serving(path, events, []) as server:
            before = len(list(Path("/proc/self/fd").iterdir()))
            given_up = Process(path)
            given_up.sock.close()  # before the store has read its hello
            await asyncio.sleep(0.1)
            assert len(list(Path("/proc/self/fd").iterdir())) == before
            assert events == []
            process = Process(path)
            assert "welcome" in await process.next()
            assert server.lives.is_open(NAME, ("worker", 0))
            process.sock.close()

    run(scenario())
