"""Storms of aborts and preemptions: right answers, and every block, slot and book back where it was."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.e2e.harness import CHUNK, Book, EngineProcess, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PREFIXES = [tokens(31 + i, 3 * CHUNK) for i in range(3)]


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share prefixes, so that loads, saves and GPU hits mix."""
    dice = random.Random(seed)
    return [
        dice.choice(PREFIXES)[: dice.randrange(CHUNK, 3 * CHUNK + 1)] + tokens(dice.randrange(12), 20)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("blocks", "aborts", "max_tokens"),
    [(512, 0.3, 8), (40, 0.0, 160), (40, 0.03, 160)],
    ids=["aborts", "preemptions", "both"],
)
def test_a_storm_leaves_nothing_behind_and_nothing_wrong(
    host: Host, blocks: int, aborts: float, max_tokens: int
) -> None:
    shape: dict[str, Any] = {"num_gpu_blocks_override": blocks, "max_model_len": 1024}
    asked = {(seed, number): one for seed in range(4) for number, one in enumerate(prompts(seed, 12))}
    storming = host.engine(extra={"host": {"size": "24MiB"}}, **shape)
    with host.engine(plain=True, **shape) as plain, storming as engine:
        right = Book.write(plain, asked, max_tokens)
        assert engine.do("reset_gpu_cache")
        free = engine.do("free_blocks")
        aborted = finished = 0
        for seed in range(4):
            assert engine.do("reset_gpu_cache")  # or a large GPU cache would answer everything
            result = engine.do(
                "storm", prompts=prompts(seed, 12), seed=seed, aborts=aborts, max_tokens=max_tokens
            )
            aborted += result["aborted"]
            for number, answer in result["finished"].items():
                finished += 1
                right.check((seed, int(number)), answer)
        engine.do("settle")
        counters = engine.do("counters")
        preemptions = engine.do("preemptions")

        assert finished > 0
        assert aborted > 0 or not aborts
        assert preemptions > 0 or blocks > 40
        assert counters["loaded_tokens"] > 0
        assert counters["failed_loads"] == 0
        assert set(engine.do("books").values()) == {0}
        assert engine.do("reset_gpu_cache")
        assert engine.do("free_blocks") == free
        stats = host.quiet()
        assert stats["counters"]["hit_chunks"] > 0


def test_the_book_tells_right_answers_from_wrong_ones(plain: EngineProcess) -> None:
    book = Book.write(plain, dict(enumerate(prompts(5, 2))), max_tokens=8)
    for key in book.prompts:
        assert book.could_be(key, book.answers[key])
        assert not book.could_be(key, book.answers[1 - key])
        *most, last = book.answers[key]
        assert not book.could_be(key, [*most, last - 1])
