"""Whatever clients do, and however late or twice they say it, the planner's promises hold.

The machine keeps a ledger of its own, made of questions and answers alone: who holds which slot, and
which key's bytes are in it. The planner never sees the ledger.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from kvstrata.core.planner import Limits, Planner
from kvstrata.core.slots import Slot
from tests.core.stores import SLOT, key

DEADLINE = 10.0
NAMES = ("a", "b", "c")
SIZES = {"a": (SLOT,), "b": (SLOT, 2 * SLOT), "c": (2 * SLOT,)}  # a and c read none of each other's
RANKS = {"a": 1, "b": 2, "c": 1}

chosen = st.integers(0, 1_000)  # picks one of what there is
names = st.sampled_from("aaabbc")
# Prefixes of two documents, so that lookups meet what was stored.
prompts = st.builds(
    lambda document, length: list(range(document, document + length)),
    st.sampled_from([0, 10]),
    st.integers(1, 6),
)


@dataclass
class Held:
    """A lease or a job: what its client may be reading or writing."""

    slots: list[Slot]
    keys: list[bytes]
    since: float
    job: bool
    overdue: bool = False  # a tick has found it past its deadline


@dataclass
class Life:
    """One client, from open to gone."""

    seq: int = 0
    stopped: bool = False
    held: dict[int, Held] = field(default_factory=dict)
    registered: dict[int, set[int]] = field(default_factory=dict)


def overlap(one: Slot, other: Slot) -> bool:
    return (
        one.segment == other.segment
        and one.offset < other.offset + other.nbytes
        and other.offset < one.offset + one.nbytes
    )


class PlannerMachine(RuleBasedStateMachine):
    @initialize(segments=st.integers(2, 4), rest=st.integers(0, 3), well=st.sampled_from([0, 2, 3]))
    def begin(self, segments: int, rest: int, well: int) -> None:
        limits = Limits(segments * 4 * SLOT + rest * SLOT, 4 * SLOT, claim_deadline_s=DEADLINE)
        self.planner = Planner(limits)
        self.now = 0.0
        self.lives: dict[str, Life] = {}
        self.bytes: dict[Slot, bytes] = {}  # slot -> key, from commit until the slot is granted anew
        self.to_make: list[GrowPool] = []
        self.segments: dict[int, int] = {}
        self.numbers = 0
        self.old: list[Match | Update] = []
        if well:
            self.everybody_is_well(well)

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
        claims = [held for life in self.lives.values() for held in life.held.values()]
        return [held for held in claims if any(overlap(slot, other) for other in held.slots)]

    # ------------------------------------------------------------------------------- clients come and go

    @rule(count=st.sampled_from([2, 3]))
    def everybody_is_well(self, count: int) -> None:
        for name in NAMES[:count]:
            self.open(name)
            self.resume(name)
            while self.to_make:
                self.a_segment_is_made(works=1)
        for name in NAMES[:count]:
            for segment in self.segments:
                for rank in range(RANKS[name]):
                    self.register(name, rank, segment)

    @rule(name=names)
    def open(self, name: str) -> None:
        answers = self.step(ClientOpened(name, SIZES[name], RANKS[name]))
        if self.planner.limits.pool_bytes < SIZES[name][0]:
            assert answers == [Refused(Why.POOL_TOO_SMALL)]
            return
        assert answers == []
        self.lives.setdefault(name, Life())

    @rule(name=names)
    def resume(self, name: str) -> None:
        self.step(ClientResumed(name))
        if life := self.lives.get(name):
            life.stopped = False

    @rule(name=names, exits=st.sampled_from([False, False, True]))
    def end(self, name: str, exits: bool) -> None:
        self.step(ClientGone(name) if exits else ClientStopped(name))
        if exits:
            self.lives.pop(name, None)
        elif life := self.lives.get(name):
            life.stopped = True

    # ---------------------------------------------------------------------------------------------- pool

    @precondition(lambda self: self.to_make)
    @rule(works=st.integers(0, 9))
    def a_segment_is_made(self, works: int) -> None:
        action = self.to_make.pop()
        if not works:
            self.step(GrowthFailed())
            return
        segment = len(self.segments)
        self.segments[segment] = action.nbytes
        self.step(SegmentAdded(segment, action.nbytes, action.slot_bytes))

    @precondition(lambda self: self.segments)
    @rule(name=names, rank=chosen, which=chosen)
    def a_rank_registers(self, name: str, rank: int, which: int) -> None:
        self.register(name, rank % RANKS[name], which % len(self.segments))

    @rule(name=names, rank=chosen)
    def a_rank_disconnects(self, name: str, rank: int) -> None:
        rank %= RANKS[name]
        self.step(WorkerDisconnected(name, rank))
        if life := self.lives.get(name):
            for ranks in life.registered.values():
                ranks.discard(rank)

    def register(self, name: str, rank: int, segment: int) -> None:
        self.step(SegmentRegistered(name, rank, segment))
        if life := self.lives.get(name):
            life.registered.setdefault(segment, set()).add(rank)

    def usable(self, name: str, slot: Slot) -> bool:
        return len(self.lives[name].registered.get(slot.segment, ())) == RANKS[name]

    # --------------------------------------------------------------------------------------------- match

    @rule(name=names, document=st.sampled_from([0, 10]))
    def match_everything(self, name: str, document: int) -> None:
        self.match(name, list(range(document, document + 9)))

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
            assert answer.why in ((Why.STOPPED,) if life.stopped else (Why.QUARANTINE, Why.BUSY))
            return
        assert isinstance(answer, Matched)
        assert not life.stopped
        for each, slot in zip(keys, answer.slots, strict=False):
            assert self.bytes.get(slot) == each, "not that chunk's bytes"
            assert self.usable(name, slot)
            assert not any(held.job for held in self.holders(slot)), "somebody writes there"
        if answer.slots:
            life.held[lease] = Held(list(answer.slots), keys[: len(answer.slots)], self.now, job=False)

    # -------------------------------------------------------------------------------------------- update

    @rule(name=names, prompt=prompts)
    def reserve(self, name: str, prompt: list[int]) -> None:
        self.update(name, prompt)

    @rule(name=names, prompt=prompts)
    def save(self, name: str, prompt: list[int]) -> None:
        before = self.numbers
        self.update(name, prompt)
        self.update(name, committed=[job for job in self.jobs(name) if job > before])

    @precondition(lambda self: any(life.held for life in self.lives.values()))
    @rule(name=names, which=chosen, prompt=prompts, data=st.data())
    def report(self, name: str, which: int, prompt: list[int], data: st.DataObject) -> None:
        held = self.lives[name].held if name in self.lives else {}
        ended = [number for number in held if number % 3 == which % 3]
        jobs = [number for number in ended if held[number].job]
        committed = [job for job in jobs if data.draw(st.booleans())]
        aborted = [job for job in jobs if job not in committed]
        self.update(name, prompt, committed, aborted, [number for number in ended if number not in jobs])

    @rule(name=names, which=st.sampled_from([0, 3, 10, 12]))
    def find_corrupt(self, name: str, which: int) -> None:
        self.update(name, corrupt=[key(which)])

    def jobs(self, name: str) -> list[int]:
        return [job for job, held in self.lives[name].held.items() if held.job] if name in self.lives else []

    def update(
        self,
        name: str,
        prompt: Sequence[int] = (),
        committed: Sequence[int] = (),
        aborted: Sequence[int] = (),
        released: Sequence[int] = (),
        corrupt: Sequence[bytes] = (),
    ) -> None:
        life = self.lives.get(name, Life())
        sizes = itertools.cycle(SIZES[name])
        reserve = [(self.number(), key(each), next(sizes)) for each in prompt]
        jobs, ended = self.jobs(name), {*committed, *aborted}
        event = Update(
            client=name,
            seq=life.seq + 1,
            reserve=tuple(reserve),
            committed=(*committed, 10**6),  # and what the store has never heard of
            aborted=(*aborted, *committed, 10**6),
            released=(*released, 10**6),
            corrupt=tuple(corrupt),
            used=(tuple(each for _, each, _ in reserve),),
            leases_held=len(life.held) - len(jobs) - len(released),
            jobs_held=len(jobs) - len(ended),
        )
        (answer,) = self.step(event)
        if name not in self.lives:
            assert answer == Refused(Why.UNKNOWN_CLIENT)
            return
        life.seq = event.seq
        for job in committed:
            if not life.held[job].overdue:
                self.bytes[life.held[job].slots[0]] = life.held[job].keys[0]
        for number in (*ended, *released):
            del life.held[number]
        for each in corrupt:
            if self.planner.catalogue.get(each) is None:
                self.bytes = {slot: held for slot, held in self.bytes.items() if held != each}
        assert isinstance(answer, Updated)
        self.take_grants(name, reserve, answer)

    def take_grants(self, name: str, reserve: list[tuple[int, bytes, int]], answer: Updated) -> None:
        life = self.lives[name]
        for (job, wanted, nbytes), grant in zip(reserve, answer.grants, strict=True):
            if not isinstance(grant, Slot):
                continue
            assert not life.stopped
            assert self.usable(name, grant)
            assert grant.nbytes == nbytes
            assert self.holders(grant) == [], "granted what a live claim may touch"
            self.bytes = {slot: held for slot, held in self.bytes.items() if not overlap(slot, grant)}
            life.held[job] = Held([grant], [wanted], self.now, job=True)

    # -------------------------------------------------------------------------------------- late and slow

    @precondition(lambda self: self.old)
    @rule(which=chosen)
    def an_old_call_arrives_again(self, which: int) -> None:
        event = self.old[which % len(self.old)]
        life = self.lives.get(event.client)
        if life is not None and event.seq > life.seq:
            return  # of an earlier life: in truth no name is used twice
        before = self.books()
        (answer,) = self.step(event)
        assert answer == Refused(Why.STALE if life else Why.UNKNOWN_CLIENT)
        assert self.books() == before

    def books(self) -> Any:
        segments = self.planner.slots.segments.values()
        return (
            [list(segment.free) for segment in segments],
            [(entry.key, entry.state, entry.readers) for entry in self.planner.catalogue],
            [(name, list(c.leases), list(c.jobs), c.seq) for name, c in self.planner.clients.items()],
        )

    @rule(seconds=st.sampled_from([0.1, 1.0, DEADLINE / 2, DEADLINE * 2]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        before = self.books()[0]
        self.step(Tick())
        assert self.books()[0] == before, "time alone frees nothing"
        for life in self.lives.values():
            for held in life.held.values():
                held.overdue = held.overdue or held.since + DEADLINE < self.now

    # ----------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        assert audit(self.planner) == []

    @invariant()
    def the_pool_keeps_its_limit(self) -> None:
        assert sum(self.segments.values()) <= self.planner.limits.pool_bytes

    @invariant()
    def leases_keep_their_share(self) -> None:
        claims = [held for life in self.lives.values() for held in life.held.values() if not held.job]
        leased = {slot for held in claims for slot in held.slots}
        limits = self.planner.limits
        assert sum(slot.nbytes for slot in leased) <= limits.leased_share_max * limits.pool_bytes

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
                assert self.bytes[entry.slot] == entry.key

    def teardown(self) -> None:
        """Once all clients are gone nothing is in use but what is stored."""
        for name in list(self.lives):
            self.end(name, exits=True)
        stored = list(self.planner.catalogue)
        assert all(entry.state is State.READY and not entry.readers for entry in stored)
        assert sum(segment.used for segment in self.planner.slots.segments.values()) == len(stored)
        assert audit(self.planner) == []


TestPlannerKeepsItsPromises = PlannerMachine.TestCase
TestPlannerKeepsItsPromises.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
