"""The catalogue, against its own table and against a model that is a plain dict."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from kvstrata.core.catalogue import TRANSITIONS, Catalogue, Cause, Entry, State
from kvstrata.core.policy import LRU
from kvstrata.core.slots import Slot

KEYS = [bytes([number]) * 32 for number in range(4)]


@pytest.fixture
def freed() -> list[Slot]:
    return []


@pytest.fixture
def catalogue(freed: list[Slot]) -> Catalogue:
    return Catalogue(LRU, freed.append)


# How each state is reached from nothing.
PATHS: dict[State, tuple[Cause, ...]] = {
    State.RESERVED: (),
    State.READY: (Cause.COMMIT,),
    State.EVICTING: (Cause.COMMIT, Cause.DROP),
    State.QUARANTINED: (Cause.OVERDUE,),
}


def in_state(catalogue: Catalogue, state: State, key: bytes = KEYS[0]) -> Entry:
    entry = catalogue.reserve(key, Slot(0, key[0], 1))
    for cause in PATHS[state]:
        catalogue.move(entry, cause)
    assert entry.state is state
    return entry


# ---------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("state", "cause"), TRANSITIONS)
def test_a_transition_of_the_table_happens(
    catalogue: Catalogue, freed: list[Slot], state: State, cause: Cause
) -> None:
    entry = in_state(catalogue, state)
    after = TRANSITIONS[state, cause]
    catalogue.move(entry, cause)
    if after is None:
        assert freed == [entry.slot]
        assert len(catalogue) == 0
    else:
        assert entry.state is after
        assert freed == []
        assert list(catalogue) == [entry]


@pytest.mark.parametrize(
    ("state", "cause"), [pair for pair in itertools.product(State, Cause) if pair not in TRANSITIONS]
)
def test_any_other_transition_is_refused_and_changes_nothing(
    catalogue: Catalogue, freed: list[Slot], state: State, cause: Cause
) -> None:
    entry = in_state(catalogue, state)
    visible = catalogue.get(entry.key)
    with pytest.raises(ValueError, match=f"a {state.value} chunk cannot {cause.value}"):
        catalogue.move(entry, cause)
    assert entry.state is state
    assert list(catalogue) == [entry]
    assert catalogue.get(entry.key) is visible
    assert freed == []


@pytest.mark.parametrize("state", State)
def test_a_slot_is_freed_only_on_the_way_out(state: State) -> None:
    ways_out = {cause for (before, cause), after in TRANSITIONS.items() if before is state and after is None}
    assert (
        ways_out
        == {
            State.RESERVED: {Cause.ABORT},
            State.READY: set(),
            State.EVICTING: {Cause.DRAINED},
            State.QUARANTINED: {Cause.ABORT},
        }[state]
    )


# ----------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize("state", [State.RESERVED, State.READY])
def test_a_visible_key_is_not_reserved_again(catalogue: Catalogue, state: State) -> None:
    in_state(catalogue, state)
    with pytest.raises(ValueError, match="has an entry"):
        catalogue.reserve(KEYS[0], Slot(0, 1, 1))


@pytest.mark.parametrize("state", [State.EVICTING, State.QUARANTINED])
def test_a_hidden_key_may_be_written_anew(catalogue: Catalogue, state: State) -> None:
    old = in_state(catalogue, state)
    new = catalogue.reserve(KEYS[0], Slot(0, 1, 1))
    assert catalogue.get(KEYS[0]) is new
    assert set(catalogue) == {old, new}


@pytest.mark.parametrize("state", [State.RESERVED, State.EVICTING, State.QUARANTINED])
def test_only_ready_chunks_are_found_and_held(catalogue: Catalogue, state: State) -> None:
    entry = in_state(catalogue, state)
    assert catalogue.match([entry.key]) == []
    with pytest.raises(ValueError, match="not ready"):
        catalogue.hold([entry])


def test_a_match_ends_at_the_first_chunk_that_is_missing(catalogue: Catalogue) -> None:
    first, second, _, fourth = (in_state(catalogue, State.READY, key) for key in KEYS)
    catalogue.drop(second)
    assert catalogue.match(KEYS) == [first]
    assert catalogue.match([KEYS[3], KEYS[0]]) == [fourth, first]


def test_a_dropped_chunk_keeps_its_slot_until_its_last_reader_lets_go(
    catalogue: Catalogue, freed: list[Slot]
) -> None:
    entry = in_state(catalogue, State.READY)
    catalogue.hold([entry])
    catalogue.hold([entry])
    catalogue.drop(entry)
    catalogue.let_go([entry])
    assert freed == []
    catalogue.let_go([entry])
    assert freed == [entry.slot]


def test_victims_have_no_readers_and_no_live_pin(catalogue: Catalogue) -> None:
    held, pinned, free = (in_state(catalogue, State.READY, key) for key in KEYS[:3])
    catalogue.hold([held])
    pinned.pin_deadline = 10.0
    assert catalogue.victims(1, now=9.0, wanted=3) == [free]
    catalogue.let_go([held])
    assert set(catalogue.victims(1, now=10.0, wanted=3)) == {held, pinned, free}


def test_a_held_prefix_is_used_lately(catalogue: Catalogue) -> None:
    first, second, third = (in_state(catalogue, State.READY, key) for key in KEYS[:3])
    catalogue.hold([first, second])
    catalogue.let_go([first, second])
    assert catalogue.victims(1, now=0, wanted=3) == [third, second, first]


def test_victims_are_of_the_size_that_is_asked_for(catalogue: Catalogue) -> None:
    for number, nbytes in enumerate((1, 2, 1)):
        catalogue.move(catalogue.reserve(KEYS[number], Slot(0, number, nbytes)), Cause.COMMIT)
    catalogue.touch(2, KEYS[:1])  # of no effect: it lies in a slot of another size
    for nbytes, expected in ((1, [KEYS[0], KEYS[2]]), (2, [KEYS[1]]), (3, [])):
        assert [entry.key for entry in catalogue.victims(nbytes, now=0, wanted=9)] == expected


def test_no_more_victims_than_wanted_and_none_that_is_of_no_use(catalogue: Catalogue) -> None:
    first, second, third, fourth = (in_state(catalogue, State.READY, key) for key in KEYS)
    assert catalogue.victims(1, 0, 2) == [first, second]
    assert catalogue.victims(1, 0, 2, lambda entry: entry is not first) == [second, third]
    assert catalogue.victims(1, 0, 9, lambda entry: entry is fourth) == [fourth]


def test_what_is_in_use_for_long_does_not_hide_the_rest(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.core.catalogue._LOOKED_AT_MAX", 2)
    first, second, third, fourth = (in_state(catalogue, State.READY, key) for key in KEYS)
    for entry in (second, first):
        catalogue.hold([entry])
    catalogue.touch(1, KEYS[2:])
    assert catalogue.victims(1, now=0, wanted=1) == [], "two are looked at, and both are read"
    assert catalogue.victims(1, now=0, wanted=2) == [fourth, third]
    catalogue.let_go([second, first])
    monkeypatch.undo()
    assert catalogue.victims(1, now=0, wanted=4) == [fourth, third, second, first]


# --------------------------------------------------------------------------------------- the dumb model


@dataclass
class Row:
    """What the model knows of one chunk."""

    key: bytes
    slot: Slot
    state: str = "reserved"
    readers: int = 0


class CatalogueModel(RuleBasedStateMachine):
    """Every call is made on the catalogue and on a dict of rows; both must agree on everything seen."""

    entries = Bundle("entries")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[Slot] = []
        self.expected_freed: list[Slot] = []
        self.catalogue = Catalogue(LRU, self.freed.append)
        self.rows: dict[Entry, Row] = {}
        self.slots = itertools.count()

    def visible(self, key: bytes) -> Entry | None:
        found = [e for e, row in self.rows.items() if row.key == key and row.state in ("reserved", "ready")]
        assert len(found) <= 1
        return found[0] if found else None

    def leave(self, entry: Entry) -> None:
        self.expected_freed.append(self.rows.pop(entry).slot)

    @rule(key=st.sampled_from(KEYS), target=entries)
    def reserve(self, key: bytes) -> Entry | None:
        slot = Slot(0, next(self.slots), 1)
        if self.visible(key):
            with pytest.raises(ValueError):
                self.catalogue.reserve(key, slot)
            return self.visible(key)
        entry = self.catalogue.reserve(key, slot)
        self.rows[entry] = Row(key, slot)
        return entry

    @rule(entry=entries, cause=st.sampled_from([Cause.COMMIT, Cause.ABORT, Cause.OVERDUE]))
    def writer_says(self, entry: Entry, cause: Cause) -> None:
        row = self.rows.get(entry)
        if row is None:  # gone: nobody has it in hand any more
            return
        allowed = {
            Cause.COMMIT: row.state == "reserved",
            Cause.OVERDUE: row.state == "reserved",
            Cause.ABORT: row.state in ("reserved", "quarantined"),
        }[cause]
        if not allowed:
            with pytest.raises(ValueError):
                self.catalogue.move(entry, cause)
            return
        self.catalogue.move(entry, cause)
        if cause is Cause.ABORT:
            self.leave(entry)
        else:
            row.state = "ready" if cause is Cause.COMMIT else "quarantined"

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4), target=held)
    def match_and_hold(self, keys: list[bytes]) -> list[Entry]:
        found = self.catalogue.match(keys)
        expected = []
        for entry in map(self.visible, keys):
            if entry is None or self.rows[entry].state != "ready":
                break
            expected.append(entry)
        assert found == expected
        self.catalogue.hold(found)
        for entry in found:
            self.rows[entry].readers += 1
        return found

    @rule(entries_held=consumes(held))
    def let_go(self, entries_held: list[Entry]) -> None:
        self.catalogue.let_go(entries_held)
        for entry in entries_held:
            row = self.rows[entry]
            row.readers -= 1
            if row.state == "evicting" and not row.readers:
                self.leave(entry)

    @precondition(lambda self: any(row.state == "ready" for row in self.rows.values()))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        ready = [entry for entry, row in self.rows.items() if row.state == "ready"]
        entry = data.draw(st.sampled_from(ready))
        self.catalogue.drop(entry)
        self.rows[entry].state = "evicting"
        if not self.rows[entry].readers:
            self.leave(entry)

    @invariant()
    def agree(self) -> None:
        assert set(self.catalogue) == set(self.rows)
        assert len(self.catalogue) == len(self.rows)
        assert self.freed == self.expected_freed
        for entry, row in self.rows.items():
            assert (entry.key, entry.slot, entry.state.value, entry.readers) == (
                row.key,
                row.slot,
                row.state,
                row.readers,
            )
        for key in KEYS:
            assert self.catalogue.get(key) is self.visible(key)
        unread = {e for e, row in self.rows.items() if row.state == "ready" and not row.readers}
        assert set(self.catalogue.victims(1, now=0, wanted=len(KEYS) + 1)) == unread


TestCatalogueAgainstTheModel = CatalogueModel.TestCase
TestCatalogueAgainstTheModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
