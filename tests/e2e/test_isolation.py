"""What must never hit: other tenants, other models, other weights, prompts that cannot be cached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.harness import CHUNK, Host, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = tokens(11, 2 * CHUNK + 50)


def salted(salt: str | None) -> dict[str, object]:
    prompt: dict[str, object] = {"prompt_token_ids": PROMPT}
    return prompt if salt is None else prompt | {"cache_salt": salt}


def test_a_salt_hits_only_itself(host: Host) -> None:
    with host.engine() as engine:
        for salt in ("alice", None):
            engine.ask(salted(salt))
            engine.do("settle")
        before = host.quiet()["counters"]

        hits = {}
        for salt in ("bob", "Alice", "alice ", "", "alice", None):
            assert engine.do("reset_gpu_cache")
            saved = engine.do("counters")["loaded_tokens"]
            (answer,) = engine.ask(salted(salt))
            hits[salt] = answer["cached"]
            assert engine.do("counters")["loaded_tokens"] - saved == answer["cached"]

    # vLLM takes an empty salt for none.
    assert hits == {"bob": 0, "Alice": 0, "alice ": 0, "": 2 * CHUNK, "alice": 2 * CHUNK, None: 2 * CHUNK}
    assert before["committed_chunks"] == 4


def test_another_model_never_hits(host: Host, tiny_model: Path, tmp_path: Path) -> None:
    # Other KV dtypes have other slot sizes: room for segments of both.
    pool = {"host": {"size": "128MiB", "segment_size": "32MiB"}}
    with host.engine(extra=pool) as engine:
        (original,) = engine.ask(PROMPT)
        engine.do("settle")

    retrained = tmp_path / "retrained"
    shutil.copytree(tiny_model, retrained)
    weights = load_file(retrained / "model.safetensors")
    weights["model.embed_tokens.weight"][PROMPT[0]] *= -30  # one row, nothing else
    save_file(weights, retrained / "model.safetensors", {"format": "pt"})
    stretched = tmp_path / "stretched"
    shutil.copytree(tiny_model, stretched)
    config = json.loads((stretched / "config.json").read_text())
    rope = {"rope_theta": 20000.0, "rope_type": "default"}
    (stretched / "config.json").write_text(json.dumps(config | rope | {"rope_parameters": rope}))
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_model, renamed)

    hits, answers = {}, {}
    for name, options in {
        "other weights": {"model": str(retrained)},
        "other RoPE": {"model": str(stretched)},
        "other KV dtype": {"dtype": "bfloat16"},
        "same model elsewhere": {"model": str(renamed)},
    }.items():
        with host.engine(extra=pool, **options) as engine:
            (answers[name],) = engine.ask(PROMPT)
            hits[name] = answers[name]["cached"]

    assert answers["other weights"]["tokens"] != original["tokens"]
    assert answers["other RoPE"]["tokens"] != original["tokens"]
    assert answers["same model elsewhere"]["tokens"] == original["tokens"]
    assert hits == {
        "other weights": 0,
        "other RoPE": 0,
        "other KV dtype": 0,
        "same model elsewhere": 2 * CHUNK,
    }


def test_prompts_that_ask_for_every_token_are_computed(host: Host) -> None:
    with host.engine() as engine:
        engine.ask(PROMPT)
        engine.do("settle")
        assert engine.do("reset_gpu_cache")

        (answer,) = engine.ask(PROMPT, prompt_logprobs=1)

        assert answer["cached"] == 0
        assert engine.do("counters")["loaded_tokens"] == 0
        assert engine.do("reset_gpu_cache")
        assert engine.ask(PROMPT)[0]["cached"] == 2 * CHUNK  # it was there all the time


def test_a_cache_reset_forgets_what_was_stored(host: Host) -> None:
    with host.engine() as engine:
        engine.ask(PROMPT)
        engine.do("settle")
        assert engine.do("reset_gpu_cache")
        assert engine.ask(PROMPT)[0]["cached"] == 2 * CHUNK
        assert engine.do("reset_gpu_cache")
        assert engine.do("reset_connector_cache")

        assert engine.ask(PROMPT)[0]["cached"] == 0
