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
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from blake3 import blake3

from kvstrata.core.digest import DIGEST_BYTES, digest
from kvstrata.core.errors import UnsupportedModel

_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
_BESIDE = ("*.py", "*.json")  # code of its own, how it is quantised, which weight files are loaded at all
# File systems on which every change of a file changes its time stamps, for all who look. On others (tmpfs,
# network mounts) digests are taken at each start.
_KEEP_TIMES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay"})
_READ_AT_ONCE = 16 << 20
# A file changed since then may change again without another time stamp: one that is mapped gets it when the
# kernel begins to write it back, within half a minute.
_SETTLED_S = 60.0
_THREADS_MAX = 8

Signature = tuple[tuple[str, int, int, int, int, int], ...]


def weight_files(path: Path) -> list[Path]:
    """The files at `path`, a model or adapter folder or one file, that decide what is computed.

    Raises:
        UnsupportedModel: there are no weights.
    """
    if path.is_file():
        return [path]
    weights = _files(path, _WEIGHTS)
    if not weights:
        raise UnsupportedModel(f"no weight files in {path}")
    return sorted(weights + _files(path, _BESIDE))


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """No folders, pipes, or links to nowhere: the engine reads none of them either."""
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


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
        UnsupportedModel: a file changed while they were read.
        OSError: a file cannot be read.
    """
    before = signature(files)
    single = len(files) == 1
    fields = []
    for file in files:
        fields += [b"" if single else file.name.encode(), _file_digest(file, memory)]
    if signature(files) != before:
        raise UnsupportedModel(f"files in {files[0].parent} changed while they were read")
    return digest(*fields)


def start_digest(files: list[Path], memory: Path) -> Future[bytes]:
    """`content_digest` on a thread of its own, which does not keep the process alive."""
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(content_digest(files, memory))
        except (UnsupportedModel, OSError) as error:
            result.set_exception(error)
        finally:
            if not result.done():  # its traceback goes to the log; nobody may wait for ever
                result.set_exception(UnsupportedModel(f"{files[0].parent} could not be read: see the log"))

    threading.Thread(target=run, name="kvstrata-weights", daemon=True).start()
    return result


def memory_folder() -> Path:
    """Where digests are remembered: `$XDG_CACHE_HOME/kvstrata/weights`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "kvstrata" / "weights"


def changed_since(files: list[Path], moment: float) -> list[str]:
    """Names of the files that were changed after `moment` (seconds since the epoch).

    By the time that the kernel notes; the other one anybody can set, to next year even.
    """
    return [one[0] for one in signature(files) if one[-1] / 1e9 > moment]


def process_start() -> float:
    """When this process began, in seconds since the epoch."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since the machine was started
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + began


def _file_digest(file: Path, memory: Path) -> bytes:
    state = signature([file])
    note = memory / digest(str(file.resolve()).encode(), repr(state).encode()).hex()
    if _is_private(memory):
        with contextlib.suppress(OSError, ValueError):
            known = bytes.fromhex(note.read_text())
            if len(known) == DIGEST_BYTES:
                return known
    found = _read(file)
    if time.time() - state[0][-1] / 1e9 > _SETTLED_S and _keeps_times(file):
        _remember(note, found)
    return found


def _read(file: Path) -> bytes:
    """Not by mapping it: a file that is cut short meanwhile would end the process."""
    cores = len(os.sched_getaffinity(0))
    hasher = blake3(max_threads=max(1, min(_THREADS_MAX, cores // 2)))
    buffer = memoryview(bytearray(_READ_AT_ONCE))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            hasher.update(buffer[:count])  # without the GIL
    return hasher.digest()


def _keeps_times(file: Path) -> bool:
    device = file.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == wanted:
            return rest.split()[0] in _KEEP_TIMES
    return False


def _is_private(folder: Path) -> bool:
    """Whether only we write there: what somebody else has noted is not believed."""
    try:
        state = folder.stat()
    except OSError:
        return False
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


def _remember(note: Path, found: bytes) -> None:
    """Costs a second reading after the next start if it fails, nothing else."""
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_private(note.parent):
            return
        fd, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(fd, "w") as output:
            output.write(found.hex())
        os.replace(name, note)
