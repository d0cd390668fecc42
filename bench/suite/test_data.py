"""Packing, opening and gathering of images: `python -m pytest bench/suite/test_data.py`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.measuring.measured import Measurement
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, Split, TrainBatches, open_dataset
from gen_dist.data.cache import open_packed
from gen_dist.data.sources.source import Block

DIGITS = 60_000
ROWS = 192
GATHERED_ROUNDS, BATCHES_OF_A_ROUND = 50, 16
FILES, FILE_SIDE = 512, 96


@dataclass(frozen=True)
class DigitsInMemory:
    """Source as large as MNIST's train split, whose images cost nothing, so that packing alone is timed."""

    name: str = "digits in memory"
    slug: str = "digits-in-memory"
    has_test_split: bool = False
    default_size: int | None = None

    def fingerprint(self) -> object:
        """The same each time."""
        return DIGITS

    def remarks(self) -> list[str]:
        """None."""
        return []

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def image_count(self) -> int | None:
        """No bar."""
        return None

    def blocks(self) -> Iterator[Block]:
        """Blocks of noise."""
        images = np.random.default_rng(0).integers(0, 256, (1000, 1, 28, 28), np.uint8)
        labels = np.arange(1000, dtype=np.int64) % 10
        for _ in range(DIGITS // 1000):
            yield Block("train", images, labels, "digit")


@pytest.fixture(scope="module")
def large_split() -> Split:
    """As many images as MNIST has, in memory that a map would have."""
    images = np.random.default_rng(0).integers(0, 256, (DIGITS, 1, 28, 28), np.uint8)
    return Split("train split", images, np.arange(DIGITS, dtype=np.int64) % 10)


def test_packing(measurement: Measurement, tmp_path: Path) -> None:
    """60,000 digits into a new cache: held-out images moved, files written, synced, hashed."""
    caches = itertools.count()
    measurement.time(
        lambda: open_packed(DigitsInMemory(), DataConfig(cache_dir=str(tmp_path / f"{next(caches)}")), silent),
        rounds=3,
        warmup_rounds=0,
        images=DIGITS,
    )


def test_opening_a_packed_set(measurement: Measurement, tmp_path: Path) -> None:
    """Its digests are checked and its arrays mapped, as at each start of a run."""
    packing = DataConfig(cache_dir=str(tmp_path))
    open_packed(DigitsInMemory(), packing, silent)
    measurement.time(lambda: open_packed(DigitsInMemory(), packing, silent), rounds=10, images=DIGITS)


def test_decoding_a_folder(measurement: Measurement, tmp_path: Path) -> None:
    """PNG files of photographs' noise, resized from 96 x 96 to 64 x 64 pixels and packed."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (FILES, FILE_SIDE, FILE_SIDE, 3), np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number:04}.png", compress_level=1)
    caches = itertools.count()
    packing = DataConfig(image_size=64)
    measurement.time(
        lambda: open_dataset(
            f"folder:{folder}", "data", replace(packing, cache_dir=str(tmp_path / f"{next(caches)}")), silent
        ),
        rounds=4,
        images=FILES,
    )


def test_resident_gather(measurement: Measurement, large_split: Split, device: torch.device) -> None:
    """The keyed order, and images and labels gathered from the device's memory."""
    batches = batches_of(large_split, device, resident=True)
    assert batches.resident
    time_batches(measurement, batches.micro_batch)


def test_mapped_gather(measurement: Measurement, digits: Dataset, device: torch.device) -> None:
    """The same from the memory map, as the prefetching thread gathers it."""
    batches = batches_of(digits.train, device, resident=False)
    time_batches(measurement, lambda step, part: batches.gather((step, part)))
    batches.close()


def test_prefetched_batches(measurement: Measurement, digits: Dataset, device: torch.device) -> None:
    """Batches taken from the prefetching thread at its full speed: the longest that a step can wait for one."""
    batches = batches_of(digits.train, device, resident=False)
    time_batches(measurement, batches.micro_batch)
    batches.close()


def time_batches(measurement: Measurement, batch_of: Callable[[int, int], object]) -> None:
    """Time the batches of successive steps, given as (step, micro-batch)."""
    steps = itertools.count()
    measurement.time(
        lambda: batch_of(next(steps), 0), rounds=GATHERED_ROUNDS, iterations=BATCHES_OF_A_ROUND, images=ROWS
    )


def batches_of(split: Split, device: torch.device, *, resident: bool) -> TrainBatches:
    """Batches of one process."""
    return TrainBatches(
        split,
        seed=1,
        global_batch_size=ROWS,
        micro_batches=[(0, ROWS)],
        device=device,
        resident_budget_bytes=2**31 if resident else 0,
    )


def silent(_line: str) -> None:
    """Ignore the messages of packing."""
