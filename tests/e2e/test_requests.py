"""Every kind of request: several samples, prompts in pieces, lengths on a chunk's edge, early ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import CHUNK, EngineProcess, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK = 32
BUDGET = 96  # tokens a step: a chunk takes three steps, and no step ends where a chunk does
LENGTHS = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1]


@pytest.fixture(scope="module")
def engine(module_host: Host) -> Iterator[EngineProcess]:
    with module_host.engine(max_num_batched_tokens=BUDGET) as engine:
        yield engine
        engine.do("settle")
        assert set(engine.do("books").values()) == {0}
        assert engine.do("counters")["failed_loads"] == 0
        module_host.quiet()


def counted(engine: EngineProcess, name: str) -> int:
    engine.do("settle")
    return int(engine.do("counters")[name])


def host_hit(length: int) -> int:
    """What a stored prompt of `length` tokens gives: whole chunks, whole blocks, never the last token."""
    return min(length // CHUNK * CHUNK, (length - 1) // BLOCK * BLOCK)


def test_several_samples_of_one_prompt_equal_plain_vllms(engine: EngineProcess, plain: EngineProcess) -> None:
    # The three questions fit in one step: on a CPU, vLLM cannot seed a request whose prompt is cut.
    document, question = tokens(201, 2 * CHUNK), tokens(202, BUDGET // 3)
    for one in (plain, engine):
        one.ask(document + tokens(203, 20))
    assert engine.do("reset_gpu_cache")
    loaded = counted(engine, "loaded_tokens")
    sampling = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 24}

    (right,) = plain.ask(document + question, **sampling)
    (answer,) = engine.ask(document + question, **sampling)

    assert right["cached"] == answer["cached"] == 2 * CHUNK
    # Each sample is a request; one that comes late finds in the engine what another one has loaded.
    assert counted(engine, "loaded_tokens") - loaded in [n * 2 * CHUNK for n in (1, 2, 3)]
    assert len({tuple(sample) for sample in right["samples"]}) == 3
    assert answer["samples"] == right["samples"]


def test_prompts_in_pieces_between_decodes(engine: EngineProcess, plain: EngineProcess) -> None:
    lengths = {"long": 1500, "longer": 1900, "short": 40, "middle": 700, "edge": 3 * CHUNK, "late": 1000}
    prompts = {name: tokens(210 + i, length) for i, (name, length) in enumerate(lengths.items())}
    right = {name: plain.ask(prompt, max_tokens=40)[0]["tokens"] for name, prompt in prompts.items()}
    late = {"late": prompts.pop("late")}

    def mixed() -> dict[str, dict[str, object]]:
        engine.do("add", prompts=prompts, max_tokens=40)
        state = engine.do("step", count=20)
        assert state["running"] > 1
        engine.do("add", prompts=late, max_tokens=40)
        finished: dict[str, dict[str, object]] = engine.do("drain")["finished"]
        return finished

    cold = mixed()
    assert engine.do("reset_gpu_cache")
    loaded = counted(engine, "loaded_tokens")
    warm = mixed()

    assert {name: answer["tokens"] for name, answer in cold.items()} == right
    assert {name: answer["tokens"] for name, answer in warm.items()} == right
    hits = {name: host_hit(length) for name, length in lengths.items()}
    assert {name: answer["cached"] for name, answer in warm.items()} == hits
    assert counted(engine, "loaded_tokens") - loaded == sum(hits.values())


def test_one_token_answers_save_exactly_the_prompts_chunks(
    engine: EngineProcess, plain: EngineProcess
) -> None:
    saved, cached, cold, warm, right = {}, {}, {}, {}, {}
    for length in LENGTHS:
        prompt = tokens(230 + length, length)
        right[length] = plain.ask(prompt, max_tokens=1)[0]["tokens"]
        before = counted(engine, "saved_chunks")
        cold[length] = engine.ask(prompt, max_tokens=1)[0]["tokens"]
        saved[length] = counted(engine, "saved_chunks") - before
        assert engine.do("reset_gpu_cache")
        (again,) = engine.ask(prompt, max_tokens=1)
        cached[length], warm[length] = again["cached"], again["tokens"]

    assert saved == {length: length // CHUNK for length in LENGTHS}
    assert cached == {length: host_hit(length) for length in LENGTHS}
    assert cold == warm == right


@pytest.mark.parametrize(("answers", "chunks"), [(1, 0), (2, 1)])
def test_a_chunk_counts_once_its_last_tokens_kv_is_computed(
    engine: EngineProcess, plain: EngineProcess, answers: int, chunks: int
) -> None:
    """The last answered token has no KV yet: a chunk whose last token it is must not be stored."""
    prompt = tokens(240 + answers, CHUNK - 1)
    before = counted(engine, "saved_chunks")
    (first,) = engine.ask(prompt, max_tokens=answers)
    assert counted(engine, "saved_chunks") - before == chunks
    follow_up = prompt + first["tokens"] + tokens(243, 10)
    assert engine.do("reset_gpu_cache")

    (answer,) = engine.ask(follow_up)

    assert answer["cached"] == chunks * CHUNK
    assert answer["tokens"] == plain.ask(follow_up)[0]["tokens"]


def test_a_stop_on_the_first_token(engine: EngineProcess, plain: EngineProcess) -> None:
    prompt = tokens(250, 2 * CHUNK)
    (right,) = plain.ask(prompt, max_tokens=8)
    stop = right["tokens"][:1]
    before = counted(engine, "saved_chunks")

    (cold,) = engine.ask(prompt, max_tokens=8, stop_token_ids=stop)
    assert counted(engine, "saved_chunks") - before == 2
    assert engine.do("reset_gpu_cache")
    (stopped,) = engine.ask(prompt, max_tokens=8, stop_token_ids=stop)
    assert engine.do("reset_gpu_cache")
    (whole,) = engine.ask(prompt, max_tokens=8)

    assert cold["tokens"] == stopped["tokens"] == stop
    assert stopped["cached"] == whole["cached"] == host_hit(2 * CHUNK)
    assert whole["tokens"] == right["tokens"]


def test_prompt_logprobs_compute_everything_and_still_save(
    engine: EngineProcess, plain: EngineProcess
) -> None:
    prompt, others = tokens(260, 2 * CHUNK + 50), [tokens(261 + i, 300) for i in range(2)]
    (right,) = plain.ask(prompt, prompt_logprobs=0)
    loaded, saved = counted(engine, "loaded_tokens"), counted(engine, "saved_chunks")

    engine.do("add", prompts={"other 0": others[0]}, max_tokens=60)
    engine.do("step", count=6)
    engine.do("add", prompts={"asked": prompt}, max_tokens=16, logprobs=5, prompt_logprobs=0)
    engine.do("add", prompts={"other 1": others[1]}, max_tokens=8)
    first = engine.do("drain")["finished"]["asked"]
    assert counted(engine, "saved_chunks") - saved == 2 + 1 + 1
    assert engine.do("reset_gpu_cache")
    (second,) = engine.ask(prompt, prompt_logprobs=0)  # stored by now, and still not read
    assert counted(engine, "loaded_tokens") == loaded
    assert engine.do("reset_gpu_cache")
    (ordinary,) = engine.ask(prompt)

    for answer in (first, second):
        assert answer["cached"] == 0
        assert answer["prompt_logprobs"] == pytest.approx(right["prompt_logprobs"], abs=1e-3)
    assert ordinary["cached"] == 2 * CHUNK
    assert first["tokens"] == second["tokens"] == ordinary["tokens"] == right["tokens"]
