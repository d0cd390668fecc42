"""Shards, servers and addresses that are refused, each in one line."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gen_dist.config import DataConfig, TrainConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.shards.contents import LONG_ZEROS, Contents
from gen_dist.data.shards.tar_contents import tar_contents
from gen_dist.errors import ConfigError, DataError
from tests.data.shard_sets import some_batches
from tests.support.shards import ShardServer, encoded, samples, tar_of, write_shards


def bad(
    files: dict[str, bytes], pattern: str = "*.tar", **options: Any
) -> tuple[dict[str, bytes], str, dict[str, Any]]:
    return files, pattern, options


def tar_head(name: str, size: int) -> bytes:
    """A tar file that ends behind the header of a file of this size."""
    header = bytearray(tar_of({name: b""})[:512])
    header[124:136] = f"{size:011o}\0".encode() if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


GOOD = tar_of(samples(0, 6))

CUT = tar_of({"a.png": encoded(1), "b.png": encoded(2) + b"1" * 4000})
"""Copies of it whose room was set aside end within its second image."""

WIDE = tar_of({"a.png": encoded(1), "b.png": encoded(2, side=9), "c.png": encoded(3)})

BAD = {
    "no file is named .*none.*tar": bad({}, "none*.tar"),
    r"cannot read .*x\.tar: No such file": bad({}, "x.tar"),
    r"is no \.tar or \.parquet file; unpack it with gunzip": bad({"a.tar.gz": b""}, "a.tar.gz"),
    r"is no \.tar or \.parquet file; name": bad({"a.zip": b""}, "a.zip"),
    "shards are of parquet and tar": bad({"a.tar": GOOD, "a.parquet": GOOD}, "a.*"),
    r"\{9\.\.0\} counts from 9 to 0": bad({}, "{9..0}.tar"),
    "names .* twice": bad({"a.tar": GOOD}, "{a,a}.tar"),
    "a.tar: it is no tar file": bad({"a.tar": b"<html>" * 200}),
    r"b.tar: all 66,048 bytes are zero": bad({"a.tar": GOOD, "b.tar": bytes(129 * 512)}),
    r"a.tar: its last 98,\d{3} bytes and the end of its last file are zero": bad(
        {"a.tar": CUT[:2048] + bytes(102_400)}
    ),
    r"a.tar: its last 97,\d{3} bytes and the end of its last file are zero": bad(
        {"a.tar": CUT[:1500] + bytes(102_400)}
    ),
    "it is compressed; unpack it": bad({"a.tar": b"\x1f\x8b" + bytes(600)}),
    "a.tar: it is cut off": bad({"a.tar": GOOD[:570]}),
    r"a.tar: it is damaged or cut off at byte 1,024": bad({"a.tar": GOOD[:1100]}),
    "fewer than two images with a name": bad({"a.tar": tar_of({"a.txt": b"1"})}),
    "sample a has two images": bad({"a.tar": tar_of({"a.png": encoded(1), "a.jpg": encoded(1)})}),
    "some images have labels and some have none": bad(
        {"a.tar": tar_of({"a.png": encoded(1), "a.cls": b"1", "b.png": encoded(2)})}
    ),
    "label 700 is out of range": bad({"a.tar": tar_of({**samples(0, 6), "000002.cls": b"700"})}),
    "images are of 8x8 and 9x9; say which size": bad({"a.tar": WIDE}),
    "images looked at are unreadable": bad({"a.tar": tar_of({f"{i}.png": b"x" * 99 for i in range(6)})}),
    "label -1 is out of range": bad({"a.tar": tar_of({**samples(0, 6), "000002.cls": b"-1"})}),
    "label at byte .* has 201 characters": bad({"a.tar": tar_of({**samples(0, 6), "000002.cls": b"a" * 201})}),
    "have labels and some have none": bad({"a.tar": tar_of({**samples(0, 6), "000002.cls": b" "})}),
    "an image at byte 512 has 4,294,967,296 bytes": bad({"a.tar": tar_head("a.png", 2**32)}),
    "it is no tar file": bad({"a.tar": tar_head("a.png", -1)}),
    "layout NHWC is not for shards": bad({"a.tar": GOOD}, layout="NHWC"),
    "no image has a, b of --label-columns": bad({"a.tar": GOOD}, label_columns=("a", "b")),
    "pages first is not for shards": bad({"a.tar": GOOD}, pages="first"),
    "is in the test split too": bad({"a.tar": GOOD}, test_shards="*.tar"),
    "is not a whole parquet file": bad({"a.parquet": b"PAR1" + bytes(99)}, "a.parquet"),
    "is unreadable|it has 1 unreadable image: ": bad(
        {"a.tar": tar_of({**samples(0, 6), "000002.png": encoded(2)[:50]})}, unreadable_images="error"
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_shards_give_one_line(line: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    files, pattern, options = BAD[line]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if "test_shards" in options:
        options = {**options, "test_shards": f"{tmp_path}/{options['test_shards']}"}
    with pytest.raises(DataError, match=line) as raised:
        some_batches(opened(f"{tmp_path}/{pattern}", **options).train, 0, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("records", [2, 20, 40, 128])
def test_archives_without_files_are_told(
    records: int, tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    """GNU tar pads to any blocking factor, as `tar -b 40` to 40 records."""
    (tmp_path / "a.tar").write_bytes(GOOD)
    (tmp_path / "b.tar").write_bytes(bytes(512 * records))
    opened(f"{tmp_path}/*.tar")
    assert any("1 archive without files is left out: " in line and line.endswith(": b.tar") for line in lines)
    (tmp_path / "c.tar").write_bytes(tar_of({}))
    lines.clear()
    opened(f"{tmp_path}/*.tar")
    assert any("2 archives without files are left out: " in line and line.endswith(": b.tar, c.tar") for line in lines)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("records", ["1", "20", "40", "100", "128", "256", "300", "2048", "5000"])
def test_an_archive_padded_by_tar_is_whole(
    records: str, tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    padded_by_tar(tmp_path, records, samples(0, 7))
    dataset = opened(f"{tmp_path}/*.tar")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 7
    told = [line for line in lines if "1 archive with more zeros behind the files than tar's usual blocks" in line]
    assert [line.endswith(": a.tar") for line in told] == [True] * (
        records not in ("1", "20", "40")
    )  # 40 of 28 are within 20


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize(("records", "is_whole"), [("300", False), ("5000", False), ("128", True), ("2048", True)])
def test_an_archive_with_files_to_a_page_has_a_block_of_tapes(records: str, is_whole: bool, tmp_path: Path) -> None:
    content = padded_by_tar(tmp_path, records, samples(0, 6))
    if is_whole:
        assert len(contents_in(content).sizes) == 6 and LONG_ZEROS in contents_in(content).left_out
    else:
        with pytest.raises(DataError, match=r"cut off; copy it anew, write it anew with tar's usual blocks \(-b 20\)"):
            contents_in(content)
    assert len(contents_in(padded_by_tar(tmp_path, "20", samples(0, 6))).sizes) == 6


def padded_by_tar(directory: Path, records: str, files: dict[str, bytes]) -> bytes:
    """Archive a.tar of files in a directory, padded to a multiple of some records."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    subprocess.run(["tar", "-b", records, "-cf", "a.tar", *files], cwd=directory, check=True)
    return (directory / "a.tar").read_bytes()


@pytest.mark.parametrize(
    "files", [{"z.txt": b""}, {"z.txt": b"1" * 512}, {"z/" * 90 + "z.png": encoded(9)}, {"z.cls": b"1"}]
)
def test_zeros_of_a_round_block_are_padding_behind_any_last_file(files: dict[str, bytes]) -> None:
    content = tar_of(samples(0, 6) | files)
    found = contents_in(content + bytes(1_024_000 - len(content)))
    assert len(found.sizes) == 6 + any(encoded(9) == one for one in files.values())
    assert LONG_ZEROS in found.left_out


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "GNU": tarfile.GNU_FORMAT}


def contents_in(content: bytes) -> Contents:
    return tar_contents("set", "a.tar", (content[first : first + 2**20] for first in range(0, len(content), 2**20)))


def small_files(format_: int, name: str) -> bytes:
    """A tar file of 100 images and labels, each of which fits into a record."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        for file, content in samples(0, 100).items():
            assert len(content) <= 512
            member = tarfile.TarInfo(name + file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["", "a" * 120 + "/", "é" * 30 + "/"])
def test_no_copy_that_is_cut_off_at_a_page_passes_but_for_its_last_block(format_: str, name: str) -> None:
    """Every page ends behind a whole sample where names are short."""
    if format_ == "ustar" and name:
        name = "a" * 80 + "/"
    whole = small_files(FORMATS[format_], name)
    assert len(contents_in(whole).sizes) == 100
    files = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(4096, files, 4096):
        copied = whole[:cut] + bytes(len(whole) - cut)
        if len(whole) - len(copied.rstrip(b"\0")) > 11_264:
            with pytest.raises(DataError, match=r"cut off|without the file"):
                contents_in(copied)


@pytest.mark.parametrize("zeros", [0, 1024, 10_240, 102_400])
@pytest.mark.parametrize("format_", ["pax", "GNU"])
def test_a_long_name_without_its_file_is_a_cut(format_: str, zeros: int) -> None:
    name = small_files(FORMATS[format_], "é" * 60 + "/")[:1024]
    with pytest.raises(DataError, match="ends behind a file's long name, without the file; copy it anew"):
        contents_in(name + bytes(zeros))


@pytest.mark.parametrize("name", ["b.cls", "b.json"])
def test_a_label_whose_bytes_never_came_is_a_cut(name: str) -> None:
    whole = tar_of({"a.png": encoded(1), name: b'{"label": 3}', "b.png": encoded(2)})
    start = whole.index(b'{"label": 3}')
    with pytest.raises(DataError, match=r"the label at byte .* ends in zeros, as of a copy that was cut off"):
        contents_in(whole[:start] + bytes(len(whole) - start))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("content", "told"), [(b"", "with more zeros"), (GOOD, "without the two records of zeros")])
def test_an_end_that_may_be_a_cut_has_a_line_that_nothing_hides(
    split: str, content: bytes, told: str, tmp_path: Path, opened: Callable[..., Dataset], lines: list[str]
) -> None:
    """The five most frequent kinds of what is left out are shown."""
    others = {f"{n:06}.{ending}": b"1" for n in range(2) for ending in ("a", "b", "c", "d", "e", "f")}
    whole = tar_of(samples(0, 7) | others)
    files = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    whole = whole[:files] if content else whole + bytes(153_600 - len(whole))
    (tmp_path / "a.tar").write_bytes(whole)
    (tmp_path / "b.tar").write_bytes(tar_of(samples(7, 7)))
    train, test = ("a", "b") if split == "train" else ("b", "a")
    opened(f"{tmp_path}/{train}.tar", test_shards=f"{tmp_path}/{test}.tar")
    assert [line.endswith("cut off; compare it with the original: a.tar") for line in lines if told in line] == [True]


@pytest.mark.parametrize("block", [2**16, 2**17, 2**20])
def test_a_mark_of_the_end_that_straddles_two_blocks_is_one(
    block: int, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    """The first of its two records is the last of a block, and the second brings a block of its own."""
    files = len(tar_of(samples(0, 6)).rstrip(b"\0")) // 512 * 512 + 512
    content = tar_of(samples(0, 6) | {"z.txt": b"1" * (block - 512 - files - 512)})[: block - 512]
    (tmp_path / "a.tar").write_bytes(content + bytes(512 + block))
    dataset = opened(f"{tmp_path}/*.tar")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 6


@pytest.mark.parametrize("pattern", ["*.tar", "{000..001}.tar", "00[01].tar"])
@pytest.mark.parametrize("name", ["photos [2020]", "a{b", "{0..1}/*?"])
def test_a_directory_that_is_there_has_the_name_that_is_written(
    name: str, pattern: str, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    write_shards(tmp_path / name, shards=2, images=6)
    dataset = opened(f"{tmp_path}/{name}/{pattern}")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 12


@pytest.mark.parametrize("pattern", ["~/a/000.tar", "{~/a,~/b}/000.tar", "{~/a,~/b}/*.tar"])
def test_a_home_directory_is_named_in_braces_too(
    pattern: str, tmp_path: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        write_shards(tmp_path / name, shards=1, images=6)
    dataset = opened(pattern)
    assert len(dataset.train.labels) + len(dataset.test.labels) == (12 if "{" in pattern else 6)


def test_a_file_system_that_needs_options_is_refused_in_one_line(
    opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(DataError, match=r"fsspec reads ftp:// with host as options, which URLs do not give"):
        opened("ftp://host/a.tar")
    assert not ignored


@pytest.mark.parametrize(("status", "line"), [(403, "no credentials of a reader"), (404, "there is no such file")])
def test_refusals_of_a_server_are_one_line(
    status: int, line: str, server: ShardServer, opened: Callable[..., Dataset]
) -> None:
    server.fails = lambda _: status
    with pytest.raises(DataError, match=line):
        opened(f"{server.url}/{{000..002}}.tar")


def test_a_server_without_ranges_is_refused(server: ShardServer, opened: Callable[..., Dataset]) -> None:
    size = 2**20 + 512  # more than a block
    server._read = lambda name, first, last: bytes(last - first)
    server._size = lambda name: size
    server.ranges = False
    with pytest.raises(DataError, match="sends whole files and no ranges"):
        opened(f"{server.url}/{{000..002}}.tar")
    assert sum(one.startswith("GET") for one in server.asked) == 1


@pytest.mark.parametrize(
    "address",
    [
        "https://me:word@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=word",
        "s3://key:word@bucket/{0..9}.tar",
        "https://host/a.tar?sig=word&b=1",
    ],
)
def test_secrets_in_addresses_are_refused_and_not_shown(address: str, tmp_path: Path) -> None:
    for make in (
        lambda: TrainConfig(data=f"shards:{address}"),
        lambda: DataConfig(test_shards=address),
        lambda: open_dataset(f"shards:{address}", ".", DataConfig(cache_dir=str(tmp_path))),
    ):
        with pytest.raises(ConfigError, match="has a password or signature in it") as raised:
            make()
        assert "word" not in str(raised.value).replace("password", "")
    assert not list(tmp_path.iterdir())
