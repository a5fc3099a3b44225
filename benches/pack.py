"""How much smaller exact packing makes the KV of a real model.

    python benches/pack.py

SmolLM2-135M in bf16 reads English prose, Python's own manual, on a real vLLM that packs what it saves.
A chunk that does not fit packed is stored raw, and counts as such. The figure is what the chunks would
take raw over what they do take, headers, checksums and rounding to pages included.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common import Node, keep, node_store, parser, smollm2

from kvstrata.controller.cli_node import stats
from kvstrata.controller.results import Figure
from kvstrata.core.layout import CODEC_PACKED, ChunkLayout, LayerSpec, Part, PartKind

POOL_BYTES = 2 << 30
PROMPTS = 16
PROMPT_TOKENS = 2048
CHUNK_TOKENS = 256
SETTLE_S = 60.0


def slot_sizes(model: Path) -> tuple[int, int]:
    """Bytes of a chunk's slot: packed, raw."""
    config = json.loads((model / "config.json").read_text())
    dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    layer = LayerSpec("layer", config["num_key_value_heads"], (dim, dim), "bfloat16")
    layers = (layer,) * config["num_hidden_layers"]
    packed, raw = ChunkLayout(CHUNK_TOKENS, (Part(PartKind.FULL, layers),), CODEC_PACKED).ways
    return packed.slot_bytes, raw.slot_bytes


def serve(model: Path, node: Node) -> dict[int, int]:
    """Let the model read; how many chunks lie in slots of each size, in bytes."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="KVStrataConnector",
        kv_connector_module_path="kvstrata.connector.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "node": {"runtime_dir": str(node.paths.folder), "autostart": False},
            "host": {"size": POOL_BYTES},
            "client": {"packing": "on"},
        },
    )
    llm: Any = LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS + 128,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        kv_transfer_config=transfer,
    )
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = llm.get_tokenizer().encode(text)
    answer = SamplingParams(max_tokens=2, ignore_eos=True)
    for i in range(PROMPTS):
        prompt = ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS]
        llm.generate([{"prompt_token_ids": prompt}], answer, use_tqdm=False)
    deadline = time.monotonic() + SETTLE_S
    while sum((chunks := stored(node)).values()) < PROMPTS * PROMPT_TOKENS // CHUNK_TOKENS:
        if time.monotonic() > deadline:
            raise SystemExit(f"pack: not all chunks were stored: {chunks}")
        llm.generate([{"prompt_token_ids": ids[:5]}], answer, use_tqdm=False)  # saves end while it steps
    return chunks


def stored(node: Node) -> dict[int, int]:
    return {int(size): count for size, count in stats(node.paths)["chunks_by_slot_bytes"].items()}


def main() -> None:
    options = parser(__doc__, "pack")
    options.add_argument("--model", type=Path, help="a folder (SmolLM2, made if it is not there)")
    chosen = options.parse_args()
    model = smollm2(chosen.model)
    packed, raw = slot_sizes(model)
    with node_store(POOL_BYTES) as node:
        chunks = serve(model, node)
    total = sum(chunks.values())
    figures = [
        Figure("pack.ratio_real_kv", round(total * raw / sum(size * n for size, n in chunks.items()), 4)),
        Figure("pack.fitting_real_kv", round(chunks.get(packed, 0) / total, 4)),
    ]
    keep(chosen.json, "pack", figures, {"chunks_by_slot_bytes": chunks, "packed": packed, "raw": raw})


if __name__ == "__main__":
    main()
