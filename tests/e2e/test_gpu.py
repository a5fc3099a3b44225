"""What only engines on a GPU do: loads that are handed over early, sleep, memory that comes in segments."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import make_model
from tests.e2e.harness import CHUNK, EngineError, EngineProcess, Host, same, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]

CHUNKS = 12
# 16 MiB of bf16 a chunk: loads take long enough for processors to verify a part of them meanwhile.
WIDE = ("--layers=16", "--heads=8", "--kv-heads=8", "--head-dim=128")
GIB = 1 << 30
DOCUMENTS = [tokens(seed, CHUNKS * CHUNK) for seed in (91, 92, 93)]
QUESTIONS = [document + tokens(94, 1) for document in DOCUMENTS]


def gpu_hits(engine: EngineProcess) -> list[dict[str, Any]]:
    for document in DOCUMENTS:
        engine.ask(document, max_tokens=1)
    found = [engine.ask(question)[0] for question in QUESTIONS]
    assert [answer["cached"] for answer in found] == [CHUNKS * CHUNK] * len(found)
    return found


def host_hits(engine: EngineProcess, together: bool) -> list[dict[str, Any]]:
    assert engine.do("reset_gpu_cache")
    before = engine.do("loaded_tokens")
    found = engine.ask(*QUESTIONS) if together else [engine.ask(question)[0] for question in QUESTIONS]
    assert engine.do("loaded_tokens") == before + len(QUESTIONS) * CHUNKS * CHUNK
    return found


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_load_that_is_handed_over_is_a_hit(host: Host, eager: bool) -> None:
    pool = {"host": {"size": "2GiB"}}
    wide = {"model": str(make_model("wide", *WIDE)), "kv_cache_memory_bytes": 2 * GIB, "max_model_len": 4096}
    with host.engine(enforce_eager=eager, extra=pool, **wide) as engine:
        right = gpu_hits(engine)
        for together in (False, True, False):
            assert same(host_hits(engine, together), right)
        assert engine.do("handed_over") >= 3, "most of these loads should have been"
    host.quiet()


def test_an_engine_that_is_put_to_sleep_at_once(host: Host) -> None:
    """Its last saves may be under way: the memory that they read is about to go."""
    with host.engine(enable_sleep_mode=True, max_model_len=4096) as engine:
        right = gpu_hits(engine)
        for _ in range(3):
            engine.do("sleep")
            engine.do("wake_up")
            assert same(gpu_hits(engine), right)
        assert same(host_hits(engine, together=True), right)
    host.quiet()
    with host.engine(max_model_len=4096) as other:  # finds what was saved before the first sleep, if anything
        found = [other.ask(question)[0] for question in QUESTIONS]
    assert all(answer["tokens"] == one["tokens"] for answer, one in zip(found, right, strict=True))


def test_memory_in_expandable_segments_is_refused(host: Host) -> None:
    """By vLLM itself, whatever the connector."""
    segments = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with pytest.raises(EngineError, match="incompatible with PYTORCH_CUDA_ALLOC_CONF=expandable_segments"):
        host.start(env=segments).ready()
