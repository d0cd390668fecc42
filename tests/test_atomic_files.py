"""A file is written whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from gen_dist.atomic_files import sync, write_atomically


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
