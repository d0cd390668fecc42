"""Decoded images a second for training: gen_dist, PIL alone, torch's DataLoader over an ImageFolder, and webdataset.

`python bench/peers/decoding.py` makes JPEG files of 256 x 256 from scikit-image's photographs and takes batches of 64
from each way in turn, a few seconds at a time, with as many threads or processes. PIL alone decodes the same bytes in
threads, from memory into arrays, and does nothing else: it is the limit. Then a VAE trains on the same files, packed as
values and encoded, and the stopwatch of its steps tells how long they wait for images. It prints JSON.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

# From a checkout, for python bench/peers/decoding.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from bench.measuring.finished import train_to_the_end
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread, spread_of_ratios
from bench.measuring.temporary import temporary_directory
from bench.quality.photographs import photographs
from gen_dist.config import DataConfig
from gen_dist.data import Split, TrainBatches, on_demand, open_dataset
from gen_dist.training.step_times import measure_step_times

SIDE = 256
BATCH = 64
CLASSES = 4
QUALITY = 90
STEPS, STEP_IMAGES = 20, 16


def main(images: int = 1024, rounds: int = 7, seconds: float = 3.0, workers: int = 2, out: Path | None = None) -> None:
    """Measure all ways in turn.

    Args:
        images: JPEG files.
        rounds: turns of each way.
        seconds: length of a turn.
        workers: threads or processes that decode.
        out: file for the JSON as well.
    """
    check_out(out)
    torch.set_num_threads(1)
    with temporary_directory() as directory:
        paths = list(_write_images(directory / "images", images))
        ways: dict[str, Iterator[int]] = {
            "gen_dist, encoded": _gen_dist(directory, workers),
            "gen_dist, shards": _gen_dist_shards(directory, paths),
            "PIL alone": _pil_alone(paths, workers),
            "DataLoader over ImageFolder": _image_folder(directory / "images", workers),
            "webdataset": _webdataset(directory, paths, workers),
        }
        for way in ways.values():  # starts of processes, first reads
            _rate(way, 1.0)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(_rate(way, seconds))
        ours = rates["gen_dist, encoded"]
        waits = {storage: _step_waits(directory, storage) for storage in ("raw", "encoded")}
    found = {
        "conditions": conditions(),
        "workers": workers,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "encoded_over": {name: spread_of_ratios(ours, values) for name, values in rates.items() if values is not ours},
        "step": waits,
    }
    print_and_write(json.dumps(found, indent=2), out)


def _rate(batches: Iterator[int], seconds: float) -> float:
    """Images a second. Batches that waited since the last turn are taken before."""
    for _ in range(8):
        next(batches)
    started, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < started + seconds:
        count += next(batches)
    return count / (now - started)


def _write_images(directory: Path, count: int) -> Iterator[Path]:
    """Random crops of the photographs, in sub-directories that are classes."""
    generator = np.random.default_rng(0)
    pictures = [picture for picture in photographs() if min(picture.shape[:2]) >= SIDE]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (int(generator.integers(0, side - SIDE + 1)) for side in picture.shape[:2])
        path = directory / f"class{number % CLASSES}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[top : top + SIDE, left : left + SIDE]).save(path, quality=QUALITY)
        yield path


def _batches(split: Split) -> Iterator[int]:
    taken = TrainBatches(
        split,
        seed=0,
        global_batch_size=BATCH,
        micro_batches=[(0, BATCH)],
        device=torch.device("cpu"),
        resident_budget_bytes=0,
    )
    for step in itertools.count():
        images, _ = taken.micro_batch(step, 0)
        yield len(images)


def _step_waits(directory: Path, storage: Literal["raw", "encoded"]) -> dict[str, float]:
    """Milliseconds of a training step, and of its wait for images, of a network that is slower than decoding."""
    run = directory / f"run-{storage}"
    config = gen_dist.preset("vae-conv-mnist").with_options(
        data=f"folder:{directory / 'images'}",
        packed_as=storage,
        cache_dir=str(directory / "cache"),
        resident_budget_mib=0,
        likelihood="gaussian",
        feature_maps=(16, 32, 32, 32),
        global_batch_size=STEP_IMAGES,
        test_fraction=0.01,
        steps=STEPS,
        checkpoint_every=STEPS,
        sample_every=STEPS,
        evaluate_every=STEPS,
        run_dir=str(run),
    )
    train_to_the_end(config, say=lambda _line: None)
    times = measure_step_times(run, lambda _line: None)
    return {"step_ms": 1e3 * times.step_seconds, "waits_for_images_ms": 1e3 * times.seconds["data"]}


def _gen_dist(directory: Path, workers: int) -> Iterator[int]:
    setattr(on_demand, "THREADS", workers)  # noqa: B010  mypy: a name that the module imports
    packing = DataConfig(cache_dir=str(directory / "cache"), packed_as="encoded", test_fraction=0.01)
    yield from _batches(open_dataset(f"folder:{directory / 'images'}", ".", packing).train)


def _gen_dist_shards(directory: Path, paths: list[Path]) -> Iterator[int]:
    _write_tar(directory / "ours.tar", paths)
    packing = DataConfig(cache_dir=str(directory / "cache"), test_fraction=0.01)
    yield from _batches(open_dataset(f"shards:{directory / 'ours.tar'}", ".", packing).train)


def _pil_alone(paths: list[Path], workers: int) -> Iterator[int]:
    """Threads with nothing to wait for, each at a batch of its own."""
    content = [path.read_bytes() for path in paths]

    def decode(first: int) -> int:
        for place in range(first, first + BATCH):
            with Image.open(io.BytesIO(content[place % len(content)])) as opened:
                np.asarray(opened)
        return BATCH

    yield from _ahead(decode, workers)


def _ahead(work: Callable[[int], int], workers: int) -> Iterator[int]:
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(work, BATCH * number) for number in range(2 * workers)]
        for number in itertools.count(2 * workers):
            yield waiting.pop(0).result()
            waiting.append(pool.submit(work, BATCH * number))


def _image_folder(directory: Path, workers: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    loader: Any = torch.utils.data.DataLoader(
        ImageFolder(str(directory), transform=PILToTensor()),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def _webdataset(directory: Path, paths: list[Path], workers: int) -> Iterator[int]:
    try:
        import webdataset
    except ImportError:
        raise SystemExit("webdataset is missing; run `pip install webdataset`") from None
    for number in range(workers):
        _write_tar(directory / f"{number}.tar", paths[number::workers])
    data = webdataset.WebDataset(f"{directory}/{{0..{workers - 1}}}.tar", shardshuffle=False, resampled=True)
    data = data.shuffle(1000).decode("torchrgb8").to_tuple("jpg", "cls").batched(BATCH)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers)
    for images, _ in loader:
        yield len(images)


def _write_tar(path: Path, paths: list[Path]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for one in paths:
            tar.add(one, one.name)
            label = one.parent.name.removeprefix("class").encode()
            entry = tarfile.TarInfo(f"{one.stem}.cls")
            entry.size = len(label)
            tar.addfile(entry, io.BytesIO(label))


if __name__ == "__main__":
    tyro.cli(main)
