"""Copies as the scheduler side orders them and as the workers report them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkCopy:
    """One chunk between a slot and engine blocks.

    `blocks` are the engine's block ids of the whole chunk, -1 where a block takes no part.
    """

    key: bytes
    segment: int
    offset: int  # bytes into the segment
    nbytes: int  # of the slot: it tells how the chunk is stored
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Slots -> blocks, for one request. `expires`: monotonic seconds, past which no chunk is begun."""

    job: int
    epoch: bytes  # of the store that granted the slots
    chunks: tuple[ChunkCopy, ...]
    expires: float


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Blocks -> slot, one chunk."""

    job: int
    epoch: bytes
    chunk: ChunkCopy


@dataclass(slots=True)
class Report:
    """What became of a job. `failed_from`: index of the first chunk of a load that is not in the blocks."""

    job: int
    ok: bool
    failed_from: int = 0
    corrupt: bytes | None = None  # key of the chunk whose bytes failed their check
    does_not_fit: bool = False  # a save: the chunk cannot be packed
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A load that has not ended: its bytes are verified and their copies enqueued, so a stream of the
    engine's that `Copies.follow` was told of may use its blocks. What became of it is reported later.
    """

    job: int


@dataclass(frozen=True, slots=True)
class Fence:
    """An event of the engine's device stream that a copy has to wait for. `owner` keeps it alive."""

    handle: int
    owner: object
