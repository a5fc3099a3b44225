"""What the benches share: a node store of their own, and how a result is shown and kept."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.controller.cli_node import end_node_store
from kvstrata.controller.paths import RuntimePaths
from kvstrata.controller.results import Figure, measured
from kvstrata.core.config import Config, as_tree, build_config

REPO = Path(__file__).resolve().parent.parent
_START_S = 30.0


def smollm2(named: Path | None) -> Path:
    """The model's folder: the one that was named, or SmolLM2, made in this checkout if it is not there."""
    folder = named or REPO / ".cache" / "models" / "smollm2"
    if named is None:
        subprocess.run([sys.executable, REPO / "scripts" / "models.py", "smollm2", folder], check=True)
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} holds no model: name a folder with config.json, weights and tokenizer")
    return folder


@dataclass(frozen=True, slots=True)
class Node:
    """A running node store that nobody else knows of."""

    config: Config
    paths: RuntimePaths
    pid: int


@contextmanager
def node_store(pool_bytes: int) -> Iterator[Node]:
    """A node store in a folder of its own; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    tree = {"host": {"size": pool_bytes}, "node": {"runtime_dir": str(folder), "autostart": False}}
    config, paths = build_config(("this bench", tree)), RuntimePaths(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstrata.controller.node"],
        stdin=subprocess.PIPE,
        stderr=(folder / "node.log").open("wb"),
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(json.dumps(as_tree(config)).encode() + b"\n")
    try:
        deadline = time.monotonic() + _START_S
        while not paths.control.exists() or not paths.side.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no node store: {paths.log.read_text()}")
            time.sleep(0.05)
        yield Node(config, paths, process.pid)
    finally:
        end_node_store(paths)
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def parser(doc: str | None, bench: str) -> argparse.ArgumentParser:
    """With the one option that every bench has."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    kept = REPO / "docs" / "results" / f"{bench}.json"
    made.add_argument("--json", type=Path, default=kept, metavar="FILE", help="where the result goes")
    return made


def keep(path: Path, bench: str, figures: Sequence[Figure], samples: Mapping[str, Any]) -> None:
    """Print the figures and write the result."""
    for figure in figures:
        goal = f" (goal {figure.goal}: {'met' if figure.met else 'MISSED'})" if figure.goal else ""
        print(f"{figure.name}: {figure.value:,} {figure.unit}".rstrip() + goal)
    measured(bench, f"python benches/{bench}.py", figures, samples).write(path)
