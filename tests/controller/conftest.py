"""Fixtures of the node store's tests: real processes, ended by their pid, leaving nothing behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.core.config import Config
from tests.controller.stores import Engine, EngineProcess, RunningStore, config_for


@pytest.fixture
def config(runtime_dir: Path) -> Config:
    """Of a small pool that nobody serves yet."""
    return config_for(runtime_dir)


@pytest.fixture
def node_store(runtime_dir: Path) -> Iterator[Callable[..., RunningStore]]:
    """Starts node stores, each in a folder of its own. `node_store(host={...})` sets what it should."""
    started: list[RunningStore] = []

    def start(**sections: dict[str, Any]) -> RunningStore:
        folder = runtime_dir / str(len(started))
        started.append(RunningStore.start(config_for(folder, **sections)))
        return started[-1]

    yield start
    for store in started:
        store.stop()


@pytest.fixture(scope="module")
def shared_store() -> Iterator[RunningStore]:
    """One node store for all tests of a file that leave it as they found it."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    store = RunningStore.start(config_for(folder))
    yield store
    store.stop()
    shutil.rmtree(folder)


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Starts engines without a model; all say bye at the end."""
    started: list[Engine] = []

    def start(config: Config, name: str, **options: int) -> Engine:
        started.append(Engine(config, name, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def processes() -> Iterator[Callable[..., EngineProcess]]:
    """Starts engines in processes of their own; all are ended."""
    started: list[EngineProcess] = []

    def start(config: Config, name: str, rank: int | None = None) -> EngineProcess:
        started.append(EngineProcess(config, name, rank))
        return started[-1]

    yield start
    for process in started:
        process.end()
