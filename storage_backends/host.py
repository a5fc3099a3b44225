"""The host tier: memfd segments that the node store makes and workers map.

A segment has a fixed size for life: resizing would move registered memory. It has no name to
leak or guess; whoever holds the descriptor may map it. It is pre-faulted before anybody copies
into it, since a first touch costs five to ten times the copy.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass

_PROT_READ_WRITE = 0x3
_MAP_SHARED = 0x01
_MAP_PRIVATE = 0x02
_MAP_FIXED = 0x10
_MAP_ANONYMOUS = 0x20
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_F_ADD_SEALS = 1033
_F_SEAL_SEAL = 0x1
_F_SEAL_SHRINK = 0x2
_F_SEAL_GROW = 0x4
_HUGE_PAGE = 2 << 20
_COLLAPSE_STEP = 16 << 20  # larger steps hold mmap_lock long enough for others to notice
_MAP_FAILED = ctypes.c_void_p(-1).value


class MappingError(OSError):
    """A segment could not be made, mapped or pre-faulted."""


@dataclass(frozen=True, slots=True)
class MappedSegment:
    """`nbytes` of a segment in this process's address space, at `address`."""

    address: int
    nbytes: int


def map_segment(fd: int, nbytes: int) -> MappedSegment:
    """Map a segment, aligned to huge pages. The descriptor may be closed afterwards.

    Raises:
        MappingError: the kernel refused.
    """
    libc = _libc()
    reserve = nbytes + _HUGE_PAGE
    base = _mmap(libc, None, reserve, 0, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-base // _HUGE_PAGE) * _HUGE_PAGE
    try:
        _mmap(libc, address, nbytes, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, fd)
    except MappingError:
        libc.munmap(base, reserve)
        raise
    # The reservation before and after the segment is given back at once.
    page_end = -(-(address + nbytes) // 4096) * 4096
    if address > base:
        libc.munmap(base, address - base)
    if base + reserve > page_end:
        libc.munmap(page_end, base + reserve - page_end)
    return MappedSegment(address, nbytes)


def unmap_segment(mapping: MappedSegment) -> None:
    """Give the addresses back. No copy may be using them."""
    _libc().munmap(mapping.address, mapping.nbytes)


class HostPool:
    """All segments of one node store; owns their descriptors and its own mappings."""

    def __init__(self) -> None:
        self._segments: dict[int, tuple[int, MappedSegment]] = {}
        self._next = 0

    def make_segment(self, nbytes: int, should_stop: Callable[[], bool] = lambda: False) -> int:
        """Make, map and pre-fault a segment of `nbytes`; return its id.

        Takes 0.07 to 1 s/GiB without the GIL; call it off the event loop. `should_stop` is
        asked between steps.

        Raises:
            MappingError: no memory, or stopped.
        """
        fd = os.memfd_create("kvstrata", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
            mapping = map_segment(fd, nbytes)
        except OSError:
            os.close(fd)
            raise
        try:
            _prefault(mapping, should_stop)
        except MappingError:
            unmap_segment(mapping)
            os.close(fd)
            raise
        segment, self._next = self._next, self._next + 1
        self._segments[segment] = (fd, mapping)
        return segment

    def descriptor(self, segment: int) -> int:
        return self._segments[segment][0]

    def mapping(self, segment: int) -> MappedSegment:
        return self._segments[segment][1]

    @property
    def nbytes(self) -> int:
        return sum(mapping.nbytes for _, mapping in self._segments.values())

    def close(self) -> None:
        """Unmap and close everything. Workers that still map a segment keep its memory alive."""
        for fd, mapping in self._segments.values():
            unmap_segment(mapping)
            os.close(fd)
        self._segments.clear()


def _prefault(mapping: MappedSegment, should_stop: Callable[[], bool]) -> None:
    libc = _libc()
    for start in range(0, mapping.nbytes, _COLLAPSE_STEP):
        if should_stop():
            raise MappingError(errno.EINTR, "stopped while pre-faulting the host pool")
        step = min(_COLLAPSE_STEP, mapping.nbytes - start)
        if not _collapse(libc, mapping.address + start, step):
            _populate(libc, mapping.address + start, step)


def _collapse(libc: ctypes.CDLL, address: int, nbytes: int) -> bool:
    """Huge pages where the kernel has them: touch one page in each, then collapse."""
    if nbytes % _HUGE_PAGE:
        return False
    for offset in range(0, nbytes, _HUGE_PAGE):
        ctypes.memset(address + offset, 0, 1)
    return bool(libc.madvise(address, nbytes, _MADV_COLLAPSE) == 0)


def _populate(libc: ctypes.CDLL, address: int, nbytes: int) -> None:
    for offset in range(0, nbytes, _HUGE_PAGE):
        step = min(_HUGE_PAGE, nbytes - offset)
        if libc.madvise(address + offset, step, _MADV_POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            if error != errno.EINVAL:
                raise MappingError(error, f"cannot pre-fault the host pool: {os.strerror(error)}")
            for page in range(0, step, 4096):  # kernels before 5.14
                ctypes.memset(address + offset + page, 0, 1)


def _mmap(libc: ctypes.CDLL, address: int | None, nbytes: int, prot: int, flags: int, fd: int) -> int:
    got = libc.mmap(address, nbytes, prot, flags, fd, 0)
    if got is None or got == _MAP_FAILED:
        error = ctypes.get_errno()
        raise MappingError(error, f"cannot map {nbytes} bytes of the host pool: {os.strerror(error)}")
    return int(got)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
