"""`kvstrata results`: the kept figures, and the tables of them in the documents."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from kvstrata.controller.results import (
    SHORT_BEGIN,
    TABLE_BEGIN,
    Figure,
    Result,
    ResultError,
    markdown_table,
    read_all,
    readable,
    replace_file,
    short_table,
    with_table,
)

# What the README shows of all that was measured, and in which words.
_MAIN = {
    "On two CPU cores, vLLM 0.32, SmolLM2-135M": {
        "demo.outputs_equal": "answers bit for bit those of plain vLLM's own hit",
        "demo.host_ttft_ratio": "time to the first token when found in host memory, over a cold one",
        "demo.engine_restart_ttft_ratio": "the same after a restart of the engine",
        "demo.second_engine_ttft_ratio": "the same from another engine's cache",
        "overhead.ttft_ratio_upper95": "first token, nothing reused, over plain vLLM (95 % bound)",
        "overhead.throughput_ratio_lower95": "throughput, nothing reused, over plain vLLM (95 % bound)",
    },
    "On one H200, vLLM 0.26, a model of Llama-3.1-8B's shape": {
        "serve.v2.max_dlogprob_vs_gpu_hit": "largest difference of a log-probability to a hit in GPU memory",
        "serve.v2.host_hit_32k_ms": "time to the first token of 32k tokens found in host memory",
        "serve.v2.gpu_hit_32k_ms": "the same in GPU memory",
        "serve.v2.ahead_of_best_peer_32k": "times as fast as the next best connector, 32k tokens",
        "serve.v2.ahead_of_best_peer_8k": "times as fast as the next best connector, 8k tokens",
        "serve.v2.hits_at_once_vs_pcie": "rate of four hits of 16k tokens at once, over that of a plain copy",
        "serve.v2.decode_p99_ratio": "decode steps at p99 while hits join, over the same with GPU hits",
        "serve.v2.cold_ratio_upper95": "first token, nothing reused, over plain vLLM (95 % bound)",
        "serve.v2.throughput_ratio_lower95": "throughput, nothing reused, over plain vLLM (95 % bound)",
        "pack.kv_rate_vs_pcie_h2d": "KV to the GPU, packed, over what the link carries raw",
    },
}


def run(options: argparse.Namespace) -> int:
    """Exit status 1 if the README's table is out of date and should only be checked."""
    results = read_all(options.results)
    if options.readme is not None:
        return _readme(options.readme, results, options.check)
    if options.json:
        print(json.dumps([result.as_tree() for result in results], indent=1))
    else:
        print(_text(results))
    return 0


def _text(results: Iterable[Result]) -> str:
    """One line for each figure: missed goals, then met ones, then those without a goal."""
    rank = {False: 0, True: 1, None: 2}
    sign = {False: "missed", True: "met", None: ""}
    figures = [(result, figure) for result in results for figure in result.figures]
    figures.sort(key=lambda pair: rank[pair[1].met])
    if not figures:
        return "no results are kept yet"
    width = max(len(figure.name) for _, figure in figures)
    return "\n".join(
        f"{sign[figure.met]:7} {figure.name:{width}}  {_measured(figure):22} {result.date[:10]}  "
        f"{result.command}".rstrip()
        for result, figure in figures
    )


def _measured(figure: Figure) -> str:
    value = f"{readable(figure.value)} {figure.unit}".rstrip()
    return f"{value} ({figure.goal})" if figure.goal else value


def _readme(path: Path, results: Iterable[Result], check: bool) -> int:
    try:
        text = path.read_text()
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    if SHORT_BEGIN in text:
        wanted = with_table(text, short_table(results, _MAIN), SHORT_BEGIN)
    else:
        wanted = with_table(text, markdown_table(results), TABLE_BEGIN)
    if text == wanted:
        return 0
    if check:
        print(
            f"kvstrata results: the table in {path} is out of date: run `kvstrata results --readme {path}`",
            file=sys.stderr,
        )
        return 1
    try:
        replace_file(path, wanted)
    except OSError as error:
        raise ResultError(f"{path} cannot be written: {error.strerror}") from error
    return 0
