"""What the weights are: a fingerprint of files, so that two models with one name never share KV."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from blake3 import blake3

from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.namespace import sample_windows

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_UNKNOWN_SPAN_WINDOWS = 4096
_HEADER_MAX = 100 << 20


def fingerprint(path: Path, only: str = "*") -> bytes:
    """32 bytes over the weight files at `path`: names, sizes, headers and samples of every tensor.

    Reads a few hundred KB for each GB, so that it costs a start less than a second.

    Args:
        path: a model or adapter folder, or one file.
        only: glob of the files that count.

    Raises:
        UnsupportedModel: there is nothing to read.
    """
    files = [path] if path.is_file() else sorted(f for f in path.glob(only) if f.suffix in _WEIGHT_SUFFIXES)
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        raise UnsupportedModel(
            f"no weight files in {path}: set identity.model to a name of your own for these weights "
            "(equal name means equal KV)"
        )
    hasher = blake3()
    for file in files:
        hasher.update(f"{'' if path.is_file() else file.name}:{file.stat().st_size}\0".encode())
        _hash_file(file, hasher)
    return hasher.digest()


def _hash_file(file: Path, hasher: blake3) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        spans, windows = [(0, size)], _UNKNOWN_SPAN_WINDOWS
        if file.suffix == ".safetensors":
            header = _safetensors_header(fd, file)
            hasher.update(header)
            start = 8 + len(header)
            spans, windows = _tensor_spans(header, start, file), 4
        for offset, length in sample_windows(size, spans, windows=windows):
            hasher.update(os.pread(fd, length, offset))
    finally:
        os.close(fd)


def _tensor_spans(header: bytes, start: int, file: Path) -> list[tuple[int, int]]:
    try:
        tensors = json.loads(header)
        offsets = [tensors[name]["data_offsets"] for name in sorted(tensors) if name != "__metadata__"]
        return [(start + int(first), int(last) - int(first)) for first, last in offsets]
    except (ValueError, KeyError, TypeError) as error:  # cut short, or being written right now
        raise UnsupportedModel(f"the header of {file} cannot be read: {error}") from error


def _safetensors_header(fd: int, file: Path) -> bytes:
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0).ljust(8, b"\0"))
    if not 0 < length <= _HEADER_MAX:
        raise UnsupportedModel(f"{file} is not a safetensors file")
    return os.pread(fd, length, 8)
