"""A reset of all caches in the middle of work: nothing older is found again, and nobody is disturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import CHUNK, EngineProcess, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def engines(module_host: Host) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """One that is reset, with room for one running request, and one beside it that is not."""
    with module_host.engine(max_num_seqs=1) as reset, module_host.engine() as other:
        yield reset, other


@pytest.mark.parametrize("preempt", [False, True], ids=["running", "preempted"])
def test_a_reset_between_a_running_and_a_queued_request(
    module_host: Host,
    engines: tuple[EngineProcess, EngineProcess],
    plain: EngineProcess,
    preempt: bool,
) -> None:
    host, (reset, other) = module_host, engines
    seed = 510 + 10 * preempt
    old = tokens(seed, 2 * CHUNK + 30)
    running, queued = tokens(seed + 1, CHUNK + 100), old[: 2 * CHUNK] + tokens(seed + 2, 30)
    after = tokens(seed + 3, 2 * CHUNK + 30)
    right = {name: plain.ask(prompt, max_tokens=200)[0]["tokens"] for name, prompt in
             {"running": running, "queued": queued, "after": after, "old": old}.items()}  # fmt: skip
    reset.ask(old)
    reset.do("settle")
    assert reset.do("reset_gpu_cache")
    before = host.quiet()["counters"]
    loaded = reset.do("counters")["loaded_tokens"]

    with host.checked_all_the_while():
        reset.do("add", prompts={"running": running, "queued": queued}, max_tokens=200)
        assert reset.do("step", count=20) == {"running": 1, "waiting": 1}
        held = host.stats()["clients"]
        assert sum(client["leases"] for client in held) == 1  # the queued request's, on the old document
        reset.do("add", prompts={"unanswered": queued}, max_tokens=200)
        assert reset.do("reset_caches", running=preempt) is preempt  # vLLM's own cache is in use otherwise
        answers = reset.do("drain")["finished"]
    stored = host.quiet()["counters"]["committed_chunks"] - before["committed_chunks"]

    right["unanswered"] = right["queued"]
    assert {name: answer["tokens"] for name, answer in answers.items()} == {
        name: right[name] for name in ("running", "queued", "unanswered")
    }
    assert answers["queued"]["cached"] == 0
    assert reset.do("counters")["loaded_tokens"] == loaded
    assert stored == 1  # the running request's first chunk, from before the reset
    assert reset.do("reset_gpu_cache")
    assert [reset.ask(prompt, max_tokens=200)[0]["tokens"] for prompt in (old, after)] == [
        right["old"],
        right["after"],
    ]
    assert reset.do("counters")["loaded_tokens"] == loaded  # neither was found
    reset.do("settle")
    assert host.quiet()["counters"]["committed_chunks"] - before["committed_chunks"] == 1 + 2 + 2

    assert reset.do("reset_gpu_cache")
    for name, prompt in (("old", old), ("after", after)):
        (hit,) = reset.ask(prompt, max_tokens=200)
        assert (hit["cached"], hit["tokens"]) == (2 * CHUNK, right[name])
    assert reset.do("counters")["loaded_tokens"] - loaded == 2 * 2 * CHUNK

    # The other engine goes on with what was stored before the first reset, and sees nothing later.
    assert other.ask(after)[0]["cached"] == 0
    assert other.ask(old)[0]["cached"] == (0 if preempt else 2 * CHUNK)
    for engine in (reset, other):
        engine.do("settle")
        assert set(engine.do("books").values()) == {0}
    host.quiet()
