"""How large a packed sub-block is. cuda_ext/pack.h has the bytes, docs/format.md the picture.

Rule of this file: arithmetic only, the same as `kvs::Packed`.
"""

from __future__ import annotations

_GROUP = 16  # elements that a thread packs at once
_ELEMENTS_PER_ESCAPE_WORD = 256
_ESCAPE_WORDS_MAX = 2048  # they are sorted in a GPU's shared memory
_DIM_MAX = 1024


def can_pack(tokens: int, dim: int, dtype: str) -> bool:
    """Whether a sub-block of `tokens` x `dim` elements has a packed form."""
    elements = tokens * dim
    return (
        dtype == "bfloat16"
        and elements % _GROUP == 0
        and dim % 2 == 0
        and _GROUP <= dim <= _DIM_MAX
        and _escape_words(elements) <= _ESCAPE_WORDS_MAX
        and packed_bytes(tokens, dim) < 2 * elements
    )


def packed_bytes(tokens: int, dim: int) -> int:
    """Bytes of a packed sub-block, whatever its content."""
    elements = tokens * dim
    tables = _round_up(dim, 8) + 4 * _escape_words(elements)
    return _round_up(elements + elements // 2 + tables, 16)


def escapes_max(tokens: int, dim: int) -> int:
    """Elements that may lie outside their channel's range before a sub-block does not fit."""
    return _escape_words(tokens * dim) - 1


def _escape_words(elements: int) -> int:
    return _round_up(-(-elements // _ELEMENTS_PER_ESCAPE_WORD), 2)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
