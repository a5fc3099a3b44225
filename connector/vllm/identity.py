"""The namespace of vLLM's requests: what of a `VllmConfig` and of a request decides its KV."""

from __future__ import annotations

import logging
import re
import secrets
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.connector.vllm.compat import (
    calculates_kv_scales,
    fetched_revision,
    load_inplace,
    model_settings,
    release,
)
from kvstrata.connector.weights import (
    Signature,
    changed_since,
    memory_folder,
    process_start,
    signature,
    start_digest,
    weight_files,
)
from kvstrata.core.config import Config
from kvstrata.core.digest import digest
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.layout import ChunkLayout
from kvstrata.core.namespace import ModelIdentity, canonical_config, chunk_extras, namespace_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

log = logging.getLogger("kvstrata.vllm")

_CONTENT_HASH = re.compile(r"(^|:)[0-9a-f]{64,128}$")  # as vLLM writes it, behind an adapter's name or not

# RoPE variants whose frequencies depend on how long a context the engine was started for.
_CONTEXT_DEPENDENT_ROPE = ('"longrope"', '"dynamic"', '"su"')


class Identity:
    """Namespaces of one engine: computed once for the model, then per adapter and salt.

    Weights and adapters are read whole, on threads of their own. Until that is done nothing can be
    named: requests go on without the store.

    Raises:
        UnsupportedModel: the weights cannot be identified, or KV scales are found at run time.
    """

    def __init__(self, vllm_config: VllmConfig, layout: ChunkLayout, config: Config) -> None:
        self._model = model_identity(vllm_config, layout)
        self._weights = _weights(vllm_config, config)
        self._weights.add_done_callback(_say_if_failed)
        self._digest = b""  # of the model, once the weights are known
        self._adapters: dict[tuple[str, str, int], _Adapter] = {}
        self._paths: dict[int, str] = {}  # of adapters, by the id that the engine knows them by

    def wait(self, timeout_s: float) -> None:
        """Give the weights a moment to be read, so that the first requests of a small model are cached."""
        begun = time.monotonic()
        if not wait([self._weights], timeout_s).done:
            log.info("the weights are being read to be identified; until then no request is cached")
            self._weights.add_done_callback(
                lambda _: log.info("the weights were read in %.1f s", time.monotonic() - begun)
            )

    def new_generation(self) -> None:
        """From now on this engine finds nothing older, and nobody else finds what it stores."""
        self._model = replace(self._model, generation=secrets.token_hex(16))
        self._digest = b""

    def namespace(self, request: Request) -> bytes | None:
        """The seed of the request's key chain, or None while its weights or adapter are being read.

        Raises:
            UnsupportedModel: its adapter cannot be identified.
            OSError: its adapter cannot be read.
        """
        if not self._digest:
            if not self._weights.done() or self._weights.exception():  # which was logged
                return None
            self._digest = replace(self._model, weights=self._weights.result()).digest
        adapter = self._adapter(request.lora_request) if request.lora_request else b""
        if adapter is None:
            return None
        return namespace_digest(self._digest, adapter, request.cache_salt)

    def extras(self, request: Request, chunk_tokens: int) -> dict[int, bytes]:
        """What multimodal content adds to the request's keys.

        Raises:
            UnsupportedModel: nothing says what the content is. With its caches off, vLLM numbers items
                instead of hashing them, and a name that a user has given is good inside one engine only.
        """
        items = [(f.mm_position.offset, f.mm_position.length, f.identifier) for f in request.mm_features]
        if unnamed := [identifier for _, _, identifier in items if not _CONTENT_HASH.search(identifier)]:
            raise UnsupportedModel(
                f"{unnamed[0]!r} is no hash of an item's content: leave out multi_modal_uuids, and leave "
                "vLLM's prefix cache or its multimodal processor cache on"
            )
        return chunk_extras(items, chunk_tokens) if items else {}

    def _adapter(self, lora: LoRARequest) -> bytes | None:
        """A few stats for each request: vLLM may load the files again whenever it likes."""
        loaded = (lora.lora_name, lora.lora_path, lora.lora_int_id)
        # The engine goes by the id, and answers with whatever it has loaded under it.
        if self._paths.setdefault(lora.lora_int_id, lora.lora_path) != lora.lora_path or load_inplace(lora):
            raise UnsupportedModel(
                f"adapter {lora.lora_name} was loaded in the place of another one: give it an id of its own"
            )
        if loaded not in self._adapters:
            try:
                files = [Path(lora.lora_path), *weight_files(Path(lora.lora_path))]
            except UnsupportedModel as error:
                raise UnsupportedModel(
                    f"adapter {lora.lora_name}: {error}: load it from a local folder"
                ) from error
            content = start_digest(files[1:], memory_folder())
            self._adapters[loaded] = _Adapter(files, signature(files), content)
        adapter = self._adapters[loaded]
        if signature(adapter.files) != adapter.seen:
            # The engine may still serve what it loaded before: nobody can tell which.
            raise UnsupportedModel(
                f"adapter {lora.lora_name} has changed on disk: load it under another name or id"
            )
        return adapter.content.result() if adapter.content.done() else None


@dataclass(frozen=True, slots=True)
class _Adapter:
    files: list[Path]  # its folder first: another file in it changes that
    seen: Signature
    content: Future[bytes]


def _say_if_failed(weights: Future[bytes]) -> None:
    if error := weights.exception():
        log.error("nothing will be cached: the weights cannot be identified: %s", error)


def model_identity(vllm_config: VllmConfig, layout: ChunkLayout) -> ModelIdentity:
    """Everything about an engine that decides its KV, but its weights.

    Raises:
        UnsupportedModel: KV scales are found at run time.
    """
    model = vllm_config.model_config
    if calculates_kv_scales(vllm_config):
        raise UnsupportedModel("--calculate-kv-scales makes KV differ from engine to engine: leave it off")
    settings = canonical_config(
        {"hf": model.hf_config.to_dict(), "engine": model_settings(vllm_config), "vllm": release()}
    )
    context = ""
    if any(name in settings for name in _CONTEXT_DEPENDENT_ROPE):
        context = f"max_model_len={model.max_model_len}"
    return ModelIdentity(
        config=settings,
        weights=b"",
        weight_quantization=str(model.quantization),
        kv_dtype=f"{vllm_config.cache_config.cache_dtype}/{model.dtype}",
        kv_scales="checkpoint",
        layout=layout.raw.digest,  # packed or not, the content is the same
        context=context,
    )


def _weights(vllm_config: VllmConfig, config: Config) -> Future[bytes]:
    """What names the weights, at once or later."""
    model, load = vllm_config.model_config, vllm_config.load_config
    known: Future[bytes] = Future()
    if config.identity.model:
        known.set_result(digest(b"named", config.identity.model.encode()))
    elif str(load.load_format) == "dummy":
        known.set_result(digest(b"dummy", str(model.seed).encode()))
    else:
        return _of_files(vllm_config)
    return known


def _of_files(vllm_config: VllmConfig) -> Future[bytes]:
    model = vllm_config.model_config
    path = Path(model.model)
    if not path.exists():  # files of a model that was fetched by name are never changed, only replaced
        # The branch may have moved on since the engine read its config.
        path = _downloaded(model.model, fetched_revision(model), vllm_config.load_config.download_dir)
        return start_digest(_weight_files(model.model, path), memory_folder())
    files = _weight_files(model.model, path)
    if changed := changed_since(files, process_start()):
        # Nobody can tell whether the engine has loaded what is there now.
        raise UnsupportedModel(
            f"{', '.join(changed)} in {path} changed after this engine was started: start it again, or set "
            "identity.model to a name of your own for these weights (equal name means equal KV)"
        )
    return start_digest(files, memory_folder())


def _weight_files(name: str, path: Path) -> list[Path]:
    try:
        return weight_files(path)
    except UnsupportedModel as error:
        raise _without_files(name, error) from error


def _downloaded(name: str, revision: str | None, folder: str | None) -> Path:
    """The local snapshot of a model that vLLM fetched by name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=folder, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise _without_files(name, error) from error


def _without_files(name: str, error: Exception) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of {name} cannot be found on this machine ({error}): set identity.model "
        "to a name of your own for them (equal name means equal KV)"
    )
