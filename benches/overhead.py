"""What kvstrata costs when it is of no use: serving with and without it, nothing ever reused.

    python benches/overhead.py

Two stock `vllm serve` processes with SmolLM2, one plain and one with kvstrata, take turns at the same
fresh random prompts, in the order AB, BA, AB, ... Two servers, and not two engines in one process:
that is what people run, so it also measures what the connector costs the engine core and the worker
as processes of their own; in one process its threads would hold the GIL of both arms; and a server
goes on stepping after an answer until its saves are done, so that they are paid for by the arm and
the pair that caused them. HTTP costs both arms the same and hardly any next to the prefill.

Both arms, with all their threads, are bound to one core, and the node store and this client to
another: whatever the connector does takes time from its own arm's model, which is the worst case.
Each pair gives a ratio; the figure is the median ratio. Two processes of one kind can differ by several
per cent for as long as they live, so servers are started again for each round, and the bound comes from
resampling the rounds, and the pairs in them.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Node, keep, node_store, parser, smollm2

from kvstrata.controller.cli_node import stats
from kvstrata.controller.demo.client import is_healthy
from kvstrata.controller.demo.engines import Engine, free_port
from kvstrata.controller.results import Figure

Prompts = Sequence[Sequence[int]]
Taken = dict[str, list[float]]  # by arm

PORTS = {"plain": free_port(), "kvstrata": free_port()}
POOL_BYTES = 1 << 30
ROUNDS = 12
PAIRS = 3  # of a round
WARM_UP_PAIRS = 2
VOCABULARY = 48_000

TTFT_PROMPT_TOKENS = 1024  # four chunks, all of them saved
TTFT_ANSWER_TOKENS = 8
BATCH_REQUESTS = 4
BATCH_PROMPT_TOKENS = 512
BATCH_ANSWER_TOKENS = 24

# vLLM's worker spins for a second after its last step, which would take core time from the other arm.
SETTLE_S = 1.5
RESAMPLES = 20_000
READY_S = 600.0
ANSWER_S = 300.0


def command(model: Path, arm: str, node: Node) -> list[str]:
    """`vllm serve` as the README says it; without kvstrata, the same but for one flag."""
    flags = ["--host", "127.0.0.1", "--port", str(PORTS[arm]), "--served-model-name", "bench"]
    flags += ["--max-model-len", "2048", "--enforce-eager", "--uvicorn-log-level", "warning"]
    if arm == "kvstrata":
        transfer = {
            "kv_connector": "KVStrataConnector",
            "kv_connector_module_path": "kvstrata.connector.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"node": {"runtime_dir": str(node.paths.folder)}},
        }
        flags += ["--kv-transfer-config", json.dumps(transfer)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *flags]


@contextmanager
def servers(model: Path, node: Node, core: int, order: Sequence[str]) -> Iterator[None]:
    """Both arms on `core`, started in this order, ready to be asked."""
    environment = {name: value for name, value in os.environ.items() if name != "KVSTRATA_CONFIG"}
    environment |= {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # arms of one round were 10 % apart without, 5 with it
    }
    folder = Path(tempfile.mkdtemp(prefix="kvs-bench-"))
    ours = os.sched_getaffinity(0)
    arms: list[Engine] = []
    try:
        os.sched_setaffinity(0, {core})  # inherited by every thread of theirs
        for arm in order:
            log = folder / f"{arm}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command(model, arm, node),
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            arms.append(Engine(arm, PORTS[arm], log, process))
        os.sched_setaffinity(0, ours)
        wait_ready(arms)
        yield
    finally:
        for engine in arms:
            engine.end()
    shutil.rmtree(folder)  # after a failure the logs stay


def wait_ready(arms: Sequence[Engine]) -> None:
    deadline = time.monotonic() + READY_S
    for engine in arms:
        while not is_healthy(engine.port):
            if engine.process.poll() is not None or time.monotonic() > deadline:
                raise engine.failed("is not ready")
            time.sleep(0.5)


def ask(arm: str, prompts: Prompts, answer_tokens: int) -> float:
    """Stream the answers to all `prompts` to their end; return the seconds to the first token."""
    body = {
        "model": "bench",
        "prompt": prompts,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", PORTS[arm], timeout=ANSWER_S)
    first = None
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise SystemExit(f"overhead: the {arm} server answered {response.status}: {response.read(500)!r}")
    for line in response:
        if first is None and line.startswith(b"data: {"):
            first = time.perf_counter() - began
    connection.close()
    if first is None:
        raise SystemExit(f"overhead: the {arm} server sent no token")
    return first


def ttft_s(arm: str, prompts: Prompts) -> float:
    return ask(arm, prompts, TTFT_ANSWER_TOKENS)


def tokens_per_s(arm: str, prompts: Prompts) -> float:
    """Prompt and answer tokens of one batch, until its last answer has ended."""
    began = time.perf_counter()
    ask(arm, prompts, BATCH_ANSWER_TOKENS)
    return sum(len(prompt) + BATCH_ANSWER_TOKENS for prompt in prompts) / (time.perf_counter() - began)


def pairs(
    name: str,
    measure: Callable[[str, Prompts], float],
    fresh: Callable[[], Prompts],
    count: int,
) -> Taken:
    """`count` measurements of each arm, taken in turns, after some that do not count."""
    taken: Taken = {arm: [] for arm in PORTS}
    for number in range(-WARM_UP_PAIRS, count):
        prompts = fresh()
        for arm in list(PORTS) if number % 2 else list(PORTS)[::-1]:
            time.sleep(SETTLE_S)
            value = measure(arm, prompts)
            if number >= 0:
                taken[arm].append(value)
        print(f"\r{name}: pair {number + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return taken


def bound(rounds: Sequence[Sequence[float]], share: float, choose: random.Random) -> float:
    """The `share` quantile of the median ratio, by resampling the rounds and their pairs."""

    def resampled() -> float:
        drawn = choose.choices(rounds, k=len(rounds))
        return statistics.median(ratio for pairs in drawn for ratio in choose.choices(pairs, k=len(pairs)))

    medians = sorted(resampled() for _ in range(RESAMPLES))
    return medians[min(RESAMPLES - 1, round(share * RESAMPLES))]


def check_work(node: Node, taken: int) -> dict[str, int]:
    """The store's counters; ends the bench if the connector saved too little or found anything."""
    counters: dict[str, int] = stats(node.paths)["counters"]
    per_pair = TTFT_PROMPT_TOKENS // 256 + BATCH_REQUESTS * (BATCH_PROMPT_TOKENS // 256)
    if counters.get("hit_chunks", 0) or counters["committed_chunks"] < 0.9 * per_pair * taken:
        raise SystemExit(f"overhead: kvstrata did not do what should be measured: {counters}")
    return counters


def main() -> None:
    options = parser(__doc__, "overhead")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--pairs", type=int, default=PAIRS, help="of a round")
    options.add_argument("--model", type=Path, help="a folder (SmolLM2, made if it is not there)")
    chosen = options.parse_args()
    model = smollm2(chosen.model)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("overhead: two cores are needed, one for the engines and one for the node store")
    choose = random.Random(11)

    def fresh(requests: int, length: int) -> Prompts:
        return [[choose.randrange(1000, VOCABULARY) for _ in range(length)] for _ in range(requests)]

    def fresh_prompt() -> Prompts:
        return fresh(1, TTFT_PROMPT_TOKENS)

    def fresh_batch() -> Prompts:
        return fresh(BATCH_REQUESTS, BATCH_PROMPT_TOKENS)

    os.sched_setaffinity(0, {cores[1]})  # this client, and the node store that it starts
    ttft: list[Taken] = []
    batch: list[Taken] = []
    with node_store(POOL_BYTES) as node:
        for number in range(chosen.rounds):
            print(f"round {number + 1} of {chosen.rounds}", file=sys.stderr)
            order = list(PORTS) if number % 2 else list(PORTS)[::-1]
            with servers(model, node, cores[0], order):
                ttft.append(pairs("ttft", ttft_s, fresh_prompt, chosen.pairs))
                batch.append(pairs("batches", tokens_per_s, fresh_batch, chosen.pairs))
        counters = check_work(node, chosen.rounds * chosen.pairs)
    report(chosen.json, ttft, batch, counters, choose)


def report(
    path: Path, ttft: list[Taken], batch: list[Taken], counters: dict[str, int], choose: random.Random
) -> None:
    slower = [ratios(taken) for taken in ttft]
    faster = [ratios(taken) for taken in batch]
    figures = [
        Figure("overhead.ttft_ratio", median(slower)),
        Figure("overhead.ttft_ratio_upper95", round(bound(slower, 0.95, choose), 4), "", "<= 1.03"),
        Figure("overhead.throughput_ratio", median(faster)),
        Figure("overhead.throughput_ratio_lower95", round(bound(faster, 0.05, choose), 4), "", ">= 0.97"),
    ]
    samples: dict[str, Any] = {
        "ttft_ms": [
            {arm: [round(1e3 * value, 2) for value in values] for arm, values in taken.items()}
            for taken in ttft
        ],
        "tokens_per_s": [
            {arm: [round(value, 1) for value in values] for arm, values in taken.items()} for taken in batch
        ],
        "counters": counters,
    }
    keep(path, "overhead", figures, samples)


def ratios(taken: Taken) -> list[float]:
    return [ours / plain for plain, ours in zip(taken["plain"], taken["kvstrata"], strict=True)]


def median(rounds: Sequence[Sequence[float]]) -> float:
    return round(statistics.median(ratio for pairs in rounds for ratio in pairs), 4)


if __name__ == "__main__":
    main()
