"""What the ends of connections and of processes mean, whatever their order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.events import ClientGone, ClientResumed, ClientStopped, WorkerDisconnected
from kvstrata.core.lives import SCHEDULER, Lives, ProcessId

NAME = "engine"
WORKER: ProcessId = ("worker", 0)


@pytest.fixture
def lives() -> Lives:
    lives = Lives()
    lives.arrived(NAME, SCHEDULER)
    lives.arrived(NAME, WORKER)
    lives.open(NAME)
    return lives


def test_a_worker_whose_connection_ends_may_still_be_copying(lives: Lives) -> None:
    assert lives.ended(NAME, WORKER) == [ClientStopped(NAME), WorkerDisconnected(NAME, 0)]
    assert not lives.is_open(NAME, WORKER)
    assert lives.serves, "its scheduler side is there"
    assert lives.ended(NAME, WORKER) == [], "it is said once"


def test_it_goes_on_when_all_its_processes_are_back(lives: Lives) -> None:
    lives.ended(NAME, WORKER)
    lives.ended(NAME, SCHEDULER)
    assert not lives.serves
    assert lives.arrived(NAME, WORKER) == []
    assert lives.arrived(NAME, SCHEDULER) == [ClientResumed(NAME)]


def test_it_is_gone_when_its_last_process_is_done_though_its_connections_ended_before(lives: Lives) -> None:
    lives.ended(NAME, SCHEDULER)
    assert lives.done(NAME, SCHEDULER) == []
    assert lives.ended(NAME, WORKER)[0] == ClientStopped(NAME)
    assert lives.opened == {NAME}
    assert lives.done(NAME, WORKER) == [ClientGone(NAME)]
    assert lives.opened == set()
    assert lives.done(NAME, WORKER) == [], "nobody knows it any more"


def test_a_process_that_connects_again_has_lost_its_connection_before(lives: Lives) -> None:
    assert lives.arrived(NAME, WORKER) == [
        ClientStopped(NAME),
        WorkerDisconnected(NAME, 0),
        ClientResumed(NAME),
    ]


def test_an_engine_that_was_refused_is_not_served() -> None:
    lives = Lives()
    lives.arrived(NAME, SCHEDULER)
    assert not lives.serves
    lives.open(NAME)
    assert lives.serves


@given(
    st.lists(st.tuples(st.sampled_from(["arrived", "ended", "done"]), st.sampled_from([SCHEDULER, WORKER])))
)
def test_it_is_gone_exactly_when_none_that_ever_arrived_can_copy(steps: list[tuple[str, ProcessId]]) -> None:
    lives, may_copy, known = Lives(), set[ProcessId](), False
    for what, process in steps:
        events = getattr(lives, what)(NAME, process)
        if what == "arrived":
            may_copy.add(process)
            known = True
        elif what == "done":
            may_copy.discard(process)
        gone = known and not may_copy
        assert (ClientGone(NAME) in events) is gone
        known = known and not gone
        assert (ClientStopped(NAME) in events) <= (process in may_copy or what == "done")
