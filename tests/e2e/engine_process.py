"""One real vLLM engine in a process of its own, driven by JSON lines: what the end-to-end tests talk to.

Run as `python engine_process.py '<json options>'`. A request is `{"do": name, ...}`, the answer is one
line `{"ok": ...}` or `{"error": text}` on the original standard output.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]
_HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
)


class Engine:
    """Commands are methods; see `main`."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
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
        if torch.cuda.is_available():  # several engines share the GPU; its attention kernels are for 16 bits
            settings |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}
        settings |= options
        if transfer:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = LLM(**settings)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.preempted = 0
        self.finished: dict[str, Answer] = {}
        self.hooks = {"calls": 0, "seconds": 0.0}  # of the connector's scheduler side, since the last step
        self._count_preemptions(self.core.scheduler)
        self.seen: Counter[str] = Counter()
        if self.core.scheduler.connector is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            for side in (self.core.scheduler.connector, get_kv_transfer_group()):
                self._count_stats(side)

    def _count_preemptions(self, scheduler: Any) -> None:
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preempted += 1
            preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def _count_stats(self, connector: Any) -> None:
        """What one side counts; vLLM 0.26 drops that of steps without an answer."""
        take = connector.get_kv_connector_stats

        def counted() -> Any:
            stats = take()
            self.seen.update({} if stats is None else stats.data)
            return stats

        connector.get_kv_connector_stats = counted

    def ask(
        self, prompts: list[Any], max_tokens: int = 16, logprobs: int = 5, **sampling: Any
    ) -> list[Answer]:
        params = _sampling(max_tokens=max_tokens, logprobs=logprobs, **sampling)
        outputs = self.llm.generate([_prompt(p) for p in prompts], params, use_tqdm=False)
        return [_answer(output) for output in outputs]

    def add(self, prompts: dict[str, Any], **sampling: Any) -> None:
        """Queue requests by name; `step`, `drain` and `abort` do the rest."""
        for name, prompt in prompts.items():
            self.engine.add_request(name, _prompt(prompt), _sampling(**sampling))

    def abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)

    def step(self, count: int = 1) -> dict[str, int]:
        """Take steps, with or without anything to do; says what is running and what waits."""
        for _ in range(count):
            self._one_step()
        running, waiting = self.core.scheduler.get_request_counts()
        return {"running": running, "waiting": waiting}

    def drain(self) -> dict[str, Any]:
        """Step until nothing is under way: answers since the last call, and each step's hooks."""
        steps = []
        while self.core.scheduler.has_requests():
            waiting = self.core.scheduler.get_request_counts()[1]
            self._one_step()
            steps.append({"waiting": waiting, **self.hooks})
            self.hooks.update(calls=0, seconds=0.0)
        finished, self.finished = self.finished, {}
        return {"finished": finished, "steps": steps}

    def _one_step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.finished[output.request_id] = _answer(output)

    def time_hooks(self) -> None:
        """From now on count the calls of the connector's scheduler side and the CPU time that they take."""
        connector = self.core.scheduler.connector
        for name in _HOOKS:
            setattr(connector, name, self._timed(getattr(connector, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return hook(*args, **kwargs)
            finally:
                self.hooks["calls"] += 1
                self.hooks["seconds"] += time.thread_time() - started

        return timed

    def settle(self) -> int:
        """Step until nothing is under way, as a serving engine does by itself. Returns the steps it took."""
        steps = 0
        while self.core.scheduler.has_requests():
            self.engine.step()
            steps += 1
        return steps

    def reset_gpu_cache(self) -> bool:
        self.settle()
        return bool(self.llm.reset_prefix_cache())

    def reset_caches(self, running: bool = False) -> bool:
        """What `/reset_prefix_cache?reset_external=true` does, in whatever state the engine is."""
        return bool(self.llm.reset_prefix_cache(reset_running_requests=running, reset_connector=True))

    def preempt_all(self) -> bool:
        """Take everything from the running requests, if any, and forget the engine's own cache.

        False when vLLM could not do the latter: a request that waits has just been loaded.
        """
        try:
            return bool(self.llm.reset_prefix_cache(reset_running_requests=True))
        except RuntimeError:
            return False

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
            "lookups": side._link.lookups.leases,
            "saves": len(side._link.saves),
            "watched_blocks": len(side._link.saves._by_block),
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

    def loaded_tokens(self) -> int:
        """By loads that ended well."""
        return int(self.seen["loaded_tokens"])

    def handed_over(self) -> int:
        """Loads whose requests went on before their end."""
        return int(self.seen["loads_handed_over"])

    def sleep(self) -> None:
        """At once, whatever is being saved: the KV cache's memory is given back."""
        self.llm.sleep(level=1)

    def wake_up(self) -> None:
        self.llm.wake_up()

    def drafts(self) -> tuple[int, int]:
        """Tokens that speculative decoding has proposed, and how many of them were accepted."""
        from prometheus_client import REGISTRY

        names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
        samples = {s.name: s.value for metric in REGISTRY.collect() for s in metric.samples}
        return int(samples[names[0]]), int(samples[names[1]])

    def client_name(self) -> str:
        return str(self.core.scheduler.connector._scheduler._link._client.client)

    def connected(self) -> bool:
        return self.core.scheduler.connector._scheduler._link._client.session is not None

    def storm(self, prompts: list[Any], seed: int, aborts: float, max_tokens: int = 8) -> dict[str, Any]:
        """Many requests at once, some aborted at random. Returns the answers of those that finished."""
        dice = random.Random(seed)
        params = _sampling(max_tokens=max_tokens)
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


def _sampling(**settings: Any) -> Any:
    """Greedy and of a fixed length, unless said otherwise."""
    from vllm import SamplingParams

    return SamplingParams(**({"temperature": 0, "detokenize": False, "ignore_eos": True} | settings))


def _answer(output: Any) -> Answer:
    first = output.outputs[0]
    return {
        "tokens": list(first.token_ids),
        "samples": [list(one.token_ids) for one in output.outputs],
        "prompt_logprobs": [
            entries[token].logprob if entries else None
            for token, entries in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
        ],
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
