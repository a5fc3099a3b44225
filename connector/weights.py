"""What the weights are: a digest of whole files, so that two models with one name never share KV.

Every byte counts, because a single changed row of an embedding changes answers. Hashing hundreds of
GB takes a while, so it is done once for each file, on a thread of its own, and remembered on disk.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from blake3 import blake3

from kvstrata.core.digest import DIGEST_BYTES, digest
from kvstrata.core.errors import UnsupportedModel

_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
_BESIDE = ("*.py", "*config*.json")  # a folder's own modelling code or quantisation file counts too
_SETTLED_S = 2.0  # a file changed since then may change again without another time stamp
_THREADS_MAX = 8

Signature = tuple[tuple[str, int, int, int, int, int], ...]


def weight_files(path: Path) -> list[Path]:
    """The files at `path`, a model or adapter folder or one file, that decide what is computed.

    Raises:
        UnsupportedModel: there are no weights.
    """
    if path.is_file():
        return [path]
    weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    if not weights:
        raise UnsupportedModel(f"no weight files in {path}")
    return sorted(weights + [file for pattern in _BESIDE for file in path.glob(pattern)])


def signature(files: list[Path]) -> Signature:
    """Names, sizes, places and times of files: equal as long as nobody has changed them."""
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def content_digest(files: list[Path], memory: Path) -> bytes:
    """32 bytes over the names and whole contents of `files`.

    Args:
        files: what to read.
        memory: folder in which digests of unchanged files are remembered; made if missing.

    Raises:
        UnsupportedModel: a file changed while it was read.
        OSError: a file cannot be read.
    """
    single = len(files) == 1
    fields = []
    for file in files:
        fields += [b"" if single else file.name.encode(), _file_digest(file, memory)]
    return digest(*fields)


def start_digest(files: list[Path], memory: Path) -> Future[bytes]:
    """`content_digest` on a thread of its own, which does not keep the process alive."""
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(content_digest(files, memory))
        except (UnsupportedModel, OSError) as error:
            result.set_exception(error)

    threading.Thread(target=run, name="kvstrata-weights", daemon=True).start()
    return result


def memory_folder() -> Path:
    """Where digests are remembered: `$XDG_CACHE_HOME/kvstrata/weights`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "kvstrata" / "weights"


def _file_digest(file: Path, memory: Path) -> bytes:
    before = signature([file])
    note = memory / digest(str(file.resolve()).encode(), repr(before).encode()).hex()
    with contextlib.suppress(OSError, ValueError):
        known = bytes.fromhex(note.read_text())
        if len(known) == DIGEST_BYTES:
            return known
    cores = len(os.sched_getaffinity(0))
    hasher = blake3(max_threads=max(1, min(_THREADS_MAX, cores // 2)))
    hasher.update_mmap(file)  # without the GIL
    if signature([file]) != before:
        raise UnsupportedModel(f"{file} changed while its digest was taken")
    if time.time() - before[0][-1] / 1e9 > _SETTLED_S:
        _remember(note, hasher.digest())
    return hasher.digest()


def _remember(note: Path, found: bytes) -> None:
    """Costs a second reading after the next start if it fails, nothing else."""
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(fd, "w") as output:
            output.write(found.hex())
        os.replace(name, note)
