"""Packed chunks, raw ones and both in one prompt answer as vLLM's own prefix hit does, to any engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.harness import CHUNK, EngineProcess, Host, same, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNKS = 3
DOCUMENT = tokens(71, CHUNKS * CHUNK)
QUESTION = DOCUMENT + tokens(72, 30)
BF16 = {"dtype": "bfloat16"}
POOL = {"host": {"segment_size": "16MiB"}}  # several, as there are two sizes of slots
PICKY = {"kv_connector": "MisfitsConnector", "kv_connector_module_path": "misfits"}


def answer(engine: EngineProcess) -> dict[str, Any]:
    """Of a host hit."""
    assert engine.do("reset_gpu_cache")
    (found,) = engine.ask(QUESTION)
    return found


def test_packed_or_not_a_hit_is_a_hit(host: Host) -> None:
    with host.engine(plain=True, **BF16) as plain:
        plain.ask(DOCUMENT)
        plain.ask(DOCUMENT + tokens(73, 5))
        (right,) = plain.ask(QUESTION)
        assert right["cached"] == CHUNKS * CHUNK
    with host.engine(extra=POOL | {"client": {"packing": "on"}}, transfer=PICKY, **BF16) as picky:
        picky.ask(DOCUMENT + tokens(74, 9))
        picky.do("settle")
        found = answer(picky)
        counters = picky.do("counters")
    assert found["cached"] == CHUNKS * CHUNK and same([found], [right])
    assert counters["unpackable_chunks"] >= 1, "no chunk was odd: take another document"
    assert counters["saved_chunks"] > counters["unpackable_chunks"], "no chunk was even"
    for packing in ("on", "off"):
        with host.engine(extra=POOL | {"client": {"packing": packing}}, **BF16) as other:
            found = answer(other)
            assert found["cached"] == CHUNKS * CHUNK and same([found], [right])
            assert other.do("loaded_tokens") == CHUNKS * CHUNK
    stats = host.quiet()
    assert stats["counters"].get("corrupt_chunks", 0) == 0
    assert stats["chunks"]["reserved"] == stats["chunks"]["quarantined"] == 0
