"""Labels of shards of every kind: those that the same images have as one parquet file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.errors import DataError
from gen_dist.inference.encoding import encode
from tests.support.shards import encoded, tar_of

COUNT = 24
GONE = (5, 17)


def values(number: int) -> dict[str, Any]:
    return {
        "age": 20.0 + number / 4,
        "smile": bool(number % 3),
        "hair": ("red", "black", "fair")[number % 3],
        "kind": number % 4,
        "pair": [number % 2, number % 5],
        "height": float(number),
    }


CASES: dict[str, tuple[str, ...]] = {
    "numbers": ("age", "height"),
    "one number": ("age",),
    "attributes": ("smile", "kind"),
    "attributes as texts": ("hair", "kind"),
    "a list": ("pair",),
    "one class": ("hair",),
    "one class by number": ("kind",),
}
MISSING = ("numbers", "attributes as texts", "one class", "one class by number")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Dataset]:
    def open_it(source: str, **options: Any) -> Dataset:
        packing = DataConfig(cache_dir=str(tmp_path / "cache"), test_fraction=0.2, **options)
        return open_dataset(source, "unused", packing, lambda _: None)

    return open_it


def rows(gone: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [dict.fromkeys(values(number)) if number in gone else values(number) for number in range(COUNT)]


def write_parquet(path: Path, gone: tuple[int, ...] = (), first: int = 0, last: int = COUNT) -> str:
    some = [{"image": {"bytes": encoded(number)}, **row} for number, row in enumerate(rows(gone))][first:last]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path, row_group_size=5)
    return str(path)


def write_tar(path: Path, gone: tuple[int, ...] = (), first: int = 0, last: int = COUNT) -> str:
    files = {}
    for number, row in list(enumerate(rows(gone)))[first:last]:
        files[f"{number:04}.png"] = encoded(number)
        files[f"{number:04}.json"] = json.dumps(row).encode()
    path.write_bytes(tar_of(files))
    return str(path)


def labels_of(dataset: Dataset) -> dict[bytes, str]:
    """Label of each image, as people read it."""
    return {
        image.tobytes(): dataset.labels.caption(np.atleast_1d(label).tolist())
        for split in (dataset.train, dataset.test)
        for image, label in zip(split.images[:], split.labels, strict=True)
    }


@pytest.mark.parametrize("write", [write_tar, write_parquet])
@pytest.mark.parametrize(("case", "gone"), [*((case, ()) for case in CASES), *((case, GONE) for case in MISSING)])
def test_labels_are_those_of_one_parquet_file(
    case: str, gone: tuple[int, ...], write: Any, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    asked: dict[str, Any] = {"label_columns": CASES[case], "missing_labels": "unknown" if gone else "refuse"}
    ending = write.__name__.removeprefix("write_")
    for number in range(2):
        write(tmp_path / f"{number}.{ending}", gone, 12 * number, 12 * (number + 1))
    theirs = opened(f"parquet:{write_parquet(tmp_path / 'whole.parquet', gone)}", **asked)
    ours = opened(f"shards:{tmp_path}/{{0..1}}.{ending}", **asked)
    assert labels_of(ours) == labels_of(theirs)
    assert len(labels_of(ours)) == COUNT
    # Moments and examples are those of training images, which are others.
    bare = [replace(one.labels, mean=(), deviation=(), examples=()) for one in (ours, theirs)]
    assert bare[0] == bare[1]
    if ours.labels.kind == "numbers":
        train = np.asarray(ours.train.labels, np.float64)
        assert np.allclose(ours.labels.mean, np.nanmean(train, axis=0), rtol=1e-12)
        assert np.allclose(ours.labels.deviation, np.nanstd(train, axis=0), rtol=1e-12)
    assert opened(f"shards:{tmp_path}/{{0..1}}.{ending}", **asked).digest == ours.digest


def test_the_usual_label_may_be_a_number_or_a_list(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    for name, label in (("number", 0.5), ("list", [1, 0, 1])):
        files = {}
        for number in range(4):
            files[f"{number}.png"] = encoded(number)
            files[f"{number}.json"] = json.dumps({"label": label}).encode()
        (tmp_path / f"{name}.tar").write_bytes(tar_of(files))
    assert opened(f"shards:{tmp_path}/number.tar").labels.names == ("label",)
    assert opened(f"shards:{tmp_path}/list.tar").labels.names == ("label_0", "label_1", "label_2")


LINES: dict[str, tuple[dict[str, Any], str]] = {
    "a class is missing": ({"label_columns": ("hair",)}, "some images have labels and some have none"),
    "a number is missing": (
        {"label_columns": ("age", "height")},
        "some images have no label age; add it, or",
    ),
    "no such label": ({"label_columns": ("eyes",), "missing_labels": "unknown"}, "eyes of --label-columns"),
    "texts and numbers": (
        {"label_columns": ("hair", "age"), "missing_labels": "unknown"},
        "the columns of labels are texts and numbers",
    ),
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_labels_that_cannot_be_learned_are_one_line(
    case: str, write: Any, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    options, line = LINES[case]
    ending = write.__name__.removeprefix("write_")
    if case == "a class is missing" and ending == "parquet":
        line = "1 labels in a.parquet are missing"
    with pytest.raises(DataError) as raised:
        opened(f"shards:{write(tmp_path / f'a.{ending}', GONE)}", **options)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_shards_with_labels_of_two_kinds_are_refused(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    write_tar(tmp_path / "0.tar")
    (tmp_path / "1.tar").write_bytes(tar_of({"a.png": encoded(90), "a.json": json.dumps({"age": "old"}).encode()}))
    with pytest.raises(DataError, match="are of another kind than those of the shards before it"):
        opened(f"shards:{tmp_path}/{{0..1}}.tar", label_columns=("age",))


def test_a_conditional_vae_trains_on_numbers_of_shards(tmp_path: Path) -> None:
    config = gen_dist.preset("vae-mnist").with_options(
        data=f"shards:{write_tar(tmp_path / 'a.tar', GONE)}",
        cache_dir=str(tmp_path / "cache"),
        label_columns=("age", "height"),
        missing_labels="unknown",
        test_fraction=0.2,
        conditioning="concat",
        hidden_sizes=(8,),
        steps=2,
        global_batch_size=6,
        run_dir=str(tmp_path / "run"),
    )
    gen_dist.train(config, say=lambda _: None)
    model = gen_dist.load(tmp_path / "run")
    assert model.labels.names == ("age", "height")
    assert model.sample(2, torch.tensor([[30.0, 4.0], [21.0, float("nan")]])).shape == (2, 1, 8, 8)
    others = f"shards:{write_tar(tmp_path / 'b.tar', GONE)}"
    encode(tmp_path / "run", tmp_path / "latents", data=others, file_format="npz", announce=lambda _: None)
    with np.load(tmp_path / "latents" / "train.npz") as latents:
        assert latents["label"].shape[1:] == (2,)
