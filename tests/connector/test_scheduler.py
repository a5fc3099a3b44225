"""When the scheduler side keeps an engine awake; the rest of it runs in the simulator and in real engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstrata.connector.vllm.requests import Loading
from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.core.config import ClientConfig


@pytest.mark.parametrize("session", [SimpleNamespace(epoch=b"store"), None], ids=["store", "no store"])
def test_an_engine_does_not_sleep_while_a_load_is_under_way(session: object) -> None:
    """Its request may be over: it was handed over, and then aborted. Its end gives the lease back."""
    client = cast(Any, SimpleNamespace(session=session, slot_sizes=(4096,)))
    side = SchedulerConnector(client, cast(Any, None), 256, 16, 1, ClientConfig())
    assert not side.busy()
    side._loading[1] = Loading("aborted", 1, b"store", 0, 256)
    assert side.busy()
