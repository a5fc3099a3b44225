"""Host hits answer exactly as plain vLLM's own prefix hit at the same boundary does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.harness import CHUNK, Host, same, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SHARED = 3 * CHUNK
DOCUMENT = tokens(1, SHARED)
QUESTIONS = [tokens(100 + i, 40 + 13 * i) for i in range(4)]


@pytest.fixture(scope="module")
def plain_answers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> list[dict[str, Any]]:
    """Plain vLLM, each question answered on a GPU prefix hit of exactly the document."""
    host = Host(tmp_path_factory.mktemp("plain"), tiny_model, tmp_path_factory.mktemp("logs"))
    with host.engine(plain=True) as engine:
        engine.ask(DOCUMENT + tokens(99, 20))
        answers = [engine.ask(DOCUMENT + question)[0] for question in QUESTIONS]
    host.close()
    assert [a["cached"] for a in answers] == [SHARED] * len(QUESTIONS)
    return answers


def ask_each(engine: Any) -> list[dict[str, Any]]:
    """Each question with nothing in the GPU's own cache."""
    answers = []
    for question in QUESTIONS:
        assert engine.do("reset_gpu_cache")
        answers += engine.ask(DOCUMENT + question)
    return answers


def test_hits_from_the_host_pool_equal_the_engines_own(
    host: Host, plain_answers: list[dict[str, Any]]
) -> None:
    with host.engine() as first:
        first.ask(DOCUMENT + tokens(99, 20))
        first.do("settle")

        after_eviction = ask_each(first)

        assert [a["cached"] for a in after_eviction] == [SHARED] * len(QUESTIONS)
        assert first.do("counters")["loaded_tokens"] == SHARED * len(QUESTIONS)
        assert same(after_eviction, plain_answers)
        with host.engine() as second:  # beside the first one
            from_second = ask_each(second)
            assert second.do("counters")["loaded_tokens"] == SHARED * len(QUESTIONS)
            assert same(from_second, plain_answers)
            first.close()
            host.quiet()
    with host.engine() as restarted:
        after_restart = ask_each(restarted)
        assert restarted.do("counters")["loaded_tokens"] == SHARED * len(QUESTIONS)
        assert same(after_restart, plain_answers)
        restarted.do("settle")
        assert set(restarted.do("books").values()) == {0}
    stats = host.quiet()
    assert stats["counters"]["hit_chunks"] == 3 * 3 * len(QUESTIONS)


def test_loads_that_bring_zeros_change_the_answers(host: Host, plain_answers: list[dict[str, Any]]) -> None:
    with host.engine() as honest:
        honest.ask(DOCUMENT + tokens(99, 20))
        honest.do("settle")
    drill = {
        "kv_connector": "ZeroedLoadsConnector",
        "kv_connector_module_path": "kvstrata.connector.vllm.drill",
    }
    with host.engine(transfer=drill) as zeroed:
        answers = ask_each(zeroed)

    assert [a["cached"] for a in answers] == [SHARED] * len(QUESTIONS)  # they did hit
    for wrong, right in zip(answers, plain_answers, strict=True):
        assert wrong["logprobs"] != right["logprobs"]


@pytest.mark.parametrize("length", [CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 2 * CHUNK + 31, 3 * CHUNK - 1])
def test_any_prompt_length_loads_whole_blocks_and_never_the_last_token(host: Host, length: int) -> None:
    prompt = tokens(7, length)
    with host.engine() as engine:
        (cold,) = engine.ask(prompt)
        (own_hit,) = engine.ask(prompt)
        assert engine.do("reset_gpu_cache")
        (host_hit,) = engine.ask(prompt)

    chunks_end = length // CHUNK * CHUNK
    assert cold["cached"] == 0
    assert own_hit["cached"] == (length - 1) // 32 * 32
    assert host_hit["cached"] == min(chunks_end, (length - 1) // 32 * 32)
    assert host_hit["tokens"] == cold["tokens"] == own_hit["tokens"]
