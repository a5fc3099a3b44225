"""One arm of `benches/serve.py`: one engine in this process, asked the same prompts as all others.

    python benches/serve_arm.py ARM --runner v1|v2 --json FILE

The model has the shape of Llama-3.1-8B and random weights of such sizes that every answer depends on the
whole prompt. Prompts are k * 256 + 1 tokens, so that a hit in GPU memory and one in host memory leave the
same single token to compute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ARMS = ("plain", "kvstrata", "offload", "lmcache")
POOL_GIB = 40
LAYERS = 32
KV_BYTES_PER_TOKEN = LAYERS * 2 * 8 * 128 * 2
SETTLE_S = 0.8

DECODERS = 8
DECODE_STEPS = 300
INJECT_EVERY = 25
INJECTED_TOKENS = 64 * 256 + 1
TOGETHER = 4

BATCH = 16
BATCH_PROMPT_TOKENS = 2048
BATCH_ANSWER_TOKENS = 64
BATCHES = 5


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--runner", choices=("v1", "v2"), required=True)
    parser.add_argument("--lens", type=int, nargs="+", default=[8193, 16385, 32769])
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def as_prompts(prompts: Sequence[list[int]]) -> Any:
    """As vLLM takes token ids."""
    return [{"prompt_token_ids": one} for one in prompts]


def prompt(tokens: int, name: object) -> list[int]:
    """The same in every arm."""
    draw = random.Random(f"{tokens} {name}")
    return [draw.randrange(100, 128_000) for _ in range(tokens)]


def transfer_config(arm: str, runtime_dir: str) -> dict[str, Any] | None:
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if arm == "kvstrata":
        extra: dict[str, Any] = {
            "identity": {"model": "serve bench"},
            "host": {"size": f"{POOL_GIB}GiB"},
            "node": {"runtime_dir": runtime_dir, "idle_exit": "1min"},
        }
        module = "kvstrata.connector.vllm"
        return common | {
            "kv_connector": "KVStrataConnector",
            "kv_connector_module_path": module,
            "kv_connector_extra_config": extra,
        }
    if arm == "offload":
        extra = {"cpu_bytes_to_use": POOL_GIB << 30}
        return common | {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
    if arm == "lmcache":
        return common | {"kv_connector": "LMCacheConnectorV1"}
    return None


def model_folder(layers: int) -> Path:
    """A folder with nothing but the model's shape."""
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
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

    class SizedRandom(BaseModelLoader):  # type: ignore[misc]
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
    """The engine, and what is asked of it."""

    def __init__(self, asked: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        self.asked = asked
        register_loader()
        began = time.perf_counter()
        transfer = transfer_config(asked.arm, tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
        self.llm = LLM(
            model=str(model_folder(asked.layers)),
            load_format="sized_random",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=asked.kv_dtype,
            max_model_len=max(*asked.lens, INJECTED_TOKENS) + 1024,
            max_num_seqs=32,
            seed=0,
            enforce_eager=asked.eager,
            gpu_memory_utilization=0.88,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
        )
        self.ready_s = time.perf_counter() - began
        self.first = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, logprobs=20)

    def ask(self, prompts: Sequence[list[int]]) -> tuple[float, list[Any]]:
        """Milliseconds until all of them have their first token, and the outputs."""
        began = time.perf_counter()
        outputs = self.llm.generate(as_prompts(prompts), self.first, use_tqdm=False)
        return (time.perf_counter() - began) * 1e3, outputs

    def settle(self) -> None:
        """Until saves are over: they go on while the engine steps."""
        for i in range(4):
            self.ask([prompt(33, f"settle {time.time()} {i}")])
            time.sleep(SETTLE_S / 4)

    def forget(self) -> None:
        """From now on nothing is found in GPU memory."""
        self.settle()
        deadline = time.monotonic() + 10
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise SystemExit("blocks are still in use: the prefix cache cannot be reset")
            self.settle()

    def one(self, tokens: list[int]) -> dict[str, Any]:
        ms, (output,) = self.ask([tokens])
        return {"ms": ms, "cached": output.num_cached_tokens or 0, "answer": _answer(output)}

    def length(self, tokens: int) -> dict[str, Any]:
        """Cold, hit in GPU memory, hit in host memory, and several of the last at once."""
        prompts = [prompt(tokens, i) for i in range(self.asked.repeats)]
        self.one(prompt(tokens, "warm up"))
        runs = {"cold": [self.one(p) for p in prompts]}
        self.settle()
        runs["gpu_hit"] = [self.one(p) for p in prompts]
        control = self.one(prompt(tokens // 2, "control") + prompts[0][tokens // 2 :])
        if self.asked.arm != "plain":
            runs["host_hit"] = []
            for _ in range(2):
                self.forget()
                runs["host_hit"] += [self.one(p) for p in prompts]
        cold = [run["answer"] for run in runs["cold"]]
        gpu = [run["answer"] for run in runs["gpu_hit"]]
        found: dict[str, Any] = {
            "tokens": tokens,
            "control_dlogprob": _distance(cold[0], control["answer"]),
            "cold_answers": cold,
        }
        for name, of in runs.items():
            found[name] = {
                "ms": [round(run["ms"], 3) for run in of],
                "median_ms": round(statistics.median(run["ms"] for run in of), 3),
                "cached": [run["cached"] for run in of],
                "dlogprob_to_cold": _worst(cold, of),
                "dlogprob_to_gpu_hit": _worst(gpu, of),
            }
        return found

    def together(self, tokens: int) -> dict[str, Any]:
        """Several host hits submitted at once: how fast KV comes, all of them taken together."""
        prompts = [prompt(tokens, f"together {i}") for i in range(TOGETHER)]
        for one in prompts:
            self.one(one)
        rates, hit = [], 0
        for _ in range(3):
            self.forget()
            ms, outputs = self.ask(prompts)
            hit = sum(output.num_cached_tokens or 0 for output in outputs)
            rates.append(hit * KV_BYTES_PER_TOKEN / ms / 1e6)
        return {"gb_per_s": rates, "cached": hit, "tokens": tokens * TOGETHER}

    def decode(self) -> dict[str, Any]:
        """Steps of requests that decode while prompts join that hit in GPU memory, then in host memory."""
        count = DECODE_STEPS // INJECT_EVERY - 1
        injected = [prompt(INJECTED_TOKENS, f"joins {i}") for i in range(count)]
        for one in injected:
            self.one(one)
        self.settle()
        found = {"gpu": list(self._steps("gpu", injected))}
        if self.asked.arm != "plain":
            self.forget()
            found["host"] = list(self._steps("host", injected))
        return {name: _spread(steps) for name, steps in found.items()}

    def _steps(self, name: str, injected: list[list[int]]) -> Iterator[float]:
        """Milliseconds of each step in which the decoders got a token, after they have settled."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        long = SamplingParams(
            max_tokens=DECODE_STEPS + 50, ignore_eos=True, temperature=0.0, detokenize=False
        )
        for i in range(DECODERS):
            (one,) = as_prompts([prompt(512, f"{name} {i}")])
            engine.add_request(f"{name} decodes {i}", one, long)
        step, before, waiting, next_join = 0, None, list(injected), 2 * INJECT_EVERY
        while engine.has_unfinished_requests():
            if step >= next_join and waiting:
                next_join += INJECT_EVERY
                (one,) = as_prompts([waiting.pop()])
                engine.add_request(f"{name} joins {step}", one, self.first)
            outputs, now = engine.step(), time.perf_counter()
            if any("decodes" in output.request_id for output in outputs):
                step += 1
                if before is not None and 40 < step <= DECODE_STEPS:
                    yield (now - before) * 1e3
                before = now

    def throughput(self) -> list[float]:
        """Tokens a second of batches in which nothing is ever reused."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=BATCH_ANSWER_TOKENS, ignore_eos=True, temperature=0.0, detokenize=False
        )
        rates = []
        for batch in range(BATCHES):
            prompts = as_prompts([prompt(BATCH_PROMPT_TOKENS, f"batch {batch} {i}") for i in range(BATCH)])
            began = time.perf_counter()
            self.llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
            rates.append(BATCH * (BATCH_PROMPT_TOKENS + BATCH_ANSWER_TOKENS) / seconds)
        return rates


def _answer(output: Any) -> dict[str, Any]:
    chosen = output.outputs[0]
    logprobs = {str(token): each.logprob for token, each in chosen.logprobs[0].items()}
    return {"token": chosen.token_ids[0], "logprobs": logprobs}


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The largest difference over tokens that both list; None if one's choice is not in the other's list."""
    common = one["logprobs"].keys() & other["logprobs"].keys()
    if str(one["token"]) not in common or str(other["token"]) not in common:
        return None
    found: float = max(abs(one["logprobs"][token] - other["logprobs"][token]) for token in common)
    return found


def _worst(answers: list[dict[str, Any]], runs: list[dict[str, Any]]) -> float | None:
    distances = [_distance(answers[i % len(answers)], run["answer"]) for i, run in enumerate(runs)]
    return None if None in distances else max(d for d in distances if d is not None)


def _spread(steps: list[float]) -> dict[str, Any]:
    ordered = sorted(steps)
    return {
        "median_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "longest_ms": ordered[-1],
        "steps": len(ordered),
        "sum_ms": sum(ordered),
    }


def main() -> None:
    asked = options()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if asked.runner == "v2" else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(POOL_GIB),
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_TRACK_USAGE": "false",
    }
    arm = Arm(asked)
    found: dict[str, Any] = {"arm": asked.arm, "runner": asked.runner, "ready_s": arm.ready_s}
    found["lengths"] = [arm.length(tokens) for tokens in asked.lens]
    if asked.arm != "plain":
        found["together"] = arm.together(64 * 256 + 1)
    found["decode"] = arm.decode()
    found["throughput"] = arm.throughput()
    asked.json.write_text(json.dumps(found))
    os._exit(0)  # other connectors' threads may keep the interpreter from ending


if __name__ == "__main__":
    main()
