"""The YAML file that holds a configuration: the one of `KVSTRATA_CONFIG`, or one named by a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvstrata.core.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The tree in a YAML file. Raises ConfigError if it cannot be read or is not a tree."""
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"the configuration {path} holds {type(tree).__name__}, expected sections such as host:"
        )
    return tree
