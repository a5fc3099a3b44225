"""Sockets lie in a folder of one's own, or nowhere."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

import pytest

from kvstrata.controller.paths import runtime_paths
from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import ConfigError, NodeUnavailable

FOREIGNER = 54321
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")


def node(folder: Path, group: str = "") -> NodeConfig:
    return NodeConfig(runtime_dir=str(folder), group=group)


def refused(folder: Path, group: str = "") -> str:
    with pytest.raises(NodeUnavailable) as caught:
        runtime_paths(node(folder, group))
    return str(caught.value)


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_folder_is_made_for_its_owner_alone(runtime_dir: Path) -> None:
    old = os.umask(0)
    try:
        paths = runtime_paths(node(runtime_dir / "a" / "b"))
    finally:
        os.umask(old)
    assert mode(paths.folder) == 0o700
    assert paths.folder == runtime_dir / "a" / "b"
    assert {path.parent for path in (paths.control, paths.side, paths.lock, paths.log)} == {paths.folder}
    assert runtime_paths(node(paths.folder)) == paths


def test_asking_for_paths_makes_nothing(runtime_dir: Path) -> None:
    runtime_paths(node(runtime_dir / "a"), create=False)
    assert list(runtime_dir.iterdir()) == []


def test_without_a_setting_it_is_the_user_s_runtime_folder(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    assert runtime_paths(NodeConfig()).folder == runtime_dir / "kvstrata"


@pytest.mark.parametrize("value", ["", "/nowhere/at/all"])
def test_without_a_runtime_folder_it_is_the_user_s_own_in_tmp(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert runtime_paths(NodeConfig(), create=False).folder == Path(f"/tmp/kvstrata-{os.getuid()}")


def test_a_path_too_long_for_a_socket_is_refused(runtime_dir: Path) -> None:
    long = runtime_dir / ("x" * 107)
    with pytest.raises(ConfigError, match=r"node\.runtime_dir .* is too long for a Unix socket"):
        runtime_paths(node(long))
    assert not long.exists()


def test_the_longest_path_that_fits_is_used(runtime_dir: Path) -> None:
    longest = 107 - len(str(runtime_dir)) - len("//node.sock")
    assert len(str(runtime_paths(node(runtime_dir / ("x" * longest))).control)) == 107
    with pytest.raises(ConfigError):
        runtime_paths(node(runtime_dir / ("x" * (longest + 1))))


@as_root
def test_a_folder_of_somebody_else_is_refused(runtime_dir: Path) -> None:
    os.chown(runtime_dir, FOREIGNER, FOREIGNER)
    message = refused(runtime_dir)
    assert f"{runtime_dir} belongs to user {FOREIGNER}, not to you (0)" in message
    assert "set node.runtime_dir to a folder of your own" in message


@pytest.mark.parametrize("open_to", [0o710, 0o701, 0o777, 0o704])
def test_a_folder_open_to_others_is_refused_with_the_remedy(runtime_dir: Path, open_to: int) -> None:
    runtime_dir.chmod(open_to)
    assert f"(mode {open_to:o}): run chmod 700 {runtime_dir}" in refused(runtime_dir)


def test_a_link_is_not_followed(runtime_dir: Path) -> None:
    (runtime_dir / "real").mkdir(mode=0o700)
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    assert f"{runtime_dir / 'link'} is not a folder" in refused(runtime_dir / "link")


def test_a_link_to_nowhere_is_not_followed(runtime_dir: Path) -> None:
    (runtime_dir / "link").symlink_to(runtime_dir / "nowhere")
    assert "is not a folder" in refused(runtime_dir / "link")
    assert not (runtime_dir / "nowhere").exists()


def test_a_file_in_its_place_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch()
    assert (
        f"{runtime_dir / 'file'} is not a folder: set node.runtime_dir to one, or to a free name"
        in refused(runtime_dir / "file")
    )


# --------------------------------------------------------------------------------------- a shared group

GROUP = grp.getgrgid(os.getgid()).gr_name


def test_a_group_may_look_in_and_nobody_else(runtime_dir: Path) -> None:
    folder = runtime_paths(node(runtime_dir / "a", GROUP)).folder
    assert mode(folder) == 0o750
    assert folder.stat().st_gid == os.getgid()
    folder.chmod(0o770)
    assert runtime_paths(node(folder, GROUP)).folder == folder, "its owner closes it again"
    assert mode(folder) == 0o750


@as_root
def test_a_folder_of_somebody_else_may_be_shared_by_the_group(runtime_dir: Path) -> None:
    os.chown(runtime_dir, FOREIGNER, os.getgid())
    runtime_dir.chmod(0o750)
    assert runtime_paths(node(runtime_dir, GROUP)).folder == runtime_dir
    os.chown(runtime_dir, FOREIGNER, FOREIGNER)
    assert "or node.group to a group you share" in refused(runtime_dir, GROUP)
    assert "belongs to user" in refused(runtime_dir)


def test_a_group_does_not_open_what_a_link_points_to(runtime_dir: Path) -> None:
    (runtime_dir / "real").mkdir(mode=0o700)
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    refused(runtime_dir / "link", GROUP)
    assert mode(runtime_dir / "real") == 0o700


def test_a_group_that_does_not_exist_is_named(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.group 'no such group' does not exist on this host"):
        runtime_paths(node(runtime_dir / "a", "no such group"))


@pytest.mark.parametrize("folder", ["run", "./run", "../run"])
def test_a_folder_that_depends_on_where_one_is_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="give the whole path"):
        runtime_paths(NodeConfig(runtime_dir=folder))
