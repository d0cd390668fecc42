"""Atomic writes of files and directories."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from gen_dist import files
from gen_dist.files import (
    read_regular,
    read_sealed,
    retrying,
    sync,
    temporary_directory,
    unreadable,
    whole_directory,
    write_atomically,
    write_sealed,
)


def test_writing_atomically_replaces_whole_files(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "first ü\n")
    assert path.read_text(encoding="utf-8") == "first ü\n"
    write_atomically(path, b"\x89second")
    assert path.read_bytes() == b"\x89second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing/config.json", "")


def test_temporary_files_of_killed_writers_are_removed(tmp_path):
    path = tmp_path / ("n" * 250)  # the longest name leaves no room for a suffix
    write_atomically(path, "first")
    left_over = tmp_path / f".{path.name[:50]}.tmp-0123456789abcdef"
    left_over.write_text("half")
    (tmp_path / ".out.tmp").write_text("half, by an old version")
    write_atomically(path, "second")
    write_atomically(tmp_path / "out", "whole")
    (tmp_path / "out").unlink()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    living, descriptor = files._new_temporary(path)
    write_atomically(path, "third")
    assert living.exists()
    os.close(descriptor)


def test_temporary_directory_of_a_killed_process_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = (
        "import os; from gen_dist.files import temporary_directory\n"
        "with temporary_directory('check') as path:\n    (path / 'file').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    (left_over,) = tmp_path.iterdir()
    foreign = tmp_path / "gen_dist-check-0"  # bears no mark of ours
    foreign.mkdir()
    (tmp_path / "gen_dist-check-1").symlink_to(left_over)
    with temporary_directory("check") as living, temporary_directory("check") as second:
        assert living.is_dir() and living.parent != second.parent
        assert not left_over.exists()
    assert sorted(tmp_path.iterdir()) == [foreign, tmp_path / "gen_dist-check-1"]


def test_what_a_temporary_directory_leaves_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    unlink = os.unlink

    def refuse(name, **place):
        if name == "stuck":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(name, **place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with temporary_directory("check") as first:
            (first / "stuck").touch()
    assert (first / "stuck").exists()
    with temporary_directory("check"):
        assert not first.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_temporary_files_place_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".run.json.tmp-guessed").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "run.json", "ours")
    assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / "all").mkdir()
    (tmp_path / "all/kept").write_text("precious")
    for state in ("partial", "replaced"):
        (tmp_path / f".out.{state}").symlink_to(tmp_path / "all")
    _write_directory(tmp_path / "out", "first")
    assert (tmp_path / "all/kept").read_text() == "precious"


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path, contents = tmp_path / "evaluation.json", [character * 100_000 for character in "abcd"]

    def write(content):
        for _ in range(10):
            write_atomically(path, content)
            assert path.read_text() in contents

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE", "ENOMEM", "ETIMEDOUT", "EINTR"])
def test_a_passing_error_is_tried_again(monkeypatch, name):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, calls = getattr(errno, name), []

    def fail(times):
        calls.append(times)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return "content"

    assert retrying(lambda: fail(2)) == "content"
    calls.clear()
    with pytest.raises(OSError, match=os.strerror(code)):
        retrying(lambda: fail(99))
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, ""), FileNotFoundError(errno.ENOENT, ""), ValueError()]
)
def test_a_lasting_error_is_not_tried_again(error):
    calls = []

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retrying(fail)
    assert len(calls) == 1


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes are more than 4"):
        read_regular(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(tmp_path / name, 5)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(tmp_path / "pipe", "content")
    assert [file.is_fifo() for file in tmp_path.iterdir()] == [True]
    (tmp_path / "link").symlink_to("pipe")
    write_atomically(tmp_path / "link", "content")
    assert (tmp_path / "link").read_text() == "content" and (tmp_path / "pipe").is_fifo()


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


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        (errno.EMFILE, "raise the limit"),
        (errno.EACCES, "let this user"),
        (errno.EIO, "the disk or network"),
        (0, "fix"),
    ],
)
def test_an_unreadable_file_is_named_with_reason_and_way_out(tmp_path, code, way_out):
    said = unreadable(tmp_path / "x", OSError(code, os.strerror(code)))
    assert said.startswith(f"{tmp_path}/x cannot be read just now: {os.strerror(code)}; {way_out}")
    assert said.endswith(", then run the same command again")


def test_a_sealed_file_is_whole_or_counts_as_missing(tmp_path):
    path, content = tmp_path / "kept.tensors", bytes(range(256))
    write_sealed(path, content)
    assert read_sealed(path) == content
    written = path.read_bytes()
    damaged = [written[:place] + bytes([byte ^ 1]) + written[place + 1 :] for place, byte in enumerate(written)]
    for other in (*damaged, b"", written[:-1], written + b"\0", content, b"sha256 \n"):
        path.write_bytes(other)
        assert read_sealed(path) is None
    path.unlink()
    assert read_sealed(path) is None
