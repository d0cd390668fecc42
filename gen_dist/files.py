"""Atomic, durable writes of files and directories."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

_POSIX = os.name == "posix"
if _POSIX:
    import fcntl

T = TypeVar("T")

_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT),
}
"""Errors that may be gone at the next try: a network file system that hangs, too many open files, no memory."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a lock where the file system has none, or no lock manager runs."""
_PAUSES = (0.05, 0.2, 0.5)
_WAYS_OUT = {
    **dict.fromkeys(_PASSING, "the disk or network fails: fix that"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user read it"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOMEM: "free some memory",
}
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_OURS = ".of-gen_dist"
"""File that marks a temporary directory as ours."""
_BINARY = getattr(os, "O_BINARY", 0)


def retrying(action: Callable[[], T]) -> T:
    """Result of `action`, called again after short pauses while the system is unable for a moment.

    Raises:
        OSError: as `action` does: at once for errors that do not pass, after four tries for those that may.
    """
    for seconds in _PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(seconds)
    return action()


def reason_of(error: OSError) -> str:
    """The system's reason, without path and number: `Permission denied`."""
    return error.strerror or str(error) or type(error).__name__


def unreadable(path: Path, error: OSError) -> str:
    """Sentence about a file that exists and cannot be read just now, with the way out. It need not be damaged."""
    way_out = _WAYS_OUT.get(error.errno or 0, "fix that")
    return f"{path} cannot be read just now: {reason_of(error)}; {way_out}, then run the same command again"


def read_regular(path: str | Path, at_most: int | None = None) -> bytes:
    """Read a regular file whole. A pipe, socket or device is not read, so it cannot make the caller wait.

    Raises:
        OSError: no such file, no permission, not a regular file (ENXIO), larger than `at_most` bytes (EFBIG), or a
            read error that stays after some tries.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            if at_most is not None and (size := os.fstat(file.fileno()).st_size) > at_most:
                raise OSError(errno.EFBIG, f"{size:,} bytes are more than {at_most:,}", str(path))
            return file.read(-1 if at_most is None else at_most)

    return retrying(read)


def read_at(path: str | Path, first: int, count: int) -> bytes:
    """Read up to `count` bytes of a regular file from the byte `first` on.

    Raises:
        OSError: as `read_regular`.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            file.seek(first)
            return file.read(count)

    return retrying(read)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file to read. A pipe, socket or device is refused, so it cannot make the caller wait.

    Raises:
        OSError: no such file, no permission, or not a regular file (ENXIO).
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK | _BINARY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.ENXIO, "not a regular file", str(path))


@contextlib.contextmanager
def file_lock(path: Path, announce: Callable[[str], None], *, wait: bool = False) -> Iterator[bool]:
    """Context manager that holds a lock, which the system frees if this process dies. It yields False if another
    process has the lock and `wait` is false. Where the file system has no locks, it says so and goes on.

    Raises:
        OSError: the lock file cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    held = True
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        held = False
    except NotImplementedError:  # an older filelock, where the system has no flock
        announce(f"{path.parent} has no locks: nothing keeps another process from writing there")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        announce(f"{path.parent} has no locks ({reason_of(error)}): nothing keeps another process from writing there")
    try:
        yield held
    finally:
        lock.release()


def is_utf8(path: Path) -> bool:
    """True if the bytes of a path are UTF-8."""
    return os.fsencode(path).decode(errors="replace") == str(path)


@contextlib.contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """Context manager that yields a name of a file for libraries that refuse names outside UTF-8 (Linux)."""
    if is_utf8(path) or not Path("/proc/self/fd").is_dir():
        yield path
        return
    with open_regular(path) as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: if the process dies half-way, the previous content stays.

    Text is encoded as UTF-8; bytes of a path that is not UTF-8 are escaped. The file is on disk (fsync) before it is
    renamed into place. Several processes may write the same path. Their temporary files have random names, and the next
    writer removes those of killed ones.

    Raises:
        OSError: the disk is full, the directory is missing or not writable, or as `refuse_pipes`.
    """
    refuse_pipes(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    remove_left_over(path)
    temporary, descriptor = _new_temporary(path)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if not _POSIX:  # Windows renames only closed files
                file.close()
            os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def refuse_pipes(path: Path) -> None:
    """Raise OSError for a path of a pipe, socket or device: a file would replace it.

    Raises:
        OSError: it is one (ENXIO), or the system does not say.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.ENXIO, "it is a pipe, socket or device, not a regular file", str(path))


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked until it is closed, and its descriptor."""
    while True:
        temporary = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(8)}")
        # O_EXCL: a link that someone put there is not followed.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        if _POSIX:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink == 0:  # another writer took it for left over before it was locked
                os.close(descriptor)
                continue
        return temporary, descriptor


def remove_left_over(path: Path) -> None:
    """Remove temporary files of `path` that no living process has locked: their writers were killed."""
    if not _POSIX:
        return
    prefix, old_name = _temporary_prefix(path), f".{path.name}.tmp"
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(path.parent) if name.startswith(prefix) or name == old_name]
        for left_over in map(path.with_name, names):
            with contextlib.suppress(OSError):
                descriptor = os.open(left_over, os.O_RDONLY | os.O_NOFOLLOW | _NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left_over.unlink()
                finally:
                    os.close(descriptor)


def _temporary_prefix(path: Path) -> str:
    # Cut, so that the random part does not make the name longer than 255 bytes.
    return f".{path.name[:50]}.tmp-"


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file with a digest of its content, for `read_sealed`.

    Raises:
        OSError: as `write_atomically`.
    """
    write_atomically(path, _seal(content) + content)


def read_sealed(path: Path) -> bytes | None:
    """Content of a file of `write_sealed`; None if it is missing, unreadable just now, or not what was written."""
    with contextlib.suppress(OSError):
        seal, line_end, content = read_regular(path).partition(b"\n")
        if seal + line_end == _seal(content):
            return content
    return None


def _seal(content: bytes) -> bytes:
    return b"sha256 " + hashlib.sha256(content).hexdigest().encode() + b"\n"


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Context manager that yields an empty directory and, on success, replaces `path` with it.

    Its files are on disk (fsync) before they are moved to `path`. After an error, `path` is unchanged. A link at `path`
    stays a link: its target is replaced.

    Raises:
        OSError: the disk is full or not writable; if this is detectable at the start, before any file is written.
    """
    path = path.resolve()
    partial, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (partial, replaced):
        if left_over.is_symlink():  # not ours; its target stays
            left_over.unlink()
    if partial.exists():  # left by a killed writer
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        if path.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(path, replaced)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def temporary_directory(purpose: str) -> Iterator[Path]:
    """Context manager that yields an empty directory among the system's temporary files and removes it at the end.

    If this process is killed, the next one that makes a directory for the same purpose removes it. Processes that this
    one has forked keep it until they end as well.

    Raises:
        OSError: the disk is full or not writable.
    """
    prefix = f"gen_dist-{purpose}-"
    _remove_temporary_directories(prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    descriptor = _locked_directory(path)
    try:
        (path / _OURS).touch()
        (path / "content").mkdir()
        yield path / "content"
    finally:
        _remove_temporary_directory(path)
        if descriptor is not None:
            os.close(descriptor)


def _remove_temporary_directories(prefix: str) -> None:
    """Remove temporary directories of ours that no living process has locked."""
    if not _POSIX:
        return
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            # Only a directory of this user that bears our mark; another user's and a link stay.
            if path.is_symlink() or not (path / _OURS).is_file() or path.stat().st_uid != os.getuid():
                continue
            descriptor = _locked_directory(path)
            if descriptor is not None:
                _remove_temporary_directory(path)
                os.close(descriptor)


def _remove_temporary_directory(path: Path) -> None:
    """Remove as much as goes. The mark stays if anything does: by it the next one knows that it may remove the rest."""
    shutil.rmtree(path / "content", ignore_errors=True)
    with contextlib.suppress(OSError):
        if not (path / "content").exists():
            (path / _OURS).unlink(missing_ok=True)
            try:
                path.rmdir()
            except OSError:
                (path / _OURS).touch()


def _locked_directory(path: Path) -> int | None:
    """Descriptor of a directory that holds its lock until it is closed. None if another process has the lock, or where
    there are no locks."""
    if not _POSIX:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to disk. Ignore directories that cannot be synced.

    Raises:
        OSError: the disk is full or failing, or the file is missing or not writable.
    """
    is_directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)  # Windows syncs only writable files
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows cannot open a directory; some network file systems cannot sync one.
        if not (is_directory and error.errno in (errno.EACCES, errno.EINVAL, errno.ENOTSUP)):
            raise
