"""Start a node store that outlives whoever starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

from kvstrata.controller.paths import runtime_paths
from kvstrata.core.config import Config, as_tree
from kvstrata.core.errors import NodeUnavailable

# What a long-lived daemon needs of its starter's environment; engines set a lot that it must not inherit.
_KEPT = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
)
_START_DEADLINE_S = 30.0


def start_node(config: Config) -> None:
    """Start a node store in the background. If one is running already, the new one ends quietly.

    Returns as soon as it has detached; it answers a moment later.

    Raises:
        NodeUnavailable: it could not be started; the message is what it printed.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    # Nothing is imported from the folder that the engine happens to run in.
    environment["PYTHONSAFEPATH"] = "1"
    folder = str(runtime_paths(config.node).folder)
    config = replace(config, node=replace(config.node, runtime_dir=folder))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvstrata.controller.node", "--daemon"],
            input=json.dumps(as_tree(config)) + "\n",
            env=environment,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            close_fds=True,
            start_new_session=True,
            timeout=_START_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NodeUnavailable(f"cannot start a node store: {error}") from error
    if done.returncode != 0:
        raise NodeUnavailable(f"cannot start a node store: {done.stderr.strip()[-2000:]}")
