"""The planner: `step(event, now) -> actions`. Every decision of a node store is made here.

Rule of this file: no I/O, no clock, no threads. The caller feeds events one at a time, carries
out the actions, and may replay both. Claims (leases of readers, jobs of writers) end only by the
client's report or by the end of its processes; a claim past its deadline is overdue: counted,
capped, and its slot is not reused until it is answered for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstrata.core.catalogue import Catalogue, Cause, Entry, State
from kvstrata.core.events import (
    Action,
    ClientGone,
    ClientOpened,
    ClientResumed,
    ClientStopped,
    Event,
    GrowPool,
    GrowthFailed,
    Match,
    Matched,
    Refused,
    SegmentAdded,
    SegmentRegistered,
    Tick,
    Update,
    Updated,
    Why,
    WorkerDisconnected,
)
from kvstrata.core.policy import POLICIES
from kvstrata.core.slots import Segment, Slot, SlotAllocator

_MAPPING_S = 10.0  # how long an engine may take to map a segment, and to register it with its device
_GIVEN_UP_MAX = 4096
_ROUNDS_MAX = 3  # in which one Update asks for victims of one size: each is a walk past what may not go
_GROWTH_RETRY_S = 30.0  # after a segment could not be made: memory comes and goes


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one node store. Sizes in bytes, times in seconds, shares of the pool in 0..1."""

    pool_bytes: int
    segment_bytes: int
    claim_deadline_s: float = 120.0  # above what a client may set as its load deadline: past it, it hangs
    leased_share_max: float = 0.75  # the rest stays evictable, so that saving never starves
    quarantine_share_max: float = 0.25


@dataclass(slots=True)
class Claim:
    """A lease (several entries, to read) or a job (one entry, to write) of one client."""

    entries: tuple[Entry, ...]
    deadline: float
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """Where an Update's reservations of one size find slots: each of `steps` frees some; or the answer."""

    slot_bytes: int
    steps: Iterator[bool]
    without: Why


@dataclass(slots=True)
class Client:
    """One engine. `registered` maps a segment to the ranks that have mapped it."""

    id: str
    slot_sizes: tuple[int, ...]
    workers: int
    seq: int = 0
    stopped: bool = False
    leases: dict[int, Claim] = field(default_factory=dict)
    jobs: dict[int, Claim] = field(default_factory=dict)
    given_up: dict[int, None] = field(default_factory=dict)  # leases released before they were asked for
    registered: dict[int, set[int]] = field(default_factory=dict)
    usable: set[int] = field(default_factory=set)  # segments that every rank has registered
    leases_believed: int = 0  # what it said to hold at its last update, and what it got since
    jobs_believed: int = 0

    def can_reach(self, entry: Entry) -> bool:
        """Whether all its ranks have mapped the entry's segment, and the slot's size is one of its own."""
        return entry.slot.segment in self.usable and entry.slot.nbytes in self.slot_sizes


class Planner:
    """Catalogue, clients and pool of one node store."""

    def __init__(self, limits: Limits, policy: str = "lru") -> None:
        self.limits = limits
        self.slots = SlotAllocator()
        self.catalogue = Catalogue(POLICIES[policy], self.slots.give_back)
        self.clients: dict[str, Client] = {}
        self.counters: Counter[str] = Counter()
        self.pool_bytes = 0  # of all segments made so far
        self._growing = 0  # bytes of the segment that is being made
        self._grow_again_at = 0.0
        self._added: dict[int, float] = {}  # when each segment was added

    # --- one event -------------------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Action]:
        """Apply `event` at time `now` (seconds, any monotonic clock); return what must be done."""
        match event:
            case Match():
                return self._match(event, now)
            case Update():
                return self._update(event, now)
            case ClientOpened():
                return self._open(event, now)
            case SegmentAdded():
                self._growing = 0
                self.pool_bytes += event.nbytes
                self.slots.add(event.segment, event.nbytes, event.slot_bytes, now)
                self._added[event.segment] = now
            case SegmentRegistered():
                self._register(event)
            case WorkerDisconnected():
                self._unregister(event)
            case GrowthFailed():
                self._growing, self._grow_again_at = 0, now + _GROWTH_RETRY_S
            case ClientStopped():
                if client := self.clients.get(event.client):
                    client.stopped = True
            case ClientResumed():
                if client := self.clients.get(event.client):
                    client.stopped = False
            case ClientGone():
                self._reclaim(event.client)
            case Tick():
                self._mark_overdue(now)
        return []

    # --- match: the longest stored prefix, under a lease ------------------------------------

    def _match(self, event: Match, now: float) -> list[Action]:
        client = self._heard(event)
        if isinstance(client, Refused):
            return [client]
        if why := self._refusal(client):
            return [Refused(why)]
        if event.lease in client.leases or event.lease in client.given_up:
            return [Refused(Why.STALE)]
        self.counters["lookups"] += 1
        self.counters["lookup_chunks"] += len(event.keys)
        found = self.catalogue.match(event.keys)
        following = self.catalogue.get(event.keys[len(found)]) if len(found) < len(event.keys) else None
        reachable = tuple(itertools.takewhile(client.can_reach, found))
        entries = self._leasable(reachable)
        if reachable and not entries:
            return [Refused(Why.BUSY)]
        if entries:
            self.catalogue.hold(entries, now)
            client.leases_believed += 1
            client.leases[event.lease] = Claim(entries, now + self.limits.claim_deadline_s)
            self.counters["hit_chunks"] += len(entries)
        return [Matched(tuple(entry.slot for entry in entries), being_written=following is not None)]

    @property
    def _bytes_at_hand(self) -> int:
        """Of the pool as it is: a host may not have the memory for all that it is allowed."""
        return self.pool_bytes + self._growing

    def _leasable(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """The prefix of `entries` that keeps leases within their share; the first of all may exceed it."""
        room = self.limits.leased_share_max * self._bytes_at_hand - self.catalogue.bytes_being_read
        for index, entry in enumerate(entries):
            if entry.readers:
                continue
            room -= entry.slot.nbytes
            if room < 0 and (index or self.catalogue.bytes_being_read):
                return entries[:index]
        return entries

    # --- update: reservations and reports ---------------------------------------------------

    def _update(self, event: Update, now: float) -> list[Action]:
        client = self._heard(event)
        if isinstance(client, Refused):
            return [client]
        self._hear(client, event, now)  # also one that gets nothing more: its reports free what it holds
        if why := self._refusal(client):
            return [Updated((why,) * len(event.reserve))]
        wanted = Counter(nbytes for _, _, nbytes in event.reserve if nbytes in client.slot_sizes)
        growth = [action for nbytes in wanted for action in self._grow(nbytes, now)]
        rooms = {nbytes: self._room(client, nbytes, count, now) for nbytes, count in wanted.items()}
        grants = tuple(
            self._reserve(client, job, key, rooms[nbytes], now) if nbytes in rooms else Why.OTHER
            for job, key, nbytes in event.reserve
        )
        growth += [action for nbytes in wanted for action in self._grow(nbytes, now)]
        return [Updated(grants), *growth]

    def _hear(self, client: Client, event: Update, now: float) -> None:
        for job in event.committed:
            if claim := client.jobs.pop(job, None):
                (entry,) = claim.entries
                if entry.state is State.RESERVED:
                    self.catalogue.move(entry, Cause.COMMIT)
                    self.counters["committed_chunks"] += 1
                else:  # too late: it was quarantined, and the key may be somebody else's by now
                    self.catalogue.move(entry, Cause.ABORT)
        for job in event.aborted:
            if claim := client.jobs.pop(job, None):
                self.catalogue.move(claim.entries[0], Cause.ABORT)
                self.counters["aborted_chunks"] += 1
        for lease in event.released:
            if claim := client.leases.pop(lease, None):
                self._let_go(claim)
            else:  # the question may still be on its way
                client.given_up[lease] = None
                if len(client.given_up) > _GIVEN_UP_MAX:
                    del client.given_up[next(iter(client.given_up))]
        for key in event.corrupt:
            entry_or_none = self.catalogue.get(key)
            if entry_or_none and entry_or_none.state is State.READY:
                self.catalogue.drop(entry_or_none)
                self.counters["corrupt_chunks"] += 1
        for keys in event.used:
            for slot_bytes in client.slot_sizes:
                self.catalogue.touch(slot_bytes, keys)
            for key in keys:
                if used := self.catalogue.get(key):
                    used.used = now
        later = sum(lease > event.drawn for lease in client.leases)
        client.leases_believed, client.jobs_believed = event.leases_held + later, event.jobs_held

    def _reserve(self, client: Client, job: int, key: bytes, room: Room, now: float) -> Slot | Why:
        """A slot for `key`, made free if need be."""
        if self.catalogue.get(key) is not None:
            return Why.EXISTS
        if job in client.jobs:
            return Why.STALE
        slot = self.slots.take(room.slot_bytes, client.usable)
        while slot is None and next(room.steps, False):
            slot = self.slots.take(room.slot_bytes, client.usable)
        if slot is None:
            self.counters[f"refused_{room.without.value}"] += 1
            return room.without
        entry = self.catalogue.reserve(key, slot, now)
        client.jobs_believed += 1
        client.jobs[job] = Claim((entry,), now + self.limits.claim_deadline_s)
        return slot

    def _room(self, client: Client, slot_bytes: int, wanted: int, now: float) -> Room:
        if self._more_is_coming(client, slot_bytes, now):  # then nothing is evicted for it
            return Room(slot_bytes, iter(()), Why.NOT_READY)
        return Room(slot_bytes, self._make_room(client, slot_bytes, wanted, now), Why.FULL)

    def _make_room(self, client: Client, slot_bytes: int, wanted: int, now: float) -> Iterator[bool]:
        """Each step frees room that `client` can use, up to `wanted` slots; it ends where there is no more.

        What was not used for longest goes first, whatever its size: chunk by chunk where slots have this
        size, by whole segments where they have another. Looked for once, however much an Update reserves;
        again only where another size of the same Update has taken over a segment with victims in it.
        """
        others = self._other_segments(client, slot_bytes)
        for _ in range(_ROUNDS_MAX):
            lost = False
            for entry in self.catalogue.victims(slot_bytes, now, wanted, client.can_reach):
                while others and others[0][0] < entry.used:
                    if self._take_over(others.pop(0)[1], slot_bytes, now):
                        yield True
                if self.catalogue.get(entry.key) is entry and entry.may_go(now):
                    self._evict(entry)
                    yield True
                else:  # taken over meanwhile
                    lost = True
            if not lost:
                break
        has_segments = any(s.slot_bytes == slot_bytes for s in self.slots.segments.values())
        for unused_since, segment in others:  # all of this size is in use, or there is nothing
            if (unused_since < now or not has_segments) and self._take_over(segment, slot_bytes, now):
                yield True

    def _other_segments(self, client: Client, slot_bytes: int) -> list[tuple[float, Segment]]:
        """Segments of other sizes that `client` can reach, and since when they are hardly used."""
        if self._growing:
            return []
        segments = self.slots.of_other_sizes(slot_bytes, client.usable)
        unused_since = self.catalogue.mostly_unused_since
        found = [(max(segment.since, unused_since(segment.id)), segment) for segment in segments]
        return sorted(found, key=lambda each: (each[0], each[1].used, each[1].id))

    def _evict(self, entry: Entry) -> None:
        self.catalogue.drop(entry)
        self.counters["evicted_chunks"] += 1

    # --- pool -------------------------------------------------------------------------------

    def _grow(self, slot_bytes: int, now: float) -> list[Action]:
        """Ask for the next segment while there is room: engines fill them faster than they are made.

        It is made to hold the largest slot of any client, whoever asks: what is made stays as large as it is.
        """
        free_bytes = self.slots.free_slots(slot_bytes) * slot_bytes
        if self._growing or free_bytes >= self.limits.segment_bytes:
            return []
        largest = max(size for client in self.clients.values() for size in client.slot_sizes)
        nbytes = min(max(self.limits.segment_bytes, largest), self.limits.pool_bytes - self.pool_bytes)
        if nbytes >= slot_bytes and now >= self._grow_again_at:
            self._growing = nbytes
            return [GrowPool(nbytes, slot_bytes)]
        return []

    def slot_bytes_max(self) -> int:
        """The largest slot that fits a segment, be it one that is still to be made."""
        to_come = self.limits.pool_bytes - self.pool_bytes - self._growing
        return max(to_come, self._growing, *(each.nbytes for each in self.slots.segments.values()))

    def _more_is_coming(self, client: Client, slot_bytes: int, now: float) -> bool:
        """Whether a segment is being made, or mapped, for `client`."""
        return self._growing > 0 or any(
            segment.free and segment.slot_bytes == slot_bytes and segment.id not in client.usable
            for segment in self.slots.segments.values()
            if now < self._added.get(segment.id, now) + _MAPPING_S
        )

    def _take_over(self, segment: Segment, slot_bytes: int, now: float) -> bool:
        """Cut the segment into slots of another size, unless something in it is in use."""
        inside = self.catalogue.inside(segment.id)
        if segment.slot_bytes == slot_bytes or not all(entry.may_go(now) for entry in inside):
            return False
        for entry in inside:
            self._evict(entry)
        self.slots.reclass(segment.id, slot_bytes, now)
        return True

    def _register(self, event: SegmentRegistered) -> None:
        client = self.clients.get(event.client)
        if client is None:
            return
        if event.segment not in self.slots.segments or not 0 <= event.rank < client.workers:
            self.counters["ignored_registrations"] += 1
            return
        ranks = client.registered.setdefault(event.segment, set())
        ranks.add(event.rank)
        if len(ranks) >= client.workers:
            client.usable.add(event.segment)

    def _unregister(self, event: WorkerDisconnected) -> None:
        if client := self.clients.get(event.client):
            for segment, ranks in client.registered.items():
                if event.rank in ranks:
                    ranks.remove(event.rank)
                    client.usable.discard(segment)

    # --- clients ----------------------------------------------------------------------------

    def _open(self, event: ClientOpened, now: float) -> list[Action]:
        if self.slot_bytes_max() < min(event.slot_sizes):
            return [Refused(Why.POOL_TOO_SMALL)]
        client = self.clients.setdefault(event.client, Client(event.client, event.slot_sizes, event.workers))
        return self._grow(client.slot_sizes[0], now)

    def _heard(self, event: Match | Update) -> Client | Refused:
        """The sender, unless a later request of its was answered already (this one was overtaken)."""
        client = self.clients.get(event.client)
        if client is None:
            return Refused(Why.UNKNOWN_CLIENT)
        if isinstance(event, Match) and not event.seq:
            return client
        if event.seq <= client.seq:
            return Refused(Why.STALE)
        client.seq = event.seq
        return client

    def _refusal(self, client: Client) -> Why | None:
        """Why `client` may not be given anything now."""
        if client.stopped:
            return Why.STOPPED
        overdue_bytes = sum(entry.slot.nbytes for entry in self._overdue(client))
        if overdue_bytes > self.limits.quarantine_share_max * self._bytes_at_hand:
            return Why.QUARANTINE
        return None

    def _let_go(self, claim: Claim) -> None:
        self.catalogue.let_go(claim.entries)

    def _reclaim(self, client_id: str) -> None:
        client = self.clients.pop(client_id, None)
        if client is None:
            return
        for claim in client.leases.values():
            self._let_go(claim)
        for claim in client.jobs.values():
            self.catalogue.move(claim.entries[0], Cause.ABORT)
        self.counters["reclaimed_claims"] += len(client.leases) + len(client.jobs)

    def _mark_overdue(self, now: float) -> None:
        for client in self.clients.values():
            for claim in client.leases.values():
                claim.overdue = claim.overdue or claim.deadline < now
            for claim in client.jobs.values():
                if claim.deadline < now and not claim.overdue:
                    claim.overdue = True
                    self.catalogue.move(claim.entries[0], Cause.OVERDUE)

    def overdue_slots(self, client: Client) -> int:
        """How many slots its overdue claims hold."""
        return len(self._overdue(client))

    def _overdue(self, client: Client) -> list[Entry]:
        claims = (*client.leases.values(), *client.jobs.values())
        return list(
            {id(entry): entry for claim in claims if claim.overdue for entry in claim.entries}.values()
        )
