"""The hot path's arithmetic stays cheap.

Bounds are five times the goals, for slow and busy machines; a benchmark has the exact figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvstrata.core.catalogue import Catalogue, Cause
from kvstrata.core.keys import KeyChain
from kvstrata.core.policy import LRU
from kvstrata.core.slots import Slot
from tests.core.stores import key


def best_of(rounds: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest round: what the code costs when nobody else has the core."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def test_hashing_131072_tokens_takes_milliseconds() -> None:
    prompt = [token * 7919 % 128_000 for token in range(131_072)]
    seconds = best_of(20, lambda: KeyChain(bytes(32), 256).extend(prompt))
    assert len(KeyChain(bytes(32), 256).extend(prompt)) == 512
    assert seconds < 5 * 2e-3, f"{seconds * 1e3:.2f} ms"


def test_a_catalogue_matches_a_million_keys_a_second() -> None:
    catalogue = Catalogue(LRU, lambda slot: None)
    keys = [key(number) for number in range(20_000)]
    for number, each in enumerate(keys):
        catalogue.move(catalogue.reserve(each, Slot(0, number, 1)), Cause.COMMIT)
    assert len(catalogue.match(keys)) == len(keys)
    seconds = best_of(20, lambda: catalogue.match(keys))
    assert len(keys) / seconds > 1e6 / 5, f"{len(keys) / seconds:.0f} keys/s"
