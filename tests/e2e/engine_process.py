"""One real vLLM engine in a process of its own, driven by JSON lines: what the end-to-end tests talk to.

Run as `python engine_process.py '<json options>'`. A request is `{"do": name, ...}`, the answer is one
line `{"ok": ...}` or `{"error": text}` on the original standard output.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

Answer = dict[str, Any]


class Engine:
    """Commands are methods; see `main`."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = options.pop("kv_transfer_config", None)
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 2048,
            "enforce_eager": True,
            "block_size": 32,
            "seed": 0,
            "max_num_seqs": 8,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
            "distributed_executor_backend": "uni",
        }
        settings |= options
        if transfer:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = LLM(**settings)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.preempted = 0
        self._count_preemptions(self.core.scheduler)

    def _count_preemptions(self, scheduler: Any) -> None:
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preempted += 1
            preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def ask(
        self, prompts: list[Any], max_tokens: int = 16, logprobs: int = 5, **sampling: Any
    ) -> list[Answer]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            detokenize=False,
            ignore_eos=True,
            logprobs=logprobs,
            **sampling,
        )
        outputs = self.llm.generate([_prompt(p) for p in prompts], params, use_tqdm=False)
        return [_answer(output) for output in outputs]

    def settle(self) -> int:
        """Step until nothing is under way, as a serving engine does by itself. Returns the steps it took."""
        steps = 0
        while self.core.scheduler.has_requests():
            self.engine.engine_core.get_output()
            steps += 1
        return steps

    def reset_gpu_cache(self) -> bool:
        self.settle()
        return bool(self.llm.reset_prefix_cache())

    def reset_connector_cache(self) -> bool:
        return bool(self.core.scheduler.reset_connector_cache())

    def free_blocks(self) -> int:
        return int(self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def books(self) -> dict[str, int]:
        """What the connector still keeps; all zero when nothing is under way."""
        side = self.core.scheduler.connector._scheduler
        return {
            "tracked": len(side._tracked),
            "loading": len(side._loading),
            "lookups": len(side._lookups),
            "saves": len(side._saves),
            "watched_blocks": len(side._saves._by_block),
        }

    def counters(self) -> dict[str, float]:
        """The connector's counters as vLLM exports them."""
        from prometheus_client import REGISTRY

        return {
            sample.name.removeprefix("kvstrata_").removesuffix("_total"): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name.startswith("kvstrata_") and sample.name.endswith("_total")
        }

    def client_name(self) -> str:
        return str(self.core.scheduler.connector._scheduler._client.client)

    def connected(self) -> bool:
        return self.core.scheduler.connector._scheduler._client.session is not None

    def storm(self, prompts: list[Any], seed: int, aborts: float, max_tokens: int = 8) -> dict[str, Any]:
        """Many requests at once, some aborted at random. Returns the answers of those that finished."""
        from vllm import SamplingParams

        dice = random.Random(seed)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
        waiting = list(enumerate(prompts))
        live: set[str] = set()
        finished: dict[str, list[int]] = {}
        aborted = 0
        while waiting or live or self.core.scheduler.has_requests():
            while waiting and dice.random() < 0.5:
                number, prompt = waiting.pop()
                name = f"{seed}-{number}"
                self.engine.add_request(name, _prompt(prompt), params)
                live.add(name)
            if live and dice.random() < aborts:
                name = dice.choice(sorted(live))
                self.engine.abort_request([name])
                live.discard(name)
                aborted += 1
            for output in self.engine.step():
                if output.finished and output.request_id in live:
                    live.discard(output.request_id)
                    finished[output.request_id.split("-")[1]] = list(output.outputs[0].token_ids)
        return {"finished": finished, "aborted": aborted}

    def preemptions(self) -> int:
        return self.preempted

    def shutdown(self) -> None:
        self.settle()
        self.engine.engine_core.shutdown()


def _prompt(prompt: Any) -> Any:
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt


def _answer(output: Any) -> Answer:
    first = output.outputs[0]
    return {
        "tokens": list(first.token_ids),
        "logprobs": [
            sorted([token, entry.logprob] for token, entry in step.items()) for step in first.logprobs or ()
        ],
        "cached": output.num_cached_tokens,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the engine prints goes to the log

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Whatever ends this process is told to the test, which decides what it means."""
        answers.write(json.dumps({"error": f"{kind.__name__}: {error}"}) + "\n")
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    engine = Engine(json.loads(sys.argv[1]))
    answers.write(json.dumps({"ok": "ready"}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        answers.write(json.dumps({"ok": getattr(engine, name)(**request)}) + "\n")
        if name == "shutdown":
            return


if __name__ == "__main__":
    main()
