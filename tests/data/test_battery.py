"""One battery for every source and type of values: what training takes of it does not depend on how it takes it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, TrainBatches, open_dataset
from tests.support.shards import tar_of

COUNT, BATCH = 34, 8
PLANE = np.random.default_rng(0).integers(0, 100, (COUNT, 6, 5))
"""Images that all differ."""


def values_of(dtype: str) -> Any:
    scale = {"uint8": 2, "uint16": 600, "int16": 300, "float16": 0.01, "float32": 0.01}[dtype]
    return (PLANE * scale - (9000 if dtype == "int16" else 0)).astype(dtype)


def encoded(values: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF" if values.dtype == np.float32 else "PNG")
    return file.getvalue()


def folder(path: Path, dtype: str) -> str:
    for place, values in enumerate(values_of(dtype)):
        file = path / "images" / "abc"[place % 3] / f"{place:02}.{'tiff' if dtype == 'float32' else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(values))
    return f"folder:{path / 'images'}"


def parquet(path: Path, dtype: str) -> str:
    pyarrow, tables = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    images = [{"bytes": encoded(values)} for values in values_of(dtype)]
    tables.write_table(pyarrow.table({"image": images, "label": np.arange(COUNT) % 3}), path / "a.parquet")
    return f"parquet:{path / 'a.parquet'}"


def array(path: Path, dtype: str) -> str:
    np.save(path / "a.npy", values_of(dtype))
    return f"array:{path / 'a.npy'}"


def archive(path: Path, dtype: str) -> str:
    numbers = np.linspace(-1, 1, 2 * COUNT).reshape(COUNT, 2)
    np.savez(path / "a.npz", x=values_of(dtype), labels=numbers)
    return f"array:{path / 'a.npz'}"


def shards(path: Path, dtype: str) -> str:
    files: dict[str, bytes] = {}
    for place, values in enumerate(values_of(dtype)):
        if dtype in ("uint8", "uint16"):
            files[f"{place:02}.png"] = encoded(values)
        else:
            stream = io.BytesIO()
            np.save(stream, values)
            files[f"{place:02}.npy"] = stream.getvalue()
        files[f"{place:02}.cls"] = str(place % 3).encode()
    for shard in range(3):
        some = {name: content for name, content in files.items() if int(name[:2]) % 3 == shard}
        (path / f"{shard}.tar").write_bytes(tar_of(some))
    return f"shards:{path}/{{0..2}}.tar"


SOURCES: list[tuple[Callable[[Path, str], str], str]] = [
    *((shards, dtype) for dtype in ("uint8", "uint16", "int16", "float16", "float32")),
    *((folder, dtype) for dtype in ("uint8", "uint16", "float32")),
    *((parquet, dtype) for dtype in ("uint8", "uint16", "float32")),
    *((array, dtype) for dtype in ("uint8", "uint16", "int16", "float16", "float32")),
    (archive, "uint8"),
]


Storage = Literal["raw", "encoded"]
STORED: list[tuple[Callable[[Path, str], str], str, Storage]] = [
    *((make, dtype, "raw") for make, dtype in SOURCES),
    *((make, dtype, "encoded") for make in (folder, parquet) for dtype in ("uint8", "uint16", "float32")),
]


@pytest.fixture(params=STORED, ids=lambda one: f"{one[0].__name__}-{one[1]}-{one[2]}")
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Storage]:
    make, dtype, storage = request.param
    return make(tmp_path, dtype), dtype, storage


def opened(source: str, cache: Path, storage: Storage) -> Dataset:
    packing = DataConfig(cache_dir=str(cache), packed_as=storage)
    return open_dataset(source, "", packing, lambda _line: None)


def batches_of(dataset: Dataset, rows: list[tuple[int, int]], *, resident: bool) -> TrainBatches:
    return TrainBatches(
        dataset.train,
        seed=5,
        global_batch_size=BATCH,
        micro_batches=rows,
        device=torch.device("cpu"),
        resident_budget_bytes=2**30 if resident else 0,
    )


def test_a_source_gives_one_run_however_it_is_read(source: tuple[str, str, Storage], tmp_path: Path) -> None:
    name, dtype, storage = source
    dataset = opened(name, tmp_path / "one", storage)
    assert opened(name, tmp_path / "two", storage).digest == dataset.digest  # packed twice
    assert dataset.scale.dtype == dtype
    train = dataset.train
    both = np.concatenate([train.images[:], dataset.test.images[:]])[:, 0]
    assert sorted(map(bytes, both)) == sorted(map(bytes, values_of(dtype)))  # no value is changed

    whole = batches_of(dataset, [(0, BATCH)], resident=True)
    mapped = batches_of(dataset, [(0, BATCH)], resident=False)
    ranks = [batches_of(dataset, [(first, 2), (first + 2, 2)], resident=first == 0) for first in (0, 4)]
    known = {train.for_model(np.array([row]))[0].numpy().tobytes(): row for row in range(len(train.labels))}
    seen = []
    steps = -(-2 * len(train.labels) // BATCH)
    for step in range(steps):
        images, labels = whole.micro_batch(step, 0)
        parts = [rank.micro_batch(step, index) for rank in ranks for index in (0, 1)]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)  # two ranks, micro-batches
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        for one, other in zip(mapped.micro_batch(step, 0), (images, labels), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype  # mapped against resident
        rows = [known[image.numpy().tobytes()] for image in images]
        assert np.array_equal(labels.numpy(), train.labels[rows])
        seen += rows
    epoch = len(train.labels)
    assert sorted(seen[:epoch]) == sorted(seen[epoch : 2 * epoch]) == list(range(epoch))  # once an epoch
    resumed = batches_of(dataset, [(0, BATCH)], resident=False)
    assert torch.equal(resumed.micro_batch(steps - 1, 0)[0], images)
    for batches in (whole, mapped, resumed, *ranks):
        batches.close()
