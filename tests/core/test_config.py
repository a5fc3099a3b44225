"""One configuration: every key known, every value in range, no two sources in contradiction."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstrata.core.config import Config, as_tree, build_config
from kvstrata.core.errors import ConfigError

Tree = dict[str, Any]

sizes = st.one_of(
    st.just("auto"), st.integers(1 << 20, 1 << 45), st.sampled_from(["8GiB", "500 MB", "1024kib"])
)
times = st.one_of(st.floats(1, 1e6), st.integers(1, 10**6), st.sampled_from(["30min", "2 h", "1500ms"]))
trees = st.fixed_dictionaries(
    {},
    optional={
        "host": st.fixed_dictionaries({}, optional={"size": sizes, "segment_size": sizes}),
        "chunk": st.fixed_dictionaries({"tokens": st.integers(1, 4096)}),
        "node": st.fixed_dictionaries(
            {},
            optional={
                "runtime_dir": st.text(max_size=10),
                "autostart": st.booleans(),
                "idle_exit": times,
                "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
            },
        ),
        "client": st.fixed_dictionaries(
            {},
            optional={
                "lookup_wait": st.floats(0, 0.1),
                "load_deadline": st.floats(1.0, 90.0),
                "copy_threads": st.integers(1, 8),
                "save": st.booleans(),
            },
        ),
        "identity": st.fixed_dictionaries({"model": st.text(max_size=10)}),
    },
)


def refused(*sources: tuple[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(*sources)
    return str(caught.value)


def test_without_sources_there_are_defaults() -> None:
    assert build_config() == build_config(("file", {}), ("flags", {})) == Config()


def test_values_are_read_as_people_write_them() -> None:
    config = build_config(
        ("file", {"host": {"size": "8GiB", "segment_size": "auto"}, "node": {"idle_exit": "2h"}}),
        ("flags", {"client": {"lookup_wait": "0.01ms"}, "chunk": {"tokens": 64}}),
    )
    assert config.host.size == 8 << 30
    assert config.host.segment_size == 0
    assert config.node.idle_exit == 7200
    assert config.client.lookup_wait == pytest.approx(1e-5)
    assert config.chunk.tokens == 64


@given(trees)
def test_a_configuration_survives_the_way_to_a_node_store(tree: Tree) -> None:
    config = build_config(("file", tree))
    assert build_config(("standard input", json.loads(json.dumps(as_tree(config))))) == config


def test_a_tree_has_every_setting() -> None:
    tree = as_tree(Config())
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}
    assert all(values for values in tree.values())


# -------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("tree", "unknown", "nearest"),
    [
        ({"host": {"sise": 1}}, "host.sise", "host.size"),
        ({"host": {"segment": 1}}, "host.segment", "host.segment_size"),
        ({"client": {"deadline": 1}}, "client.deadline", "client.load_deadline"),
        ({"hosts": {}}, "hosts", "host"),
        ({"nodes": {"group": ""}}, "nodes", "node"),
        ({"copy_threads": 1}, "copy_threads", "client.copy_threads"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tree: Tree, unknown: str, nearest: str) -> None:
    assert refused(("node.yaml", tree)) == f"unknown key {unknown} in node.yaml: did you mean {nearest}?"


def test_a_key_like_no_other_is_refused_with_all_there_are() -> None:
    message = refused(("flags", {"zzzzzzzz": 1}))
    assert message.startswith("unknown key zzzzzzzz in flags: known keys: ")
    assert "host.size" in message


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("host.size", "8GiB", "host: {size: 8GiB}"),
        ("chunk.tokens", 64, "chunk: {tokens: 64}"),
        ("client.save", False, "client: {save: false}"),
    ],
)
def test_a_key_with_a_dot_is_refused_with_how_to_write_it(key: str, value: Any, right: str) -> None:
    message = refused(("node.yaml", {key: value}))
    assert message == f"{key} in node.yaml is one key with a dot in it: write it as {right}"


def test_a_section_that_is_no_section_is_refused_with_its_keys() -> None:
    assert refused(("flags", {"chunk": 64})) == "chunk in flags is 64; it holds keys: tokens"


# ------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("host.size", "8 elephants", "'8 elephants' is not a size"),
        ("host.size", True, "True is not a size"),
        ("host.size", -1, "-1 is not a size"),
        ("host.size", "1e9", "'1e9' is not a size such as 8GiB or 500MB"),
        ("host.size", math.nan, "nan is not a size"),
        ("host.size", math.inf, "inf is not a size"),
        ("host.size", "9" * 400, "is not a size"),
        ("host.size", None, "None is not a size"),
        ("host.segment_size", [1], "[1] is not a size"),
        ("node.idle_exit", True, "True is not a time"),
        ("node.idle_exit", -1.5, "-1.5 is not a time"),
        ("node.idle_exit", "-1.5s", "'-1.5s' is not a time"),
        ("node.idle_exit", math.nan, "nan is not a time"),
        ("node.idle_exit", -math.inf, "-inf is not a time"),
        ("node.idle_exit", "9" * 400 + "d", "is not a time"),
        ("client.lookup_wait", math.inf, "inf is not a time"),
        ("client.lookup_wait", "1h", "3600.0; the most allowed is 0.1 seconds"),
        ("client.call_deadline", "1h", "3600.0; the most allowed is 60.0 seconds"),
        ("node.idle_exit", "auto", "'auto' is not a time"),
        ("node.idle_exit", "0.5s", "0.5; the least allowed is 1.0"),
        ("client.load_deadline", 0, "0.0; the least allowed is 0.1"),
        ("client.load_deadline", "2min", "120.0; the most allowed is 90.0"),
        ("host.size", 0, '0; the least allowed is 1.0 MiB: leave it out, or write "auto", for a quarter'),
        ("host.size", "500kB", "500000; the least allowed is 1.0 MiB"),
        ("client.staging", 4096, "4096; the least allowed is 1.0 MiB"),
        ("client.copy_threads", 0, "0; the least allowed is 1"),
        ("client.copy_threads", 65, "65; the most allowed is 64"),
        ("client.copy_threads", True, "True; it must be a whole number"),
        ("client.copy_threads", math.nan, "nan; it must be a whole number"),
        ("chunk.tokens", 0, "0; the least allowed is 1"),
        ("chunk.tokens", -256, "-256; the least allowed is 1"),
        ("chunk.tokens", 65537, "65537; the most allowed is 65536"),
        ("chunk.tokens", "256", "'256'; it must be a whole number"),
        ("client.copy_threads", 1.0, "1.0; it must be a whole number"),
        ("client.save", 1, "1; it must be true or false"),
        ("client.save", "yes", "'yes'; it must be true or false"),
        ("chunk.tokens", True, "True; it must be a whole number"),
        ("chunk.tokens", None, "None; it must be a whole number"),
        ("identity.model", 7, "7; it must be text"),
        ("host.policy", "random", "'random'; allowed: lru"),
        ("node.log_level", "INFO", "'INFO'; allowed: debug, info, warning, error"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(path: str, value: Any, why: str) -> None:
    section, key = path.split(".")
    message = refused(("flags", {section: {key: value}}))
    assert message.startswith(f"{path} in flags")
    assert why in message


# ----------------------------------------------------------------------------------- contradictions


def test_two_sources_that_disagree_are_both_named() -> None:
    message = refused(("node.yaml", {"host": {"size": "8GiB"}}), ("flags", {"host": {"size": "4GiB"}}))
    assert message == "host.size is '8GiB' in node.yaml and '4GiB' in flags: set it in one place"


def test_a_wrong_value_is_not_hidden_by_another_source() -> None:
    """1 == True, and nan != nan: what is compared are values that have been found right."""
    for wrong, right in ((True, 1), (math.nan, math.nan)):
        message = refused(
            ("a", {"client": {"copy_threads": wrong}}), ("b", {"client": {"copy_threads": right}})
        )
        assert message == f"client.copy_threads in a is {wrong}; it must be a whole number"


def test_two_sources_may_say_the_same_in_other_words() -> None:
    config = build_config(("a", {"host": {"size": "1GiB"}}), ("b", {"host": {"size": 1 << 30}}))
    assert config.host.size == 1 << 30


def test_two_sources_that_agree_are_fine() -> None:
    source = {"host": {"size": "8GiB"}, "client": {"save": False}}
    assert build_config(("node.yaml", source), ("flags", source)) == build_config(("one", source))


def test_sources_may_each_set_a_part() -> None:
    config = build_config(("a", {"host": {"size": "1GiB"}}), ("b", {"host": {"segment_size": "2MiB"}}))
    assert (config.host.size, config.host.segment_size) == (1 << 30, 2 << 20)
