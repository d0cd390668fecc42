"""Bytes of files at a path or URL, asked for again while their server fails."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from gen_dist.config.addresses import shown
from gen_dist.data.naming import printable
from gen_dist.errors import DataError
from gen_dist.files import read_at, reason_of, write_atomically

T = TypeVar("T")

READERS = 16
"""Threads that read at once."""
# A server may restart, or a connection be down for some minutes.
PATIENCE_SECONDS = 900.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_TOLD_AFTER_SECONDS = 2.0
_TIMEOUT_SECONDS = 60
_LEAST_BYTES_A_SECOND = 2**20
"""Speed at which a file has to be taken, besides that time."""
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_LASTING_KINDS = ("InvalidURL", "Certificate")
"""Parts of the names of connection errors that do not pass."""
_LASTING_AT_FIRST = "SSL"
"""The same, of a server that has never answered: later, a restart may break a handshake."""
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "Content-MD5", "generation", "LastModified", "last_modified", "mtime")
"""Facts of file systems that change with the content, the surest first."""


class Facts(NamedTuple):
    """State of a file."""

    size: int
    """In bytes."""
    tag: str
    """Text that changes with the content; empty where a server gives none."""


class Fetcher:
    """Reader of files at paths and at URLs of any file system that fsspec knows. Threads share it."""

    def __init__(
        self,
        name: str,
        announce: Callable[[str], None],
        patience_seconds: float = PATIENCE_SECONDS,
        *,
        verb: str = "read",
    ) -> None:
        """
        Args:
            name: the source in error messages.
            announce: takes lines about servers that fail and that answer again.
            patience_seconds: time that a server may fail for.
            verb: word of error messages for what could not be done.
        """
        self.name = name
        self._verb = verb
        self._announce = announce
        self._patience_seconds = patience_seconds
        self.interrupted = threading.Event()
        """Ends the waiting for servers while it is set."""
        self._lock = threading.Lock()
        self._systems: dict[str, Any] = {}
        self._tried_again = 0
        self._has_answered = False
        self._down_since: float | None = None

    @contextlib.contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """Context manager with a pool of threads that read. An error, or Ctrl-C, ends their waiting for servers."""
        pool = ThreadPoolExecutor(READERS)
        try:
            yield pool
        except BaseException:
            self.interrupted.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what is still queued is not waited for

    def facts(self, place: str) -> Facts:
        """Size and tag of a file.

        Raises:
            DataError: it is missing, this user may not read it, or its server fails for too long.
        """
        if not is_url(place):
            status = self._local(place, lambda: os.stat(place))
            return Facts(status.st_size, f"{status.st_mtime_ns}")

        def ask() -> Facts:
            system = self._system(place)
            found = system.info(place, **_timeout(system))
            if not isinstance(found.get("size"), int):
                raise self._refused(place, "its server gives no size")
            tag = next((str(found[name]) for name in _TAGS if found.get(name)), "")
            return Facts(found["size"], tag)

        return self._asking(place, ask)

    def read(self, place: str, first: int, last: int) -> bytes:
        """Bytes first .. last - 1 of a file.

        Raises:
            DataError: as `facts`, or the server does not serve ranges.
        """
        if not is_url(place):
            found = self._local(place, lambda: read_at(place, first, last - first))
            if len(found) < last - first:
                raise self._refused(place, f"it has become shorter than {last:,} bytes")
            return found

        def ask() -> bytes:
            system = self._system(place)
            content: bytes = system.cat_file(place, start=first, end=last, **_reading_options(system))
            if len(content) > last - first:
                raise self._refused(place, "its server sends whole files and no ranges; use one that does")
            if len(content) < last - first:
                raise ConnectionError(f"{len(content)} of {last - first} bytes came")
            return content

        return self._asking(place, ask)

    def write(self, place: str, content: bytes) -> None:
        """Write a file, whole or not at all where its file system can.

        Raises:
            DataError: as `facts`, or the disk is full or the file system read-only.
        """
        if not is_url(place):

            def write_here() -> None:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                write_atomically(Path(place), content)

            self._local(place, write_here)
            return

        def ask() -> None:
            system = self._system(place)
            try:
                system.makedirs(system._parent(place), exist_ok=True)
                system.pipe_file(place, content, **_timeout(system, len(content)))
            except (NotImplementedError, TypeError):  # of file systems that only read
                raise self._refused(place, "its file system is read-only") from None

        self._asking(place, ask)

    def refuse_whole_files(self, place: str) -> None:
        """Raise DataError if a web server sends a whole file where a part is asked for: `read` would hold all of it."""
        if not place.startswith(("http://", "https://")):
            return

        def ask() -> None:
            system = self._system(place)
            from fsspec.asyn import sync

            if sync(system.loop, _sends_whole_file, system, place, timeout=_TIMEOUT_SECONDS):
                raise self._refused(place, "its server sends whole files and no ranges; use one that does")

        self._asking(place, ask)

    def exists(self, place: str) -> bool:
        """True if there is a file.

        Raises:
            DataError: as `facts`.
        """
        if not is_url(place):
            return os.path.exists(place)
        return self._asking(place, lambda: bool(self._system(place).exists(place)))

    def glob(self, pattern: str) -> list[str]:
        """Files of a pattern with `*`, as `read` takes them.

        Raises:
            DataError: as `facts`, or the server does not list its files.
        """
        if not is_url(pattern):
            import glob

            return glob.glob(pattern, recursive=True)

        def ask() -> list[str]:
            system = self._system(pattern)
            return [system.unstrip_protocol(path) for path in system.glob(pattern)]

        return self._asking(pattern, ask)

    def _local(self, place: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise self._refused(place, reason_of(error)) from None

    def _system(self, place: str) -> Any:
        protocol = place.partition("://")[0]
        with self._lock:
            if protocol not in self._systems:
                try:
                    import fsspec
                except ImportError:
                    raise self._refused(place, "URLs need fsspec; pip install fsspec") from None
                if needed := _required_options(protocol):
                    raise self._refused(
                        place,
                        f"fsspec reads {protocol}:// with {' and '.join(needed)} as options, which URLs do not give; "
                        "copy the files to a disk, a web server or an object store",
                    )
                try:
                    # Listings are kept for ever otherwise, and a changed file would look as it was.
                    self._systems[protocol] = fsspec.filesystem(protocol, use_listings_cache=False)
                except (ImportError, ValueError) as error:
                    raise self._refused(place, printable(" ".join(str(error).split()))[:200]) from None
            return self._systems[protocol]

    def _asking(self, place: str, ask: Callable[[], T]) -> T:
        """Result of `ask`, which is tried again after longer and longer pauses while the server fails."""
        started, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                found = ask()
            except DataError:
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                reason = self._passing(place, cause)
                waited = time.monotonic() - started
                if waited > self._patience_seconds:
                    raise self._refused(
                        place, f"its server has failed for {waited:,.0f} s ({reason}); run the same command again"
                    ) from None
                self._tell_failure(place, reason, waited)
                if self.interrupted.wait(pause):
                    raise self._refused(place, f"its server has failed ({reason}), and training ends") from None
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._has_answered = True
                self._tell_answer(place)
                return found

    def _passing(self, place: str, error: Exception) -> str:
        """Reason of a failure that may pass.

        Raises:
            DataError: it will not.
        """
        response = getattr(error, "response", None)  # of Hugging Face's errors
        status = (
            getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", None)
        )
        kind = type(error).__name__
        # Texts of libraries may have the URL with its signature in them.
        reason = f"HTTP {status}" if isinstance(status, int) else kind
        if status in (401, 403) or isinstance(error, PermissionError) or "Credential" in kind or "Auth" in kind:
            raise self._refused(place, f"{reason}: no credentials of a reader; see fsspec's documentation")
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise self._refused(place, "there is no such file") from None
        if isinstance(error, ImportError):
            raise self._refused(place, printable(" ".join(str(error).split()))[:200]) from None
        lasting = _LASTING_KINDS if self._has_answered else (*_LASTING_KINDS, _LASTING_AT_FIRST)
        if any(word in kind for word in lasting):
            raise self._refused(place, f"{kind}, which is not tried again")
        passing = isinstance(error, OSError | EOFError | asyncio.TimeoutError) or "aiohttp" in type(error).__module__
        if status in _PASSING_STATUS or (status is None and passing) or "Timeout" in kind or "Connection" in kind:
            return reason
        raise self._refused(place, f"{reason}, which is not tried again") from None

    def _tell_failure(self, place: str, reason: str, waited: float) -> None:
        with self._lock:
            self._tried_again += 1
            count = self._tried_again
            starts = waited > _TOLD_AFTER_SECONDS and self._down_since is None
            if starts:
                self._down_since = time.monotonic() - waited
        if starts:
            self._announce(f"{self.name}: waiting for {server_of(place)}, which does not answer ({reason})")
        elif str(count).strip("0") == "1":  # the first, and then fewer and fewer
            requests = "a request" if count == 1 else f"{count:,} requests so far"
            self._announce(f"{self.name}: {server_of(place)} failed {requests} ({reason}); tried again")

    def _tell_answer(self, place: str) -> None:
        if self._down_since is None:
            return
        with self._lock:
            since, self._down_since = self._down_since, None
        if since is not None:
            self._announce(f"{self.name}: {server_of(place)} answers again after {time.monotonic() - since:,.0f} s")

    def _refused(self, place: str, reason: str) -> DataError:
        return DataError(f"{self.name}: cannot {self._verb} {printable(shown(place))}: {reason}")


def _required_options(protocol: str) -> list[str]:
    """Options without a default of a file system of fsspec, such as ftp's `host`; none if fsspec cannot import it.

    A file system that is made without them is half made, and its end prints a traceback.
    """
    import fsspec

    try:
        system = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):
        return []
    options = list(inspect.signature(system.__init__).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in options if one.kind in kinds and one.default is inspect.Parameter.empty]


def is_url(place: str) -> bool:
    """True for an address with a protocol."""
    return "://" in place


def server_of(place: str) -> str:
    """Protocol and host of a URL, without a login."""
    parts = urlsplit(place)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}"


async def _sends_whole_file(system: Any, place: str) -> bool:
    """True if the answer to a request for one byte is longer. Its content is not read."""
    session = await system.set_session()
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": "bytes=1-1"}
    async with session.get(system.encode_url(place), headers=headers, **options) as answer:
        return answer.status == 200 and answer.content_length not in (0, 1)


def _timeout(system: Any, sent_bytes: int = 0) -> dict[str, float]:
    """Option for calls of file systems that are asynchronous within: fsspec stops waiting for them."""
    return {"timeout": _TIMEOUT_SECONDS + sent_bytes / _LEAST_BYTES_A_SECOND} if system.async_impl else {}


def _reading_options(system: Any) -> dict[str, Any]:
    """Options for `cat_file`: a time-out, or no read-ahead.

    File systems that are not asynchronous, such as hf://, open a file for each range and fetch 5 MB behind it.
    """
    if system.async_impl:
        return _timeout(system)
    from fsspec.spec import AbstractFileSystem

    return {"cache_type": "none"} if type(system).cat_file is AbstractFileSystem.cat_file else {}
