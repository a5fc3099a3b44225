"""Chunk keys: a chain of keyed BLAKE3 hashes over the prompt, seeded with the namespace.

Rule of this file: a key says "these tokens, after exactly this prefix, in exactly this
namespace". Two prompts share a key only if they share every token up to the chunk's end. How many
tokens a chunk has is not hashed: the namespace holds the digest of the layout, which does.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence

from blake3 import blake3

KEY_BYTES = 32
_TOKEN_BYTES = 4


class KeyChain:
    """The keys of one request's chunks, extended as its tokens grow.

    Args:
        namespace: 32-byte digest of everything that must be equal for KV to be interchangeable.
        chunk_tokens: tokens a chunk.
        extras: chunk index -> bytes that also decide that chunk's KV (multimodal content).
    """

    __slots__ = ("_chunk_tokens", "_extras", "_parent", "keys")

    def __init__(
        self, namespace: bytes, chunk_tokens: int, extras: Mapping[int, bytes] | None = None
    ) -> None:
        self.keys: list[bytes] = []
        self._parent = namespace
        self._chunk_tokens = chunk_tokens
        self._extras = extras or {}

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """Add the keys of all chunks that `tokens` (from position 0) completes; return all keys.

        Raises:
            OverflowError: a token id is negative or needs more than 32 bits.
        """
        size = self._chunk_tokens
        done, full = len(self.keys), len(tokens) // size
        if full <= done:
            return self.keys
        # Slicing copies the list; a whole prompt is packed as it is, its tail left unused.
        packed = array("I", tokens[done * size :] if done else tokens)
        if sys.byteorder == "big":
            packed.byteswap()
        view = memoryview(packed).cast("B")
        step = size * _TOKEN_BYTES
        parent, extras, append = self._parent, self._extras, self.keys.append
        for index in range(full - done):
            hasher = blake3(view[index * step : (index + 1) * step], key=parent)
            if extras and (extra := extras.get(done + index)):
                hasher.update(extra)
            parent = hasher.digest()
            append(parent)
        self._parent = parent
        return self.keys
