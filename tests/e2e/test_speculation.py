"""Speculative decoding: drafts come and go, only chunks of confirmed tokens are stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import CHUNK, EngineProcess, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ANSWER = 270


def repetitive(seed: int, length: int) -> list[int]:
    """A prompt of few words in changing order: drafts are often made, and often wrong."""
    words = [tokens(seed * 100 + i, 6) for i in range(5)]
    order = tokens(seed, length)
    return [token for number in order for token in words[number % 5]][:length]


PROMPTS = {f"{length}": repetitive(length, length) for length in (CHUNK - 5, 200, 340, 2 * CHUNK + 1)}


@pytest.fixture(scope="module")
def right(plain: EngineProcess) -> dict[str, list[int]]:
    answers = plain.ask(*PROMPTS.values(), max_tokens=ANSWER)
    return {name: answer["tokens"] for name, answer in zip(PROMPTS, answers, strict=True)}


@pytest.fixture(scope="module")
def drafting(module_host: Host) -> Iterator[EngineProcess]:
    """Its own cache has room for each of the requests, but not for all at once."""
    shape = {"num_gpu_blocks_override": 40, "max_model_len": 1024}
    with module_host.engine(speculative_config=NGRAM, **shape) as engine:
        yield engine
        engine.do("settle")
        assert set(engine.do("books").values()) == {0}
        module_host.quiet()


def test_only_confirmed_tokens_are_stored(
    module_host: Host, plain: EngineProcess, drafting: EngineProcess, right: dict[str, list[int]]
) -> None:
    for name, prompt in PROMPTS.items():
        assert drafting.ask(prompt, max_tokens=ANSWER)[0]["tokens"] == right[name]
    drafting.do("settle")
    drafts, accepted = drafting.do("drafts")
    hits = {name: (len(prompt) + ANSWER - 1) // CHUNK * CHUNK for name, prompt in PROMPTS.items()}
    assert 0 < accepted < drafts
    assert drafting.do("counters")["saved_chunks"] == sum(hits.values()) / CHUNK

    # The next turn of each conversation: answers are in what is loaded.
    with module_host.engine() as other:
        for engine, question in ((other, tokens(401, 20)), (drafting, tokens(402, 20))):
            turns = {name: prompt + right[name] + question for name, prompt in PROMPTS.items()}
            said = [answer["tokens"] for answer in plain.ask(*turns.values())]
            assert engine.do("reset_gpu_cache")
            loaded = engine.do("counters")["loaded_tokens"]
            answers = {name: engine.ask(turn)[0] for name, turn in turns.items()}
            assert {name: answer["cached"] for name, answer in answers.items()} == hits
            assert engine.do("counters")["loaded_tokens"] - loaded == sum(hits.values())
            assert [answer["tokens"] for answer in answers.values()] == said


def test_preempted_while_drafting(
    module_host: Host, drafting: EngineProcess, right: dict[str, list[int]]
) -> None:
    assert drafting.do("reset_gpu_cache")
    loaded, preempted = drafting.do("counters")["loaded_tokens"], drafting.do("preemptions")
    with module_host.checked_all_the_while():
        # A salt, so that everything is computed, stored, and loaded again after a preemption.
        prompts = {n: {"prompt_token_ids": p, "cache_salt": "again"} for n, p in PROMPTS.items()}
        drafting.do("add", prompts=prompts, max_tokens=ANSWER)
        for _ in range(3):
            drafting.do("step", count=60)
            while not drafting.do("preempt_all"):
                drafting.do("step")
        answers = drafting.do("drain")["finished"]

    assert {name: answer["tokens"] for name, answer in answers.items()} == right
    assert drafting.do("preemptions") > preempted + 3
    assert drafting.do("counters")["loaded_tokens"] > loaded
    assert drafting.do("counters")["failed_loads"] == 0
