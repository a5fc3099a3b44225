"""The copy library; tests fail, not skip, where it was not built."""

from __future__ import annotations

import pytest

from kvstrata.cuda_ext.native import Library, load_library


@pytest.fixture(scope="session")
def library() -> Library:
    return load_library()
