"""Two prompts share a key exactly as far as they share everything that the key stands for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstrata.core.keys import KEY_BYTES, KeyChain

NAMESPACE = bytes(range(32))
CHUNK = 4

few_tokens = st.lists(st.integers(0, 2), max_size=24)  # a small alphabet, so that prefixes meet
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
extras = st.dictionaries(st.integers(0, 5), st.binary(min_size=1, max_size=8), max_size=3)


def keys(
    prompt: list[int],
    chunk: int = CHUNK,
    namespace: bytes = NAMESPACE,
    extras: dict[int, bytes] | None = None,
) -> list[bytes]:
    return KeyChain(namespace, chunk, extras).extend(prompt)


def same(left: list[bytes], right: list[bytes]) -> list[bool]:
    return [one == other for one, other in zip(left, right, strict=False)]


@given(few_tokens, few_tokens, few_tokens, st.integers(1, 5))
def test_keys_are_equal_exactly_where_prefixes_are(
    head: list[int], left: list[int], right: list[int], chunk: int
) -> None:
    one, other = head + left, head + right
    ends = range(chunk, min(len(one), len(other)) + 1, chunk)
    assert same(keys(one, chunk), keys(other, chunk)) == [one[:end] == other[:end] for end in ends]


@given(tokens)
def test_every_full_chunk_has_a_key_and_no_two_are_equal(prompt: list[int]) -> None:
    found = keys(prompt)
    assert len(found) == len(prompt) // CHUNK
    assert len(set(found)) == len(found)
    assert all(len(key) == KEY_BYTES for key in found)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=CHUNK, max_size=40), st.data())
def test_a_changed_token_changes_its_key_and_all_later_ones(prompt: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(prompt) - 1))
    changed = [*prompt[:at], prompt[at] ^ data.draw(st.integers(1, 2**32 - 1)), *prompt[at + 1 :]]
    chunks = len(prompt) // CHUNK
    assert same(keys(prompt), keys(changed)) == [index < at // CHUNK for index in range(chunks)]


@given(tokens, st.integers(0, 31), st.integers(1, 255))
def test_another_namespace_shares_no_key(prompt: list[int], byte: int, flip: int) -> None:
    other = bytearray(NAMESPACE)
    other[byte] ^= flip
    assert not set(keys(prompt)) & set(keys(prompt, namespace=bytes(other)))


@given(tokens, st.integers(1, 9), st.integers(1, 9))
def test_another_chunk_size_shares_no_key(prompt: list[int], one: int, other: int) -> None:
    shared = set(keys(prompt, one)) & set(keys(prompt, other))
    assert not shared or one == other


@given(tokens, extras, st.integers(0, 5), st.binary(min_size=1, max_size=8))
def test_changed_extras_change_their_key_and_all_later_ones(
    prompt: list[int], before: dict[int, bytes], at: int, value: bytes
) -> None:
    after = {**before, at: value}
    chunks = len(prompt) // CHUNK
    unchanged = before.get(at) == value
    expected = [index < at or unchanged for index in range(chunks)]
    assert same(keys(prompt, extras=before), keys(prompt, extras=after)) == expected


@given(tokens, extras, st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=200)
def test_growing_a_prompt_gives_the_keys_of_the_whole(
    prompt: list[int], content: dict[int, bytes], cuts: list[int]
) -> None:
    chain = KeyChain(NAMESPACE, CHUNK, content)
    for cut in [*sorted(cuts), len(prompt)]:
        assert chain.extend(prompt[:cut]) == keys(prompt[:cut], extras=content)


def test_a_shorter_prompt_takes_no_key_away() -> None:
    chain = KeyChain(NAMESPACE, CHUNK)
    before = list(chain.extend([1] * 12))
    assert chain.extend([1] * 5) == before


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_does_not_fit_is_an_overflow_and_changes_nothing(token: int) -> None:
    chain = KeyChain(NAMESPACE, CHUNK)
    before = list(chain.extend([7] * CHUNK))
    with pytest.raises(OverflowError):
        chain.extend([7] * CHUNK + [token] * CHUNK)
    assert chain.keys == before
    assert chain.extend([7] * 2 * CHUNK) == keys([7] * 2 * CHUNK)


def test_a_token_that_completes_no_chunk_is_not_looked_at() -> None:
    assert KeyChain(NAMESPACE, CHUNK).extend([1, 2, 3]) == []


def test_keys_never_change_between_versions() -> None:
    """Stored chunks are found by these bytes: a change here loses every cache without a word."""
    found = keys(list(range(8)), extras={1: b"picture"})
    assert [key.hex() for key in found] == [
        "4e5f86dae835f103c28ca79392c819d41fa19690a857cb31e0e5258be086a525",
        "27fda095643a5015a657eecb8e53be8a4d34a90f5b9e21a3867e2329ae1fddf4",
    ]
