"""Data that may not mean what they say are refused, or a line says how they were taken."""

from __future__ import annotations

import io
import os
import re
import socket
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.naming import names_test, names_train, remarks_on_classes
from gen_dist.errors import DataError


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def write_folder(path: Path, *names: str) -> str:
    """A folder with these files; a name with a slash at its end is an empty directory."""
    for value, name in enumerate(names):
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(value))
    return f"folder:{path}"


def write_parquet(path: Path, **rows: int) -> str:
    """A directory with a parquet file for each name, of so many rows."""
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    for name, count in rows.items():
        table = pyarrow.table({"image": [png(value) for value in range(count)], "label": [0] * count})
        pyarrow.parquet.write_table(table, path / f"{name.replace('__', '-')}.parquet")
    return f"parquet:{path}"


def opened(source: str, tmp_path: Path, **options: Any) -> tuple[Dataset, str]:
    """The data and the lines that were announced."""
    lines: list[str] = []
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), **options)
    for _ in range(2):  # lines are told at each opening
        lines.clear()
        dataset = open_dataset(source, ".", packing, lines.append)
    return dataset, "\n".join(lines)


A, B = ("a/1.png", "a/2.png"), ("b/1.png", "b/2.png")
TRAIN = tuple(f"train/{name}" for name in (*A, *B))

# Files, classes, images in train and test, words of a line.
TAKEN: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[int, int], str]] = {
    "train alone": (TRAIN, ("a", "b"), (3, 1), ""),
    "train beside directories without images": ((*TRAIN, "docs/", "__MACOSX/train/._1.png"), ("a", "b"), (3, 1), ""),
    "train beside loose images": ((*TRAIN, "x.png"), ("a", "b"), (3, 1), "not used beside train/: 1 image"),
    "Train and TEST": (("Train/a/1.png", "Train/a/2.png", "TEST/a/1.png"), ("a",), (2, 1), ""),
    "training and validation": (("training/a/1.png", "validation/a/1.png"), ("a",), (1, 1), ""),
    "training_set and test_set": (("training_set/1.png", "test_set/1.png"), ("all",), (1, 1), ""),
    "Train and val": (("Train/1.png", "Train/2.png", "val/1.png"), ("all",), (2, 1), ""),
    "train, test and val": ((*TRAIN, "test/a/1.png", "val/a/1.png"), ("a", "b"), (4, 1), "test/: val/"),
    "train, test and others": (
        (*TRAIN, "test/a/1.png", "extra/1.png", "x.png"),
        ("a", "b"),
        (4, 1),
        "extra/, 1 image",
    ),
    "train as a class": (
        ("bus/1.png", "car/1.png", "train/1.png"),
        ("bus", "car", "train"),
        (2, 1),
        "taken for a class",
    ),
    "test as a class": (("pass/1.png", "test/1.png"), ("pass", "test"), (1, 1), "test/ lies beside pass/"),
    "splits inside classes": (
        ("a/train/1.png", "a/test/1.png", "b/1.png"),
        ("a", "b"),
        (2, 1),
        "inside the class a are not splits",
    ),
    "numbers out of order": (
        ("1/1.png", "10/1.png", "2/1.png"),
        ("1", "10", "2"),
        (2, 1),
        "label 1 is '10', before '2'",
    ),
    "numbers in names": (("c_9/1.png", "c_10/1.png"), ("c_10", "c_9"), (1, 1), "write leading zeros"),
    "numbers with leading zeros": (("01/1.png", "02/1.png", "10/1.png"), ("01", "02", "10"), (2, 1), ""),
    "capitals": (("cat/1.png", "Cat/1.png"), ("Cat", "cat"), (1, 1), "'Cat' and 'cat' differ in capitals"),
    "an empty class": ((*A, *B, "c/"), ("a", "b"), (3, 1), "c/ has no images and is not a class"),
    "other files": ((*A, "a/x.heic", "a/y.heic", "a/LICENSE"), ("a",), (1, 1), "2 .heic, 1 without extension"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_line_says_how_a_folder_was_taken(tmp_path: Path, case: str) -> None:
    names, classes, counts, words = TAKEN[case]
    dataset, lines = opened(write_folder(tmp_path / "images", *names), tmp_path, image_size=8)
    assert dataset.class_names == classes
    assert (len(dataset.train.labels), len(dataset.test.labels)) == counts
    assert words in lines if words else not lines, lines


REFUSED = {
    "train with classes beside others": (
        (*TRAIN, "docs/x.png"),
        "train/ has classes as a split has, but lies beside docs/",
    ),
    "train with classes beside two": ((*TRAIN, "c/x.png", "d/x.png"), "give --data folder:"),
    "test without train": (("test/a/1.png", "test/a/2.png"), "test/ has classes as a split has, but has no train/"),
    "Val beside classes": ((*A, "Val/a/1.png"), "Val/ has classes as a split has, but lies beside a/"),
    "two spellings of train": ((*TRAIN, "Train/a/1.png", "test/a/1.png"), "Train/, train/ are spellings of one"),
    "one directory more": (("data/train/a/1.png", "data/test/a/1.png"), "the splits are one directory further down"),
    "NFC and NFD classes": (("caf\u00e9/1.png", "cafe\u0301/1.png"), r"spelled in two ways, cafe\u0301 and caf\xe9"),
    "NFC in train, NFD in test": (("train/\u00fc/1.png", "test/u\u0308/1.png"), r"spelled in two ways"),
    "NFC and NFD of Korean": (
        ("\uac00/1.png", unicodedata.normalize("NFD", "\uac00") + "/1.png"),
        "spelled in two ways",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_of_two_meanings_is_refused(tmp_path: Path, case: str) -> None:
    names, words = REFUSED[case]
    with pytest.raises(DataError) as error:
        opened(write_folder(tmp_path / "images", *names), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


PARQUET: dict[str, tuple[dict[str, int], tuple[int, int] | str, str]] = {
    "NAME_train and NAME_test": ({"pets_train": 6, "pets_test": 3}, (6, 3), ""),
    "Train and Validation": ({"Train": 6, "Validation": 3}, (6, 3), ""),
    "train and test first": ({"train__x": 5, "test__x": 2}, (5, 2), ""),
    "a third file": ({"train": 6, "test": 3, "extra": 4}, (6, 3), "not used beside train.parquet: extra.parquet"),
    "test and validation": ({"train": 6, "test": 3, "validation": 4}, (6, 3), "validation.parquet"),
    "no split": ({"one": 6, "two": 4}, (9, 1), ""),
    "all shards": ({"train__00000__of__00002": 6, "train__00001__of__00002": 4}, (9, 1), ""),
    "shards from 1": ({"a__1__of__2": 6, "a__2__of__2": 4}, (9, 1), ""),
    "a missing shard": ({"train__00000__of__00002": 6}, "train-00001-of-00002.parquet", ""),
    "the first shard missing": ({"train__00001__of__00002": 6}, "train-00000-of-00002.parquet", ""),
    "a missing shard of test": (
        {"train__0__of__1": 6, "test__1__of__3": 2},
        "2 of the 3 shards test-* are missing",
        "",
    ),
    "shards of two sets": ({"train__0__of__1": 6, "train__0__of__2": 6, "train__1__of__2": 1}, "of two data sets", ""),
    "both splits in a name": ({"train_test": 6}, "named after two splits", ""),
}


@pytest.mark.parametrize("case", PARQUET)
def test_names_of_parquet_files_say_their_split(tmp_path: Path, case: str) -> None:
    files, wanted, words = PARQUET[case]
    source = write_parquet(tmp_path / "set", **files)
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=re.escape(wanted)):
            opened(source, tmp_path)
        return
    dataset, lines = opened(source, tmp_path)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == wanted
    assert words in lines if words else not lines, lines


def test_one_of_several_parquet_files_is_told(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set", pets_train=6, pets_test=3, x__00000__of__00002=4)
    assert "pets_test.parquet beside it is not used" in opened(f"{source}/pets_train.parquet", tmp_path)[1]
    assert "one of 2 shards" in opened(f"{source}/x-00000-of-00002.parquet", tmp_path)[1]


def ramp(low: float, high: float, dtype: type) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 4096).reshape(64, 64).astype(dtype))


def frames(extension: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return extension, {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")], **options}


LOST: dict[str, tuple[Image.Image, str, dict[str, Any], str]] = {
    "uint16 of 12 bits": (ramp(150, 2599, np.uint16), "png", {}, "150..2599 become 1..10 of 0..255"),
    "uint16 of 14 bits": (ramp(0, 16383, np.uint16), "tif", {}, "0..16383 become 0..64"),
    "int32 of 10 bits": (ramp(0, 1023, np.int32), "tif", {}, "0..1023 become 0..4"),
    "float counts": (ramp(0, 5000, np.float32), "tif", {}, "0..5000 beyond 0..255"),
    "float of -1 to 1": (ramp(-1, 1, np.float32), "tif", {}, "-1..1 beyond 0..1"),
    "float of 0 to 3": (ramp(0, 3, np.float32), "tif", {}, "0..3 become 0..3 of 0..255"),
    "faint floats": (ramp(0, 0.05, np.float32), "tif", {}, "0..0.05 become 0..13"),
    "int32 below 0": (ramp(-500, 60000, np.int32), "tif", {}, "-500..60000 beyond 0..65535"),
    "pages of a TIFF": (Image.new("RGB", (8, 8)), *frames("tif"), "several pages or frames"),
    "an animated GIF": (Image.new("RGB", (8, 8)), *frames("gif"), "several pages or frames"),
    "an animated PNG": (Image.new("RGB", (8, 8)), *frames("png"), "several pages or frames"),
    "an animated WebP": (Image.new("RGB", (8, 8)), *frames("webp"), "several pages or frames"),
}
KEPT = {
    "uint16 of all bits": (ramp(0, 65535, np.uint16), "png"),
    "uint16 of one value": (ramp(700, 700, np.uint16), "png"),
    "floats of 0 to 1": (ramp(0, 1, np.float32), "tif"),
    "floats of 0 to 255": (ramp(0, 255, np.float32), "tif"),
    "8 bits, dark": (ramp(0, 9, np.uint8), "png"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_8_bits_and_one_frame_lose_is_told(tmp_path: Path, case: str) -> None:
    image, extension, options, words = LOST[case]
    (tmp_path / "images").mkdir()
    for number in range(3):
        image.save(tmp_path / "images" / f"{number}.{extension}", **options)
    lines = opened(f"folder:{tmp_path / 'images'}", tmp_path, dtype="uint8")[1]
    assert words in lines and "3 images" in lines, lines


@pytest.mark.parametrize("case", KEPT)
def test_what_8_bits_keep_is_not_told(tmp_path: Path, case: str) -> None:
    image, extension = KEPT[case]
    (tmp_path / "images").mkdir()
    for number in range(3):
        image.save(tmp_path / "images" / f"{number}.{extension}")
    lines = opened(f"folder:{tmp_path / 'images'}", tmp_path, dtype="uint8")[1]
    assert "grey levels" not in lines and "beyond the range" not in lines, lines
    assert "beyond" not in opened(f"folder:{tmp_path / 'images'}", tmp_path)[1].replace(str(tmp_path), "")


def tiff(samples: int, extra: tuple[int, ...], bits: int = 8, value: int = 9) -> bytes:
    """An uncompressed TIFF of 8 x 8 pixels, with PIL's writer for its tags only."""
    content = bytes([value]) * (64 * samples * bits // 8)
    tags = [
        *((256, 3, [8]), (257, 3, [8]), (258, 3, [bits] * samples), (259, 3, [1]), (262, 3, [2 if samples > 2 else 1])),
        *((273, 4, [8]), (277, 3, [samples]), (278, 3, [8]), (279, 4, [len(content)]), (338, 3, list(extra))),
    ]
    after = 8 + len(content)
    directory, overflow = b"", b""
    overflow_at = after + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        packed = b"".join(value.to_bytes({3: 2, 4: 4}[kind], "little") for value in values)
        if len(packed) > 4:
            packed, overflow = (overflow_at + len(overflow)).to_bytes(4, "little"), overflow + packed
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + len(values).to_bytes(4, "little")
        directory += packed.ljust(4, b"\0")
    return (
        b"II*\0"
        + after.to_bytes(4, "little")
        + content
        + len(tags).to_bytes(2, "little")
        + directory
        + bytes(4)
        + overflow
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(2, (0,)), "channels beyond colour"),
        (tiff(4, (0,)), "channels beyond colour"),
        (tiff(5, (0, 0)), "channels beyond colour"),
        (tiff(3, (), 16, 0), ""),
        (tiff(4, (2,)), ""),
    ],
)
def test_channels_that_are_dropped_are_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.tif").write_bytes(content)
    lines = opened(f"folder:{tmp_path / 'images'}", tmp_path)[1]
    assert words in lines if words else "channels beyond" not in lines, lines


def test_images_left_out_are_told_by_reason(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", *(f"{number}.png" for number in range(20)))
    for number in range(6):
        (tmp_path / f"images/text{number}.png").write_text("no image")
    (tmp_path / "images/cut.png").write_bytes(png()[:45])
    (tmp_path / "images/empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "images/pipe.png")
    (tmp_path / "images/link.png").symlink_to("nowhere")
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path / "images", os.O_DIRECTORY)
        server.bind(f"/proc/self/fd/{here}/socket.png")
        os.close(here)
        lines = opened(source, tmp_path, image_size=8)[1]
    assert "left out 8 unreadable images: text0.png, text1.png, text2.png, ... (6: not an image" in lines
    assert "cut.png (" in lines and "empty.png (an empty file)" in lines
    assert "left out 4 that are broken links, pipes, sockets or devices" in lines


@pytest.mark.parametrize("name", ["train", "Train", "TRAIN", "training", "train_set", "Training-Images", "trn"])
def test_spellings_of_train_are_known(name: str) -> None:
    assert names_train(name) and not names_test(name)


@pytest.mark.parametrize(
    "name", ["test", "Test", "val", "VALIDATION", "valid", "testing", "test_images", "eval", "dev"]
)
def test_spellings_of_test_are_known(name: str) -> None:
    assert names_test(name) and not names_train(name)


@pytest.mark.parametrize("name", ["trainers", "bullet train", "testament", "valley", "contest", "0", "развитие", ""])
def test_other_names_are_no_splits(name: str) -> None:
    assert not names_train(name) and not names_test(name)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["10", "9", "cats"], "label 0 is '10', before '9'"),
        (["a", "b1", "b10", "b2", "c"], "label 2 is 'b10', before 'b2'"),
        (["1", "2", "x1"], None),
        (["2", "a1", "b"], None),
        (["a-2", "a1"], None),
    ],
)
def test_numbers_of_classes_out_of_order_are_told(names: list[str], told: str | None) -> None:
    remarks = remarks_on_classes(names)
    assert not remarks if told is None else told in remarks[0]


def test_classes_of_parquet_in_their_own_order_are_not_told() -> None:
    assert not remarks_on_classes(["10", "2", "1"])
    assert not remarks_on_classes(["0", "1", "2"])
    assert not remarks_on_classes([str(number) for number in range(100)])
