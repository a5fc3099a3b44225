"""What differs between vLLM 0.26 and 0.33. The only place that may ask what a version has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request


def prompt_tokens(request: Request) -> list[int] | None:
    """The prompt's token ids as a plain list; None when it is not made of tokens alone."""
    if request.prompt_embeds is not None:
        return None
    tokens: list[int] | None = request.prompt_token_ids
    return tokens


def all_tokens(request: Request) -> list[int]:
    """Prompt and confirmed output as the plain list behind the read-only view."""
    tokens: list[int] = request._all_token_ids
    return tokens


def is_streaming_input(request: Request) -> bool:
    """Whether the prompt may still change: such a request is not cached."""
    return bool(getattr(request, "resumable", False))


def skips_prefix_cache(request: Request) -> bool:
    """Whether every prompt token must be computed, e.g. for prompt logprobs."""
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def context_parallel_size(config: VllmConfig) -> int:
    """Ranks that share one sequence's KV, prefill and decode together."""
    parallel = config.parallel_config
    decode = getattr(parallel, "decode_context_parallel_size", 1)
    prefill = getattr(parallel, "prefill_context_parallel_size", 1)
    return int(decode) * int(prefill)


def cache_layout_extras(spec: Any) -> dict[str, Any]:
    """Fields of a KV cache spec that change the layout of a page where this vLLM has them, unless at rest."""
    at_rest = {
        "num_head_slots": (None,),
        "state_content_bytes": (None,),
        "tokens_per_state": (1,),
        "page_size_padded": (None,),
        "kv_quant_mode": (0, None),
    }
    return {
        name: value for name, rest in at_rest.items() if (value := getattr(spec, name, rest[0])) not in rest
    }


def calculates_kv_scales(config: VllmConfig) -> bool:
    """Whether KV scales come from the first batch instead of the checkpoint (removed in later versions)."""
    return bool(getattr(config.cache_config, "calculate_kv_scales", False))


def model_settings(config: VllmConfig) -> dict[str, str]:
    """Engine options that change what a model computes without being in its own config."""
    model = ("override_attention_dtype", "disable_sliding_window", "quantization_config", "model_impl")
    load = ("load_format", "ignore_patterns", "model_loader_extra_config")
    items = ("mm_processor_kwargs",)
    multimodal = getattr(config.model_config, "multimodal_config", None)
    return {
        name: str(value)
        for names, part in ((model, config.model_config), (load, config.load_config), (items, multimodal))
        for name in names
        if (value := getattr(part, name, None)) is not None
    }


def fetched_revision(model: ModelConfig) -> str | None:
    """The commit that the model's config came from, where transformers says so, or what was asked for."""
    commit: str | None = getattr(model.hf_config, "_commit_hash", None)
    return commit or model.revision


def load_inplace(lora: LoRARequest) -> bool:
    """Whether the adapter replaces the one that the engine has under its id."""
    return bool(getattr(lora, "load_inplace", False))


def release() -> str:
    """vLLM's version without the name of its build: another one may compute a model otherwise."""
    return str(vllm.__version__).partition("+")[0]


def instance_id(config: VllmConfig) -> str:
    """A name for this life of the engine, the same in all its processes."""
    assert config.kv_transfer_config is not None
    return f"{config.kv_transfer_config.engine_id}/{getattr(config, 'instance_id', '')}"
