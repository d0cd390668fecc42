"""Fixtures of the tests of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from tests.data.shard_sets import IMAGES, SHARDS
from tests.support.shards import ShardServer, served, write_shards


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    """Shards 000.tar to 002.tar behind a server."""
    write_shards(tmp_path / "shards", SHARDS, IMAGES)
    with served(tmp_path / "shards") as server:
        yield server


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, lines: list[str]) -> Callable[..., Dataset]:
    def open_it(pattern: str, cache: str = "cache", **options: Any) -> Dataset:
        packing = DataConfig(cache_dir=str(tmp_path / cache), **{"test_fraction": 0.1, **options})
        return open_dataset(f"shards:{pattern}", "unused", packing, lines.append)

    return open_it
