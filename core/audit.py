"""The check behind `kvstrata check`: slots, leases, jobs and quarantine must account for each other."""

from __future__ import annotations

from collections import Counter

from kvstrata.core.catalogue import Entry, State
from kvstrata.core.planner import Planner


def audit(planner: Planner) -> list[str]:
    """Every contradiction in the books of a node store, as sentences; empty when they are right."""
    return [*_slots(planner), *_claims(planner), *_orders(planner), *_clients(planner)]


def _slots(planner: Planner) -> list[str]:
    problems = []
    owners = Counter((entry.slot.segment, entry.slot.offset) for entry in planner.catalogue)
    problems += [
        f"slot {segment}+{offset:#x} has {n} owners" for (segment, offset), n in owners.items() if n > 1
    ]
    held = Counter(segment for segment, _ in owners)
    for segment in planner.slots.segments.values():
        if held[segment.id] + len(segment.free) != segment.total or len(set(segment.free)) != len(
            segment.free
        ):
            problems.append(
                f"segment {segment.id}: {held[segment.id]} slots in use and {len(segment.free)} free, "
                f"of {segment.total}"
            )
        both = [i for i in segment.free if (segment.id, i * segment.slot_bytes) in owners]
        problems += [f"segment {segment.id}: slot {index} is free and in use" for index in both]
    made = sum(segment.nbytes for segment in planner.slots.segments.values())
    if made != planner.pool_bytes or made > planner.limits.pool_bytes:
        problems.append(
            f"pool of {made} bytes, {planner.pool_bytes} in the books, {planner.limits.pool_bytes} allowed"
        )
    return problems


def _claims(planner: Planner) -> list[str]:
    problems = []
    readers: Counter[int] = Counter()
    writers: Counter[int] = Counter()
    for client in planner.clients.values():
        for claim in client.leases.values():
            readers.update(id(entry) for entry in claim.entries)
        for claim in client.jobs.values():
            writers.update(id(entry) for entry in claim.entries)
    for entry in planner.catalogue:
        name = _name(entry)
        if entry.readers != readers[id(entry)]:
            problems.append(
                f"{name} counts {entry.readers} readers, leases name it {readers[id(entry)]} times"
            )
        wanted = 1 if entry.state in (State.RESERVED, State.QUARANTINED) else 0
        if writers[id(entry)] != wanted:
            problems.append(f"{name} has {writers[id(entry)]} writers, should have {wanted}")
        if entry.state is State.EVICTING and not entry.readers:
            problems.append(f"{name} waits for readers that do not exist")
    read = sum(entry.slot.nbytes for entry in planner.catalogue if entry.readers)
    if read != planner.catalogue.bytes_being_read:
        problems.append(f"{read} bytes are being read, {planner.catalogue.bytes_being_read} in the books")
    return problems


def _orders(planner: Planner) -> list[str]:
    """What is READY may be evicted, so it is in the order of its slot size; nothing else is in any."""
    problems = []
    missing = {(e.slot.nbytes, e.key): e for e in planner.catalogue if e.state is State.READY}
    for slot_bytes, order in planner.catalogue.orders():
        problems += [
            f"the eviction order of {slot_bytes}-byte slots has chunk {key.hex()[:16]}, not ready there"
            for key in order
            if missing.pop((slot_bytes, key), None) is None
        ]
    return problems + [f"{_name(entry)} is not in its eviction order" for entry in missing.values()]


def _clients(planner: Planner) -> list[str]:
    """An engine may know less than the store about what it just got, never of less than the store holds."""
    problems = []
    for client in planner.clients.values():
        if client.stopped:
            continue
        for name, held, believed in (
            ("leases", len(client.leases), client.leases_believed),
            ("jobs", len(client.jobs), client.jobs_believed),
        ):
            if held > believed:
                problems.append(
                    f"engine {client.id} knows of {believed} {name}, the store holds {held} for it"
                )
    return problems


def _name(entry: Entry) -> str:
    return f"chunk {entry.key.hex()[:16]} ({entry.state.value})"
