"""Questions come over a socket of their own: Updates may overtake them, and nothing is leased twice."""

from __future__ import annotations

import pytest

from kvstrata.core.events import Match, Matched, Refused, Why
from tests.core.stores import Engine, Store, keys


@pytest.fixture
def engine() -> Engine:
    engine = Store().engine()
    engine.save(1, 2)
    return engine


def ask(engine: Engine, lease: int) -> object:
    (answer,) = engine.store.step(Match(engine.name, 0, lease, keys(1, 2)))
    return answer


def test_a_question_needs_no_place_among_the_updates(engine: Engine) -> None:
    answer = ask(engine, 900)
    assert isinstance(answer, Matched) and len(answer.slots) == 2
    engine.tell(released=(900,))  # in the order of before
    assert not engine.store.planner.clients[engine.name].leases


def test_a_question_that_was_given_up_before_it_came_gets_nothing(engine: Engine) -> None:
    engine.tell(released=(900,))
    assert ask(engine, 900) == Refused(Why.STALE)
    assert isinstance(ask(engine, 901), Matched)


def test_what_is_remembered_of_such_questions_is_bounded(engine: Engine) -> None:
    for lease in range(1000, 7000, 100):
        engine.tell(released=tuple(range(lease, lease + 100)))
    assert len(engine.store.planner.clients[engine.name].given_up) <= 4096
    assert ask(engine, 6999) == Refused(Why.STALE)
