"""The eviction order, against a model that is a plain list."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstrata.core.policy import LRU, POLICIES, EvictionPolicy

KEYS = [b"a", b"b", b"c", b"d", b"e"]

key = st.sampled_from(KEYS)
prefix = st.lists(key, unique=True, max_size=5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), key),
        st.tuples(st.just("touch"), prefix),
        st.tuples(st.just("remove"), key),
    ),
    max_size=40,
)


class ListModel:
    """Least recently used first. What is known moves to the end, the tail of a prefix before its head."""

    def __init__(self) -> None:
        self.order: list[bytes] = []

    def admit(self, key: bytes) -> None:
        self.order.append(key)

    def touch(self, keys: list[bytes]) -> None:
        known = [key for key in reversed(keys) if key in self.order]
        self.order = [key for key in self.order if key not in known] + known

    def remove(self, key: bytes) -> None:
        self.order = [other for other in self.order if other != key]


@given(steps)
@settings(max_examples=300)
def test_lru_orders_keys_like_the_list(sequence: list[tuple[str, object]]) -> None:
    policy, model = LRU(), ListModel()
    for name, argument in sequence:
        if name == "admit" and argument in model.order:
            continue  # a key becomes evictable once
        getattr(policy, name)(argument)
        getattr(model, name)(argument)
        assert list(policy.victims()) == model.order


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    @pytest.fixture
    def policy(self, name: str) -> EvictionPolicy:
        return POLICIES[name]()

    def test_offers_exactly_what_was_admitted_and_not_removed(self, policy: EvictionPolicy) -> None:
        for each in KEYS:
            policy.admit(each)
        policy.remove(KEYS[1])
        assert set(policy.victims()) == set(KEYS) - {KEYS[1]}
        assert sorted(policy) == sorted(policy.victims())

    def test_ignores_keys_that_it_does_not_know(self, policy: EvictionPolicy) -> None:
        policy.touch(KEYS)
        policy.remove(KEYS[0])
        assert list(policy.victims()) == []

    def test_lets_the_caller_stop_anywhere(self, policy: EvictionPolicy) -> None:
        for each in KEYS:
            policy.admit(each)
        (first,) = itertools.islice(policy.victims(), 1)
        policy.remove(first)
        assert first not in list(policy.victims())


def test_a_used_prefix_loses_its_tail_before_its_head() -> None:
    policy = LRU()
    for each in KEYS:
        policy.admit(each)
    policy.touch([b"a", b"b", b"c"])
    assert list(policy.victims()) == [b"d", b"e", b"c", b"b", b"a"]
