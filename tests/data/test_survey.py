"""`gen-dist data` says of a source what packing then makes of it."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gen_dist import commands
from gen_dist.cli import run_command
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset, pack_given, survey_source, surveying
from gen_dist.data.decoding import decode_image
from gen_dist.data.headers import read_header
from gen_dist.data.survey import Survey, sizes_text
from gen_dist.errors import DataError
from gen_dist.plugins.loading import load as load_plugin
from tests.conftest import REPOSITORY
from tests.data.test_sources import encode, mixed_folder, save
from tests.support.digits import mnist_files
from tests.support.loaded_plugins import forgetting_plugins


def _mixed(path: Path) -> str:
    mixed_folder(path / "mixed")
    whole = encode(Image.effect_noise((64, 32), 90).convert("RGB"), "jpg")
    (path / "mixed" / "rgb_jpg" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "mixed" / "rgb_png" / "text.png").write_text("no image at all")
    (path / "mixed" / "rgb_png" / "notes.txt").write_text("no image by its name")
    save(path / "mixed", "dark", Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)))
    pages = [Image.new("RGB", (9, 12), (value, 0, 0)) for value in (1, 2)]
    save(path / "mixed", "pages", pages[0], "tif", save_all=True, append_images=pages[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path / "mixed", "turned", Image.new("L", (30, 10)), "jpg", exif=exif)
    return f"folder:{path / 'mixed'}"


def _gray_splits(path: Path) -> str:
    for value in range(5):
        save(path / "gray" / "train", f"{value % 2}", Image.new("L", (40, 20), value * 9))
    save(path / "gray" / "test", "0", Image.new("LA", (20, 20), (1, 255)))
    return f"folder:{path / 'gray'}"


def _parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": encode(Image.new("RGB", (12, 12), (value, 0, 0)), "png"), "path": None} for value in range(30)]
    table = pyarrow.table({"image": images, "label": [value % 3 for value in range(30)]})
    pyarrow.parquet.write_table(table, path / "train.parquet")
    return f"parquet:{path / 'train.parquet'}"


def _idx(path: Path) -> str:
    mnist_files(path)
    return "mnist"


def _toy(path: Path) -> str:
    from gen_dist.data.catalogue import source_kinds

    load_plugin(str(REPOSITORY / "tests/plugins/toy_source.py"))
    write = sys.modules[source_kinds()["toy"].open.__module__].write_toy
    write(path / "a.toy", np.arange(50 * 64, dtype=np.uint8).reshape(50, 8, 8), np.arange(50) % 4, 4)
    return f"toy:{path / 'a.toy'}"


def _given(path: Path) -> str:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 12), np.uint8)
    return pack_given((images, np.arange(40) % 5), packing=DataConfig(cache_dir=str(path / "cache")))


SOURCES: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "a mixed folder": (_mixed, {"image_size": 16}),
    "a mixed folder in gray": (_mixed, {"image_size": 20, "channels": 1}),
    "splits of gray images": (_gray_splits, {"image_size": 8}),
    "parquet": (_parquet, {"test_fraction": 0.3}),
    "parquet, padded": (_parquet, {"image_size": "20x8", "channels": 1, "fit": "pad"}),
    "a folder of alike images": (lambda path: _files(path / "a", *[_png(12, 6)] * 9), {}),
    "idx files": (_idx, {}),
    "idx files, resized": (_idx, {"image_size": 32, "channels": 3}),
    "digits inside a package": (lambda _path: "mnist5k", {}),
    "synthetic": (lambda _path: "synthetic", {"synthetic_images": 70, "channels": 3}),
    "a plug-in": (_toy, {}),
    "images given from Python": (_given, {}),
}


def options(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(cache_dir=str(path / "cache"), **changes)


def assert_same(survey: Survey, dataset: Dataset, announced: str) -> None:
    assert survey.problem is None
    assert survey.class_names == dataset.class_names
    assert survey.shape == dataset.image_shape
    for split in (dataset.train, dataset.test):
        classes = np.bincount(split.labels, minlength=len(dataset.class_names))
        assert survey.counts["train" if split is dataset.train else "test"].tolist() == classes.tolist()
    assert survey.bytes == sum(split.images.nbytes + split.labels.nbytes for split in (dataset.train, dataset.test))
    for line in (*survey.remarks, *survey.losses, *survey.intensity_losses):
        assert line in announced
    left_out = re.search(r"left out ([\d,]+) unreadable images?:", announced)
    assert survey.left_out.count == (int(left_out[1]) if left_out else 0)
    images = np.concatenate([dataset.train.images, dataset.test.images])
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    packed = {(int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)}
    shown = {(label, image.tobytes()) for image, label in zip(survey.sheet, survey.sheet_labels, strict=True)}
    assert shown <= packed
    assert len({label for label, _ in shown}) == min(len(dataset.class_names), 20)


@pytest.mark.parametrize("name", SOURCES)
def test_a_survey_says_what_is_packed_then(name: str, tmp_path: Path) -> None:
    write, changes = SOURCES[name]
    with forgetting_plugins():
        source, packing = write(tmp_path), options(tmp_path, **changes)
        before = sorted(tmp_path.rglob("*"))
        survey = survey_source(source, tmp_path, packing)
        assert sorted(tmp_path.rglob("*")) == before
        assert (survey.packed_in is not None) == source.startswith("array:")
        announced: list[str] = []
        dataset = open_dataset(source, tmp_path, packing, announced.append)
        assert_same(survey, dataset, "\n".join(announced))
        again = survey_source(source, tmp_path, packing)
        assert again.packed_in is not None
        assert again.packed_in.is_dir()


def test_a_header_says_which_way_up_an_image_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = {  # as ImageMagick and Photoshop write it
        "Raw profile type exif": f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n",
        "XML:com.adobe.xmp": '<x tiff:Orientation="6"/>',
    }
    saved: list[dict[str, Any]] = [{"exif": exif}]
    for key, text in texts.items():
        info = PngInfo()
        info.add_itxt(key, text) if key.startswith("XML") else info.add_text(key, text)
        saved.append({"pnginfo": info})
    for options_of_png in saved:
        content = encode(Image.new("L", (30, 10)), "png", **options_of_png)
        header = read_header(content)
        assert (header.width, header.height) == decode_image(content, None, None).size == (10, 30)
        assert header.turned


def test_what_becomes_of_images_is_counted(tmp_path: Path) -> None:
    survey = survey_source(_mixed(tmp_path), tmp_path, options(tmp_path, image_size=16))
    text = "\n".join(survey.lines())
    images = survey.images
    assert sum(survey.kinds.values()) == sum(survey.sizes.values()) == images + 1  # one is damaged behind its header
    assert survey.changes["are resized to 16x16"] == images + 1
    assert survey.changes["are cropped at their centre to its proportions"] == 3  # with the damaged one
    assert survey.changes["are turned upright"] == 1
    assert survey.sizes[10, 30] == 1
    assert survey.changes["are smaller than that and are enlarged"] == 2
    for words in (
        "2 unreadable: ",
        "1 .txt",
        "1 image has several pages",
        "0..1023 become 0..4",
        "2 PNG palette with transparency",
        "2 TIFF float gray",
    ):
        assert words in text


def _files(path: Path, *images: bytes) -> str:
    path.mkdir()
    for place, content in enumerate(images):
        (path / f"{place}.png").write_bytes(content)
    return f"folder:{path}"


def _png(width: int = 8, height: int = 8) -> bytes:
    return encode(Image.new("L", (width, height)), "png")


DAMAGED = encode(Image.effect_noise((90, 90), 90), "png")[:900]
"""A whole header, and some of its pixels."""


def _unlike_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [_png(), _png(), _png(9, 8)], "label": [0, 0, 0]})
    pyarrow.parquet.write_table(table, path / "a.parquet")
    return f"parquet:{path / 'a.parquet'}"


REFUSED: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "sizes that differ": (_unlike_parquet, {}),
    "more than half unreadable": (lambda path: _files(path / "a", _png(), b"x", b"y"), {}),
    "more than half damaged": (lambda path: _files(path / "a", _png(), DAMAGED, DAMAGED), {}),
    "a size that fit none refuses": (_unlike_parquet, {"image_size": "9x8", "fit": "none"}),
    "one image": (lambda path: _files(path / "a", _png()), {}),
    "an empty file": (
        lambda path: _files(path / "a", b"", _png(), _png(), _png()),
        {"unreadable_images": "error"},
    ),
    "a damaged one": (
        lambda path: _files(path / "a", DAMAGED, _png(), _png()),
        {"unreadable_images": "error"},
    ),
    "a split without images": (
        lambda path: (_files(path / "train", _png(), _png()), _files(path / "test", b"x"), f"folder:{path}")[2],
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_survey_refuses_with_the_line_of_packing(name: str, tmp_path: Path) -> None:
    write, changes = REFUSED[name]
    source, packing = write(tmp_path), options(tmp_path, **changes)
    survey = survey_source(source, tmp_path, packing)
    with pytest.raises(DataError) as refused:
        open_dataset(source, tmp_path, packing, lambda _line: None)
    assert str(survey.problem) == str(refused.value)
    assert survey.shape is None
    assert not survey.sheet
    assert "packing makes of them" not in survey.lines()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([(8, 9)], "all 8x9"),
        ([(8, 9), (8, 9), (3, 4)], "2, from 3x4 to 8x9 (width x height); 2 are 8x9"),
        ([(8, 9), (3, 4)], "2, from 3x4 to 8x9 (width x height), no two alike"),
    ],
)
def test_sizes_are_told_in_a_few_words(sizes: list[tuple[int, int]], text: str) -> None:
    assert sizes_text(collections.Counter(sizes)) == text


def test_some_images_stand_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "_MOST_DECODED", 100)
    (tmp_path / "a").mkdir()
    for place in range(400):
        (tmp_path / "a" / f"{place:03}.png").write_bytes(DAMAGED if place % 4 == 0 else _png(4 + place % 3, 8))
    survey = survey_source(f"folder:{tmp_path}", tmp_path, options(tmp_path, image_size=4))
    assert survey.images == 400
    assert survey.decoded == 100
    assert survey.decoded < survey.to_decode
    assert 10 < survey.damaged.count < 40  # a quarter, whatever the files' order
    assert survey.left_out.count == 0
    assert any("among the" in line for line in survey.lines())


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["gen-dist", "data", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run_command(commands.main)
    return stop.value.code


@pytest.mark.parametrize("name", ["a mixed folder", "idx files, resized", "parquet"])
def test_the_contact_sheet_shows_what_is_packed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, changes = SOURCES[name]
    source, sheet = write(tmp_path), tmp_path / "sheet.png"
    words = [word for option, value in changes.items() for word in (f"--{option.replace('_', '-')}", value)]
    cache = ["--cache-dir", tmp_path / "cache", "--data-root", tmp_path]
    assert call(monkeypatch, source, "--out", sheet, *words, *cache) == 0
    output = capsys.readouterr().out
    assert output.endswith(f"{sheet}\n")
    assert not (tmp_path / "cache").exists()
    survey = survey_source(source, tmp_path, options(tmp_path, **changes))
    picture = np.asarray(Image.open(sheet).convert("RGB")).transpose(2, 0, 1)
    rows = len(set(survey.sheet_labels))
    assert survey.shape is not None
    assert picture.shape[1] > rows * survey.shape[1]
    assert len(np.unique(picture)) >= len(np.unique(survey.sheet[0]))


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["folder:none"], "error: folder:none: there is no such directory"),
        (["mnist5kk"], "error: unknown data source 'mnist5kk'"),
        (["mnist", "--data-root", "none"], "error: mnist: its files are missing"),
        (["synthetic", "--image-size", "2"], "error: image_size 2 is less than 4"),
        (["synthetic", "--out", "a.bmp"], "error: a.bmp cannot be written: name a file of .png"),
        (["synthetic", "--out", "none/a.png"], "error: none/a.png cannot be written: No such file or directory"),
        ([f"array:{'0' * 32}"], "error: array:00000000 was given from Python, and this cache has no packed images"),
        (["a.parquet"], "error: unknown data source 'a.parquet'"),
    ],
)
def test_bad_words_of_the_data_command_are_one_line(
    words: list[str],
    mentioned: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(mentioned)
    assert not list(tmp_path.iterdir())
