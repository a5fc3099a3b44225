"""`kvstrata bench copy | serve`: measures on this machine's GPU, prints figures, keeps the result."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvstrata.controller.bench import serve
from kvstrata.controller.results import Figure, measured
from kvstrata.core.errors import KVStrataError

_COPY_MODULE = "kvstrata.cuda_ext.bench"


ARMS = ("plain", "kvstrata", "offload", "lmcache")


class CannotMeasure(KVStrataError):
    """Something that the bench needs is not there, or a part of it failed."""


def bench(options: argparse.Namespace) -> int:
    """Exit status 1 if an answer or a byte was wrong."""
    if importlib.util.find_spec("torch") is None:
        raise CannotMeasure(f"{sys.executable} has no torch: use the Python that has vLLM")
    if not _has_gpu():
        raise CannotMeasure(f"no CUDA GPU that the torch of {sys.executable} can use")
    return _serve(options) if options.what == "serve" else _copy(options)


def _has_gpu() -> bool:
    """Asked in a process of its own: one that has used a GPU holds some of its memory."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def copied() -> dict[str, Any]:
    """What `kvstrata.cuda_ext.bench` measures: in a process of its own, which gives all memory back."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "copy.json"
        done = subprocess.run(
            [sys.executable, "-m", _COPY_MODULE, "--json", str(kept)], stderr=subprocess.PIPE, check=False
        )
        if done.returncode or not kept.exists():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise CannotMeasure(f"the copy bench failed: {' '.join(last)}")
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def copy_figures(found: dict[str, Any]) -> list[Figure]:
    pinned, rates, slow = found["pinned_gb_per_s"], found["rates"], found["slowdowns"]["packed"]

    def share(which: str, way: str) -> float:
        return round(float(rates[which]["kv_gb_per_s"][way] / pinned[way]), 4)

    made = [Figure(f"copy.pinned_{way}", round(pinned[way], 2), "GB/s") for way in ("d2h", "h2d")]
    for tokens, goal in ((256, 0.98), (16, 0.92)):
        for way in ("d2h", "h2d"):
            made.append(Figure(f"copy.{way}_vs_pcie_{tokens}", share(f"raw_{tokens}", way), "", f">= {goal}"))
    for name, goal in (("gemv", 1.1), ("gemm", 1.05)):
        for way in ("d2h", "h2d", "both"):
            wanted = None if way == "both" else f"<= {goal}"
            made.append(Figure(f"copy.{name}_slowdown_{way}", round(slow[name][way], 4), "", wanted))
    for way in ("d2h", "h2d"):
        made.append(Figure(f"pack.kv_rate_vs_pcie_{way}", share("packed_256", way), "", ">= 1.25"))
    made.append(Figure("pack.ratio", round(rates["packed_256"]["kv_bytes_over_stored"], 4)))
    made.append(Figure("copy.exact", all(rate["exact"] for rate in rates.values()), "", "== true"))
    return made


def _copy(options: argparse.Namespace) -> int:
    found = copied()
    made = copy_figures(found)
    _tell("copy", "kvstrata bench copy", made, found, options)
    return 0 if made[-1].met else 1


def _serve(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise CannotMeasure(f"{sys.executable} has no vLLM: use the Python that has it")
    asked = options.arms or ARMS
    for arm in asked:
        if arm not in ARMS and not arm.startswith("kvstrata:"):
            raise CannotMeasure(f"--arms {arm}: choose from {', '.join(ARMS)}, or kvstrata:KEY=VALUE,...")
    if "kvstrata" not in asked:
        raise CannotMeasure("--arms: kvstrata itself is missing; figures are about it")
    arms = [arm for arm in asked if arm != "lmcache" or importlib.util.find_spec("lmcache")]
    plan = serve.Plan(options.runner, arms, options.pool_gib, options.kv_gib, options.kv_dtype)
    pcie = pinned_to_device()
    serve.say(f"one large pinned copy: {pcie:.1f} GB/s")
    outcome = serve.run(plan, pcie, serve.say)
    made = serve.figures(plan, outcome)
    flags = "" if options.kv_dtype == "auto" else f" --kv-dtype {options.kv_dtype}"
    command = f"kvstrata bench serve --runner {options.runner}{flags} --arms {' '.join(outcome.arms)}"
    name = f"serve_{options.runner}" + ("" if options.kv_dtype == "auto" else f"_{options.kv_dtype}")
    _tell(name, command, made, dataclasses.asdict(outcome), options)
    wrong = [figure.name for figure in made if figure.met is False and figure.goal == "== true"]
    return 1 if wrong else 0


def pinned_to_device() -> float:
    """GB/s of one large copy; measured in a process of its own."""
    code = "from kvstrata.cuda_ext.bench import pinned_gb_per_s as rate; print(rate()['h2d'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"no GPU answers: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return float(done.stdout)


def _tell(
    name: str, command: str, made: list[Figure], samples: dict[str, Any], options: argparse.Namespace
) -> None:
    for figure in made:
        goal = f" (goal {figure.goal}: {'met' if figure.met else 'MISSED'})" if figure.goal else ""
        print(f"{figure.name}: {figure.value} {figure.unit}".rstrip() + goal)
    if options.json is not None:
        measured(name, command, made, samples).write(options.json)
