"""What a lookup costs in `core/`: hashing a long prompt into keys, and finding those keys.

    python benches/hash_and_catalogue.py

One thread, no engine and no node store: the code that the scheduler side (hashing) and the node
store's planner (matching) run for every request. Each figure is the median of many runs; the best
is kept beside it, since other work on the machine only ever adds time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from common import keep, parser

from kvstrata.controller.results import Figure
from kvstrata.core.events import ClientOpened, Match, Matched, SegmentAdded, SegmentRegistered, Update
from kvstrata.core.keys import KeyChain
from kvstrata.core.planner import Limits, Planner

PROMPT_TOKENS = 128 << 10
CHUNK_TOKENS = 256
VOCABULARY = 150_000
STORED_PROMPTS = 200  # of 512 chunks each: a catalogue of 100,000 chunks
SLOT_BYTES = 4096
RUNS = 300
CLIENT = "bench"


def random_tokens(choose: random.Random) -> list[int]:
    return [choose.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]


def keys_of(tokens: list[int]) -> list[bytes]:
    return KeyChain(b"\1" * 32, CHUNK_TOKENS).extend(tokens)


def filled_planner(prompts: list[list[bytes]]) -> Planner:
    """A planner with every chunk of `prompts` stored, by the events that a node store sees."""
    chunks = sum(map(len, prompts))
    pool = chunks * SLOT_BYTES
    planner = Planner(Limits(pool_bytes=pool, segment_bytes=pool))
    planner.step(ClientOpened(CLIENT, (SLOT_BYTES,), workers=1), 0.0)
    planner.step(SegmentAdded(0, pool, SLOT_BYTES), 0.0)
    planner.step(SegmentRegistered(CLIENT, 0, 0), 0.0)
    for number, keys in enumerate(prompts, start=1):
        jobs = range(number * len(keys), (number + 1) * len(keys))
        reserve = tuple((job, key, SLOT_BYTES) for job, key in zip(jobs, keys, strict=True))
        planner.step(Update(CLIENT, 2 * number, reserve=reserve), 0.0)
        planner.step(Update(CLIENT, 2 * number + 1, committed=tuple(jobs)), 0.0)
    return planner


def seconds(run: Callable[[], object]) -> list[float]:
    """How long each of many calls took."""
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    options = parser(__doc__, "hash_and_catalogue").parse_args()
    choose = random.Random(5)
    tokens = random_tokens(choose)
    hashing = seconds(lambda: keys_of(tokens))

    prompts = [[choose.randbytes(32) for _ in range(len(keys_of(tokens)))] for _ in range(STORED_PROMPTS)]
    planner = filled_planner(prompts)
    asked = [tuple(keys) for keys in prompts]
    matching = seconds(lambda: found(planner.catalogue.match(choose.choice(asked)), len(asked[0])))

    seq = iter(range(1 << 20, 1 << 30))

    def match_and_release() -> None:
        lease = next(seq)
        (answer,) = planner.step(Match(CLIENT, next(seq), lease, choose.choice(asked)), 0.0)
        assert isinstance(answer, Matched)
        found(answer.slots, len(asked[0]))
        planner.step(Update(CLIENT, next(seq), released=(lease,)), 0.0)

    leasing = seconds(match_and_release)
    count = len(asked[0])
    figures = [
        Figure("hash.128k_tokens_ms", round(1e3 * statistics.median(hashing), 3), "ms", "<= 2"),
        Figure("catalogue.keys_per_s", round(count / statistics.median(matching)), "", ">= 1e6"),
        Figure("catalogue.leased_keys_per_s", round(count / statistics.median(leasing)), ""),
    ]
    samples = {
        "runs": RUNS,
        "chunks_stored": STORED_PROMPTS * count,
        "hash_ms": {"best": round(1e3 * min(hashing), 3), "worst": round(1e3 * max(hashing), 3)},
        "match_keys_per_s": {"best": round(count / min(matching)), "worst": round(count / max(matching))},
        "lease_keys_per_s": {"best": round(count / min(leasing)), "worst": round(count / max(leasing))},
    }
    keep(options.json, "hash_and_catalogue", figures, samples)


def found(entries: object, count: int) -> None:
    assert isinstance(entries, list | tuple) and len(entries) == count, "a stored prompt must be found whole"


if __name__ == "__main__":
    main()
