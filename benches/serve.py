"""Reuse of KV in real vLLM on a GPU: kvstrata beside plain vLLM and the connectors that are installed.

    python benches/serve.py --runner v2

Each arm is an engine in a process of its own, one after the other on the same device, with the same
weights and prompts (benches/serve_arm.py). An arm whose answers differ from its own hits in GPU memory
is shown as WRONG, and one that computed what it should have loaded as MISS; neither counts as fast.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import keep, parser
from pcie import pinned_copy_gb_per_s
from serve_arm import ARMS, KV_BYTES_PER_TOKEN

from kvstrata.controller.results import Figure

LOGPROB_TOLERANCE = 0.2
HIT_SHARE = 0.99
ARM_DEADLINE_S = 500
LENGTHS = {8193: "8k", 16385: "16k", 32769: "32k"}
AHEAD = {"v1": 1.15, "v2": 1.3}


def run_arm(arm: str, runner: str, folder: Path) -> dict[str, Any] | None:
    """What the arm measured; None if it failed."""
    kept, log = folder / f"{arm}.json", folder / f"{arm}.log"
    command = [sys.executable, str(Path(__file__).with_name("serve_arm.py")), arm]
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, "--runner", runner, "--json", str(kept)],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=ARM_DEADLINE_S,
            check=False,
        )
    if not kept.exists():
        print(f"{arm}: ended with status {done.returncode}; the end of its log:", flush=True)
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)
        return None
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def verdict(length: dict[str, Any]) -> str:
    """Empty if the host hits are what they should be."""
    if "host_hit" not in length:
        return ""
    hit = length["host_hit"]
    if min(hit["cached"]) < HIT_SHARE * length["tokens"]:
        return "MISS"
    distance = hit["dlogprob_to_gpu_hit"]
    if distance is None or distance > LOGPROB_TOLERANCE:
        return "WRONG"
    return ""


def show(found: dict[str, Any]) -> None:
    """One line for each length."""
    for length in found["lengths"]:
        times = {
            name: length[name]["median_ms"] for name in ("cold", "gpu_hit", "host_hit") if name in length
        }
        words = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        print(f"{found['arm']:9} {length['tokens']:6} tokens: {words} ms {verdict(length)}", flush=True)


def figures(runner: str, arms: dict[str, dict[str, Any]], pcie: float) -> list[Figure]:
    ours, plain = arms["kvstrata"], arms["plain"]
    made: list[Figure] = []

    def add(name: str, value: float | bool, unit: str = "", goal: str | None = None) -> None:
        made.append(Figure(f"serve.{runner}.{name}", value, unit, goal))

    worst = 0.0
    for index, length in enumerate(ours["lengths"]):
        name = LENGTHS[length["tokens"]]
        hit, gpu = length["host_hit"]["median_ms"], length["gpu_hit"]["median_ms"]
        floor = length["tokens"] * KV_BYTES_PER_TOKEN / pcie / 1e6
        add(f"host_hit_{name}_ms", hit, "ms", f"<= {0.8 * floor + gpu:.1f}")
        add(f"gpu_hit_{name}_ms", gpu, "ms")
        peers = [
            peer["lengths"][index]["host_hit"]["median_ms"]
            for arm, peer in arms.items()
            if arm not in ("kvstrata", "plain") and not verdict(peer["lengths"][index])
        ]
        if peers:
            add(f"ahead_of_best_peer_{name}", min(peers) / hit, "", f">= {AHEAD[runner]}")
        add(f"correct_{name}", not verdict(length), "", "== true")
        worst = max(worst, length["host_hit"]["dlogprob_to_gpu_hit"] or 0.0)
        add(f"cold_ratio_{name}", length["cold"]["median_ms"] / plain["lengths"][index]["cold"]["median_ms"])
    add("max_dlogprob_vs_gpu_hit", worst, "", "<= 0")
    add("hits_at_once_vs_pcie", sorted(ours["together"]["gb_per_s"])[1] / pcie, "", ">= 1.15")
    decode = ours["decode"]
    add("decode_p99_ratio", decode["host"]["p99_ms"] / decode["gpu"]["p99_ms"], "", "<= 1.15")
    rates = [sorted(arm["throughput"])[len(arm["throughput"]) // 2] for arm in (ours, plain)]
    add("throughput_ratio", rates[0] / rates[1])
    add("start_s_longer", ours["ready_s"] - plain["ready_s"], "s")
    return made


def main() -> None:
    made = parser(__doc__, "serve")
    made.add_argument("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = made.parse_args()
    pcie = pinned_copy_gb_per_s()["to_device"]
    print(f"one large pinned copy: {pcie:.1f} GB/s", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="serve-"))
    arms: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        if arm == "lmcache" and importlib.util.find_spec("lmcache") is None:
            print("lmcache: not installed", flush=True)
        elif (found := run_arm(arm, options.runner, folder)) is not None:
            arms[arm] = found
            show(found)
    bench = f"serve_{options.runner}"
    path = options.json.with_name(f"{bench}.json") if options.json.name == "serve.json" else options.json
    keep(path, bench, figures(options.runner, arms, pcie), {"pcie_gb_per_s": pcie, "arms": arms})


if __name__ == "__main__":
    main()
