"""Private directories of a process, and the removal of those that other processes left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local_ray.temporary import private_directory

ROOT = Path(__file__).parents[2]
OWNER = """
import os, sys
from cluster.local_ray.temporary import private_directory

with private_directory(sys.argv[1]) as directory:
    print(directory, flush=True)
    sys.stdin.read()
    os._exit(0)  # as if killed
"""


def test_a_directory_is_private_and_removed_after_the_block(tmp_path: Path) -> None:
    with private_directory(str(tmp_path)) as directory:
        (Path(directory) / "file").touch()
        assert Path(directory).parent == tmp_path
        assert Path(directory).stat().st_mode & 0o777 == 0o700
        assert len(Path(directory).name) <= 17  # of the 107 bytes of a socket's path
    assert not list(tmp_path.iterdir())


def test_a_directory_of_another_process_is_removed_once_no_process_holds_it(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().strip())
    with private_directory(str(tmp_path)):
        assert theirs.is_dir()  # in use
    owner.communicate()
    assert theirs.is_dir()
    with private_directory(str(tmp_path)):
        assert not theirs.exists()


def test_the_next_process_removes_a_directory_that_could_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "a process that is dying has written another file")

    with private_directory(str(tmp_path)) as directory:
        (Path(directory) / "r").mkdir()
        monkeypatch.setattr(os, "rmdir", busy)
    monkeypatch.undo()
    assert Path(directory).is_dir()
    with private_directory(str(tmp_path)):
        assert not Path(directory).exists()


def test_other_directories_with_a_similar_name_are_kept(tmp_path: Path) -> None:
    with private_directory(str(tmp_path)) as directory:
        (owner,) = Path(directory).iterdir()
        name = owner.name
    results = tmp_path / "asgd-ray-experiment"
    (results / "trace").mkdir(parents=True)
    (tmp_path / "asgd-20261122-exp").mkdir()
    (tmp_path / "asgd-ray-dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "asgd-ray-file").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / name).touch()
    (tmp_path / "asgd-ray-link").symlink_to(elsewhere)
    linked = tmp_path / "asgd-ray-linked"
    linked.mkdir()
    (linked / name).symlink_to(elsewhere / name)
    before = sorted(tmp_path.rglob("*"))
    with private_directory(str(tmp_path)):
        pass
    assert sorted(tmp_path.rglob("*")) == before
