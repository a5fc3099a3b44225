"""The host pool: memory of a fixed size that is really there, really shared, and really given back."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.storage_backends.host import HostPool, MappedSegment, MappingError, map_segment, unmap_segment

MIB = 1 << 20
HUGE_PAGE = 2 << 20


@pytest.fixture
def pool() -> Iterator[HostPool]:
    pool = HostPool()
    yield pool
    pool.close()


def mapped_segments() -> list[str]:
    """This process's mappings of any host pool."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:kvstrata" in line]


def open_segments() -> list[str]:
    """This process's descriptors of any host pool."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [link for link in links if "memfd:kvstrata" in link]


def resident(mapping: MappedSegment) -> int:
    """Bytes of `mapping` that are in memory, on this process's account (PSS: shared pages count in part)."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(part, 16) for part in found.groups())
            inside = mapping.address <= first and last <= mapping.address + mapping.nbytes
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


# ------------------------------------------------------------------------------------------ what it is


@pytest.mark.parametrize("nbytes", [4096, MIB, 3 * MIB + 4096, 32 * MIB, 5_000_001])
def test_a_segment_is_as_large_as_was_asked(pool: HostPool, nbytes: int) -> None:
    segment = pool.make_segment(nbytes)
    assert os.fstat(pool.descriptor(segment)).st_size == nbytes
    assert pool.mapping(segment).nbytes == nbytes
    assert pool.nbytes == nbytes


@pytest.mark.parametrize("nbytes", [4096, 3 * MIB + 4096, 32 * MIB])
def test_a_mapping_starts_on_a_huge_page_and_reaches_no_further_than_its_segment(
    pool: HostPool, nbytes: int
) -> None:
    mapping = pool.mapping(pool.make_segment(nbytes))
    assert mapping.address % HUGE_PAGE == 0
    assert len(mapped_segments()) == 1
    first, last = (int(part, 16) for part in mapped_segments()[0].split()[0].split("-"))
    assert (first, last) == (mapping.address, mapping.address + nbytes)


def test_the_size_of_a_segment_is_sealed(pool: HostPool) -> None:
    fd = pool.descriptor(pool.make_segment(MIB))
    for size in (0, MIB // 2, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x8)  # F_SEAL_WRITE: nobody can take the pool's writers away
    assert os.fstat(fd).st_size == MIB


def test_a_segment_has_no_name_and_no_heirs(pool: HostPool) -> None:
    fd = pool.descriptor(pool.make_segment(MIB))
    assert os.fstat(fd).st_nlink == 0
    assert not os.get_inheritable(fd)


def test_segments_have_numbers_that_are_never_used_twice(pool: HostPool) -> None:
    assert [pool.make_segment(4096) for _ in range(3)] == [0, 1, 2]
    pool.close()
    assert pool.make_segment(4096) == 3


# ------------------------------------------------------------------------------------- really there


@pytest.mark.parametrize("nbytes", [64 * MIB, 17 * MIB + 4096])
def test_a_new_segment_is_in_memory_before_anybody_copies_into_it(pool: HostPool, nbytes: int) -> None:
    assert resident(pool.mapping(pool.make_segment(nbytes))) == pytest.approx(nbytes, rel=0.05)


def test_a_new_segment_is_empty(pool: HostPool) -> None:
    mapping = pool.mapping(pool.make_segment(3 * MIB))
    assert ctypes.string_at(mapping.address, mapping.nbytes).count(0) == mapping.nbytes


def test_making_a_segment_can_be_stopped_between_steps(pool: HostPool) -> None:
    asked = iter([False, False, True])
    with pytest.raises(MappingError, match="stopped"):
        pool.make_segment(64 * MIB, should_stop=lambda: next(asked))
    assert (pool.nbytes, mapped_segments(), open_segments()) == (0, [], [])


def test_more_memory_than_there_is_addresses_for_is_refused_and_leaves_nothing(pool: HostPool) -> None:
    with pytest.raises(OSError):
        pool.make_segment(1 << 62)
    assert (pool.nbytes, mapped_segments(), open_segments()) == (0, [], [])


# ------------------------------------------------------------------------------------------ really shared


def test_what_is_written_through_one_mapping_is_read_through_another(pool: HostPool) -> None:
    segment = pool.make_segment(4 * MIB)
    other = map_segment(pool.descriptor(segment), 4 * MIB)
    ctypes.memmove(pool.mapping(segment).address + 3 * MIB, b"chunk", 5)
    assert ctypes.string_at(other.address + 3 * MIB, 5) == b"chunk"
    assert other.address != pool.mapping(segment).address
    unmap_segment(other)


# A worker in another process: gets the descriptor, maps it, reads, writes an answer, unmaps.
WORKER = """
import ctypes, socket, sys
from kvstrata.controller.side import receive_message
from kvstrata.storage_backends.host import map_segment, unmap_segment

sock = socket.socket(fileno=int(sys.argv[1]))
message, (fd,) = receive_message(sock)
mapping = map_segment(fd, message["nbytes"])
seen = ctypes.string_at(mapping.address + message["nbytes"] - 8, 5)
ctypes.memmove(mapping.address, seen[::-1], 5)
unmap_segment(mapping)
sock.send(seen)
"""


def test_another_process_sees_the_bytes(pool: HostPool) -> None:
    segment = pool.make_segment(4 * MIB)
    mapping = pool.mapping(segment)
    ctypes.memmove(mapping.address + 4 * MIB - 8, b"chunk", 5)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-c", WORKER, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as worker:
            socket.send_fds(ours, [b'{"nbytes": %d}' % (4 * MIB)], [pool.descriptor(segment)])
            ours.settimeout(30)
            assert ours.recv(64) == b"chunk"
            assert worker.wait(timeout=30) == 0
    assert ctypes.string_at(mapping.address, 5) == b"knuhc"


# ------------------------------------------------------------------------------------- really given back


def test_after_close_nothing_is_mapped_or_open(pool: HostPool) -> None:
    for nbytes in (MIB, 8 * MIB):
        pool.make_segment(nbytes)
    assert len(mapped_segments()) == len(open_segments()) == 2
    pool.close()
    assert (pool.nbytes, mapped_segments(), open_segments()) == (0, [], [])
    pool.close()


def shared_memory() -> int:
    """Bytes of shared memory on this machine."""
    text = Path("/proc/meminfo").read_text()
    return int(re.findall(r"^Shmem: +(\d+)", text, re.MULTILINE)[0]) << 10


def test_memory_comes_back_when_the_last_mapping_is_gone(pool: HostPool) -> None:
    nbytes = 256 * MIB
    before = shared_memory()
    segment = pool.make_segment(nbytes)
    worker = map_segment(pool.descriptor(segment), nbytes)
    full = shared_memory()
    pool.close()
    kept = shared_memory()
    unmap_segment(worker)
    after = shared_memory()
    # Other processes take and return shared memory too: a quarter of the segment is room for them.
    room = nbytes // 4
    assert full - before > nbytes - room
    assert full - kept < room, "a worker that still maps a segment keeps its memory"
    assert full - after > nbytes - room


@pytest.fixture
def pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def test_mapping_a_descriptor_that_is_no_memory_is_refused(pipe: int) -> None:
    with pytest.raises(MappingError, match="cannot map"):
        map_segment(pipe, mmap.PAGESIZE)


def test_mapping_that_fails_takes_no_addresses(pipe: int) -> None:
    def addresses() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    before = addresses()
    for _ in range(4):
        with pytest.raises(MappingError):
            map_segment(pipe, 1 << 30)
    assert addresses() - before < 1 << 30
