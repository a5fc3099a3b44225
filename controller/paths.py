"""Where a node store's sockets lie, and who may be there."""

from __future__ import annotations

import grp
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import ConfigError, NodeUnavailable

_SOCKET_PATH_MAX = 107  # bytes in sockaddr_un


@dataclass(frozen=True, slots=True)
class RuntimePaths:
    """The files of one node store, all in one private folder."""

    folder: Path

    @property
    def control(self) -> Path:
        """gRPC for the scheduler side."""
        return self.folder / "node.sock"

    @property
    def side(self) -> Path:
        """Life of clients, descriptors of segments, lookups."""
        return self.folder / "side.sock"

    @property
    def lock(self) -> Path:
        """Held for as long as a node store lives."""
        return self.folder / "node.lock"

    @property
    def log(self) -> Path:
        return self.folder / "node.log"


def runtime_paths(config: NodeConfig, create: bool = True) -> RuntimePaths:
    """The folder for `config`, made if need be, and safe to use.

    Raises:
        NodeUnavailable: it cannot be made, belongs to somebody else or is open to others.
        ConfigError: its path is relative or too long for a Unix socket, or the group does not exist.
    """
    folder = Path(config.runtime_dir).expanduser() if config.runtime_dir else _default_folder()
    if not folder.is_absolute():  # engines and commands started in different folders would not meet
        raise ConfigError(f"node.runtime_dir is {config.runtime_dir!r}: give the whole path, from / or ~ on")
    paths = RuntimePaths(folder)
    if len(os.fsencode(paths.control)) > _SOCKET_PATH_MAX:
        raise ConfigError(f"node.runtime_dir {folder} is too long for a Unix socket; choose a shorter one")
    if create:
        if not os.path.lexists(folder):
            _make(folder)
        if config.group and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            os.chown(folder, -1, group_id(config.group))
            folder.chmod(0o750)
    if os.path.lexists(folder):
        _check_private(folder, config.group)
    return paths


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NodeUnavailable(
            f"{folder} cannot be made ({error.strerror}): set node.runtime_dir to a folder of your own"
        ) from error


def group_id(name: str) -> int:
    """Raises ConfigError if there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"node.group {name!r} does not exist on this host") from None


def _default_folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.access(base, os.W_OK):
        return Path(base) / "kvstrata"
    return Path(f"/tmp/kvstrata-{os.getuid()}")


def _check_private(folder: Path, group: str) -> None:
    status = folder.stat(follow_symlinks=False)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        raise NodeUnavailable(f"{folder} is not a folder: set node.runtime_dir to one, or to a free name")
    allowed_groups = {group_id(group)} if group else set()
    if status.st_uid != os.getuid() and status.st_gid not in allowed_groups:
        raise NodeUnavailable(
            f"{folder} belongs to user {status.st_uid}, not to you ({os.getuid()}): "
            "set node.runtime_dir to a folder of your own, or node.group to a group you share"
        )
    if mode & (0o027 if group else 0o077):
        raise NodeUnavailable(f"{folder} is open to other users (mode {mode:o}): run chmod 700 {folder}")
