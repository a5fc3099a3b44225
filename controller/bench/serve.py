"""`kvstrata bench serve`: reuse of KV in real vLLM, beside plain vLLM and the connectors that are installed.

All arms' engines run side by side on one GPU, with the same weights and prompts, and take turns: one
works at a time. An arm whose answers to host hits differ from those to its own hits in GPU memory is shown
as WRONG, one that computed what it should have loaded as MISS; neither counts as fast.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstrata.controller.bench.arm import Arm, ArmFailed, Prompt
from kvstrata.controller.results import Figure

CHUNK_TOKENS = 256
LENGTHS = {"8k": 32 * CHUNK_TOKENS + 1, "16k": 64 * CHUNK_TOKENS + 1, "32k": 128 * CHUNK_TOKENS + 1}
UNALIGNED = {"8k+100": 32 * CHUNK_TOKENS + 101}
KV_BYTES_PER_TOKEN = {"auto": 131_072, "fp8": 65_536}
PROMPTS = 3
HOST_TURNS = 2
COLD_PAIRS = 40  # two prefills differ by 2 %
BATCH_PAIRS = 12
TOGETHER = 4
JOINS = 11
SETTLE_S = 2.5
BREATHE_S = 0.4  # for what goes on after an answer, e.g. saves
LOGPROB_TOLERANCE = 0.2  # of the best peer; our own goal is 0
HIT_SHARE = 0.97
AHEAD = {"v1": 1.15, "v2": 1.3}
RESAMPLES = 10_000


@dataclass(frozen=True)
class Plan:
    """What to run."""

    runner: str
    arms: Sequence[str]
    pool_gib: int
    kv_gib: float
    kv_dtype: str = "auto"
    extra: Sequence[str] = ()


@dataclass
class Measured:
    """Everything that was seen of one arm."""

    ready_s: float
    lengths: dict[str, dict[str, Any]] = field(default_factory=dict)
    together: list[dict[str, float]] = field(default_factory=list)
    decode: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Outcome:
    """`cold` and `batches`: for each of our arms (plain, ours) pairs, milliseconds and tokens a second."""

    pcie_gb_per_s: float
    arms: dict[str, Measured] = field(default_factory=dict)
    cold: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    batches: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@contextmanager
def engines(plan: Plan) -> Iterator[dict[str, Arm]]:
    """The arms that could be started; the others' reasons are printed."""
    options = ["--runner", plan.runner, "--max-tokens", str(max(LENGTHS.values()))]
    options += ["--kv-gib", str(plan.kv_gib), "--pool-gib", str(plan.pool_gib), "--kv-dtype", plan.kv_dtype]
    with ExitStack() as stack:
        started: dict[str, Arm] = {}
        for name in plan.arms:
            folder = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))  # a socket's path is short
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            started[name] = Arm(name, folder, [*options, *plan.extra])
            stack.callback(started[name].close)
        yield started


def run(plan: Plan, pcie_gb_per_s: float, say: Callable[[str], None]) -> Outcome:
    """Raises ArmFailed if kvstrata's or plain vLLM's engine fails; others are left out."""
    outcome = Outcome(pcie_gb_per_s)
    with engines(plan) as arms:
        for name, arm in list(arms.items()):
            with _leaving_out(arms, name, say):
                outcome.arms[name] = Measured(arm.wait_ready())
                say(f"{name} started in {outcome.arms[name].ready_s:.0f} s")
        for length, tokens in {**LENGTHS, **UNALIGNED}.items():
            for name, arm in list(arms.items()):
                with _leaving_out(arms, name, say):
                    found = _length(arm, tokens)
                    outcome.arms[name].lengths[length] = found
                    say(line(name, length, found))
        for name, arm in list(arms.items()):
            with _leaving_out(arms, name, say):
                _beyond_one(arm, outcome.arms[name])
                say(f"{name}: {outcome.arms[name].together} {outcome.arms[name].decode}")
        if "plain" in arms:
            _pairs([arm for name, arm in arms.items() if name == "plain" or is_ours(name)], outcome)
    return outcome


@contextmanager
def _leaving_out(arms: dict[str, Arm], name: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except ArmFailed as error:
        if name in ("plain", "kvstrata"):
            raise
        del arms[name]
        say(str(error))


def _length(arm: Arm, tokens: int) -> dict[str, Any]:
    """Cold, hit in GPU memory, hit in host memory, one at a time."""
    prompts: list[Prompt] = [(tokens, str(i)) for i in range(PROMPTS)]
    arm.ask((tokens, "warm up"))
    runs = {"cold": [arm.ask(one) for one in prompts]}
    arm.do("settle", seconds=SETTLE_S)
    runs["gpu_hit"] = [arm.ask(one) for one in prompts]
    control = arm.do("control", tokens=tokens, name="0")
    if arm.name != "plain":
        runs["host_hit"] = []
        for _ in range(HOST_TURNS):
            arm.do("forget")
            runs["host_hit"] += [arm.ask(one) for one in prompts]
    cold, gpu = ([run["answers"][0] for run in runs[name]] for name in ("cold", "gpu_hit"))
    found: dict[str, Any] = {
        "tokens": tokens,
        "control_dlogprob": distance(cold[0], control["answers"][0]),
    }
    for name, of in runs.items():
        found[name] = {
            "ms": [round(run["ms"], 3) for run in of],
            "median_ms": round(statistics.median(run["ms"] for run in of), 3),
            "cached": [run["cached"][0] for run in of],
            "dlogprob_to_cold": _worst(cold, of),
            "dlogprob_to_gpu_hit": _worst(gpu, of),
        }
    return found


def _beyond_one(arm: Arm, measured: Measured) -> None:
    """Several host hits at once; decoding while prompts join that hit in host memory, then in the GPU's."""
    tokens = LENGTHS["16k"]
    joins: list[Prompt] = [(tokens, f"joins {i}") for i in range(JOINS)]
    if arm.name != "plain":
        for one in joins:
            arm.ask(one)
        arm.do("settle", seconds=SETTLE_S)
        for _ in range(PROMPTS):
            arm.do("forget")
            asked = arm.ask(*joins[:TOGETHER])
            measured.together.append({"ms": asked["ms"], "cached": sum(asked["cached"])})
        arm.do("forget")
        measured.decode["host"] = arm.do("decode", name="host", joins=joins)
    some = joins[: TOGETHER - 1]  # as many as surely stay in the GPU's memory
    for one in some:
        arm.ask(one)
    arm.do("settle", seconds=BREATHE_S)
    measured.decode["gpu"] = arm.do("decode", name="gpu", joins=[some[i % len(some)] for i in range(JOINS)])


def _pairs(arms: Sequence[Arm], outcome: Outcome) -> None:
    """What it costs where nothing is reused: the arms in turns, each as often first as last."""
    for i in range(COLD_PAIRS):
        found = {}
        for arm in arms if i % 2 else reversed(arms):
            found[arm.name] = arm.ask((LENGTHS["8k"], f"pair {i}"))["ms"]
            time.sleep(BREATHE_S)
        _add_pairs(outcome.cold, found)
    for i in range(BATCH_PAIRS + 1):
        found = {}
        for arm in arms if i % 2 else reversed(arms):
            found[arm.name] = arm.do("batch", name=f"batch {i}")["tokens_per_s"]
            time.sleep(BREATHE_S)
        if i:  # the first is for warming up
            _add_pairs(outcome.batches, found)


def _add_pairs(pairs: dict[str, list[tuple[float, float]]], found: dict[str, float]) -> None:
    for name, value in found.items():
        if name != "plain":
            pairs.setdefault(name, []).append((found["plain"], value))


def is_ours(arm: str) -> bool:
    """It may have settings of its own: "kvstrata:client.save=false"."""
    return arm.partition(":")[0] == "kvstrata"


def distance(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The largest difference over tokens that both list; None if one's choice is not in the other's list."""
    common = one["logprobs"].keys() & other["logprobs"].keys()
    if str(one["token"]) not in common or str(other["token"]) not in common:
        return None
    found: float = max(abs(one["logprobs"][token] - other["logprobs"][token]) for token in common)
    return found


def _worst(answers: list[dict[str, Any]], runs: list[dict[str, Any]]) -> float | None:
    distances = [distance(answers[i % len(answers)], run["answers"][0]) for i, run in enumerate(runs)]
    return None if None in distances else max(d for d in distances if d is not None)


def verdict(length: dict[str, Any]) -> str:
    """Empty if the host hits are what they should be."""
    if "host_hit" not in length:
        return ""
    if length["control_dlogprob"] == 0:
        return "INSENSITIVE"
    hit = length["host_hit"]
    if min(hit["cached"]) < HIT_SHARE * (length["tokens"] - CHUNK_TOKENS):
        return "MISS"
    found = hit["dlogprob_to_gpu_hit"]
    return "WRONG" if found is None or found > LOGPROB_TOLERANCE else ""


def line(arm: str, length: str, found: dict[str, Any]) -> str:
    """For people."""
    names = ("cold", "gpu_hit", "host_hit")
    times = ", ".join(f"{name} {found[name]['median_ms']:.1f}" for name in names if name in found)
    return f"{arm:9} {length:>7}: {times} ms {verdict(found)}"


def figures(plan: Plan, outcome: Outcome) -> list[Figure]:
    """What is promised, and whether it is so."""
    prefix = f"serve.{plan.runner}" + ("" if plan.kv_dtype == "auto" else f".{plan.kv_dtype}")
    ours, packed = outcome.arms["kvstrata"], plan.kv_dtype == "auto"
    made: list[Figure] = []

    def add(name: str, value: float | bool, unit: str = "", goal: str | None = None) -> None:
        shown = value if isinstance(value, bool) else round(value, 4)
        made.append(Figure(f"{prefix}.{name}", shown, unit, goal))

    for name in (*LENGTHS, *UNALIGNED):
        length = ours.lengths[name]
        hit, gpu = length["host_hit"]["median_ms"], length["gpu_hit"]["median_ms"]
        floor = length["tokens"] * KV_BYTES_PER_TOKEN[plan.kv_dtype] / outcome.pcie_gb_per_s / 1e6
        goal = f"<= {0.8 * floor + gpu:.1f}" if name in LENGTHS and packed else None
        add(f"host_hit_{name}_ms", hit, "ms", goal)
        add(f"gpu_hit_{name}_ms", gpu, "ms")
        add(f"pcie_floor_{name}_ms", floor, "ms")
        peers = [
            arm.lengths[name]["host_hit"]["median_ms"]
            for other, arm in outcome.arms.items()
            if other != "plain"
            and not is_ours(other)
            and name in arm.lengths
            and not verdict(arm.lengths[name])
        ]
        if peers:
            goal = f">= {AHEAD[plan.runner]}" if name in LENGTHS and packed else None
            add(f"ahead_of_best_peer_{name}", min(peers) / hit, "", goal)
    correct = [not verdict(length) for length in ours.lengths.values()]
    # Hits of other lengths end at another place in host memory than on the GPU: more is computed, other
    # sums are rounded.
    distances = [ours.lengths[name]["host_hit"]["dlogprob_to_gpu_hit"] for name in LENGTHS]
    add("all_correct", all(correct), "", "== true")
    if None not in distances:  # then some answers cannot even be compared
        add("max_dlogprob_vs_gpu_hit", max(distances), "", "<= 0")
    rates = [
        one["cached"] * KV_BYTES_PER_TOKEN[plan.kv_dtype] / one["ms"] / 1e6 / outcome.pcie_gb_per_s
        for one in ours.together
    ]
    add("hits_at_once_vs_pcie", statistics.median(rates), "", ">= 1.15" if packed else None)
    decode = ours.decode
    add("decode_p99_ratio", decode["host"]["p99_ms"] / decode["gpu"]["p99_ms"], "", "<= 1.15")
    if "plain" in outcome.arms:  # they start at the same time, side by side
        add("start_longer_s", ours.ready_s - outcome.arms["plain"].ready_s, "s", "<= 2")
    if outcome.cold:
        cold = [ours / plain for plain, ours in outcome.cold["kvstrata"]]
        add("cold_ratio", statistics.median(cold))
        add("cold_ratio_upper95", bound(cold, 0.95), "", "<= 1.01")
        batches = [ours / plain for plain, ours in outcome.batches["kvstrata"]]
        add("throughput_ratio", statistics.median(batches))
        add("throughput_ratio_lower95", bound(batches, 0.05), "", ">= 0.99")
    return made


def bound(ratios: Sequence[float], quantile: float) -> float:
    """One-sided bound of the median, from resampling."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(quantile * (RESAMPLES - 1))]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
