"""What the planner is told and what it answers. Plain data; `controller/node` carries it out."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvstrata.core.slots import Slot

# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientOpened:
    """An engine's scheduler side has introduced itself, or has come back."""

    client: str
    slot_sizes: tuple[int, ...]  # of the slots that it can use, in bytes; the usual one first
    workers: int  # processes that copy, one for each rank


@dataclass(frozen=True, slots=True)
class Match:
    """Find and lease the longest stored prefix of `keys`. `seq` is 0 if Updates may have overtaken it."""

    client: str
    seq: int
    lease: int  # drawn by the client, so that it can be released even if the answer got lost
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """Everything else a client has to say, at most once a step."""

    client: str
    seq: int
    reserve: tuple[tuple[int, bytes, int], ...] = ()  # (job drawn by the client, key, bytes of the slot)
    committed: tuple[int, ...] = ()  # jobs whose every writer has finished
    aborted: tuple[int, ...] = ()  # jobs that write no more
    released: tuple[int, ...] = ()  # leases whose copies are done
    corrupt: tuple[bytes, ...] = ()  # keys whose stored bytes failed their checksum
    used: tuple[tuple[bytes, ...], ...] = ()  # prefixes of finished requests, for the policy
    leases_held: int = 0  # what the client believes, after this update
    jobs_held: int = 0
    drawn: int = (1 << 63) - 1  # last number drawn by then: leases of later ones may exist, too


@dataclass(frozen=True, slots=True)
class ClientStopped:
    """A client's connection ended: it gets nothing more, and keeps what its copies may touch."""

    client: str


@dataclass(frozen=True, slots=True)
class ClientResumed:
    """The connection that had ended is back, and with it all processes of the client."""

    client: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """All processes of a client have exited or said that their copies are done."""

    client: str


@dataclass(frozen=True, slots=True)
class SegmentAdded:
    """The pool has grown by one segment, pre-faulted and ready to be handed out."""

    segment: int
    nbytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class GrowthFailed:
    """The segment that was asked for could not be made."""


@dataclass(frozen=True, slots=True)
class SegmentRegistered:
    """One worker of a client has mapped (and registered) a segment."""

    client: str
    rank: int
    segment: int


@dataclass(frozen=True, slots=True)
class WorkerDisconnected:
    """A worker's connection ended, and with it its mappings: a new connection registers all segments anew."""

    client: str
    rank: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    ClientOpened
    | Match
    | Update
    | ClientStopped
    | ClientResumed
    | ClientGone
    | SegmentAdded
    | GrowthFailed
    | SegmentRegistered
    | WorkerDisconnected
    | Tick
)

# --- actions --------------------------------------------------------------------------------


class Why(enum.Enum):
    """Why a reservation was not granted, or a request was refused."""

    EXISTS = "exists"  # somebody has written, or is writing, this chunk
    FULL = "full"  # no free slot and nothing that may be evicted
    NOT_READY = "not_ready"  # the pool is growing, or the client's workers are mapping it: ask again soon
    STALE = "stale"  # a later request of this client was answered already
    UNKNOWN_CLIENT = "unknown_client"
    STOPPED = "stopped"  # the client's connection ended
    QUARANTINE = "quarantine"  # the client holds too much that it does not answer for
    POOL_TOO_SMALL = "pool_too_small"  # not even one chunk fits, or none of its segments is as large as one
    OTHER = "other"  # a reason that a newer version has and this one does not know
    BUSY = "busy"  # too much of the pool is leased to requests that wait


@dataclass(frozen=True, slots=True)
class Matched:
    """Answer to Match: slots of the leased prefix; no lease exists if it is empty."""

    slots: tuple[Slot, ...]
    being_written: bool  # the next chunk is on its way


@dataclass(frozen=True, slots=True)
class Updated:
    """Answer to Update: for each reservation, in order, a slot or the reason why not."""

    grants: tuple[Slot | Why, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer to a request that was not looked at."""

    why: Why


@dataclass(frozen=True, slots=True)
class GrowPool:
    """Make one segment of at most `nbytes` for slots of `slot_bytes`, then send SegmentAdded."""

    nbytes: int
    slot_bytes: int


Action = Matched | Updated | Refused | GrowPool
