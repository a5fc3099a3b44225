"""The side socket's messages: one JSON object a packet, descriptors beside it; or a question.

client -> store   {"hello": {...}} + pidfd of the client     who I am; this descriptor says when I am gone
store  -> client  {"welcome": {"epoch": hex}}
store  -> worker  {"segment": {"id": n, "nbytes": n}} + memfd
worker -> store   {"registered": n}                           mapped, and registered with the device
worker -> store   {"unusable": n}                             could not be; offer it again later
client -> store   {"bye": true}                               all my copies are done
scheduler -> store  "M" + MatchRequest                        what of this prompt is there?
store -> scheduler  "M" + MatchReply                          in the order of the questions

The connection is the client's life: when it ends the store grants nothing more, and when the
pidfd fires, or after a bye, what the client held is free.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from kvstrata.core.lives import ProcessId

MAX_MESSAGE = 128 << 10
PROTOCOL = 2
QUESTION = b"M"  # no JSON object begins so
QUESTION_KEYS_MAX = 2048  # longer prompts ask over gRPC

# Python's own socket lets go of the GIL even where it does not wait, and gets it back after 5 ms if another
# thread computes. vLLM's does when requests come in, and their questions are asked then.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
_libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.send.restype = _libc.recv.restype = ctypes.c_ssize_t


@dataclass(frozen=True, slots=True)
class Hello:
    """How a process of an engine introduces itself on the side socket."""

    client: str
    role: str  # "scheduler" or "worker"
    rank: int
    protocol: int = PROTOCOL

    @property
    def process(self) -> ProcessId:
        """Which one of its engine."""
        return self.role, self.rank

    @classmethod
    def parse(cls, fields: Any) -> Hello:
        """Raises ValueError for anything that is not a hello of this protocol."""
        if not isinstance(fields, dict) or set(fields) != {"client", "role", "rank", "protocol"}:
            raise ValueError("not a hello")
        hello = cls(**fields)
        if hello.protocol != PROTOCOL:
            raise ValueError(f"speaks side protocol {hello.protocol}, this node store speaks {PROTOCOL}")
        if (
            not isinstance(hello.client, str)
            or hello.role not in ("scheduler", "worker")
            or type(hello.rank) is not int
        ):
            raise ValueError("not a hello")
        return hello


def send_message(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """One packet. Raises OSError when the peer is gone."""
    data = json.dumps(message, separators=(",", ":")).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary)


def send_match(sock: socket.socket, body: bytes) -> None:
    """One MatchRequest or MatchReply; never waits.

    Raises:
        BlockingIOError: the peer does not read.
        OSError: it is gone.
    """
    data = QUESTION + body
    if _libc.send(sock.fileno(), data, len(data), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def receive_match(sock: socket.socket, room: ctypes.Array[ctypes.c_char]) -> bytes | None:
    """The next answer to a question; None if there is none yet, or the peer is gone.

    Args:
        room: `MAX_MESSAGE` bytes to read into.
    """
    nbytes = _libc.recv(sock.fileno(), room, MAX_MESSAGE, socket.MSG_DONTWAIT)
    data = ctypes.string_at(room, max(0, nbytes))
    return data[len(QUESTION) :] if data.startswith(QUESTION) else None


def receive_message(sock: socket.socket) -> tuple[dict[str, Any] | bytes, list[int]] | None:
    """The next packet and its descriptors, which the caller owns; None at end of stream. A question is bytes.

    Raises:
        ValueError: the packet is not a JSON object, or too long.
        OSError: the connection broke.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data and not fds:
        return None
    try:
        if flags & socket.MSG_TRUNC:
            raise ValueError("side message too long")
        if data.startswith(QUESTION):
            return data[len(QUESTION) :], list(fds)
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("side message is not an object")
    except (ValueError, RecursionError):
        for fd in fds:
            os.close(fd)
        raise
    return message, list(fds)
