"""Sets of tar shards, and a server on this machine that serves them and fails as it is told."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(number: int, side: int = 8, kind: str = "PNG", mode: str = "L") -> bytes:
    """An image that differs from those of other numbers."""
    channels = {"L": 1, "RGB": 3}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, channels), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, kind)
    return stream.getvalue()


def tar_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def samples(first: int, count: int, classes: int = 3, **options: Any) -> dict[str, bytes]:
    """Files of samples with labels."""
    files = {}
    for number in range(first, first + count):
        files[f"{number:06}.png"] = encoded(number, **options)
        files[f"{number:06}.cls"] = str(number % classes).encode()
    return files


def write_shards(directory: Path, shards: int = 4, images: int = 25, **options: Any) -> str:
    """Write shards of images; returns their pattern."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        (directory / f"{shard:03}.tar").write_bytes(tar_of(samples(shard * images, images, **options)))
    return f"{directory}/{{000..{shards - 1:03}}}.tar"


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Nothing: a client that was killed has cut its connection."""


class ShardServer:
    """A server of files by ranges, which counts requests."""

    def __init__(self, read: Callable[[str, int, int], bytes], size: Callable[[str], int], port: int = 0) -> None:
        self.fails: Callable[[int], int] = lambda number: 0
        """HTTP status with which the request of a number fails; 0 serves it."""
        self.etag = '"1"'
        self.ranges = True
        self.requests = 0
        self.asked: list[str] = []
        self._read = read
        self._size = size
        self.port = port
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if self.server is not owner._server:  # stopped, with a connection that was open
                    self.close_connection = True
                    return
                owner.requests += 1
                name = self.path.lstrip("/").partition("?")[0]
                owner.asked.append(f"{self.command} {name} {self.headers.get('Range', '')}")
                status = owner.fails(owner.requests)
                try:
                    size = owner._size(name)
                except OSError:
                    status = status or 404
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                first, last = (int(found[1]), min(int(found[2]) + 1, size)) if found and owner.ranges else (0, size)
                self.send_response(206 if found and owner.ranges else 200)
                self.send_header("Content-Length", str(last - first))
                self.send_header("ETag", owner.etag)
                if found and owner.ranges:
                    self.send_header("Content-Range", f"bytes {first}-{last - 1}/{size}")
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(OSError):
                        self.wfile.write(owner._read(name, first, last))

        return Handler


@contextlib.contextmanager
def served(directory: Path) -> Iterator[ShardServer]:
    """Context manager that serves the files of a directory."""

    def read(name: str, first: int, last: int) -> bytes:
        with (directory / name).open("rb") as file:
            file.seek(first)
            return file.read(last - first)

    server = ShardServer(read, lambda name: (directory / name).stat().st_size)
    try:
        yield server
    finally:
        server.stop()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)
