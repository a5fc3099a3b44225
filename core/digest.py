"""BLAKE3 over framed fields: no two different lists of fields give the same bytes to hash."""

from __future__ import annotations

import struct

from blake3 import blake3

DIGEST_BYTES = 32


def digest(*fields: bytes) -> bytes:
    """32 bytes over `fields`; each is framed by its length, so ("ab", "c") differs from ("a", "bc")."""
    hasher = blake3()
    for data in fields:
        hasher.update(struct.pack("<Q", len(data)))
        hasher.update(data)
    return hasher.digest()
