"""Who may share KV with whom: the identity behind every chunk key.

Rule of this file: whatever can change what KV means is a field here. A field that is missing is a
wrong answer waiting; a field too many only costs hits. How KV was computed is none: kernels, batch
sizes and numbers of ranks round differently, as they do inside one engine from batch to batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvstrata.core.digest import digest

# Notes about where a config came from, not about what the model computes.
_PROVENANCE = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "name_or_path"})


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What one engine's KV depends on, the same for all its requests."""

    config: str  # canonical JSON: the model config with its overrides, the engine's own settings and release
    weights: bytes  # digest of the weight files' whole content
    weight_quantization: str
    kv_dtype: str  # as stored in the cache, e.g. "bfloat16"
    kv_scales: str  # how KV is scaled when quantised; "" when it is not
    layout: bytes  # digest of the canonical layout: format version, chunk size, parts
    context: str  # what else reaches the KV: RoPE cut-offs that depend on the context length
    generation: str = ""  # drawn anew when the cache is reset: nothing older is found, by anybody

    @property
    def digest(self) -> bytes:
        """32 bytes over every field and its name."""
        named: list[bytes] = [b"kvstrata model"]
        for field in fields(self):
            value = getattr(self, field.name)
            named += [field.name.encode(), value if isinstance(value, bytes) else str(value).encode()]
        return digest(*named)


def namespace_digest(model: bytes, adapter: bytes = b"", salt: str | None = None) -> bytes:
    """The seed of a request's key chain.

    Args:
        model: `ModelIdentity.digest`.
        adapter: digest of the LoRA adapter, empty without one.
        salt: the request's cache salt (tenant). None and "" are different.
    """
    tenant = b"" if salt is None else b"salt " + salt.encode()
    return digest(b"kvstrata namespace", model, adapter, tenant)


def canonical_config(config: Mapping[str, object]) -> str:
    """A model config as JSON with sorted keys, without notes about its origin."""
    return json.dumps(_without_provenance(config), sort_keys=True, default=str, separators=(",", ":"))


def _without_provenance(value: object) -> object:
    if isinstance(value, Mapping):
        return {
            str(key): _without_provenance(inner) for key, inner in value.items() if key not in _PROVENANCE
        }
    return value


def chunk_extras(items: list[tuple[int, int, str]], chunk_tokens: int) -> dict[int, bytes]:
    """What multimodal content adds to chunk keys.

    Args:
        items: (first token position, tokens, content hash) of each image, video or sound.
        chunk_tokens: tokens a chunk.

    Returns:
        Chunk index -> bytes, for every chunk that an item touches. Later chunks inherit it
        through the chain.
    """
    extras: dict[int, list[bytes]] = {}
    for position, length, content in sorted(items):
        first, last = position // chunk_tokens, (position + max(length, 1) - 1) // chunk_tokens
        for index in range(first, last + 1):
            # The offset inside the item tells two windows of one picture apart.
            extras.setdefault(index, []).append(
                f"{position - index * chunk_tokens}:{length}:".encode() + content.encode()
            )
    return {index: digest(*parts) for index, parts in extras.items()}
