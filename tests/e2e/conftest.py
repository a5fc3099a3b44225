"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Host


@pytest.fixture
def host(runtime_dir: Path, tiny_model: Path, tmp_path: Path) -> Iterator[Host]:
    """A host without any process yet; all that were started are ended."""
    host = Host(runtime_dir, tiny_model, tmp_path)
    yield host
    host.close()
