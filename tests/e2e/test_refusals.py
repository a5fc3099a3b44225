"""What is not supported, or set wrongly, stops the start with a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.harness import EngineError, Host

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"transfer": {"kv_load_failure_policy": "fail"}},
            [
                '"kv_load_failure_policy": "recompute"',
                '"kv_connector": "KVStrataConnector"',
                "--kv-transfer-config",
            ],
        ),
        ({"extra": {"host": {"sise": "1GiB"}}}, ["unknown key host.sise", "did you mean host.size?"]),
        ({"extra": {"host": {"size": "plenty"}}}, ["host.size", "'plenty' is not a size such as 8GiB"]),
        ({"extra": {"host": {"policy": "best"}}}, ["host.policy", "allowed: lru"]),
        ({"extra": {"node": {"group": "nosuch"}}}, ["node.group 'nosuch' does not exist"]),
        ({"extra": {"chunk": {"tokens": 65536}}}, ["chunk.tokens is 65536", "lower chunk.tokens"]),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
            ["tensor-parallel", "not supported yet"],
        ),
    ],
    ids=[
        "load failure policy",
        "unknown key",
        "bad size",
        "bad choice",
        "no group",
        "too large a chunk",
        "tensor parallel",
    ],
)
def test_the_start_is_refused_in_words(host: Host, arguments: dict[str, Any], says: list[str]) -> None:
    engine = host.start(
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor" in str(arguments) else {}, **arguments
    )
    with pytest.raises(EngineError) as refused:
        engine.ready()
    engine.process.wait(60)

    seen = str(refused.value) + engine.tail()
    for text in says:
        assert text in seen


def test_a_pool_smaller_than_a_chunk_is_said_and_serving_goes_on(host: Host) -> None:
    engine = host.start(extra={"host": {"size": "1MiB"}, "chunk": {"tokens": 1024}}).ready()

    (answer,) = engine.ask(list(range(3, 700)))

    assert len(answer["tokens"]) == 16
    assert "raise host.size or lower chunk.tokens" in engine.log.read_text()
    engine.close()
