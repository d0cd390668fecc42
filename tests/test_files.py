"""Atomic writes of files and directories."""

from __future__ import annotations

import errno
import os

import pytest

from gen_dist.files import sync, whole_directory, write_atomically


def test_writing_atomically_replaces_whole_files(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "first ü\n")
    assert path.read_text(encoding="utf-8") == "first ü\n"
    write_atomically(path, b"\x89second")
    assert path.read_bytes() == b"\x89second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing/config.json", "")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_no_error(tmp_path, monkeypatch, code):
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "file").write_text("content")
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(tmp_path / "file")


def test_a_system_that_opens_no_directory_is_no_error(tmp_path, monkeypatch):
    open_file = os.open
    synced: list[int] = []

    def as_windows(path: os.PathLike[str], flags: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        assert flags & os.O_RDWR, "Windows syncs only what is open for writing"
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", as_windows)
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "file").write_text("content")
    sync(tmp_path)
    assert not synced
    sync(tmp_path / "file")
    assert len(synced) == 1


def test_a_full_disk_is_an_error_for_directories_too(tmp_path, monkeypatch):
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        sync(tmp_path)


def _write_directory(path, *names, spoil=None):
    with whole_directory(path) as directory:
        for name in names:
            (directory / name).write_text(name)
        if spoil:
            spoil()


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep/out"

    def names():
        return sorted(str(entry.relative_to(path.parent)) for entry in path.parent.rglob("*"))

    def fail():
        raise KeyboardInterrupt

    _write_directory(path, "first", "second")
    assert names() == ["out", "out/first", "out/second"]
    with pytest.raises(KeyboardInterrupt):
        _write_directory(path, "third", spoil=fail)
    assert names() == ["out", "out/first", "out/second"]
    (path.parent / ".out.partial").mkdir()  # as a killed writer leaves it
    (path.parent / ".out.partial/half").write_text("")
    _write_directory(path, "third")
    assert names() == ["out", "out/third"]


def test_a_full_disk_leaves_the_directory_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out"
    _write_directory(path, "first")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        _write_directory(path, "second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in path.iterdir()] == ["first"]


def test_a_directory_stays_if_its_successor_fails(tmp_path, monkeypatch):
    path = tmp_path / "out"
    _write_directory(path, "first")
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        _write_directory(path, "second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in path.iterdir()] == ["first"]


def test_a_link_to_a_directory_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    for name in ("first", "second"):
        _write_directory(link, name)
        assert [entry.name for entry in target.iterdir()] == [name]
    assert link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "target"]
