"""Reads the configuration and refuses, at start and in words, what this version cannot serve."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstrata.connector.vllm.compat import context_parallel_size
from kvstrata.controller.client import runtime_paths
from kvstrata.controller.client.config_file import read_yaml
from kvstrata.core.config import Config, build_config
from kvstrata.core.errors import ConfigError, NodeUnavailable, UnsupportedModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DRAFTS_WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix")


def log_like_vllm() -> None:
    """Give our log lines vLLM's handlers: its format, its level, its file."""
    ours, theirs = logging.getLogger("kvstrata"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.getEffectiveLevel())


def load_config(vllm_config: VllmConfig) -> Config:
    """The configuration of this engine: the YAML file of `KVSTRATA_CONFIG` and `kv_connector_extra_config`.

    Raises:
        ConfigError: a key or value is wrong, or the load failure policy is missing.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    if transfer.kv_load_failure_policy != "recompute":
        wanted: dict[str, Any] = {
            "kv_connector": transfer.kv_connector,
            "kv_connector_module_path": transfer.kv_connector_module_path,
            "kv_role": transfer.kv_role,
            "kv_load_failure_policy": "recompute",
        }
        if transfer.kv_connector_extra_config:
            wanted["kv_connector_extra_config"] = transfer.kv_connector_extra_config
        raise ConfigError(
            'vLLM fails a request whose KV cannot be loaded unless "kv_load_failure_policy" is "recompute". '
            f"Start it with --kv-transfer-config '{json.dumps(wanted)}'"
        )
    config = read_settings(transfer.kv_connector_extra_config)
    longest = vllm_config.model_config.max_model_len
    if config.chunk.tokens > longest:
        raise ConfigError(
            f"chunk.tokens is {config.chunk.tokens} and max_model_len {longest}: no prompt would ever fill a "
            "chunk, so lower chunk.tokens"
        )
    # A producer only saves, a consumer only loads.
    client = replace(
        config.client,
        save=config.client.save and transfer.is_kv_producer,
        load=config.client.load and transfer.is_kv_consumer,
    )
    return replace(config, client=client)


def read_settings(extra: Mapping[str, Any]) -> Config:
    """What `KVSTRATA_CONFIG` and `kv_connector_extra_config` say.

    Raises:
        ConfigError: a key or value is wrong, or can never be used on this host.
    """
    sources = [("kv_connector_extra_config", extra)]
    if name := os.environ.get("KVSTRATA_CONFIG"):
        sources.insert(0, (name, read_yaml(Path(name), "that KVSTRATA_CONFIG names")))
    config = build_config(*sources)
    with contextlib.suppress(NodeUnavailable):  # that may change: it is said again for as long as it lasts
        runtime_paths(config.node)
    return config


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raises UnsupportedModel for engine shapes that this version does not serve."""
    parallel = vllm_config.parallel_config
    for value, name in (
        (parallel.tensor_parallel_size, "tensor"),
        (parallel.pipeline_parallel_size, "pipeline"),
        (context_parallel_size(vllm_config), "context"),
    ):
        if value > 1:
            raise UnsupportedModel(
                f"{name}-parallel engines (here {value} ranks) are not supported yet: "
                "start vLLM with one rank, or without kvstrata"
            )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS_WITHOUT_LAYERS:
        raise UnsupportedModel(
            f"speculative decoding by {speculative.method} keeps draft layers in the KV cache, "
            "which are not supported yet: start vLLM without it, or without kvstrata"
        )
