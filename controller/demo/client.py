"""Asks an engine over its OpenAI API, and reads from its /metrics where the prompt's KV came from."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvstrata.core.errors import KVStrataError

_HOST = "127.0.0.1"
_ANSWER_S = 300.0  # far above any answer: reaching it means a hung engine
_HEALTH_S = 5.0
_TOP_LOGPROBS = 5

_METRIC = re.compile(r"^([A-Za-z_:]+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_GPU_HITS = "vllm:prefix_cache_hits_total"
_LOADED = "kvstrata_loaded_tokens_total"


class RequestFailed(KVStrataError):
    """An engine did not answer a request as it should."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Tokens and logprobs are what must not change, whatever served the prompt."""

    ttft_s: float
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]  # of the most likely tokens, at each place
    prompt_tokens: int
    gpu_hit_tokens: int  # from the engine's own prefix cache
    loaded_tokens: int  # by kvstrata

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.gpu_hit_tokens - self.loaded_tokens

    def same_output(self, other: Answer) -> bool:
        """Bit for bit: the same tokens with the same logprobs."""
        return self.tokens == other.tokens and self.logprobs == other.logprobs


def is_healthy(port: int) -> bool:
    """Whether an engine answers on `port`."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=_HEALTH_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ask(port: int, model: str, prompt: str, max_tokens: int) -> Answer:
    """Ask `prompt`, greedily, while nobody else asks this engine.

    Raises:
        RequestFailed: the engine refused, hung or ended.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": True,
        "top_logprobs": _TOP_LOGPROBS,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    before = _metrics(port)
    ttft_s, events = 0.0, []
    began = time.perf_counter()
    with _response(port, "POST", "/v1/chat/completions", body) as response:
        for event in _events(response):
            if not ttft_s and _tokens(event):
                ttft_s = time.perf_counter() - began
            events.append(event)
    after = _metrics(port)
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if usage is None or not ttft_s:
        raise RequestFailed(f"port {port} ended its answer without a token or without its usage")
    choices = [choice for event in events for choice in event["choices"]]
    places = [place for choice in choices for place in (choice.get("logprobs") or {}).get("content", ())]
    return Answer(
        ttft_s=ttft_s,
        text="".join(choice["delta"].get("content") or "" for choice in choices),
        tokens=tuple(token for event in events for token in _tokens(event)),
        logprobs=tuple(tuple(top["logprob"] for top in place["top_logprobs"]) for place in places),
        prompt_tokens=usage["prompt_tokens"],
        gpu_hit_tokens=round(after.get(_GPU_HITS, 0.0) - before.get(_GPU_HITS, 0.0)),
        loaded_tokens=round(after.get(_LOADED, 0.0) - before.get(_LOADED, 0.0)),
    )


def _tokens(event: dict[str, Any]) -> list[int]:
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]


def _metrics(port: int) -> dict[str, float]:
    """Every counter and gauge, summed over its labels."""
    with _response(port, "GET", "/metrics") as response:
        text = response.read().decode()
    sums: dict[str, float] = {}
    for name, value in _METRIC.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@contextmanager
def _response(
    port: int, method: str, path: str, body: dict[str, Any] | None = None
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_S)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RequestFailed(f"port {port} answered {path} with {response.status}: {response.read(500)!r}")
        yield response
    except (OSError, http.client.HTTPException) as error:
        raise RequestFailed(f"port {port} did not answer {path}: {error!r}") from error
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream, as they arrive."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"data: ") or data == b"[DONE]":
            continue
        event: dict[str, Any] = json.loads(data)
        if "choices" not in event:
            raise RequestFailed(f"the engine broke its answer off: {event.get('error', event)}")
        yield event
