"""Exact packing as docs/format.md says it, an element at a time; nothing is shared with the native code."""

from __future__ import annotations

import struct
from collections.abc import Sequence

ESCAPE = 15


def pack(bits: Sequence[int], dim: int) -> bytes | None:
    """Packs rows of `dim` bf16 elements, given as 16-bit patterns. None: too many of them escape."""
    exponents = [b >> 7 & 0xFF for b in bits]
    bases = [max((e for e in exponents[d::dim] if e != 255), default=0) for d in range(dim)]
    rest = bytes((b >> 8 & 0x80) | (b & 0x7F) for b in bits)
    below = [bases[i % dim] - e for i, e in enumerate(exponents)]
    codes = [b if 0 <= b < ESCAPE else ESCAPE for b in below]
    escapes = [i << 8 | exponents[i] for i, code in enumerate(codes) if code == ESCAPE]
    words = escape_words(len(bits))
    if len(escapes) >= words:
        return None
    pairs = bytes(codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2))
    table = [len(escapes), *escapes, *[0] * (words - 1 - len(escapes))]
    body = rest + pairs + bytes(bases) + bytes(-dim % 8) + struct.pack(f"<{words}I", *table)
    return body + bytes(-len(body) % 16)


def unpack(data: bytes, elements: int, dim: int) -> list[int]:
    """The 16-bit patterns that `pack` was given."""
    rest, pairs = data[:elements], data[elements : elements * 3 // 2]
    bases = data[elements * 3 // 2 :][:dim]
    exponents = [bases[i % dim] - (pairs[i // 2] >> i % 2 * 4 & 15) for i in range(elements)]
    at = elements * 3 // 2 + dim + -dim % 8
    (count,) = struct.unpack_from("<I", data, at)
    for entry in struct.unpack_from(f"<{count}I", data, at + 4):
        exponents[entry >> 8] = entry & 0xFF
    return [(r & 0x80) << 8 | e << 7 | (r & 0x7F) for r, e in zip(rest, exponents, strict=True)]


def escape_words(elements: int) -> int:
    """Words of the escape table, its count included."""
    return -(-elements // 512) * 2
