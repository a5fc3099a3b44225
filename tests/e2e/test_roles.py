"""`kv_role`: a producer only saves, a consumer only loads, and the one serves the other."""

from __future__ import annotations

import pytest

from tests.e2e.harness import CHUNK, Host, same, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = tokens(301, 2 * CHUNK + 40)
UNSEEN = tokens(302, 2 * CHUNK + 40)


def test_a_consumer_loads_what_a_producer_saved(host: Host) -> None:
    with (
        host.engine(transfer={"kv_role": "kv_producer"}) as producer,
        host.engine(transfer={"kv_role": "kv_consumer"}) as consumer,
    ):
        producer.ask(PROMPT[: 2 * CHUNK] + tokens(303, 20))
        (right,) = producer.ask(PROMPT)  # on a hit in the engine's own cache, which is as long as ours
        assert right["cached"] == 2 * CHUNK
        assert producer.do("reset_gpu_cache")
        (recomputed,) = producer.ask(PROMPT)
        producer.do("settle")
        counters = producer.do("counters")
        assert recomputed["cached"] == 0
        assert recomputed["tokens"] == right["tokens"]
        assert counters["saved_chunks"] == 2
        assert counters["lookups"] == counters["loaded_tokens"] == 0

        (hit,) = consumer.ask(PROMPT)
        (first,) = consumer.ask(UNSEEN)
        consumer.do("settle")
        assert consumer.do("reset_gpu_cache")
        (second,) = consumer.ask(UNSEEN)
        consumer.do("settle")
        counters = consumer.do("counters")
        assert hit["cached"] == 2 * CHUNK
        assert same([hit], [right])
        assert first["cached"] == second["cached"] == 0
        assert first["tokens"] == second["tokens"]
        assert counters["loaded_tokens"] == 2 * CHUNK
        assert counters["saved_chunks"] == counters["bytes_saved"] == 0

        stats = host.quiet()
        assert stats["counters"]["committed_chunks"] == stats["chunks"]["ready"] == 2
        assert set(consumer.do("books").values()) == set(producer.do("books").values()) == {0}
