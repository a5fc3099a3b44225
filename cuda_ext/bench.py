"""How fast chunks move between a GPU's KV cache and host memory: what `kvstrata bench copy` runs.

    python -m kvstrata.cuda_ext.bench --json FILE

The cache has the shape of Llama-3.1-8B in vLLM's joined layout, blocks of 16 tokens in random order.
Every rate is that of whole jobs, from Python's call to the last byte, over that of one large copy
between pinned memory and the device in the same run. Buffers rotate, targets are poisoned, and what
came back is compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW, ChunkLayout, LayerSpec, Part, PartKind
from kvstrata.cuda_ext.device import (
    STAGING_BYTES,
    Chunk,
    DeviceLibrary,
    DevicePipe,
    load_device_library,
)
from kvstrata.cuda_ext.native import EngineCache, PlaneView

LAYERS, HEADS, DIM, BLOCK_TOKENS = 32, 8, 128, 16
TOKENS = 16384  # a job: 2 GiB of bf16
REPEATS = 5
PINNED_BYTES = 1 << 30
NEVER = float("inf")
CODECS = {"raw": CODEC_RAW, "packed": CODEC_PACKED}
KV_BYTES_PER_TOKEN = LAYERS * HEADS * 2 * DIM * 2

GEMV = (32, 4096, 14336)  # a decode step's matrix: its weights come from memory
GEMM = (4096, 4096, 14336)  # a prefill's
GEMV_REPEATS, GEMM_REPEATS = 200, 20
WEIGHTS = 4  # in turn, so that none stays in the cache


@dataclass(frozen=True)
class Setup:
    """A cache full of values, and slots for two jobs in turn."""

    layout: ChunkLayout
    cache: EngineCache
    layers: list[torch.Tensor]
    chunks: list[list[Chunk]]

    @property
    def kv_bytes(self) -> int:
        return len(self.chunks[0]) * self.layout.chunk_tokens * KV_BYTES_PER_TOKEN


@contextmanager
def setup(library: DeviceLibrary, chunk_tokens: int, codec: int) -> Iterator[Setup]:
    layer = LayerSpec("layer", HEADS, (DIM, DIM), "bfloat16")
    layout = ChunkLayout(chunk_tokens, (Part(PartKind.FULL, (layer,) * LAYERS),), codec)
    per_chunk, count = chunk_tokens // BLOCK_TOKENS, TOKENS // chunk_tokens
    blocks = 2 * TOKENS // BLOCK_TOKENS + 7
    draw = torch.Generator(device="cuda").manual_seed(1)
    layers = [
        torch.randn(blocks, BLOCK_TOKENS, HEADS, 2 * DIM, device="cuda", generator=draw).bfloat16()
        for _ in range(LAYERS)
    ]
    row = 2 * DIM * 2
    views = [
        PlaneView(one.data_ptr() + plane * DIM * 2, BLOCK_TOKENS * HEADS * row, row, HEADS * row, 2)
        for one in layers
        for plane in range(2)
    ]
    host = torch.frombuffer(mmap.mmap(-1, 2 * count * layout.slot_bytes), dtype=torch.uint8)
    host.fill_(0x5A)
    library.register(0, host.data_ptr(), host.numel())
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(2)).tolist()
    chunks = [
        Chunk(
            host.data_ptr() + i * layout.slot_bytes,
            tuple(order[i * per_chunk : (i + 1) * per_chunk]),
            i.to_bytes(8, "little") * 4,
        )
        for i in range(2 * count)
    ]
    torch.cuda.synchronize()
    try:
        yield Setup(
            layout,
            EngineCache(BLOCK_TOKENS, blocks, tuple(views)),
            layers,
            [chunks[:count], chunks[count:]],
        )
    finally:
        library.unregister(0, host.data_ptr())


@contextmanager
def pipe(
    made: Setup, gathers: bool, library: DeviceLibrary, options: argparse.Namespace
) -> Iterator[DevicePipe]:
    opened = DevicePipe(made.layout, made.cache, 0, options.staging_bytes, gathers, library)
    try:
        yield opened
    finally:
        opened.close()


def pinned_gb_per_s() -> dict[str, float]:
    """One large copy in each direction, the best of a few."""
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(PINNED_BYTES, dtype=torch.uint8, device="cuda")
    rates = {}
    for name, target, source in (("h2d", device, host), ("d2h", host, device)):
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        rates[name] = PINNED_BYTES / min(times) / 1e6
    return rates


def rates(
    library: DeviceLibrary, chunk_tokens: int, codec: str, options: argparse.Namespace
) -> dict[str, Any]:
    """KV bytes a second of saves and loads, each of a whole job, and whether all bits came back."""
    with setup(library, chunk_tokens, CODECS[codec]) as made:
        with (
            pipe(made, True, library, options) as saves,
            pipe(made, False, library, options) as loads,
        ):
            times: dict[str, list[float]] = {"d2h": [], "h2d": []}
            before = [layer.clone() for layer in made.layers]
            for turn in range(REPEATS + 1):
                chunks = made.chunks[turn % 2]
                times["d2h"].append(_seconds(lambda chunks=chunks: _all_saved(saves, chunks)))  # type: ignore[misc]
            for layer in made.layers:
                layer.fill_(float("nan"))
            torch.cuda.synchronize()
            for turn in range(REPEATS + 1):
                chunks = made.chunks[turn % 2]
                times["h2d"].append(_seconds(lambda chunks=chunks: _all_loaded(loads, chunks)))  # type: ignore[misc]
            held = [block for job in made.chunks for chunk in job for block in chunk.block_ids]
            exact = all(
                torch.equal(was[held].view(torch.int16), layer[held].view(torch.int16))
                for was, layer in zip(before, made.layers, strict=True)
            )
        medians = {name: statistics.median(each[1:]) for name, each in times.items()}
        return {
            "kv_gb_per_s": {name: made.kv_bytes / one / 1e9 for name, one in medians.items()},
            "kv_bytes_over_stored": made.layout.raw.payload_bytes / made.layout.payload_bytes,
            "seconds": times,
            "exact": exact,
        }


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _all_saved(saves: DevicePipe, chunks: list[Chunk]) -> None:
    for begin in range(0, len(chunks), 256):
        if any(saves.save(chunks[begin : begin + 256], 0)):
            raise SystemExit("a chunk of normal values did not fit packed")


def _all_loaded(loads: DevicePipe, chunks: list[Chunk]) -> None:
    if loads.load(chunks, 0, NEVER) != (len(chunks), None):
        raise SystemExit("a chunk came back damaged")


def slowdowns(library: DeviceLibrary, codec: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How many times longer matrix products take while chunks move, one way or both ways."""
    found: dict[str, dict[str, float]] = {}
    products = {"gemv": _product(*GEMV, GEMV_REPEATS), "gemm": _product(*GEMM, GEMM_REPEATS)}
    with (
        setup(library, 256, CODECS[codec]) as made,
        pipe(made, True, library, options) as saves,
        pipe(made, False, library, options) as loads,
    ):
        _all_saved(saves, made.chunks[0])
        for name, product in products.items():
            alone = _median_ms(product)
            found[name] = {"alone_ms": alone}
            for way, works in {
                "d2h": [lambda: _all_saved(saves, made.chunks[1])],
                "h2d": [lambda: _all_loaded(loads, made.chunks[0])],
                "both": [
                    lambda: _all_saved(saves, made.chunks[1]),
                    lambda: _all_loaded(loads, made.chunks[0]),
                ],
            }.items():
                with _busy(works):
                    found[name][way] = _median_ms(product) / alone
    return found


@dataclass(frozen=True)
class Product:
    """A graph of many matrix products, so that Python's pace does not matter, and what it works on."""

    graph: torch.cuda.CUDAGraph
    operands: list[torch.Tensor]


def _product(rows: int, inner: int, outer: int, repeats: int) -> Product:
    weights = [torch.randn(inner, outer, device="cuda").bfloat16() for _ in range(WEIGHTS)]
    given = torch.randn(rows, inner, device="cuda").bfloat16()
    torch.matmul(given, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            torch.matmul(given, weights[i % WEIGHTS])
    return Product(graph, [given, *weights])


def _median_ms(product: Product) -> float:
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        product.graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


@contextmanager
def _busy(works: list[Callable[[], None]]) -> Iterator[None]:
    """Each of `works` again and again, on a thread of its own."""
    over = threading.Event()

    def run(work: Callable[[], None]) -> None:
        while not over.is_set():
            work()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    library = load_device_library()
    torch.cuda.init()
    found: dict[str, Any] = {"pinned_gb_per_s": pinned_gb_per_s(), "rates": {}}
    for chunk_tokens in (256, 16):
        for codec in CODECS:
            found["rates"][f"{codec}_{chunk_tokens}"] = rates(library, chunk_tokens, codec, options)
    found["slowdowns"] = {codec: slowdowns(library, codec, options) for codec in CODECS}
    again = pinned_gb_per_s()
    found["pinned_gb_per_s_after"] = again
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--staging-bytes", type=int, default=STAGING_BYTES)
    options = parser.parse_args()
    options.json.write_text(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
