"""Encoded images of indexed shards by their rows: ranges of files, through a cache on the local disk."""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gen_dist.config.addresses import shown
from gen_dist.data.naming import printable
from gen_dist.data.shards.block_cache import BlockCache
from gen_dist.data.shards.fetching import READERS, Facts, Fetcher, is_url
from gen_dist.errors import DataError

_MOST_KNOWN_BLOCKS = 100_000
_SECONDS_BETWEEN_CHECKS = 600.0
_MOST_SUBSTITUTES = 100


@dataclass(frozen=True)
class Shard:
    """An indexed shard."""

    place: str
    facts: Facts
    sha256: str
    """Digest of its blocks, by which they are found in the cache."""
    end: int
    """Offset behind its last block."""


class Blocks:
    """Bytes of shards. Blocks of remote ones are fetched once a host and kept; threads share an object."""

    def __init__(
        self,
        shards: list[Shard],
        starts: NDArray[np.int64],
        crcs: NDArray[np.uint32],
        first_blocks: NDArray[np.int64],
        fetcher: Fetcher,
        cache: BlockCache,
        fetch_block: Callable[[Shard, int, int, int], bytes],
    ) -> None:
        """
        Args:
            shards: all of them.
            starts: offset of each block within its shard, those of all shards end to end.
            crcs: CRC-32 of each block.
            first_blocks: number of the first block of each shard, and their number at the end.
            fetcher: reader of files.
            cache: blocks on the local disk.
            fetch_block: function that gives a block, given its shard, number in the shard, start and end.
        """
        self.shards = shards
        self._starts = starts
        self._crcs = crcs
        self._first_blocks = first_blocks
        self._fetcher = fetcher
        self._cache = cache
        self._fetch_block = fetch_block
        self._direct = [is_read_directly(shard.place) for shard in shards]
        self._lock = threading.Lock()
        self._coming: dict[tuple[int, int], Future[bytes]] = {}
        # Blocks whose content on the disk this process has compared with its digest.
        self._known: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._checked: dict[int, float] = {}
        self._wanted: queue.SimpleQueue[tuple[Future[bytes], int, int] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard.

        Raises:
            DataError: it has changed, or it cannot be read.
        """
        if self._direct[shard]:
            self._check(shard)
            return self._fetcher.read(self.shards[shard].place, offset, offset + size)
        parts = []
        for block, first, last in self._pieces(shard, offset, size):
            content = self._kept(shard, block, first, last)
            parts.append(self._obtain(shard, block)[first:last] if content is None else content)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def expect(self, ranges: list[tuple[int, int, int]]) -> None:
        """Begin to fetch the blocks of some bytes, (shard, offset, size) each, in other threads."""
        remote = [one for one in ranges if not self._direct[one[0]]]
        wanted = dict.fromkeys(
            (shard, block) for shard, *where in remote for block, _, _ in self._pieces(shard, *where)
        )
        for shard, block in wanted:
            if self._cache.has(self._key(shard, block)):
                continue
            with self._lock:
                if (shard, block) in self._coming:
                    continue
                self._coming[shard, block] = coming = Future[bytes]()
                while len(self._threads) < READERS:
                    # Daemons: the end of a program does not wait for what nobody will read.
                    self._threads.append(threading.Thread(target=self._fetch_ahead, name="gen_dist-fetch", daemon=True))
                    self._threads[-1].start()
            self._wanted.put((coming, shard, block))

    def interrupt(self, ended: bool) -> None:
        """End the waiting of threads for servers, or let them wait again."""
        if not ended:
            self._fetcher.interrupted.clear()
            return
        self._fetcher.interrupted.set()
        with self._lock:
            threads, self._threads = self._threads, []
        ends = len(threads)
        with suppress(queue.Empty):
            while True:
                one = self._wanted.get_nowait()
                if one is None:  # meant for a thread of before
                    ends += 1
                    continue
                coming, shard, block = one
                coming.cancel()
                with self._lock:
                    self._coming.pop((shard, block), None)
        for _ in range(ends):
            self._wanted.put(None)

    def check_changed(self, shard: int) -> None:
        """Raise DataError if a shard is not as it was indexed, by its size and tag."""
        one = self.shards[shard]
        found = self._fetcher.facts(one.place)
        if found.size != one.facts.size or (found.tag and one.facts.tag and found.tag != one.facts.tag):
            raise self._changed(shard, f"{found.size:,} bytes, {found.tag}; it had {one.facts.size:,}, {one.facts.tag}")

    def _pieces(self, shard: int, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Blocks of some bytes: number in the shard, first and last byte within it."""
        starts = self._starts[self._first_blocks[shard] : self._first_blocks[shard + 1]]
        block = int(np.searchsorted(starts, offset, "right")) - 1
        end = offset + size
        while offset < end:
            start, stop = self._span(shard, block)
            yield block, offset - start, min(end, stop) - start
            offset, block = stop, block + 1

    def _span(self, shard: int, block: int) -> tuple[int, int]:
        number, following = int(self._first_blocks[shard]) + block, int(self._first_blocks[shard + 1])
        stop = int(self._starts[number + 1]) if number + 1 < following else self.shards[shard].end
        return int(self._starts[number]), stop

    def _kept(self, shard: int, block: int, first: int, last: int) -> bytes | None:
        """Bytes of a block on the disk; None if it is not there. The first time, it is compared with its digest."""
        key = self._key(shard, block)
        with self._lock:
            known = (shard, block) in self._known
        if known:
            content = self._cache.read(key, first, last)
            return content if content is not None and len(content) == last - first else None
        whole = self._cache.read(key, 0, None)
        if whole is None:
            return None
        if zlib.crc32(whole) != self._crcs[self._first_blocks[shard] + block]:
            self._cache.remove(key)  # the disk has changed it, or a power cut left it half written
            return None
        self._now_known(shard, block)
        return whole[first:last]

    def _obtain(self, shard: int, block: int) -> bytes:
        """A whole block, from the thread that is fetching it, or fetched here."""
        with self._lock:
            coming = self._coming.get((shard, block))
            if mine := coming is None:
                self._coming[shard, block] = coming = Future()
        assert coming is not None
        if mine:
            self._fulfil(coming, shard, block)
        try:
            return coming.result()
        except CancelledError:
            raise DataError(f"{self._fetcher.name}: training ends") from None

    def _fetch_ahead(self) -> None:
        while one := self._wanted.get():
            coming, shard, block = one
            if coming.set_running_or_notify_cancel():
                self._fulfil(coming, shard, block)

    def _fulfil(self, coming: Future[bytes], shard: int, block: int) -> None:
        try:
            content = self._fetch_once(shard, block)
        except BaseException as error:
            coming.set_exception(error)
        else:
            coming.set_result(content)
        finally:
            with self._lock:
                self._coming.pop((shard, block), None)

    def _fetch_once(self, shard: int, block: int) -> bytes:
        key = self._key(shard, block)
        start, stop = self._span(shard, block)
        with self._cache.only_fetcher(key):
            content = self._kept(shard, block, 0, stop - start)
            if content is not None:
                return content
            self._check(shard)
            wanted = self._crcs[self._first_blocks[shard] + block]
            for _ in range(2):  # a line may damage it once
                content = self._fetch_block(self.shards[shard], block, start, stop)
                if zlib.crc32(content) == wanted:
                    self._cache.write(key, content)
                    self._now_known(shard, block)
                    return content
        raise self._changed(shard, f"bytes {start:,} to {stop:,} have another digest")

    def _now_known(self, shard: int, block: int) -> None:
        with self._lock:
            self._known[shard, block] = None
            if len(self._known) > _MOST_KNOWN_BLOCKS:
                self._known.popitem(last=False)

    def _check(self, shard: int) -> None:
        now = time.monotonic()
        if now - self._checked.get(shard, -_SECONDS_BETWEEN_CHECKS) >= _SECONDS_BETWEEN_CHECKS:
            self.check_changed(shard)
            self._checked[shard] = now

    def _changed(self, shard: int, how: str) -> DataError:
        return DataError(
            f"{self._fetcher.name}: {printable(shown(self.shards[shard].place))} has changed since it was indexed "
            f"({how}); put the old one back, or index anew with another --cache-dir and --run-dir"
        )

    def _key(self, shard: int, block: int) -> str:
        return f"{self.shards[shard].sha256[:32]}-{block}"


class ShardImages:
    """Encoded images of a split; see `gen_dist.data.on_demand.EncodedImages`."""

    def __init__(
        self,
        blocks: Blocks,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint32],
        first_rows: NDArray[np.int64],
        *,
        skips: bool,
        announce: Callable[[str], None],
    ) -> None:
        """
        Args:
            blocks: bytes of the shards.
            offsets: offset of each image in its shard, uint64 [N].
            sizes: bytes of each, uint32 [N].
            first_rows: row of the first image of each shard, and N at the end.
            skips: True to take another image instead of a damaged one; False makes it an error.
            announce: takes lines about damaged images.
        """
        self._blocks = blocks
        self._offsets = offsets
        self._sizes = sizes
        self._first_rows = first_rows
        self._skips = skips
        self._announce = announce
        self._lock = threading.Lock()
        self._damaged: set[int] = set()
        self.waits_for_servers = any(is_url(shard.place) for shard in blocks.shards)

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, row: int) -> bytes:
        """Encoded image of a row."""
        return self._blocks.read(self._shard_of(row), int(self._offsets[row]), int(self._sizes[row]))

    def place_of(self, row: int) -> tuple[str, int]:
        """Shard of an image, and its offset there."""
        return self._blocks.shards[self._shard_of(row)].place, int(self._offsets[row])

    def read_before(self, row: int, size: int) -> bytes:
        """Bytes of a shard that end where an image begins, fewer at the start of the shard."""
        offset = int(self._offsets[row])
        first = max(0, offset - size)
        return self._blocks.read(self._shard_of(row), first, offset - first)

    def name(self, row: int) -> str:
        """Shard and place in it."""
        place = self._blocks.shards[self._shard_of(row)].place
        return f"image at byte {int(self._offsets[row]):,} of {printable(shown(place))}"

    def instead_of(self, row: int, reason: str) -> Iterator[int]:
        """The next images of the shard, and then its first ones."""
        shard = self._shard_of(row)
        reason = " ".join(reason.split())[:200]
        if row not in self._damaged:
            self._blocks.check_changed(shard)
        if not self._skips:
            raise DataError(f"{self.name(row)} is unreadable ({reason}); repair it, or use --unreadable-images skip")
        with self._lock:
            new = row not in self._damaged
            self._damaged.add(row)
            count = len(self._damaged)
        if new and str(count).strip("0") == "1":
            so_far = "" if count == 1 else f", and {count - 1:,} others so far"
            self._announce(f"{self.name(row)} is unreadable ({reason}){so_far}: the next of the shard is taken instead")
        first, end = int(self._first_rows[shard]), int(self._first_rows[shard + 1])
        for distance in range(1, min(end - first, _MOST_SUBSTITUTES)):
            yield first + (row - first + distance) % (end - first)

    def interrupt(self, ended: bool) -> None:
        """End the waiting of threads for servers, or let them wait again."""
        self._blocks.interrupt(ended)

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Begin to fetch blocks. Errors come back when the images are read."""
        shards = np.searchsorted(self._first_rows, rows, "right") - 1
        ranges = zip(shards.tolist(), self._offsets[rows].tolist(), self._sizes[rows].tolist(), strict=True)
        with suppress(RuntimeError):  # the interpreter ends
            self._blocks.expect(list(ranges))

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._first_rows, row, "right")) - 1


def is_read_directly(place: str) -> bool:
    """True for local tar files, which need no copy on the local disk."""
    return not is_url(place) and place.lower().endswith(".tar")
