"""The YAML file that holds a configuration: the one of `KVSTRATA_CONFIG`, or one named by a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvstrata.core.errors import ConfigError


def read_yaml(path: Path, origin: str = "") -> dict[str, Any]:
    """The tree in a YAML file. `origin`: what a message says of the file besides its name.

    Raises:
        ConfigError: it cannot be read, is not a tree, or gives a key twice.
    """
    named = f"the configuration {path} {origin}".rstrip()
    try:
        text = path.read_text()
        _refuse_repeats(path, yaml.compose(text, Loader=yaml.SafeLoader))
        tree = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2026-99-99
        raise ConfigError(f"{named} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "no settings"
        raise ConfigError(f"{named} holds {kind}: it has sections, such as host: with size: 8GiB in it")
    return tree


def _refuse_repeats(path: Path, node: yaml.Node | None, section: str = "") -> None:
    """PyYAML would keep the last one, and the other would be without effect and without a word."""
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{section}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ConfigError(
                f"{name} is given twice in the configuration {path}, "
                f"in line {lines[name]} and in line {line}: keep one of them"
            )
        lines[name] = line
        if not section:  # settings lie no deeper
            _refuse_repeats(path, value, f"{name}.")
