"""The namespace of vLLM's requests: what of a `VllmConfig` and of a request decides its KV."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.connector.vllm.compat import calculates_kv_scales, model_settings
from kvstrata.connector.weights import fingerprint
from kvstrata.core.config import Config
from kvstrata.core.digest import digest
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.layout import ChunkLayout
from kvstrata.core.namespace import ModelIdentity, canonical_config, chunk_extras, namespace_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

# RoPE variants whose frequencies depend on how long a context the engine was started for.
_CONTEXT_DEPENDENT_ROPE = ('"longrope"', '"dynamic"', '"su"')


class Identity:
    """Namespaces of one engine: computed once for the model, then per adapter and salt."""

    def __init__(self, vllm_config: VllmConfig, layout: ChunkLayout, config: Config) -> None:
        self._model = model_identity(vllm_config, layout, config)
        self._digest = self._model.digest
        self._adapters: dict[tuple[str, str, int], tuple[object, bytes]] = {}

    def new_generation(self) -> None:
        """From now on this engine finds nothing older, and nobody else finds what it stores."""
        self._model = replace(self._model, generation=secrets.token_hex(16))
        self._digest = self._model.digest

    def namespace(self, request: Request) -> bytes:
        """The seed of the request's key chain.

        Raises:
            UnsupportedModel: its adapter cannot be identified.
        """
        lora = request.lora_request
        return namespace_digest(self._digest, self._adapter(lora) if lora else b"", request.cache_salt)

    def extras(self, request: Request, chunk_tokens: int) -> dict[int, bytes]:
        """What multimodal content adds to the request's keys."""
        items = [(f.mm_position.offset, f.mm_position.length, f.identifier) for f in request.mm_features]
        return chunk_extras(items, chunk_tokens) if items else {}

    def _adapter(self, lora: LoRARequest) -> bytes:
        path = Path(lora.lora_path)
        files = [(file.name, file.stat()) for file in sorted(path.glob("adapter_*"))]
        changed = tuple((name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in files)
        loaded = (lora.lora_name, lora.lora_path, lora.lora_int_id)
        if loaded not in self._adapters:
            settings = path / "adapter_config.json"
            if not settings.is_file():
                raise UnsupportedModel(f"adapter {lora.lora_name}: no adapter_config.json in {path}")
            self._adapters[loaded] = (changed, digest(settings.read_bytes(), fingerprint(path)))
        seen, adapter = self._adapters[loaded]
        if seen != changed:  # the engine may still serve what it loaded before: nobody can tell which
            raise UnsupportedModel(
                f"adapter {lora.lora_name} has changed on disk: load it under another name or id"
            )
        return adapter


def model_identity(vllm_config: VllmConfig, layout: ChunkLayout, config: Config) -> ModelIdentity:
    """Everything about an engine that decides its KV.

    Raises:
        UnsupportedModel: the weights cannot be identified, or KV scales are found at run time.
    """
    model = vllm_config.model_config
    if calculates_kv_scales(vllm_config):
        raise UnsupportedModel("--calculate-kv-scales makes KV differ from engine to engine: leave it off")
    settings = canonical_config({"hf": model.hf_config.to_dict(), "engine": model_settings(vllm_config)})
    context = ""
    if any(name in settings for name in _CONTEXT_DEPENDENT_ROPE):
        context = f"max_model_len={model.max_model_len}"
    return ModelIdentity(
        config=settings,
        weights=_weights(vllm_config, config),
        weight_quantization=str(model.quantization),
        kv_dtype=f"{vllm_config.cache_config.cache_dtype}/{model.dtype}",
        kv_scales="checkpoint",
        layout=layout.digest,
        context=context,
    )


def _weights(vllm_config: VllmConfig, config: Config) -> bytes:
    if config.identity.model:
        return digest(b"named", config.identity.model.encode())
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) == "dummy":
        return digest(b"dummy", str(model.seed).encode())
    path = Path(model.model)
    if not path.exists():
        path = _downloaded(model.model, model.revision)
    return fingerprint(path)


def _downloaded(name: str, revision: str | None) -> Path:
    """The local snapshot of a model that vLLM fetched by name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise UnsupportedModel(
            f"the weights of {name} cannot be found on this machine ({error}): set identity.model "
            "to a name of your own for them (equal name means equal KV)"
        ) from error
