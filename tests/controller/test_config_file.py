"""The configuration file: what it says counts, or is refused in a sentence; nothing in it is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.controller.client.config_file import read_yaml
from kvstrata.core.errors import ConfigError


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("host:\n  size: 1GiB\n  policy: lru\n  size: 2GiB\n", "host.size", (2, 4)),
        ("host: {size: 1GiB, size: 1GiB}\n", "host.size", (1, 1)),
        ("# ours\nhost: {size: 1GiB}\nnode: {}\nhost: {policy: lru}\n", "host", (2, 4)),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    path = tmp_path / "node.yaml"
    assert refused(path, text) == (
        f"{key} is given twice in the configuration {path}, in line {lines[0]} and in line {lines[1]}: "
        "keep one of them"
    )


def test_the_same_name_in_two_sections_is_two_keys(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("a: &all {x: 1}\nb: {x: 2}\nc: {<<: *all, x: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("# host:\n#   size: 8GiB\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize("text", ["host: [", "host: 2026-99-99", "? [a]\n: b", "a: 1\n---\nb: 2", "\x00"])
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    assert "node.yaml is not YAML: " in refused(tmp_path / "node.yaml", text)
