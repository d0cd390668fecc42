"""`array:FILE`: arrays of NumPy as they are, and lines about what they are not."""

from __future__ import annotations

import gc
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen_dist.config import DataConfig
from gen_dist.data import open_dataset, survey_source
from gen_dist.data.sources.array_files import ArrayFile
from gen_dist.errors import DataError

VALUES = np.random.default_rng(0).integers(0, 65_536, (30, 4, 6, 5), np.uint16)
LABELS = np.arange(30) % 3
HUGE = "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999, 4, 4)}"
"""Header of an array."""


def opened(path: Path, cache: Path, **options: Any) -> Any:
    packing = DataConfig(cache_dir=str(cache), **options)
    return open_dataset(f"array:{path}", "", packing, lambda _line: None)


def sorted_rows(images: Any) -> list[Any]:
    return sorted(np.asarray(images).reshape(len(images), -1).tolist())


@pytest.mark.parametrize(
    ("stored", "layout"),
    [
        (VALUES, "NCHW"),
        (VALUES.transpose(0, 2, 3, 1), "NHWC"),
        (np.asfortranarray(VALUES), "NCHW"),
        (VALUES.astype(">u2"), "NCHW"),
    ],
)
def test_every_layout_of_an_array_is_the_same_data(tmp_path, stored, layout):
    np.save(tmp_path / "a.npy", stored)
    dataset = opened(tmp_path / "a.npy", tmp_path / "cache", layout=layout)
    assert dataset.image_shape == (4, 6, 5)
    assert dataset.train.images.dtype == np.uint16
    both = np.concatenate([dataset.train.images, dataset.test.images])
    assert sorted_rows(both) == sorted_rows(VALUES)
    assert dataset.train.names is not None and dataset.train.names[0] == "image 0"


def test_arrays_of_a_npz_file_have_labels_and_a_test_split(tmp_path):
    names = np.array(["cat", "dog", "ant"])[LABELS]
    np.savez(tmp_path / "a.npz", x=VALUES[:, 0], labels=names, x_test=VALUES[:7, 1], labels_test=names[:7], rest=[1])
    lines: list[str] = []
    dataset = open_dataset(f"array:{tmp_path / 'a.npz'}", "", DataConfig(cache_dir=str(tmp_path)), lines.append)
    assert dataset.class_names == ("ant", "cat", "dog")
    assert [dataset.class_names[label] for label in dataset.train.labels] == names.tolist()
    assert np.array_equal(dataset.test.images[:, 0], VALUES[:7, 1])
    assert any("not used: rest" in line for line in lines)


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damaged", [b"PK\3\4", b"PK\5\6", b"PK\3\4" + bytes(100), b"\x93NUMPY", b"", b"text"])
def test_no_damaged_file_stays_open(tmp_path, damaged):
    """Given a path, `numpy.load` leaves an archive that is damaged open, which Python tells as it is collected."""
    (tmp_path / "a.npz").write_bytes(damaged)
    before = os.listdir("/dev/fd")
    with pytest.raises(DataError, match="no arrays of numbers") as raised:
        opened(tmp_path / "a.npz", tmp_path / "cache")
    assert os.listdir("/dev/fd") == before
    del raised
    gc.collect()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_an_array_of_python_2_is_read_without_a_warning(tmp_path, name):
    np.save(tmp_path / "a.npy", VALUES)
    content = (tmp_path / "a.npy").read_bytes().replace(b"(30, 4, 6, 5), }", b"(30L, 4, 6, 5),}")
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    dataset = opened(tmp_path / name, tmp_path / "cache", layout="NCHW")
    assert len(dataset.train.images) + len(dataset.test.images) == 30


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["|S2", "|a2", "a2"])
def test_texts_by_an_old_name_of_numpy_are_refused_without_a_warning(tmp_path, kind):
    np.savez(tmp_path / "new.npz", x=VALUES, labels=np.array([b"ab", b"cd"] * 15))
    with zipfile.ZipFile(tmp_path / "new.npz") as new, zipfile.ZipFile(tmp_path / "a.npz", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"'|S2'", repr(kind).encode().ljust(5)))
    with pytest.raises(DataError, match=r"the labels are \|S2 \[30\]; integers"):
        opened(tmp_path / "a.npz", tmp_path / "cache", layout="NCHW")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["'\\d'", "1if", "b'u2'"])
def test_a_strange_type_of_values_is_refused_without_a_warning(tmp_path, kind):
    np.save(tmp_path / "a.npy", VALUES)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"'<u2'", kind.encode().ljust(5), 1))
    with pytest.raises(DataError):
        opened(tmp_path / "a.npy", tmp_path / "cache", layout="NCHW")


@pytest.mark.parametrize("category", [ResourceWarning, RuntimeWarning])
def test_warnings_of_other_kinds_are_not_hidden_by_an_open_file(tmp_path, category):
    np.savez(tmp_path / "a.npz", x=VALUES)
    with pytest.warns(category, match="ours"), ArrayFile(tmp_path / "a.npz")._opened():
        warnings.warn("ours", category, stacklevel=1)


def test_an_array_that_was_written_anew_is_packed_anew(tmp_path):
    np.save(tmp_path / "a.npy", VALUES[:, :1])
    first = opened(tmp_path / "a.npy", tmp_path)
    np.save(tmp_path / "a.npy", VALUES[:, 1:2])
    assert opened(tmp_path / "a.npy", tmp_path).digest != first.digest


def test_a_survey_of_an_array_says_type_and_values(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    found = survey_source(f"array:{tmp_path / 'a.npy'}", "", DataConfig(cache_dir=str(tmp_path), layout="NCHW"))
    text = "\n".join(found.lines())
    assert "uint16 array of 4 channels" in text
    assert "uint16 [4, 6, 5] each" in text
    assert found.bytes == 30 * (4 * 6 * 5 * 2 + 8)
    assert f"values    {VALUES.min():,}..{VALUES.max():,}" in text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "there is no such file"),
        (b"no array", "no arrays of numbers can be read from it"),
        (VALUES, r"no axis of 1 or 3 channels.*--layout"),
        (VALUES.astype(np.int64)[:, :1], r"int64 .*astype\('float32'\)"),
        (np.array([{}, 3]), "no arrays of numbers"),
        (VALUES[0, 0, 0], r"\[N, H, W\]"),
        ({"images": VALUES}, "has the arrays images, but no x"),
        ({"x": VALUES[:, 0], "labels": LABELS[:4]}, r"the labels are int64 \[4\]; integers \[30\]"),
        ({"x": VALUES[:, 0], "labels": LABELS - 1}, "image 0 has no label.*--missing-labels unknown"),
        ({"x": VALUES[:, 0], "labels": LABELS * 10**12}, "labels go from 0 to 2000000000000"),
        ({"x": VALUES[:, 0], "labels": LABELS[:0]}, r"the labels are int64 \[0\]"),
        ({"x": VALUES[:, 0], "labels": np.full(30, np.nan)}, "has no label"),
        ({"x": VALUES[:, 0], "labels": LABELS.astype("S")}, r"the labels are \|S21"),
        ({"x": VALUES[:, 0], "labels": LABELS, "x_test": VALUES[:5, 0]}, "labels of test images are missing"),
        (
            {"x": VALUES[:, 0], "labels": LABELS.astype(str), "x_test": VALUES[:5, 0], "labels_test": LABELS[:5]},
            "test images are integers, those of train images texts",
        ),
    ],
)
def test_files_that_are_no_images_are_one_line(tmp_path, content, line):
    path = tmp_path / ("a.npz" if isinstance(content, dict) else "a.npy")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=line) as caught:
        opened(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_archives_of_other_files_are_one_line(tmp_path):
    for name, change in (("a", b"no array"), ("b", None)):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", change or np.lib.format.magic(1, 0) + b"\x80\x00" + HUGE.ljust(127).encode() + b"\n")
        with pytest.raises(DataError, match="no arrays of numbers can be read from it"):
            opened(path, tmp_path / "cache")


def test_an_opening_of_packed_images_reads_no_array(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=VALUES[:, 0], labels=LABELS, labels_test=LABELS, rest=[1])
    first = opened(tmp_path / "a.npz", tmp_path)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    lines: list[str] = []
    second = open_dataset(f"array:{tmp_path / 'a.npz'}", "", DataConfig(cache_dir=str(tmp_path)), lines.append)
    assert second.digest == first.digest
    assert any("not used: labels_test, rest" in line for line in lines)


def test_a_file_that_is_cut_off_while_it_is_packed_is_one_line(tmp_path, monkeypatch):
    """A page of a map that is behind the end of its file would end the process by SIGBUS."""
    np.save(tmp_path / "a.npy", np.zeros((3000, 1, 32, 32), np.uint8))
    read = ArrayFile._read

    def cut(source, found, rows):
        os.truncate(tmp_path / "a.npy", 2_000_000)
        return read(source, found, rows)

    monkeypatch.setattr(ArrayFile, "_read", cut)
    with pytest.raises(DataError, match="cut off while it was packed; nothing is packed"):
        opened(tmp_path / "a.npy", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/meta.json"))


@pytest.mark.parametrize(
    "header", ["{'descr': '<u2', 'fortran_order': False, 'shape': (30, 4, 6, 5", "{'descr': ',', }"]
)
def test_a_header_that_is_no_literal_is_one_line(tmp_path, header):
    """NumPy has Python's tokenizer read some headers, whose errors are its own."""
    np.save(tmp_path / "a.npy", VALUES)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:10] + header.ljust(117).encode() + b"\n" + content[128:])
    with pytest.raises(DataError, match="no arrays of numbers can be read from it"):
        opened(tmp_path / "a.npy", tmp_path / "cache")


def test_texts_that_unicode_lacks_are_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", x=VALUES[:, 0], labels=np.full(30, 2**31, np.uint32).view("U1"))
    with pytest.raises(DataError, match="a text of labels has characters that Unicode lacks; save it again"):
        opened(tmp_path / "a.npz", tmp_path / "cache")


def test_a_member_that_is_no_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=VALUES[:, 0])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("labels.npy", b"no magic")
    with pytest.raises(DataError, match="labels is not an array; save it again"):
        opened(tmp_path / "a.npz", tmp_path / "cache")
