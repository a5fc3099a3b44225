"""Side messages: one JSON object a packet; whatever else arrives, or does not, leaves no descriptor open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.controller.node.side_server import SideServer
from kvstrata.controller.side import MAX_MESSAGE, PROTOCOL, Hello, receive_message, send_message

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_message_and_its_descriptors_arrive(pair: Pair) -> None:
    ours, theirs = pair
    reading, writing = os.pipe()
    send_message(ours, {"segment": {"id": 3}}, [writing])
    received = receive_message(theirs)
    assert received is not None
    message, (fd,) = received
    os.write(fd, b"same pipe")
    assert os.read(reading, 99) == b"same pipe"
    assert message == {"segment": {"id": 3}}
    assert not os.get_inheritable(fd)
    for each in (fd, reading, writing):
        os.close(each)


def test_packets_stay_apart(pair: Pair) -> None:
    ours, theirs = pair
    send_message(ours, {"registered": 1})
    send_message(ours, {"registered": 2})
    assert receive_message(theirs) == ({"registered": 1}, [])
    assert receive_message(theirs) == ({"registered": 2}, [])


def test_the_end_of_the_stream_is_none(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    assert receive_message(theirs) is None


def test_sending_to_nobody_is_an_error(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(OSError):
        send_message(ours, {"bye": True})


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00 random",
        b"{",
        b"[1]",
        b"null",
        b'"hello"',
        b'{"hello": "' + b"x" * MAX_MESSAGE + b'"}',
        b"[" * 4000,
        b"",
    ],
    ids=["bytes", "half", "list", "null", "text", "too long", "nested", "empty"],
)
def test_what_is_no_message_is_an_error_and_its_descriptors_are_closed(pair: Pair, data: bytes) -> None:
    ours, theirs = pair
    before = open_descriptors()
    socket.send_fds(ours, [data], [0, 1])
    with pytest.raises((ValueError, RecursionError)):
        receive_message(theirs)
    assert open_descriptors() == before


def test_more_descriptors_than_a_message_may_bring_are_closed(pair: Pair) -> None:
    ours, theirs = pair
    before = open_descriptors()
    socket.send_fds(ours, [b"{}"], [0] * 40)
    received = receive_message(theirs)
    assert received is not None
    for fd in received[1]:
        os.close(fd)
    assert len(received[1]) < 40
    assert open_descriptors() == before


HELLO = {"client": "engine", "role": "worker", "rank": 1, "protocol": PROTOCOL}


def test_a_hello_says_who_it_is() -> None:
    assert Hello.parse(HELLO) == Hello("engine", "worker", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"client": 7},
        {"client": None},
        {"role": "admin"},
        {"role": ["worker"]},
        {"rank": "1"},
        {"rank": True},
        {"rank": 1.0},
        {"extra": 1},
    ],
)
def test_a_hello_with_other_fields_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a hello"):
        Hello.parse({**HELLO, **change})


@pytest.mark.parametrize("fields", [None, [], "hello", {}, {"client": "engine"}])
def test_what_is_no_hello_is_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match="not a hello"):
        Hello.parse(fields)


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, "1", None])
def test_a_foreign_protocol_is_refused_with_both_versions(protocol: Any) -> None:
    with pytest.raises(
        ValueError, match=f"speaks side protocol {protocol}, this node store speaks {PROTOCOL}"
    ):
        Hello.parse({**HELLO, "protocol": protocol})


async def strangers(path: Path) -> None:
    """One process that says nothing and one that says hello, at a server that waits for 0.2 s."""
    server = SideServer(
        path, bytes(8), lambda event: None, list, 0o600, None, lambda *_: b"", hello_deadline_s=0.2
    )
    server.start()
    silent, polite = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    pidfd = os.pidfd_open(os.getpid())
    for sock in (silent, polite):
        sock.connect(str(path))
        sock.setblocking(False)
    send_message(polite, {"hello": HELLO}, [pidfd])
    loop = asyncio.get_running_loop()
    assert b"welcome" in await asyncio.wait_for(loop.sock_recv(polite, MAX_MESSAGE), 10)
    assert await asyncio.wait_for(loop.sock_recv(silent, 1), 10) == b""
    await asyncio.sleep(0.1)
    assert [c.open for c in server._connections.values()] == [True]
    with pytest.raises(BlockingIOError):
        polite.recv(1)
    server.close()
    for sock in (silent, polite):
        sock.close()
    os.close(pidfd)


def test_who_says_no_hello_is_hung_up_on(runtime_dir: Path) -> None:
    before = open_descriptors()
    asyncio.run(strangers(runtime_dir / "side.sock"))
    assert open_descriptors() == before
