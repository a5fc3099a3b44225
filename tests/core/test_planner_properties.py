"""Whatever clients do, and however late or twice they say it, the planner's promises hold.

The machine keeps a ledger of its own, made of questions and answers alone: who holds which slot, and
which key's bytes are in it. The planner never sees the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.core.audit import audit
from kvstrata.core.catalogue import State
from kvstrata.core.events import (
    Action,
    ClientGone,
    ClientOpened,
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
)
from kvstrata.core.planner import Limits, Planner
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, key

DEADLINE = 10.0
NAMES = ("a", "b", "c")
SIZES = {"a": SLOT, "b": SLOT, "c": 2 * SLOT}  # c shares no chunk with the others, only the pool
RANKS = {"a": 1, "b": 2, "c": 1}

chosen = st.integers(0, 1_000)  # picks one of what there is
names = st.sampled_from(NAMES)
prompts = st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=5)


@dataclass
class Held:
    """A lease or a job: what its client may be reading or writing."""

    slots: list[Slot]
    keys: list[bytes]
    since: float
    job: bool

    @property
    def overdue(self) -> float:
        return self.since + DEADLINE


@dataclass
class Life:
    """One client, from open to gone."""

    seq: int = 0
    stopped: bool = False
    held: dict[int, Held] = field(default_factory=dict)
    registered: dict[int, set[int]] = field(default_factory=dict)


class PlannerMachine(RuleBasedStateMachine):
    @initialize(segments=st.integers(1, 4), rest=st.integers(0, 3))
    def begin(self, segments: int, rest: int) -> None:
        limits = Limits(segments * 4 * SLOT + rest * SLOT, 4 * SLOT, claim_deadline_s=DEADLINE)
        self.planner = Planner(limits)
        self.now = 0.0
        self.lives: dict[str, Life] = {}
        self.bytes: dict[
            tuple[int, int, int], bytes
        ] = {}  # slot -> key, from commit until it is granted anew
        self.to_make: list[GrowPool] = []
        self.segments: dict[int, int] = {}
        self.numbers = 0
        self.old: list[Match | Update] = []

    def step(self, event: Event) -> list[Action]:
        actions = self.planner.step(event, self.now)
        self.to_make += [action for action in actions if isinstance(action, GrowPool)]
        if isinstance(event, Match | Update):
            self.old.append(event)
        return [action for action in actions if not isinstance(action, GrowPool)]

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def holders(self, slot: Slot) -> list[Held]:
        """Claims of living clients on any byte of `slot`."""
        return [
            held
            for life in self.lives.values()
            for held in life.held.values()
            for other in held.slots
            if other.segment == slot.segment
            and other.offset < slot.offset + slot.nbytes
            and slot.offset < other.offset + other.nbytes
        ]

    # ------------------------------------------------------------------------------- clients come and go

    @rule(name=names)
    def open(self, name: str) -> None:
        answers = self.step(ClientOpened(name, SIZES[name], RANKS[name]))
        if self.planner.limits.pool_bytes < SIZES[name]:
            assert answers == [Refused(Why.POOL_TOO_SMALL)]
            return
        assert answers == []
        self.lives.setdefault(name, Life()).stopped = False

    @rule(name=names)
    def connection_ends(self, name: str) -> None:
        self.step(ClientStopped(name))
        if life := self.lives.get(name):
            life.stopped = True

    @rule(name=names)
    def exits(self, name: str) -> None:
        self.step(ClientGone(name))
        self.lives.pop(name, None)

    # ---------------------------------------------------------------------------------------------- pool

    @precondition(lambda self: self.to_make)
    @rule(works=st.integers(0, 9))
    def segment_is_made(self, works: int) -> None:
        action = self.to_make.pop()
        if not works:
            self.step(GrowthFailed())
            return
        segment = len(self.segments)
        self.segments[segment] = action.nbytes
        self.step(SegmentAdded(segment, action.nbytes, action.slot_bytes))

    @precondition(lambda self: self.segments and self.lives)
    @rule(name=names, which=chosen, rank=chosen)
    def rank_registers(self, name: str, which: int, rank: int) -> None:
        segment, rank = which % len(self.segments), rank % RANKS[name]
        self.step(SegmentRegistered(name, rank, segment))
        if life := self.lives.get(name):
            life.registered.setdefault(segment, set()).add(rank)

    @precondition(lambda self: self.segments)
    @rule(name=names)
    def all_ranks_register(self, name: str) -> None:
        for segment in self.segments:
            for rank in range(RANKS[name]):
                self.rank_registers(name, segment, rank)

    def usable(self, name: str, slot: Slot) -> bool:
        return len(self.lives[name].registered.get(slot.segment, ())) == RANKS[name]

    # --------------------------------------------------------------------------------------------- match

    @precondition(lambda self: self.lives)
    @rule(name=names, prompt=prompts)
    def match(self, name: str, prompt: list[int]) -> None:
        life = self.lives.get(name)
        keys = [key(each) for each in prompt]
        lease = self.number()
        seq = life.seq + 1 if life else 1
        (answer,) = self.step(Match(name, seq, lease, tuple(keys)))
        if life is None:
            assert answer == Refused(Why.UNKNOWN_CLIENT)
            return
        life.seq = seq
        if isinstance(answer, Refused):
            assert answer.why in (Why.STOPPED, Why.QUARANTINE, Why.BUSY)
            return
        assert isinstance(answer, Matched)
        assert not life.stopped
        for each, slot in zip(keys, answer.slots, strict=False):
            assert self.bytes.get((slot.segment, slot.offset, slot.nbytes)) == each, "not that chunk's bytes"
            assert self.usable(name, slot)
            assert not any(held.job for held in self.holders(slot)), "somebody writes there"
        if answer.slots:
            life.held[lease] = Held(list(answer.slots), keys[: len(answer.slots)], self.now, job=False)

    # -------------------------------------------------------------------------------------------- update

    @precondition(lambda self: self.lives)
    @rule(
        name=names, prompt=st.one_of(st.just([]), prompts), ended=st.lists(chosen, max_size=4), data=st.data()
    )
    def update(self, name: str, prompt: list[int], ended: list[int], data: st.DataObject) -> None:
        life = self.lives.get(name, Life(stopped=True))
        jobs = sorted(
            {job for job, held in life.held.items() if held.job and job % 7 in {e % 7 for e in ended}}
        )
        leases = [n for n, held in life.held.items() if not held.job and n % 7 in {e % 7 for e in ended}]
        committed = [job for job in jobs if data.draw(st.booleans())]
        reserve = [(self.number(), key(each)) for each in prompt]
        corrupt = data.draw(st.lists(st.integers(0, 9).map(key), max_size=1))
        event = Update(
            client=name,
            seq=life.seq + data.draw(st.integers(1, 3)),
            reserve=tuple(reserve),
            committed=(*committed, 10**6),  # and what the store has never heard of
            aborted=(*(job for job in jobs if job not in committed), *committed, 10**6),
            released=(*leases, 10**6),
            corrupt=tuple(corrupt),
            used=(tuple(each for _, each in reserve),),
            leases_held=sum(not held.job for held in life.held.values()) - len(leases),
            jobs_held=sum(held.job for held in life.held.values()) - len(jobs),
        )
        expected_commits = [job for job in committed if self.is_reserved(life.held[job])]
        (answer,) = self.step(event)
        if name not in self.lives:
            assert answer == Refused(Why.UNKNOWN_CLIENT)
            return
        life.seq = event.seq
        for job in expected_commits:
            held = life.held[job]
            self.bytes[held.slots[0].segment, held.slots[0].offset, held.slots[0].nbytes] = held.keys[0]
        for number in (*jobs, *leases):
            del life.held[number]
        for each in corrupt:
            if self.planner.catalogue.get(each) is None:
                self.bytes = {slot: held for slot, held in self.bytes.items() if held != each}
        assert isinstance(answer, Updated)
        self.take_grants(name, reserve, answer)

    def is_reserved(self, held: Held) -> bool:
        """Whether its client may still publish it: no tick has found it overdue."""
        return not getattr(held, "quarantined", False)

    def take_grants(self, name: str, reserve: list[tuple[int, bytes]], answer: Updated) -> None:
        life = self.lives[name]
        assert len(answer.grants) == len(reserve)
        for (job, wanted), grant in zip(reserve, answer.grants, strict=True):
            if not isinstance(grant, Slot):
                continue
            assert not life.stopped
            assert self.usable(name, grant)
            assert grant.nbytes == SIZES[name]
            assert self.holders(grant) == [], "granted what a live claim may touch"
            self.forget_bytes(grant)
            life.held[job] = Held([grant], [wanted], self.now, job=True)

    def forget_bytes(self, slot: Slot) -> None:
        """`slot` will be overwritten, and with it every older slot that overlaps it."""
        self.bytes = {
            (segment, offset, nbytes): held
            for (segment, offset, nbytes), held in self.bytes.items()
            if segment != slot.segment
            or offset >= slot.offset + slot.nbytes
            or slot.offset >= offset + nbytes
        }

    # -------------------------------------------------------------------------------------- late and lost

    @precondition(lambda self: self.old)
    @rule(which=chosen)
    def an_old_call_arrives_again(self, which: int) -> None:
        event = self.old[which % len(self.old)]
        life = self.lives.get(event.client)
        if life is not None and event.seq > life.seq:
            return  # of an earlier life with this name: names are never used twice in truth
        before = self.books()
        (answer,) = self.step(event)
        assert answer == Refused(Why.STALE if life else Why.UNKNOWN_CLIENT)
        assert self.books() == before

    def books(self) -> Any:
        slots = self.planner.slots.segments.values()
        return (
            [list(segment.free) for segment in slots],
            [(entry.key, entry.state, entry.readers) for entry in self.planner.catalogue],
            [(name, list(c.leases), list(c.jobs), c.seq) for name, c in self.planner.clients.items()],
        )

    @rule(seconds=st.sampled_from([0.1, 1.0, DEADLINE / 2, DEADLINE * 2]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        free = {segment.id: list(segment.free) for segment in self.planner.slots.segments.values()}
        self.step(Tick())
        assert free == {segment.id: segment.free for segment in self.planner.slots.segments.values()}
        for life in self.lives.values():
            for held in life.held.values():
                held.quarantined = held.overdue < self.now  # type: ignore[attr-defined]

    # ----------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        assert audit(self.planner) == []

    @invariant()
    def the_pool_keeps_its_limit(self) -> None:
        assert sum(self.segments.values()) <= self.planner.limits.pool_bytes

    @invariant()
    def no_held_slot_is_free(self) -> None:
        for segment in self.planner.slots.segments.values():
            for index in segment.free:
                slot = Slot(segment.id, index * segment.slot_bytes, segment.slot_bytes)
                assert self.holders(slot) == []

    @invariant()
    def only_committed_chunks_are_ready(self) -> None:
        for entry in self.planner.catalogue:
            if entry.state is State.READY:
                slot = entry.slot
                assert self.bytes[slot.segment, slot.offset, slot.nbytes] == entry.key

    def teardown(self) -> None:
        """Once all clients are gone nothing is in use but what is stored."""
        for name in list(self.lives):
            self.exits(name)
        ready = list(self.planner.catalogue)
        assert all(entry.state is State.READY and not entry.readers for entry in ready)
        segments = self.planner.slots.segments.values()
        assert sum(segment.used for segment in segments) == len(ready)
        assert audit(self.planner) == []


TestPlannerKeepsItsPromises = PlannerMachine.TestCase
TestPlannerKeepsItsPromises.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
