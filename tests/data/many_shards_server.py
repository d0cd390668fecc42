"""Server of many tar shards of tiny images that are made when they are asked for, some of whose requests fail.

    python -m tests.data.many_shards_server PORT SHARDS IMAGES

It prints its port. Every twentieth request gets the status 503.
"""

from __future__ import annotations

import functools
import itertools
import sys

import numpy as np

from tests.support.shards import ShardServer, encoded, tar_of

KINDS = 64
_ENTRY = 1024
"""Bytes of an image in its shard: a header, and the image padded to as much."""


@functools.cache
def _entries() -> np.ndarray:
    """An entry of each kind of image, uint8 [KINDS, _ENTRY]."""
    tars = [tar_of({"00000000.png": encoded(kind)})[:_ENTRY] for kind in range(KINDS)]
    return np.stack([np.frombuffer(tar, np.uint8) for tar in tars])


@functools.lru_cache(maxsize=24)
def shard(number: int, images: int) -> bytes:
    """A tar file. Its images are of the kinds 0, 1, ... in turn, and named by their number in the whole set."""
    numbers = number * images + np.arange(images)
    entries = _entries()[numbers % KINDS].copy()
    digits = numbers[:, None] // 10 ** np.arange(7, -1, -1) % 10
    entries[:, :8] = digits + ord("0")
    entries[:, 148:156] = ord(" ")
    sums = entries[:, :512].sum(axis=1, dtype=np.int64)
    entries[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
    entries[:, 154] = 0
    return entries.tobytes() + bytes(2 * 512)


def main(port: str, shards: str, images: str) -> None:
    """Serve until the process is killed."""
    size = int(images) * _ENTRY + 2 * 512
    requests = itertools.count(1)

    def read(name: str, first: int, last: int) -> bytes:
        return shard(int(name.removesuffix(".tar")), int(images))[first:last]

    def size_of(name: str) -> int:
        if not 0 <= int(name.removesuffix(".tar")) < int(shards):
            raise FileNotFoundError(name)
        return size

    server = ShardServer(read, size_of, int(port))
    server.fails = lambda _: 503 if next(requests) % 20 == 0 else 0
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
