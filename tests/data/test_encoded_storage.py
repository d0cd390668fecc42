"""`--packed-as encoded`: the bytes of image files, packed as they are, are the same data as their values."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, TrainBatches, open_dataset, survey_source
from gen_dist.errors import ConfigError, DataError
from gen_dist.records.checkpoint import load
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.support.runs import assert_same_bits, close_losses, losses_of, small_config, write_config
from tests.support.warm_python import in_two_ranks, warm_python


def picture(number: int, mode: str = "RGB", side: int = 12) -> Image.Image:
    channels = {"RGB": 3, "L": 1}.get(mode, 1)
    dtype = np.uint16 if mode == "I;16" else np.uint8
    values = np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (side, side, channels), dtype)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def folder(path: Path, kinds: tuple[str, ...] = ("PNG",), mode: str = "RGB", count: int = 30, **options: Any) -> str:
    for number in range(count):
        kind = kinds[number % len(kinds)]
        directory = path / f"class{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        picture(number, mode, **options).save(directory / f"{number:03}.{kind.lower()}", kind, lossless=True)
    return f"folder:{path}"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Dataset]:
    def open_it(source: str, storage: str = "encoded", cache: str = "cache", **options: Any) -> Dataset:
        packing = DataConfig(cache_dir=str(tmp_path / cache), packed_as=storage, **options)  # type: ignore[arg-type]
        return open_dataset(source, "unused", packing, lambda _: None)

    return open_it


def batches(dataset: Dataset, rows: tuple[tuple[int, int], ...] = ((0, 10),)) -> TrainBatches:
    return TrainBatches(
        dataset.train,
        seed=5,
        global_batch_size=10,
        micro_batches=rows,
        device=torch.device("cpu"),
        resident_budget_bytes=2**30,
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "PNG and WebP": ({"kinds": ("PNG", "WEBP", "BMP")}, {}),
    "gray": ({"mode": "L"}, {}),
    "gray asked for": ({}, {"channels": 1}),
    "resized": ({"side": 20}, {"image_size": "12x8", "fit": "pad"}),
    "16 bits": ({"mode": "I;16", "kinds": ("PNG", "TIFF")}, {"value_range": "percentile:1"}),
    "JPEG": ({"kinds": ("JPEG",)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_encoded_images_are_the_raw_ones(case: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    made, options = CASES[case]
    source = folder(tmp_path / "images", **made)
    encoded, raw = opened(source, **options), opened(source, "raw", **options)
    assert encoded.scale == raw.scale
    assert encoded.class_names == raw.class_names
    assert encoded.image_shape == raw.image_shape
    for one, other in ((encoded.train, raw.train), (encoded.test, raw.test)):
        assert np.array_equal(one.images[:], other.images)
        assert np.array_equal(one.labels, other.labels)
        assert one.names is not None and other.names is not None
        assert list(one.names) == list(other.names)
        assert one.images.dtype == other.images.dtype
    gathered = batches(encoded), batches(raw)
    for step in range(8):
        for one, other in zip(*(each.micro_batch(step, 0) for each in gathered), strict=True):
            assert torch.equal(one, other)
    for each in gathered:
        each.close()


def test_ranks_and_jumps_take_the_rows_of_the_whole(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    dataset = opened(folder(tmp_path / "images"))
    whole, parts = batches(dataset), [batches(dataset, rows) for rows in (((0, 3), (3, 3)), ((6, 4),))]
    for step in (0, 1, 7, 2):
        images, labels = whole.micro_batch(step, 0)
        found = [parts[0].micro_batch(step, 0), parts[0].micro_batch(step, 1), parts[1].micro_batch(step, 0)]
        assert torch.equal(torch.cat([one for one, _ in found]), images)
        assert torch.equal(torch.cat([one for _, one in found]), labels)
    for each in (whole, *parts):
        each.close()


def test_images_are_indexed_as_an_array_is(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    images = opened(folder(tmp_path / "images")).train.images
    values = images[:]
    masked = np.arange(len(values)) % 3 == 0
    for rows in (0, -1, slice(2, 20, 5), slice(None, None, -4), np.array([5, -1, 5]), np.array([], np.int64), masked):
        assert np.array_equal(images[rows], values[rows])
    for outside in (len(values), -len(values) - 1, np.array([0, 99])):
        with pytest.raises(IndexError):
            images[outside]


def test_packed_twice_is_one_digest_and_small(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    source = folder(tmp_path / "images", ("JPEG",), side=64)
    first, second, raw = opened(source), opened(source, cache="another"), opened(source, "raw", cache="raw")
    assert first.digest == second.digest == opened(source).digest != raw.digest
    packed = [next((tmp_path / one).glob("*/train_images.npy")).stat().st_size for one in ("cache", "raw")]
    assert packed[0] < packed[1]


def test_bytes_of_a_file_are_packed_as_they_are(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    opened(folder(tmp_path / "images", ("JPEG",)))
    (packed,) = (tmp_path / "cache").glob("*/train_images.npy")
    content = np.load(packed).tobytes()
    kept = [path.read_bytes() in content for path in (tmp_path / "images").rglob("*.jpeg")]
    assert sum(kept) == 27


def test_a_survey_says_the_size_of_encoded_images(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    source = folder(tmp_path / "images", ("JPEG",))
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), packed_as="encoded")
    found = survey_source(source, ".", packing)
    opened(source)
    columns = ("images", "labels", "offsets")
    files = [path for name in columns for path in (tmp_path / "cache").glob(f"*/*_{name}.npy")]
    headers, ends = 128 * len(files), 2 * 8
    assert found.bytes == sum(path.stat().st_size for path in files) - headers - ends
    assert any("as encoded" in line for line in found.lines())
    with pytest.raises(DataError, match="synthetic is of arrays"):
        survey_source("synthetic", ".", packing)


def test_a_damaged_encoded_cache_is_packed_again(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    source = folder(tmp_path / "images")
    wanted = opened(source).train.images[:]
    for name in ("train_images.npy", "train_offsets.npy", "test_images.npy"):
        (path,) = (tmp_path / "cache").glob(f"*/{name}")
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
        assert np.array_equal(opened(source).train.images[:], wanted)


def test_what_cannot_be_packed_encoded_is_one_line(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    with pytest.raises(DataError, match="synthetic is of arrays, not of encoded images; leave out --packed-as encoded"):
        opened("synthetic", synthetic_images=10, image_size=8)
    with pytest.raises(ConfigError, match="packed_as encoded with pages images"):
        DataConfig(packed_as="encoded", pages="images")
    (tmp_path / "images").mkdir()
    stream = io.BytesIO()
    picture(0).save(stream, "PNG")
    for name, content in {"a": stream.getvalue(), "b": stream.getvalue(), "c": stream.getvalue()[:60]}.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(content)
    assert len(opened(f"folder:{tmp_path / 'images'}").train.images) == 1
    with pytest.raises(DataError, match="is unreadable"):
        opened(f"folder:{tmp_path / 'images'}", unreadable_images="error", cache="another")


@pytest.mark.slow
def test_two_processes_decode_the_run_of_one_and_resume_it(tmp_path: Path) -> None:
    """Real processes: two from the start, killed at the fourth step, against one that packs values."""
    source = folder(tmp_path / "images", ("PNG", "WEBP"))
    losses = {}
    for name, storage in (("one", "raw"), ("two", "encoded")):
        config = small_config(
            "vae",
            data=source,
            packing=DataConfig(cache_dir=str(tmp_path / "cache"), packed_as=storage),  # type: ignore[arg-type]
            steps=8,
            global_batch_size=10,
            checkpoint_every=4,
            evaluate_every=8,
            sample_every=8,
            keep_checkpoints=2,
            run_dir=str(tmp_path / name),
        )
        file = write_config(tmp_path / f"{name}.json", config)
        start = in_two_ranks() if name == "two" else warm_python()
        command = [*start, str(REPOSITORY / "launch/train.py"), "--config", str(file)]
        for _ in range(1 + (name == "two")):
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            losses[name] = losses_of(read_metrics(tmp_path / name / "metrics.jsonl"))
            newest, before = (tmp_path / name / "checkpoints").iterdir()
            whole, _ = load(newest := max(newest, before))
            if name == "two" and "first" not in losses:
                losses["first"], first = losses[name], whole
                shutil.rmtree(newest)  # as if it had been killed before it was written
    assert losses["two"] == losses["first"] == close_losses(losses["one"])
    for group, tensors in whole.tensors.items():
        assert_same_bits(dict(first.tensors[group]), dict(tensors))
