"""Images given from Python: their forms, and the lines about what cannot be one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from gen_dist.config import DataConfig
from gen_dist.data import open_dataset, pack_given
from gen_dist.data.given import images_given
from gen_dist.errors import DataError

GRAY = np.arange(7 * 8 * 6, dtype=np.uint8).reshape(7, 8, 6)
COLOURED = np.arange(5 * 3 * 8 * 6, dtype=np.uint8).reshape(5, 3, 8, 6)
LABELS = np.array([0, 2, 1, 0, 1, 2, 2])


class _Pictures:
    """A data set in torchvision's manner."""

    classes = ("a", "b", "c")

    def __init__(self, images: list[Any], labels: list[Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        return self.images[place], self.labels[place]


class Image_:
    """A feature whose type is called as that of Hugging Face."""


Image_.__name__ = "Image"
ClassLabel = type("ClassLabel", (), {"names": ["a", "b", "c"]})


class _HuggingFace:
    """The part of a `datasets.Dataset` that is used."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows, self.features, self.column_names = rows, features, list(features)

    def select_columns(self, names: list[str]) -> Iterator[dict[str, Any]]:
        return ({name: row[name] for name in names} for row in self.rows)


class _Raising:
    """A data set whose third item cannot be read."""

    def __init__(self, error: Exception, length: int = 3) -> None:
        self.error, self.length = error, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Any:
        if place < 2:
            return GRAY[place]
        raise self.error


PILS = [Image.fromarray(image) for image in GRAY]
FORMS: dict[str, Any] = {
    "array": GRAY,
    "array with a last axis of channels": GRAY[..., None],
    "array with a first axis of channels": GRAY[:, None],
    "tensor": torch.from_numpy(GRAY.copy()),
    "list of PIL images": PILS,
    "list of floating-point tensors": [torch.from_numpy(image)[None].float() / 255 for image in GRAY.copy()],
    "column of Hugging Face": _HuggingFace([{"image": one, "id": 3} for one in PILS], {"image": Image_(), "id": 0}),
}
LABELLED: dict[str, Any] = {
    "pair": (GRAY, LABELS),
    "pair with a list": (GRAY, LABELS.tolist()),
    "torch's": TensorDataset(torch.from_numpy(GRAY.copy())[:, None], torch.from_numpy(LABELS)),
    "torchvision's": _Pictures(PILS, LABELS.tolist()),
    "Hugging Face's": _HuggingFace(
        [{"img": one, "fine": int(label)} for one, label in zip(PILS, LABELS, strict=True)],
        {"img": Image_(), "fine": ClassLabel()},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str) -> None:
    given = images_given(FORMS[form])
    np.testing.assert_array_equal(given.images, GRAY[:, None])
    assert given.labels.tolist() == [0] * len(GRAY)
    assert given.digest() == images_given(GRAY).digest()


@pytest.mark.parametrize("form", LABELLED)
def test_every_form_gives_the_same_labels(form: str) -> None:
    given = images_given(LABELLED[form])
    np.testing.assert_array_equal(given.images, GRAY[:, None])
    np.testing.assert_array_equal(given.labels, LABELS)


def test_names_of_classes_come_with_the_data() -> None:
    assert images_given(LABELLED["torchvision's"]).class_names == ("a", "b", "c")
    assert images_given(LABELLED["Hugging Face's"]).class_names == ("a", "b", "c")


def test_digest_tells_pixels_labels_and_layout_apart() -> None:
    changed = GRAY.copy()
    changed[3, 2, 1] ^= 1
    forms = [GRAY, changed, GRAY.reshape(7, 6, 8), GRAY[:6], (GRAY, LABELS), (GRAY, LABELS[::-1])]
    assert len({images_given(form).digest() for form in forms}) == len(forms)


def test_either_layout_of_an_ambiguous_array_can_be_chosen() -> None:
    images = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    with pytest.raises(DataError, match="layout='NCHW' or 'NHWC'"):
        images_given(images)
    np.testing.assert_array_equal(images_given(images, "NCHW").images, images)
    np.testing.assert_array_equal(images_given(images, "NHWC").images, images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "data is a int; give an array"),
        ("folder:x", "data is a str"),
        (GRAY.astype(np.float64), r"float64 .*uint16.*astype\('float32'\)"),
        (GRAY[0, 0], r"uint8 \[6\]"),
        (GRAY[:0], r"\[0, 8, 6\]"),
        (np.zeros((4, 2, 5, 5), np.uint8), "no axis of 1 or 3 channels"),
        ((GRAY, LABELS[:3]), r"\[3\]; integers \[7\]"),
        ((GRAY, LABELS - 2), "from -2 to 0"),
        ((GRAY, LABELS * 1j), r"complex128 \[7\]; integers \[7\]"),
        ([], "no images"),
        ([GRAY[0], "x"], "item 1 of data is a str"),
        ([GRAY[0] / -255.0], r"outside \[0, 1\]"),
        ([(GRAY[0], 1), GRAY[1]], "item 1 of data has no label"),
        ([(GRAY[0], 1j)], "label of item 0"),
        ([(GRAY[0], 1, 2)], "item 0 of data has 3 parts"),
        (_HuggingFace([], {"text": 0}), "columns text"),
        (
            _HuggingFace([{"image": GRAY[0]}, {}], {"image": Image_()}),
            "item 1 of data cannot be read: KeyError: 'image'",
        ),
        (_Raising(ValueError("bad\nfile")), "item 2 of data cannot be read: ValueError: bad file"),
        (_Raising(OSError(5, "Input/output error")), "item 2 of data cannot be read: OSError"),
        (_Raising(StopIteration()), "item 2 of data cannot be read"),
        (_Raising(ValueError(), length=-1), "data, a _Raising, has no length: ValueError"),
        ((GRAY, [[1], [2, 3]]), "data, its labels, cannot be read as an array"),
        ((GRAY, None), r"the labels are object \[\]; integers \[7\]"),
        ([GRAY, LABELS], r"item 0 of data is uint8 \[7, 8, 6\], with no axis of 1 or 3 channels"),
        ([GRAY[0].astype(int)], r"item 0 of data is int64 \[8, 6\]; uint8"),
        ([GRAY[0], GRAY[0, 0]], r"item 1 of data is uint8 \[6\]; \[H, W\], \[H, W, C\] or"),
        ([COLOURED[0, :, :, :3]], r"item 0 .* which may be \[C, H, W\] or \[H, W, C\]; say which"),
        (torch.empty(2, 8, 8, device="meta"), "data cannot be read as an array: NotImplementedError"),
        (torch.eye(8).to_sparse(), "data cannot be read as an array: TypeError"),
        (torch.zeros(2, 8, 8, dtype=torch.bool), r"data is bool .*astype\('uint8'\)"),
    ],
)
def test_what_is_no_data_is_told_in_one_line(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        images_given(data)
    assert "\n" not in str(caught.value)


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="layout 'HWC' is not one of NHWC, NCHW"):
        images_given(COLOURED, "HWC")  # type: ignore[arg-type]


def test_items_in_half_precision_are_read() -> None:
    item = torch.full((8, 6), 0.5, dtype=torch.bfloat16)
    assert images_given([item]).images[0].max() == 128


def test_images_are_packed_once_and_found_by_their_digest(tmp_path: Path) -> None:
    packing, lines = DataConfig(cache_dir=str(tmp_path)), list[str]()
    name = pack_given((COLOURED, LABELS[:5]), packing=packing, announce=lines.append)
    assert pack_given((COLOURED, LABELS[:5]), packing=packing, announce=lines.append) == name
    assert len(lines) == 1
    dataset = open_dataset(name, "", packing, lines.append)
    assert (len(dataset.train.images), len(dataset.test.images)) == (4, 1)
    assert dataset.class_names == ("0", "1", "2")
    assert sorted(map(bytes, [*dataset.train.images, *dataset.test.images])) == sorted(map(bytes, COLOURED))


def test_test_images_that_are_given_are_the_test_split(tmp_path: Path) -> None:
    packing = DataConfig(cache_dir=str(tmp_path))
    name = pack_given(GRAY[:5], GRAY[5:], packing=packing, announce=print)
    dataset = open_dataset(name, "", packing, print)
    np.testing.assert_array_equal(dataset.train.images, GRAY[:5, None])
    np.testing.assert_array_equal(dataset.test.images, GRAY[5:, None])
    assert dataset.class_names == ("all",)


def test_images_of_many_sizes_are_fitted_to_one(tmp_path: Path) -> None:
    images = [Image.new("RGB", (size, size + 1), (size, 0, 0)) for size in (9, 12, 20)]
    with pytest.raises(DataError, match=r"differ in size.*--image-size"):
        pack_given(images, packing=DataConfig(cache_dir=str(tmp_path)), announce=print)
    packing = DataConfig(cache_dir=str(tmp_path), image_size=8)
    assert open_dataset(pack_given(images, packing=packing, announce=print), "", packing, print).image_shape == (
        3,
        8,
        8,
    )


def test_a_cache_without_the_images_tells_how_to_give_them(tmp_path: Path) -> None:
    name = f"array:{images_given(GRAY).digest()}"
    with pytest.raises(DataError, match=r"--cache-dir.*gen_dist.train\(config, data=...\)"):
        open_dataset(name, "", DataConfig(cache_dir=str(tmp_path)), print)
    with pytest.raises(DataError, match="nor a digest"):
        open_dataset("array:holiday", "", DataConfig(cache_dir=str(tmp_path)), print)
