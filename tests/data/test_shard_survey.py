"""`gen-dist data shards:PATTERN` says what training then finds, and leaves nothing behind."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist import commands
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset, survey_source
from gen_dist.data.shards import surveying
from gen_dist.errors import DataError
from tests.data.test_shard_labels import GONE, write_tar
from tests.data.test_shard_values import npy
from tests.support.shards import ShardServer, encoded, samples, served, tar_of, write_shards


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").iterdir())


def surveyed(pattern: str, tmp_path: Path, **options: Any) -> Any:
    return survey_source(f"shards:{pattern}", "", DataConfig(cache_dir=str(tmp_path / "cache"), **options))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_small_set_is_counted_as_training_counts_it(tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        pattern = write_shards(tmp_path / "s", 4, 25, mode="RGB")
    else:
        import pyarrow
        import pyarrow.parquet

        (tmp_path / "s").mkdir()
        for shard in range(4):
            numbers = range(shard * 25, shard * 25 + 25)
            table = pyarrow.table(
                {"image": [encoded(n, mode="RGB") for n in numbers], "label": [n % 3 for n in numbers]}
            )
            pyarrow.parquet.write_table(table, tmp_path / "s" / f"{shard}.parquet")
        pattern = f"{tmp_path}/s/*.parquet"
    survey = surveyed(pattern, tmp_path)
    text = "\n".join(survey.lines())
    assert not (tmp_path / "cache").exists()
    assert f"100 images in 4 {kind} shards" in text and "not indexed yet" in text and "about 1" not in text
    assert "90 train and 10 test, held out by key" in text
    assert "3: 0 (34), 1 (33), 2 (33)" in text
    assert "all 8x8" in text and "100 PNG RGB" in text
    assert "uint8 [3, 8, 8] each" in text
    dataset = open_dataset(f"shards:{pattern}", "", DataConfig(cache_dir=str(tmp_path / "cache")), lambda _line: None)
    assert survey.class_names == dataset.class_names
    assert survey.totals == {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
    assert survey.shape == dataset.image_shape
    again = surveyed(pattern, tmp_path)
    assert "indexed already in " in "\n".join(again.lines())
    index = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.npy"))
    assert 0.2 * index < survey.bytes < 5 * index + 1024 * 192


def test_a_large_set_is_estimated_from_some_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "s", 12, 20)
    (tmp_path / "s" / "011.tar").write_bytes(tar_of(samples(500, 60)))
    monkeypatch.setattr(surveying, "_MOST_BYTES", 4 * (tmp_path / "s" / "000.tar").stat().st_size)
    with served(tmp_path / "s") as server:
        survey = surveyed(f"{server.url}/{{000..011}}.tar", tmp_path)
        read = {one.split()[1] for one in server.asked if "bytes" in one}
    text = "\n".join(survey.lines())
    assert len(read) <= 5
    assert "about 240 images in 12 tar shards" in text or 200 < survey.images < 320, text
    assert "the others are taken to be like them" in text
    assert "about" in next(line for line in survey.lines() if "splits" in line)
    whole = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert survey.shard_bytes == whole


def test_a_label_of_a_set_that_is_read_in_part_is_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(6):
        files = {f"{n}.png": encoded(n) for n in range(10)} | {f"{n}.cls": b"30" for n in range(10)}
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    monkeypatch.setattr(surveying, "_MOST_BYTES", 1)
    survey = surveyed(f"{tmp_path}/*.tar", tmp_path)
    assert survey.problem is None and len(survey.class_names) == 31 and set(survey.sheet_labels) == {30}
    assert surveying._MOST_BYTES == 1 and survey.shards_read == 1


def test_what_is_left_out_and_damaged_is_told(tmp_path: Path) -> None:
    files = samples(0, 40)
    files["000003.txt"] = b"a caption"
    files["000007.png"] = b"no image at all" * 9
    (tmp_path / "a.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    text = "\n".join(surveyed(f"{tmp_path}/a.tar", tmp_path, image_size=4).lines())
    assert "left out: 1 .txt" in text
    assert "1 unreadable" in text
    refused = surveyed(f"{tmp_path}/a.tar", tmp_path, image_size=4, unreadable_images="error")
    assert "image at byte" in str(refused.problem) and "--unreadable-images skip" in str(refused.problem)
    assert "39 are reduced" in text or "resized" in text, text


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a.png": encoded(1), "b.png": encoded(2, side=9), "c.png": encoded(3)}, "8x8 and 9x9; say which size"),
        ({"a.png": encoded(1), "a.cls": b"1", "b.png": encoded(2)}, "some images have labels and some have none"),
        ({f"{i}.png": b"x" * 99 for i in range(6)}, "images looked at are unreadable"),
        ({"a.txt": b"1"}, "fewer than two images"),
    ],
)
def test_what_training_refuses_is_the_survey_s_problem(tmp_path: Path, files: dict[str, bytes], line: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    survey = surveyed(f"{tmp_path}/a.tar", tmp_path)
    assert survey.problem and line in str(survey.problem) and not survey.sheet
    assert survey.lines()
    with pytest.raises(DataError):
        open_dataset(f"shards:{tmp_path}/a.tar", "", DataConfig(cache_dir=str(tmp_path / "cache")), lambda _line: None)


def test_labels_that_are_missing_are_counted(tmp_path: Path) -> None:
    options = {"label_columns": ("age", "height"), "missing_labels": "unknown"}
    text = "\n".join(surveyed(write_tar(tmp_path / "a.tar", GONE), tmp_path, **options).lines())
    assert "2 images have no age" in text and "age: 20..25.75" in text


def test_arrays_that_cannot_be_reduced_are_the_problem(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({f"{number}.npy": npy(number, "uint16", 1) for number in range(6)}))
    assert surveyed(f"{tmp_path}/a.tar", tmp_path).problem is None
    (tmp_path / "b.tar").write_bytes(tar_of({f"{number}.png": encoded(number) for number in range(6)}))
    assert "uint16 and uint8; make the shards with --dtype uint8" in str(
        surveyed(f"{tmp_path}/*.tar", tmp_path).problem
    )
    survey = surveyed(f"{tmp_path}/a.tar", tmp_path, dtype="uint8")
    assert "which --dtype uint8 does not reduce" in str(survey.problem)


def test_shards_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>" * 200)
    for pattern, line in ((f"{tmp_path}/a.tar", "it is no tar file"), (f"{tmp_path}/b.tar", "No such file")):
        with pytest.raises(DataError, match=line):
            surveyed(pattern, tmp_path)


def test_the_command_draws_the_sheet_and_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "s", 2, 30)
    server: ShardServer
    with served(tmp_path / "s") as server:
        pattern = f"shards:{server.url}/{{000..001}}.tar?version=7"
        words = ["data", pattern, "--out", str(tmp_path / "sheet.png"), "--cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["gen-dist", *words])
        with pytest.raises(SystemExit) as stop:
            commands.main()
    assert not stop.value.code
    told = capsys.readouterr()
    assert "60 images in 2 tar shards" in told.out and "?version=7" not in told.out + told.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
    monkeypatch.setattr(sys, "argv", ["gen-dist", "data", "shards:https://me:word@host/a.tar"])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2 and "word@" not in "".join(capsys.readouterr())
