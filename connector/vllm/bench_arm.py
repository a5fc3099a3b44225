"""One arm of `kvstrata bench serve`: a stock vLLM engine, asked what the bench says, one line at a time.

    python -m kvstrata.connector.vllm.bench_arm ARM --runner v1|v2 --replies FD

ARM is one of `ARMS`; kvstrata may have settings of its own, as in `kvstrata:client.save=false`.
Commands come as JSON lines on stdin, one answer each goes to the descriptor FD; `Arm` has a method for each.
The model has the shape of Llama-3.1-8B and random weights of such sizes that every answer depends on the
whole prompt. A prompt is a number of tokens and a name, the same in every arm.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ARMS = ("plain", "kvstrata", "offload", "lmcache")
LAYERS, KV_HEADS, DIM = 32, 8, 128
SETTLE_ASKS = 4
SETTLE_TOKENS = 33
FORGET_S = 15.0
LOGPROBS = 20

DECODERS = 8
DECODE_STEPS = 300
DECODE_SKIP = 40  # steps until all decoders run
INJECT_EVERY = 25
DECODE_TOKENS = 512

BATCH = 16
BATCH_TOKENS = 2048
BATCH_ANSWER_TOKENS = 64


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arm", help=f"{' | '.join(ARMS)}, or kvstrata:KEY=VALUE,...")
    parser.add_argument("--runner", choices=("v1", "v2"), required=True, help="vLLM's model runner")
    parser.add_argument("--replies", type=int, required=True, metavar="FD")
    parser.add_argument("--folder", type=Path, required=True, help="for whatever it makes")
    parser.add_argument("--max-tokens", type=int, required=True, help="of a prompt")
    parser.add_argument("--kv-gib", type=float, required=True, help="of the GPU's memory for KV")
    parser.add_argument("--pool-gib", type=int, required=True, help="of host memory for KV")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def as_prompts(prompts: Sequence[list[int]]) -> Any:
    """As vLLM takes token ids."""
    return [{"prompt_token_ids": one} for one in prompts]


def prompt(tokens: int, name: object) -> list[int]:
    """The same in every arm."""
    draw = random.Random(f"{tokens} {name}")
    return [draw.randrange(100, 128_000) for _ in range(tokens)]


def with_settings(extra: dict[str, Any], settings: str) -> dict[str, Any]:
    """`settings` as in "client.save=false,host.size=1GiB", on top of `extra`."""
    for setting in settings.split(","):
        path, _, value = setting.partition("=")
        *sections, key = path.split(".")
        section = extra
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = json.loads(value) if value in ("true", "false") else value
    return extra


def transfer_config(arm: str, runtime_dir: str, pool_gib: int) -> dict[str, Any] | None:
    arm, _, settings = arm.partition(":")
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if arm == "kvstrata":
        extra: dict[str, Any] = {
            "identity": {"model": "serve bench"},
            "host": {"size": f"{pool_gib}GiB"},
            "node": {"runtime_dir": runtime_dir, "idle_exit": "1min"},
        }
        module = "kvstrata.connector.vllm"
        return common | {
            "kv_connector": "KVStrataConnector",
            "kv_connector_module_path": module,
            "kv_connector_extra_config": with_settings(extra, settings) if settings else extra,
        }
    if arm == "offload":
        extra = {"cpu_bytes_to_use": pool_gib << 30}
        return common | {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
    if arm == "lmcache":
        return common | {"kv_connector": "LMCacheConnectorV1"}
    return None


def model_folder(base: Path, layers: int) -> Path:
    """A folder with nothing but the model's shape."""
    folder = base / "shape"
    folder.mkdir()
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def register_loader() -> None:
    """`load_format="sized_random"`: normal weights, each layer's output about as large as its input."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    # Queries and keys large enough for attention to choose, the way back small enough for errors not to grow.
    gains = {"qkv_proj": 1.7, "o_proj": 0.6, "down_proj": 0.25, "embed_tokens": 64.0}

    class SizedRandom(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to fetch."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            draw = torch.Generator(device="cuda").manual_seed(20)
            with torch.no_grad():
                for name, weights in model.named_parameters():
                    if "norm" in name:
                        weights.fill_(1.0)
                        continue
                    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
                    weights.normal_(0, gain / weights.shape[-1] ** 0.5, generator=draw)

    register_model_loader("sized_random")(SizedRandom)


class Arm:
    """The engine, and what it is asked."""

    def __init__(self, asked: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        register_loader()
        began = time.perf_counter()
        transfer = transfer_config(asked.arm, str(asked.folder), asked.pool_gib)
        self.llm = LLM(
            model=str(model_folder(asked.folder, asked.layers)),
            load_format="sized_random",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=asked.kv_dtype,
            max_model_len=asked.max_tokens + 1024,
            max_num_seqs=32,
            seed=0,
            enforce_eager=asked.eager,
            gpu_memory_utilization=0.1,  # of which nothing but a check is made, as KV's size is given
            kv_cache_memory_bytes=int(asked.kv_gib * (1 << 30)),
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
        )
        self.ready_s = time.perf_counter() - began
        self.first = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, logprobs=LOGPROBS)

    def ask(self, prompts: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """All at once: milliseconds until each has its first token, and their answers."""
        return self._ask([prompt(tokens, name) for tokens, name in prompts])

    def control(self, tokens: int, name: str) -> dict[str, Any]:
        """As `ask`, with another first half: an answer that stays the same shows nothing."""
        return self._ask([prompt(tokens // 2, "control") + prompt(tokens, name)[tokens // 2 :]])

    def _ask(self, prompts: list[list[int]]) -> dict[str, Any]:
        given = as_prompts(prompts)
        began = time.perf_counter()
        outputs = self.llm.generate(given, self.first, use_tqdm=False)
        ms = (time.perf_counter() - began) * 1e3
        cached = [output.num_cached_tokens or 0 for output in outputs]
        return {"ms": ms, "cached": cached, "answers": [_answer(output) for output in outputs]}

    def settle(self, seconds: float) -> None:
        """Until saves are over: some connectors go on with them only while the engine steps."""
        for i in range(SETTLE_ASKS):
            self._ask([prompt(SETTLE_TOKENS, f"settle {time.time()} {i}")])
            time.sleep(seconds / SETTLE_ASKS)

    def forget(self) -> None:
        """From now on nothing is found in the GPU's memory.

        Raises:
            TimeoutError: blocks stay in use.
        """
        deadline = time.monotonic() + FORGET_S
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise TimeoutError("blocks are still in use: the prefix cache cannot be reset")
            self.settle(0.4)

    def decode(self, name: str, joins: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Steps of requests that decode while the prompts `joins` are added, one after the other."""
        steps = sorted(self._steps(name, [prompt(tokens, each) for tokens, each in joins]))
        return {
            "median_ms": steps[len(steps) // 2],
            "p99_ms": steps[int(len(steps) * 0.99)],
            "longest_ms": steps[-1],
            "steps": len(steps),
            "sum_ms": sum(steps),
        }

    def _steps(self, name: str, joins: list[list[int]]) -> Iterator[float]:
        """Milliseconds of each step in which the decoders got a token, after they have settled."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        long = SamplingParams(
            max_tokens=DECODE_STEPS + 50, ignore_eos=True, temperature=0.0, detokenize=False
        )
        for i in range(DECODERS):
            (one,) = as_prompts([prompt(DECODE_TOKENS, f"{name} {i}")])
            engine.add_request(f"{name} decodes {i}", one, long)
        step, before, waiting, next_join = 0, None, list(joins), 2 * INJECT_EVERY
        while engine.has_unfinished_requests():
            if step >= next_join and waiting:
                next_join += INJECT_EVERY
                (one,) = as_prompts([waiting.pop()])
                engine.add_request(f"{name} joins {step}", one, self.first)
            outputs, now = engine.step(), time.perf_counter()
            if any("decodes" in output.request_id for output in outputs):
                step += 1
                if before is not None and DECODE_SKIP < step <= DECODE_STEPS:
                    yield (now - before) * 1e3
                before = now

    def batch(self, name: str) -> dict[str, float]:
        """Tokens a second of a batch that reuses nothing."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=BATCH_ANSWER_TOKENS, ignore_eos=True, temperature=0.0, detokenize=False
        )
        prompts = as_prompts([prompt(BATCH_TOKENS, f"{name} {i}") for i in range(BATCH)])
        began = time.perf_counter()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"tokens_per_s": BATCH * (BATCH_TOKENS + BATCH_ANSWER_TOKENS) / seconds}


def _answer(output: Any) -> dict[str, Any]:
    chosen = output.outputs[0]
    logprobs = {str(token): each.logprob for token, each in chosen.logprobs[0].items()}
    return {"token": chosen.token_ids[0], "logprobs": logprobs}


def main() -> None:
    asked = options()
    os.environ |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if asked.runner == "v2" else "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # the engine core has to know the loader
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(asked.pool_gib),
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_TRACK_USAGE": "false",
    }
    with os.fdopen(asked.replies, "w", buffering=1) as replies:
        arm = Arm(asked)
        print(json.dumps({"ready_s": arm.ready_s}), file=replies)
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(arm, command.pop("do"))(**command)
            print(json.dumps(answer), file=replies)


if __name__ == "__main__":
    main()
