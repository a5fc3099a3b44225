"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import EngineProcess, Host


@pytest.fixture
def host(runtime_dir: Path, tiny_model: Path, tmp_path: Path) -> Iterator[Host]:
    """A host without any process yet; all that were started are ended."""
    host = Host(runtime_dir, tiny_model, tmp_path)
    yield host
    host.close()


@pytest.fixture(scope="module")
def module_host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One host for the tests of a module that share their engines; they keep apart by their prompts."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    host = Host(folder, tiny_model, tmp_path_factory.mktemp("logs"))
    yield host
    host.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """vLLM without the plug-in, which knows the right answers: one for all tests."""
    host = Host(tmp_path_factory.mktemp("plain"), tiny_model, tmp_path_factory.mktemp("logs"))
    with host.engine(plain=True) as engine:
        yield engine
    host.close()
