"""Shards made of a source: the images and labels that it has, the same bytes whoever makes them, and resumable."""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.errors import DataError, UserError
from gen_dist.launch.packing.making import Report
from gen_dist.launch.packing.options import PackOptions
from gen_dist.launch.packing.plan import ShardTask
from gen_dist.launch.packing.running import Job, in_this_process, pack
from tests.data.test_shard_labels import GONE, labels_of
from tests.data.test_shard_labels import write_parquet as write_labels
from tests.support.shards import encoded, samples, served, tar_of, write_shards

NAMES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """20 images of two classes, one of them damaged and one small; four are gray."""
    for number in range(20):
        path = tmp_path / "images" / NAMES[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side, mode = (4 if number == 11 else 10), ("L" if number % 5 == 0 else "RGB")
        content = encoded(number, side, mode=mode)
        path.write_bytes(content[:40] if number == 6 else content)
    return f"folder:{tmp_path / 'images'}"


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def packed(tmp_path: Path, lines: list[str]) -> Callable[..., Path]:
    def pack_it(source: str, out: str = "out", run: Any = in_this_process, **options: Any) -> Path:
        place = out if "://" in out else str(tmp_path / out)
        pack(PackOptions(source=source, out=place, **options), run, lines.append)
        return Path(place)

    return pack_it


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Dataset]:
    def open_it(source: str, **options: Any) -> Dataset:
        packing = DataConfig(cache_dir=str(tmp_path / "cache"), test_fraction=0.2, **options)
        return open_dataset(source, "unused", packing, lambda _: None)

    return open_it


def images_of(dataset: Dataset) -> set[tuple[bytes, str]]:
    """All images with the names of their classes."""
    return {
        (image.tobytes(), dataset.class_names[label])
        for split in (dataset.train, dataset.test)
        for image, label in zip(split.images[:], split.labels, strict=True)
    }


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_shards_have_the_images_and_labels_of_a_folder(
    container: str,
    folder: str,
    lines: list[str],
    packed: Callable[..., Path],
    opened: Callable[..., Dataset],
) -> None:
    out = packed(folder, image_size=8, channels=3, least_side=6, images_per_shard=7, container=container)
    shards = opened(f"shards:{out}/train-{{00000..00002}}.{container}")
    os.unlink(Path(folder.partition(":")[2]) / "dog" / "11.png")  # too small
    assert images_of(shards) == images_of(opened(folder, image_size=8, channels=3))
    assert shards.class_names == NAMES
    assert lines[0].startswith(f"packed {folder}: 18 images in 3 shards of ")
    assert "left out 1 image, unreadable: cat/06.png" in lines
    assert "left out 1 image, too small: dog/11.png" in lines
    assert "18 are resized to 8x8" in lines
    assert lines[-1] == f"train on it with --data 'shards:{out}/train-{{00000..00002}}.{container}'"


def test_file_names_and_the_order_of_classes_are_kept(tmp_path: Path, packed: Callable[..., Path]) -> None:
    write_parquet(tmp_path / "train.parquet", range(9), ("zebra", "ant"), group=2)
    out = packed(f"parquet:{tmp_path / 'train.parquet'}", container="parquet", images_per_shard=4)
    table = pyarrow.parquet.read_table(out / "train-00002.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == ["zebra", "ant"]
    assert table["label"].to_pylist() == [0]
    assert table["image"].to_pylist()[0]["path"] == "train.parquet row 8"
    assert np.array_equal(pixels(table["image"].to_pylist()[0]["bytes"]), pixels(encoded(8)))


def test_both_splits_become_shards(
    tmp_path: Path, lines: list[str], packed: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", range(10), NAMES)
    write_parquet(tmp_path / "set" / "test.parquet", range(10, 14), NAMES)
    source = f"parquet:{tmp_path / 'set'}"
    out = packed(source, image_format="webp", quality=100)
    assert lines[-1].endswith(f"--data 'shards:{out}/train-00000.tar' --test-shards '{out}/test-00000.tar'")
    # WebP has no grayscale.
    shards = opened(f"shards:{out}/train-00000.tar", test_shards=f"{out}/test-00000.tar", channels=1)
    assert len(shards.test.labels) == 4
    assert images_of(shards) == images_of(opened(source))


def test_shards_are_the_same_bytes_whoever_makes_them(folder: str, tmp_path: Path, packed: Callable[..., Path]) -> None:
    def backwards(job: Job, tasks: Sequence[ShardTask]) -> Iterator[Report]:
        return map(job.make, reversed(tasks))

    options: dict[str, Any] = {"image_size": 8, "images_per_shard": 3, "image_format": "jpeg"}
    out, other = packed(folder, **options), packed(folder, "other", backwards, **options)
    assert files_of(out) == files_of(other)
    assert len(files_of(out)) == 8  # of 20 images, and the plan


@pytest.mark.parametrize("name", ["it's $(touch here)", "two\nlines", os.fsdecode(b"\xff")])
def test_the_command_to_train_is_one_line_of_a_shell(
    name: str, folder: str, lines: list[str], packed: Callable[..., Path]
) -> None:
    out = packed(folder, name, images_per_shard=100)
    assert not any("\n" in line for line in lines)
    words = shlex.split(lines[-1].partition(" with ")[2])
    assert words[0] == "--data" and len(words) == 2
    assert name.isprintable() is (words[1] == f"shards:{out}/train-00000.tar")


def test_finished_shards_are_not_made_again(folder: str, lines: list[str], packed: Callable[..., Path]) -> None:
    made: list[int] = []

    def few(job: Job, tasks: Sequence[ShardTask]) -> Iterator[Report]:
        for task in tasks[:2]:
            made.append(task.number)
            yield job.make(task)
        raise DataError("killed")

    with pytest.raises(DataError, match="killed"):
        packed(folder, run=few, images_per_shard=5)

    def counted(job: Job, tasks: Sequence[ShardTask]) -> Iterator[Report]:
        made.extend(task.number for task in tasks)
        return map(job.make, tasks)

    out = packed(folder, run=counted, images_per_shard=5)
    assert made == [0, 1, 2, 3]
    assert f"2 of 4 shards are finished in {out}" in lines
    assert files_of(out) == files_of(packed(folder, "whole", images_per_shard=5))


def test_shards_of_a_server_become_shards_at_a_url(
    tmp_path: Path, packed: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    write_shards(tmp_path / "shards", 2, 6)
    (tmp_path / "shards" / "test.tar").write_bytes(tar_of(samples(12, 3)))
    with served(tmp_path / "shards") as server:
        source, tested = f"shards:{server.url}/{{000..001}}.tar", f"{server.url}/test.tar"
        packed(source, "memory://packed", test_shards=tested, container="parquet")
        theirs = opened(source, test_shards=tested)
        ours = opened("shards:memory://packed/train-*.parquet", test_shards="memory://packed/test-00000.parquet")
        assert images_of(ours) == images_of(theirs)
        assert ours.class_names == theirs.class_names
    rows = pyarrow.parquet.read_table(io.BytesIO(fsspec.filesystem("memory").cat("/packed/train-00001.parquet")))
    assert (
        rows["image"].to_pylist()[0]["path"] == "001.tar row 0" or rows["image"].to_pylist()[0]["path"] == "000006.png"
    )


def test_a_shard_that_may_be_cut_off_is_named_when_it_is_packed(
    tmp_path: Path, lines: list[str], packed: Callable[..., Path]
) -> None:
    whole = tar_of(samples(0, 6))
    (tmp_path / "a.tar").write_bytes(whole[: 6 * 4 * 512])
    (tmp_path / "b.tar").write_bytes(whole)
    packed(f"shards:{tmp_path}/*.tar")
    told = [line for line in lines if "1 archive without the two records of zeros that mark the end is used" in line]
    assert [line.endswith("cut off; compare it with the original: a.tar") for line in told] == [True]
    assert any("12 images in 2 shards" in line for line in lines)


@pytest.mark.parametrize("container", ["tar", "parquet"])
@pytest.mark.parametrize("columns", [(), ("age", "kind")])
def test_training_need_not_look_into_shards_that_were_packed(
    container: str, columns: tuple[str, ...], tmp_path: Path, packed: Callable[..., Path]
) -> None:
    source = f"parquet:{write_labels(tmp_path / 'set.parquet')}"
    out = packed(source, container=container, images_per_shard=9, label_columns=columns or ("hair",))
    pattern, digests = f"train-{{00000..00002}}.{container}", []
    with served(out) as server:
        for cache in ("with", "without"):
            packing = DataConfig(cache_dir=str(tmp_path / cache), test_fraction=0.2, label_columns=columns)
            server.asked.clear()
            digests.append(open_dataset(f"shards:{server.url}/{pattern}", "", packing, lambda _: None).digest)
            shard = out / f"train-00001.{container}"
            end = shard.stat().st_size - 1 if container == "tar" else ""  # of parquet files, parts are read for images
            read = [asked for asked in server.asked if f"GET {shard.name} bytes=0-{end}" in asked]
            assert bool(read) == (cache == "without" or container == "parquet")
            (out / "plan.json").unlink(missing_ok=True)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"source": "mnist5k"}, "mnist5k: only folder:PATH, parquet:PATH and shards:PATTERN become shards"),
        ({"source": "folder:/nowhere"}, "folder:/nowhere"),
        ({"out": "http://127.0.0.1:9/set"}, "web servers are read-only"),
        ({"unreadable_images": "error"}, "cat/06.png is unreadable"),
        ({"quality": 0}, "quality 0 is not between 1 and 100"),
        ({"images_per_shard": 0}, "images_per_shard 0 is less than 1"),
        ({"image_size": "x"}, "image_size 'x' is no side"),
        ({"out": ""}, "name a source and a place"),
        ({"out": "https://user:word@host/set"}, "has a password or signature in it"),
        ({"source": "shards:a-{0..1}.tar", "images_per_shard": 5}, "leave out --images-per-shard 5"),
        ({"source": "shards:a-{0..1}.tar", "label_columns": ("image",)}, "a label is called image"),
    ],
)
def test_what_cannot_be_packed_is_one_line(said: dict[str, Any], line: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        options = PackOptions(**{"source": folder, "out": str(tmp_path / "out"), **said})
        pack(options, in_this_process, lambda _: None)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value) and "word@" not in str(raised.value)


def test_relative_paths_count_from_where_the_command_is_called(
    folder: str, tmp_path: Path, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(job: Job, tasks: Sequence[ShardTask]) -> Iterator[Report]:
        monkeypatch.chdir(tmp_path / "images")
        return map(job.make, tasks)

    monkeypatch.chdir(tmp_path)
    pack(PackOptions(source="folder:images", out="out"), elsewhere, lambda _: None)
    assert files_of(tmp_path / "out").keys() == {"plan.json", "train-00000.tar"}


def test_a_shard_that_has_gone_or_is_cut_off_is_made_again(folder: str, packed: Callable[..., Path]) -> None:
    out = packed(folder, images_per_shard=5)
    before = files_of(out)
    (out / "train-00001.tar").unlink()
    (out / "train-00002.tar").write_bytes(before["train-00002.tar"][:700])
    packed(folder, images_per_shard=5)
    assert files_of(out) == before


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_numbers_that_are_called_label_stay_numbers(
    container: str, tmp_path: Path, packed: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    rows = [{"image": {"bytes": encoded(number)}, "label": number / 4} for number in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    source = f"parquet:{tmp_path / 'set.parquet'}"
    theirs = labels_of(opened(source))
    for out in ("first", "again"):
        source = f"shards:{packed(source, out, container=container)}/train-00000.{container}"
        assert labels_of(opened(source)) == theirs


def test_classes_named_by_other_numbers_need_parquet(
    tmp_path: Path, packed: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    for number in range(8):
        path = tmp_path / "images" / ("1001", "2002")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    source = f"folder:{tmp_path / 'images'}"
    with pytest.raises(DataError, match=r"called 1001, 2002, .* from 0 to 1; use --container parquet"):
        packed(source)
    assert not (tmp_path / "out").exists()
    ours = opened(f"shards:{packed(source, container='parquet')}/train-00000.parquet")
    assert images_of(ours) == images_of(opened(source))
    assert ours.class_names == ("1001", "2002")


@pytest.mark.parametrize("name", ["out", "[out]"])
def test_another_packing_in_the_same_place_is_refused(name: str, folder: str, packed: Callable[..., Path]) -> None:
    out = packed(folder, name, image_size=8)
    before = files_of(out)
    with pytest.raises(DataError, match=r"has shards of another packing: of folder:.*give an empty --out"):
        packed(folder, name, image_size=9)
    assert files_of(out) == before
    (out / "plan.json").unlink()
    with pytest.raises(DataError, match=r"has reports and no plan.json"):
        packed(folder, name, image_size=9)


@pytest.mark.parametrize("name", ["train-00000.tar", "plan.json"])
def test_a_file_that_no_packing_wrote_is_not_overwritten(name: str, folder: str, packed: Callable[..., Path]) -> None:
    theirs = Path(folder.partition(":")[2]).with_name("out") / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"[]")
    with pytest.raises(DataError, match=rf"{name}.*give an empty --out"):
        packed(folder)
    assert files_of(theirs.parent) == {name: b"[]"}


@pytest.mark.parametrize("damage", ["[]", "{}", "[" * 10**5, '{"name": 3}', "\0"])
def test_a_shard_with_a_damaged_report_is_made_again(damage: str, folder: str, packed: Callable[..., Path]) -> None:
    out = packed(folder, images_per_shard=10)
    report = out / "reports" / "train-00001.tar.json"
    whole = report.read_bytes()
    report.write_text(damage)
    packed(folder, images_per_shard=10)
    assert report.read_bytes() == whole


@pytest.mark.parametrize("out", ["out", "memory://given-up"])
def test_a_packing_that_made_nothing_gives_way(out: str, folder: str, packed: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="is unreadable"):
        packed(folder, out, unreadable_images="error")
    packed(folder, out)


def test_images_of_more_than_8_bits_keep_them_or_are_reduced(
    tmp_path: Path, packed: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(10):
        values = np.random.default_rng(number).integers(0, 2**16, (8, 8), np.uint16)
        Image.fromarray(values).save(tmp_path / "deep" / f"{number}.png")
    source = f"folder:{tmp_path / 'deep'}"
    for number, options in enumerate(({"value_range": "dtype"}, {"dtype": "uint8"})):
        kept = {name: value for name, value in options.items() if name == "dtype"}
        out = packed(source, f"out{number}", image_size=6, **kept)
        ours = opened(f"shards:{out}/train-00000.tar", **options)
        assert images_of(ours) == images_of(opened(source, image_size=6, **options))
        assert ours.scale.dtype == ("uint8" if kept else "uint16")


def test_images_of_two_types_are_told(folder: str, lines: list[str], packed: Callable[..., Path]) -> None:
    deep = Image.fromarray(np.full((10, 10), 999, np.uint16))
    deep.save(Path(folder.partition(":")[2]) / "dog" / "99.png")
    packed(folder)
    assert "warning: images are 1 uint16 and 19 uint8, and training takes one kind" in "\n".join(lines)


def test_pages_of_more_than_8_bits_are_refused_as_for_training(tmp_path: Path, packed: Callable[..., Path]) -> None:
    page = Image.fromarray(np.full((8, 8), 999, np.uint16))
    (tmp_path / "images").mkdir()
    page.save(tmp_path / "images" / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(DataError, match="has 2 pages of uint16: say --pages images"):
        packed(f"folder:{tmp_path / 'images'}")


@pytest.mark.parametrize("container", ["tar", "parquet"])
@pytest.mark.parametrize("columns", [("age",), ("age", "kind"), ("hair", "kind"), ("hair",), ("pair",)])
def test_labels_of_all_kinds_are_kept(
    container: str,
    columns: tuple[str, ...],
    tmp_path: Path,
    lines: list[str],
    packed: Callable[..., Path],
    opened: Callable[..., Dataset],
) -> None:
    asked: dict[str, Any] = {"label_columns": columns, "missing_labels": "unknown"}
    gone = () if columns == ("pair",) else GONE
    source = f"parquet:{write_labels(tmp_path / 'set.parquet', gone)}"
    out = packed(source, container=container, images_per_shard=9, **asked)
    of_class = columns == ("hair",)
    names = ("label_0", "label_1") if columns == ("pair",) else columns
    told = " --missing-labels unknown" if of_class else f" --label-columns {' '.join(names)} --missing-labels unknown"
    assert lines[-1].endswith(f"/train-{{00000..00002}}.{container}'{told}")
    ours = opened(
        f"shards:{out}/train-{{00000..00002}}.{container}",
        missing_labels="unknown",
        label_columns=() if of_class else names,
    )
    assert labels_of(ours) == labels_of(opened(source, **asked))
    again = f"shards:{out}/train-*.{container}"
    packed(again, "again", container=container, label_columns=() if of_class else names, missing_labels="unknown")
    one_more = f"shards:{tmp_path}/again/train-*.{container}"
    twice = opened(one_more, missing_labels="unknown", label_columns=() if of_class else names)
    assert labels_of(twice) == labels_of(ours)


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)))


def write_parquet(path: Path, numbers: Sequence[int], names: Sequence[str], group: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(
        {"image": [{"bytes": encoded(number)} for number in numbers], "label": [number % 2 for number in numbers]}
    )
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
