"""Contents of all shards, each read once and remembered: an index that was interrupted goes on with the next shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from gen_dist.config.addresses import shown
from gen_dist.data.naming import printable
from gen_dist.data.packing import SECONDS_BEFORE_PROGRESS, cache_errors
from gen_dist.data.shards.contents import BLOCK_BYTES, Contents, contents_of
from gen_dist.data.shards.fetching import Facts, Fetcher, is_url, server_of
from gen_dist.data.shards.labels import USUAL_LABELS, LabelRequest
from gen_dist.data.shards.places import kind_of
from gen_dist.data.shards.tar_contents import tar_contents
from gen_dist.data.shards.writing import PLAN_FILE, index_place
from gen_dist.errors import DataError
from gen_dist.files import read_sealed, write_sealed


class ShardContents:
    """Contents of shards by their places. One of them is in memory at a time, besides those that threads work at."""

    def __init__(self, name: str, directory: Path, fetcher: Fetcher, request: LabelRequest = USUAL_LABELS) -> None:
        """
        Args:
            name: the source in error messages.
            directory: where contents are remembered.
            fetcher: reader of the shards.
            request: labels that are read.
        """
        self._request = request
        self._packed: set[str] = set()
        self._name = name
        self._directory = directory
        self._fetcher = fetcher

    def make(self, places: list[str]) -> None:
        """Read the shards whose contents are not there, or that have changed since.

        Raises:
            DataError: one cannot be read or is damaged.
        """
        with cache_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        for place in {server_of(place): place for place in places if is_url(place)}.values():
            self._fetcher.refuse_whole_files(place)
        bar = tqdm(
            total=len(places),
            desc=f"indexing {self._name}",
            unit=" shards",
            delay=SECONDS_BEFORE_PROGRESS,
            disable=None,
        )
        directories = sorted({place.rpartition("/")[0] for place in places if "?" not in place})
        with bar, self._fetcher.threads() as pool:
            packed = pool.map(self._is_packed, directories)
            self._packed = {one for one, found in zip(directories, packed, strict=True) if found}
            for _ in pool.map(self._make_one, places):
                bar.update()

    def __call__(self, place: str) -> Contents:
        """Contents of a shard after `make`."""
        found = self._remembered(place)
        if found is None:
            raise DataError(
                f"{self._name}: the index of {printable(shown(place))} has gone from {self._directory}; try again"
            )
        return found

    def _make_one(self, place: str) -> None:
        facts = self._fetcher.facts(place)
        known = self._remembered(place)
        if known is not None and known.facts == facts:
            return
        if written := self._as_written(place, facts):
            found = written
        elif kind_of(self._name, place) == "tar":
            blocks, columns = self._blocks(place, facts), self._request.columns
            found = tar_contents(self._name, place.rpartition("/")[2], blocks, columns)
        else:
            from gen_dist.data.shards.parquet_contents import parquet_contents

            found = parquet_contents(self._name, place, facts, self._fetcher, self._request)
        if self._fetcher.facts(place) != facts:
            raise DataError(f"{self._name}: {printable(shown(place))} has changed while it was read; try again")
        found.facts = facts
        with cache_errors(self._directory):
            write_sealed(self._path(place), found.to_bytes())

    def _is_packed(self, directory: str) -> bool:
        """True if `ray_pack` made the shards of a directory."""
        try:
            return self._fetcher.exists(f"{directory}/{PLAN_FILE}")
        except DataError:  # a bucket that may not be listed refuses files that are missing, too
            return False

    def _as_written(self, place: str, facts: Facts) -> Contents | None:
        """Contents that `ray_pack` wrote beside a shard, which then need not be read; None if none fit."""
        if place.rpartition("/")[0] not in self._packed:
            return None
        beside = index_place(place)
        try:
            found = contents_of(self._fetcher.read(beside, 0, self._fetcher.facts(beside).size))
        except (DataError, ValueError, KeyError, OSError):
            return None
        fits = found.facts.size == facts.size and found.columns == self._request.columns
        return found if fits and (found.table is not None) == bool(self._request.columns) else None

    def _blocks(self, place: str, facts: Facts) -> Iterator[bytes]:
        for first in range(0, facts.size, BLOCK_BYTES):
            yield self._fetcher.read(place, first, min(first + BLOCK_BYTES, facts.size))

    def _remembered(self, place: str) -> Contents | None:
        content = read_sealed(self._path(place))
        if content is None:
            return None
        try:
            return contents_of(content)
        except (ValueError, KeyError, OSError):  # of another version
            return None

    def _path(self, place: str) -> Path:
        key = place if not self._request.columns else json.dumps([place, *self._request.columns])
        return self._directory / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.shard"
