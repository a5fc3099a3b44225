"""Whatever can change a byte of KV keeps namespaces apart."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstrata.core.namespace import (
    ModelIdentity,
    canonical_config,
    chunk_extras,
    namespace_digest,
)

MODEL = ModelIdentity(
    config='{"hidden_size":64}',
    weights=b"w" * 32,
    weight_quantization="",
    kv_dtype="bfloat16",
    kv_scales="",
    layout=b"l" * 32,
    context="",
)
FIELDS = [field.name for field in dataclasses.fields(ModelIdentity)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_model_matters(name: str) -> None:
    value = getattr(MODEL, name)
    another = value + (b"x" if isinstance(value, bytes) else 1 if isinstance(value, int) else "x")
    assert dataclasses.replace(MODEL, **{name: another}).digest != MODEL.digest


@pytest.mark.parametrize("other", [name for name in FIELDS if isinstance(getattr(MODEL, name), str)][1:])
def test_a_value_that_moves_to_another_field_is_another_model(other: str) -> None:
    left = dataclasses.replace(MODEL, config="a", **{other: ""})
    right = dataclasses.replace(MODEL, config="", **{other: "a"})
    assert left.digest != right.digest


def test_equal_models_are_one_model() -> None:
    assert dataclasses.replace(MODEL).digest == MODEL.digest
    assert len(MODEL.digest) == 32


def test_no_salt_an_empty_salt_and_a_salt_are_three_tenants() -> None:
    found = {namespace_digest(MODEL.digest, salt=salt) for salt in (None, "", "a", "b", "salt ")}
    assert len(found) == 5


def test_an_adapter_is_another_namespace_and_no_salt() -> None:
    found = {
        namespace_digest(MODEL.digest, adapter, salt)
        for adapter in (b"", b"a", b"salt a")
        for salt in (None, "", "a")
    }
    assert len(found) == 9


def test_a_new_generation_shares_nothing_with_the_one_before() -> None:
    after = dataclasses.replace(MODEL, generation="another")
    assert namespace_digest(after.digest) != namespace_digest(MODEL.digest)


# --------------------------------------------------------------------------------------- model config


def test_where_a_config_came_from_does_not_matter() -> None:
    plain = canonical_config({"layers": 2, "text_config": {"dim": 3}})
    noted = {
        "_name_or_path": "/somewhere",
        "transformers_version": "9",
        "text_config": {"dim": 3, "_commit_hash": "f00"},
        "layers": 2,
    }
    assert canonical_config(noted) == plain


@pytest.mark.parametrize(
    "other", [{"rope": {"factor": 3}}, {"rope": {"factor": 2.5}}, {"rope": {"factor": 2, "x": None}}, {}]
)
def test_what_the_model_computes_does_matter(other: dict[str, object]) -> None:
    assert canonical_config(other) != canonical_config({"rope": {"factor": 2}})


def test_the_order_of_a_config_does_not_matter() -> None:
    assert canonical_config({"a": 1, "b": {"c": 2, "d": 3}}) == canonical_config(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )


# --------------------------------------------------------------------------------- multimodal content

item = st.tuples(st.integers(0, 50), st.integers(0, 30), st.sampled_from(["cat", "dog"]))


@given(st.lists(item, max_size=4), st.integers(1, 12))
def test_extras_are_for_exactly_the_chunks_that_an_item_touches(
    items: list[tuple[int, int, str]], chunk: int
) -> None:
    touched = {
        token // chunk
        for position, length, _ in items
        for token in range(position, position + max(length, 1))
    }
    assert set(chunk_extras(items, chunk)) == touched


@given(st.lists(item, max_size=4), st.integers(1, 12))
def test_the_order_of_items_does_not_matter(items: list[tuple[int, int, str]], chunk: int) -> None:
    assert chunk_extras(items[::-1], chunk) == chunk_extras(items, chunk)


@pytest.mark.parametrize(
    "other",
    [
        [(2, 6, "dog")],  # another picture
        [(3, 6, "cat")],  # a token further
        [(2, 7, "cat")],  # another size of it
        [(2, 6, "cat"), (3, 1, "cat")],  # one more
    ],
)
def test_another_picture_place_or_size_gives_other_extras(other: list[tuple[int, int, str]]) -> None:
    first = chunk_extras([(2, 6, "cat")], 4)
    assert chunk_extras(other, 4)[0] != first[0]


def test_two_windows_of_one_picture_differ() -> None:
    extras = chunk_extras([(0, 12, "cat")], 4)
    assert len(set(extras.values())) == len(extras) == 3
