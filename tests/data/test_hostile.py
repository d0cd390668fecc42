"""Hostile files: no program is started, nothing waits for ever, memory is bounded, and packing goes on or says why."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, decoding, image_files, open_dataset, parquet_reading
from gen_dist.errors import DataError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill showpage\n%%EOF\n"
# Begins of formats that PIL knows and gen_dist does not read.
OTHERS = {
    "EPS": POSTSCRIPT,
    "EPS behind a DOS header": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + POSTSCRIPT,
    "EPS after white space": b"  \n" + POSTSCRIPT,
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\1" + bytes(3) + b"\x08" + bytes(3) + b"\x08\0\x08\0\1" + bytes(100),
    "XBM": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = { 0, 0, 0, 0, 0, 0, 0, 0 };\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
}


def png(value: int = 0, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), value).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, count: int = 4, **others: bytes) -> str:
    (folder / "a").mkdir(parents=True)
    for value in range(count):
        (folder / "a" / f"{value}.png").write_bytes(png(value))
    for name, content in others.items():
        (folder / "a" / f"{name}.png").write_bytes(content)
    return f"folder:{folder}"


def write_rows(path: Path, images: Any, metadata: bytes | None = None, **options: Any) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": images})
    if metadata is not None:
        table = pyarrow.table({"image": images, "label": [0] * len(images)})
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, **options)
    return f"parquet:{path}"


def opened(source: str, tmp_path: Path) -> tuple[Dataset, str]:
    lines: list[str] = []
    dataset = open_dataset(source, tmp_path, DataConfig(cache_dir=str(tmp_path / "cache"), image_size=8), lines.append)
    return dataset, "\n".join(lines)


def count(dataset: Dataset) -> int:
    return len(dataset.train.labels) + len(dataset.test.labels)


@pytest.mark.parametrize("kind", OTHERS)
def test_no_other_format_is_decoded_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    started: list[object] = []
    for place, function in ((EpsImagePlugin, "Ghostscript"), (subprocess, "Popen"), (os, "system")):
        monkeypatch.setattr(place, function, lambda *words, **named: started.append(words))
    dataset, lines = opened(write_images(tmp_path / "images", bad=OTHERS[kind]), tmp_path)
    assert count(dataset) == 4 and "a/bad.png (not an image of a format that is read)" in lines
    dataset, lines = opened(write_rows(tmp_path / "set.parquet", [png(0), png(1), png(2), OTHERS[kind]]), tmp_path)
    assert count(dataset) == 3 and "set.parquet row 3" in lines
    assert not started


def test_directories_that_link_to_each_other_end(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images")
    names = [f"d{number}" for number in range(14)]
    for name in names:
        (tmp_path / "images/a" / name).mkdir()
        for other in names:
            (tmp_path / "images/a" / name / other).symlink_to(tmp_path / "images/a" / other)
    (tmp_path / "images/a/up").symlink_to(tmp_path / "images")
    started = time.monotonic()
    assert count(opened(source, tmp_path)[0]) == 4
    assert time.monotonic() - started < 60


def test_pipes_and_devices_among_parquet_files_are_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "set/train.parquet", [png(value) for value in range(4)])
    os.mkfifo(tmp_path / "set/test.parquet")
    (tmp_path / "set/x.parquet").symlink_to("/dev/zero")
    (tmp_path / "set/y.parquet").symlink_to("nowhere")
    dataset, lines = opened(f"parquet:{tmp_path / 'set'}", tmp_path)
    assert count(dataset) == 4 and "left out test.parquet, x.parquet, y.parquet: broken links, pipes" in lines
    assert count(opened(f"parquet:{tmp_path / 'set/train.parquet'}", tmp_path)[0]) == 4


@pytest.mark.parametrize(
    "source", ["folder:{}/pipe", "parquet:{}/pipe", "parquet:{}/zero", "folder:{}/zero", "parquet:/dev"]
)
def test_a_pipe_or_device_as_source_is_one_line(tmp_path: Path, source: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(DataError):
        opened(source.format(tmp_path), tmp_path)


def test_a_pipe_in_the_place_of_mnist_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            os.mkfifo(tmp_path / f"MNIST/raw/{part}-{kind}-ubyte")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="is not there"):
        opened("mnist", tmp_path)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs Linux's /proc")
def test_files_of_proc_and_exchanged_files_are_not_waited_for(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images")
    (tmp_path / "images/a/proc.png").symlink_to("/proc/version")
    dataset, lines = opened(source, tmp_path)
    assert count(dataset) == 4 and "a/proc.png (an empty file)" in lines
    os.mkfifo(tmp_path / "pipe.png")  # in the place of a file that was listed
    with pytest.raises(OSError, match="not a regular file"):
        image_files.read_image(image_files.ImageFile(str(tmp_path / "pipe.png"), 10, 0))


def test_bombs_among_images_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(image_files, "_MAX_FILE_BYTES", 50_000)
    monkeypatch.setattr(decoding, "_MAX_JPEG_SCANS", 5)
    source = write_images(tmp_path / "images", 12)
    for form in ("PNG", "TIFF", "GIF", "WEBP", "BMP"):
        Image.new("L", (200, 100)).save(tmp_path / f"images/a/bomb-{form}.png", form)
    (tmp_path / "images/a/long.png").write_bytes(png() + bytes(50_001))
    Image.effect_noise((64, 64), 90).save(tmp_path / "images/a/scans.jpg", progressive=True)
    dataset, lines = opened(source, tmp_path)
    assert count(dataset) == 12
    assert "left out 7 unreadable images" in lines and "a/scans.jpg (a JPEG of more than 5 scans)" in lines
    assert "could be decompression bomb" in lines and "a/long.png (more than 50,000 bytes)" in lines


def test_bombs_in_parquet_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow

    monkeypatch.setattr(parquet_reading, "_MOST_GROWN_BYTES", 2**20)
    zeros = write_rows(tmp_path / "zeros.parquet", [bytes(2**20)] * 4, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"would grow from [0-9,]+ to 4,[0-9,]+ bytes"):
        opened(zeros, tmp_path)
    rows = write_rows(tmp_path / "rows.parquet", pyarrow.nulls(10**6, pyarrow.binary()))
    with pytest.raises(DataError, match="bytes but says 1,000,000 rows"):
        opened(rows, tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_rows_come_in_blocks_of_bounded_size(nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reading, "_BYTES_AT_ONCE", 2**18)
    monkeypatch.setattr(parquet_reading, "_MOST_GROWN_BYTES", 2**18)
    noise, other = os.urandom(10**5), png()
    rows = [noise, None, other] * 20
    images = [None if row is None else {"bytes": row} for row in rows] if nested else rows
    write_rows(tmp_path / "set.parquet", images, compression="none", dictionary_pagesize_limit=2**20)
    blocks = list(parquet_reading.image_rows("set", tmp_path / "set.parquet", "image"))
    assert [row for block in blocks for row in block] == [row or b"" for row in rows]
    assert max(sum(map(len, block)) for block in blocks) <= 2**18
    write_rows(tmp_path / "small.parquet", [png(value) for value in range(300)])
    assert [len(block) for block in parquet_reading.image_rows("set", tmp_path / "small.parquet", "image")] == [256, 44]


def test_damaged_statistics_of_columns_do_not_end_the_process(tmp_path: Path) -> None:
    """With pyarrow 26, such a file ends the process when Python asks for the sizes of its columns."""
    source = write_rows(tmp_path / "set.parquet", [png()] * 4)
    whole = (tmp_path / "set.parquet").read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(footer, footer + 40):
        for bit in (1, 2):
            (tmp_path / "set.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with contextlib.suppress(DataError):
                opened(source, tmp_path)


@pytest.mark.parametrize("kind", ["list of bytes", "list of lists", "struct in struct", "no bytes in struct"])
def test_nested_columns_are_not_images(tmp_path: Path, kind: str) -> None:
    image = png()
    rows: dict[str, Any] = {
        "list of bytes": [[image]] * 3,
        "list of lists": [[[[1, 2], [3]]]] * 3,
        "struct in struct": [{"bytes": {"bytes": image}}] * 3,
        "no bytes in struct": [{"path": "x.png"}] * 3,
    }
    with pytest.raises(DataError, match="not bytes of images"):
        opened(write_rows(tmp_path / "set.parquet", rows[kind]), tmp_path)


@pytest.mark.parametrize(
    "metadata", [b"[" * 100_000, b"null", b"\xff", b'{"info": {"features": {"label": {"names": 3}}}}']
)
def test_metadata_that_say_nothing_count_as_missing(tmp_path: Path, metadata: bytes) -> None:
    source = write_rows(tmp_path / "set.parquet", [png(value) for value in range(4)], metadata)
    assert opened(source, tmp_path)[0].class_names == ("0",)


def test_class_names_of_metadata_stay_on_one_line(tmp_path: Path) -> None:
    names = ["a\n## b", "\x1b[31mred", "\ud800", "\u202eright"]
    metadata = json.dumps({"info": {"features": {"label": {"names": names}}}}).encode()
    source = write_rows(tmp_path / "set.parquet", [png(value) for value in range(4)], metadata)
    for name in opened(source, tmp_path)[0].class_names:
        assert len(name.splitlines()) == 1 and name.encode() and "\x1b" not in name and "\u202e" not in name


MEASURED = """
import re, sys
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
def peak():
    # Not ru_maxrss, which a new process has from its parent.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
open_dataset(sys.argv[1], ".", DataConfig(cache_dir=sys.argv[2], image_size=32), lambda line: None)
print(peak() - before)
"""


def bombs_below_the_limit(path: Path) -> str:
    """Images of as many pixels as PIL lets pass, in the modes that take most memory."""
    (path / "images").mkdir()
    for number in range(2):
        Image.new("RGBA", (9400, 9400), (1, 2, 3, 4)).save(path / f"images/{number}.png")
        Image.new("F", (9400, 9400), 0.5).save(path / f"images/{number}.tif", compression="tiff_deflate")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9400, 9400)).save(path / "images/turned.png", exif=exif)
    return f"folder:{path / 'images'}"


def repeated_by_a_dictionary(path: Path) -> str:
    large = png() + os.urandom(2**25)
    return write_rows(path / "set.parquet", [large] * 40, compression="none", dictionary_pagesize_limit=2**30)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bombs_below_the_limit, repeated_by_a_dictionary])
def test_packing_takes_less_than_a_gib(make: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = make(Path(directory))
        command = [sys.executable, "-c", MEASURED, source, f"{directory}/cache"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert found.returncode == 0, found.stderr[-500:]
        print(f"{make.__name__}: {found.stdout.strip()} MiB")  # above the 500 that importing torch takes
        assert int(found.stdout) < 1024
