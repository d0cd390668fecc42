"""Labels of every source: classes, attributes and numbers, and images without them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme, scheme_of_json
from gen_dist.data import Dataset, labelling, open_dataset, pack_given, survey_source
from gen_dist.errors import DataError, UserError
from gen_dist.pictures.contact_sheet import save_contact_sheet

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 5, 4), np.uint8)
AGES = np.linspace(20, 49, 30).astype(np.float32)
NAMES = np.array(["cat", "dog", "ant"])[np.arange(30) % 3]


def packed(path: Path, content: dict[str, Any], **options: Any) -> Dataset:
    np.savez(path / "a.npz", x=IMAGES, **content)
    packing = DataConfig(cache_dir=str(path / "cache"), **options)
    return open_dataset(f"array:{path / 'a.npz'}", "", packing, lambda _line: None)


def png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def by_image(dataset: Dataset) -> list[Any]:
    """Labels in the order of `IMAGES`."""
    splits = (dataset.train, dataset.test)
    found = {image.tobytes(): label for of in splits for image, label in zip(of.images, of.labels, strict=True)}
    return [found[image[None].tobytes()] for image in IMAGES]


def test_missing_classes_are_the_last_class(tmp_path):
    dataset = packed(tmp_path, {"labels": np.where(np.arange(30) < 4, "", NAMES)}, missing_labels="unknown")
    assert dataset.class_names == ("ant", "cat", "dog", "unknown")
    assert [dataset.class_names[label] for label in by_image(dataset)] == ["unknown"] * 4 + NAMES[4:].tolist()
    assert (dataset.labels.classes, dataset.labels.known_classes) == (4, 3)


def test_images_without_a_label_are_refused_unless_allowed(tmp_path):
    with pytest.raises(DataError, match=r"image 2 has no label.*--missing-labels unknown"):
        packed(tmp_path, {"labels": np.where(np.arange(30) == 2, -1, np.arange(30) % 3)})


def test_attributes_keep_names_and_missing_values(tmp_path):
    labels = np.stack([np.arange(30) % 2, np.arange(30) % 5], axis=1)
    labels[3, 1] = -1
    dataset = packed(tmp_path, {"labels": labels, "label_names": ["hat", "pose"]}, missing_labels="unknown")
    assert dataset.labels.kind == "attributes" and dataset.class_names == ("all",)
    assert dataset.labels.names == ("hat", "pose")
    assert dataset.labels.values == (("0", "1"), ("0", "1", "2", "3", "4", "unknown"))
    labels[3, 1] = 5
    assert np.array_equal(by_image(dataset), labels)


def test_numbers_have_the_mean_of_training_images(tmp_path):
    ages = np.where(np.arange(30) == 7, np.nan, AGES)
    dataset = packed(tmp_path, {"labels": ages}, missing_labels="unknown")
    known = dataset.train.labels[~np.isnan(dataset.train.labels)].astype(np.float64)
    assert dataset.labels.mean == pytest.approx((known.mean(),))
    assert dataset.labels.deviation == pytest.approx((known.std(),))
    assert dataset.labels.unknown == (True,)
    assert np.array_equal(np.array(by_image(dataset))[:, 0], ages.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("labels", [AGES, NAMES, np.stack([NAMES, NAMES[::-1]], 1), np.eye(30, 4, dtype=bool)])
def test_every_kind_of_label_packs_to_one_digest(tmp_path, labels):
    digests = set()
    for cache in ("one", "two"):
        np.savez(tmp_path / "a.npz", x=IMAGES, labels=labels)
        packing = DataConfig(cache_dir=str(tmp_path / cache))
        digests.add(open_dataset(f"array:{tmp_path / 'a.npz'}", "", packing, print).digest)
    np.savez(tmp_path / "a.npz", x=IMAGES, labels=labels[::-1])
    digests.add(open_dataset(f"array:{tmp_path / 'a.npz'}", "", packing, print).digest)
    assert len(digests) == 2


def test_a_scheme_survives_json():
    schemes = [
        LabelScheme("numbers", ("a",), unknown=(True,), mean=(1.5,), deviation=(2.0,), examples=((float("nan"),),)),
        LabelScheme("attributes", ("a", "b"), (("x", "y"), ("z",)), (False, False), examples=((1.0, 0.0),)),
        LabelScheme("classes", ("a", "unknown"), unknown=(True,)),
    ]
    for scheme in schemes:
        text = json.dumps(scheme.as_json(), allow_nan=False)
        assert repr(scheme_of_json(json.loads(text), ())) == repr(scheme)


@pytest.mark.parametrize("damage", [{"kind": "x"}, {"names": []}, {"examples": [[7.0, 0.0]]}, {"unknown": [True]}])
def test_a_damaged_scheme_is_one_line(damage):
    scheme = LabelScheme("attributes", ("a", "b"), (("x", "y"), ("z",)), (False, False), examples=((1.0, 0.0),))
    with pytest.raises(ValueError, match="no meaning of labels"):
        scheme_of_json(scheme.as_json() | damage, ())


def test_words_of_a_user_become_labels():
    attributes = LabelScheme("attributes", ("hat", "pose"), (("no", "yes"), ("0", "1", "unknown")), (False, True))
    assert attributes.row_of("yes,unknown") == (1.0, 2.0)
    assert attributes.caption((1.0, 2.0)) == "hat yes, pose unknown"
    numbers = LabelScheme("numbers", ("age",), unknown=(True,), mean=(0.0,), deviation=(1.0,))
    assert numbers.row_of("31.5") == (31.5,) and math.isnan(numbers.row_of("unknown")[0])
    # A class whose name is a number is meant by its name.
    assert LabelScheme("classes", ("3", "1")).row_of("3") == (0.0,)
    assert LabelScheme("classes", ("cat", "dog")).row_of("1") == (1.0,)
    bad = ((attributes, "yes"), (attributes, "maybe,0"), (numbers, "old"), (numbers, "inf"), (numbers, "1e300"))
    animals = LabelScheme("classes", ("cat", "dog"))
    for scheme, word in (
        *bad,
        (animals, "2"),
        (animals, "-1"),
        (animals, "--1"),
        (animals, "\u00b2"),
        (animals, "1" * 5000),
    ):
        with pytest.raises(UserError, match="label"):
            scheme.row_of(word)


@pytest.mark.parametrize(
    ("labels", "kind", "first"),
    [
        ({"age": AGES, "pose": np.arange(30) % 3}, "numbers", [20.0, 0.0]),
        ({"kind": NAMES.tolist(), "hat": [True] * 30}, "attributes", [1, 0]),
        (NAMES.tolist(), "classes", 1),
        ([None, *NAMES[1:].tolist()], "classes", 3),
        (np.stack([AGES, AGES], 1), "numbers", [20.0, 20.0]),
    ],
)
def test_labels_given_from_python_are_read(tmp_path, labels, kind, first):
    packing = DataConfig(cache_dir=str(tmp_path), missing_labels="unknown")
    dataset = open_dataset(pack_given((IMAGES, labels), packing=packing, announce=print), "", packing, print)
    assert dataset.labels.kind == kind
    assert by_image(dataset)[0].tolist() == first
    if isinstance(labels, dict):
        assert dataset.labels.names == tuple(labels)
    else:
        items = list(zip(IMAGES, labels, strict=True))
        again = open_dataset(pack_given(items, packing=packing, announce=print), "", packing, print)
        assert again.digest == dataset.digest


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"labels": NAMES, "x_test": IMAGES[:3], "labels_test": np.array(["ca"] * 3)}, "have the class 'ca'"),
        ({"labels": NAMES, "label_names": ["cat", "dog"]}, "'ant' is none of the 2 names of classes"),
        ({"labels": np.full(30, 1e300)}, "infinite in float32"),
        ({"labels": np.arange(30) * 10_000}, "give numbers that are no classes as floating point"),
    ],
)
def test_labels_that_would_be_misread_are_refused(tmp_path, labels, words):
    """A text of the test images that is the start of a class's name is not that class."""
    with pytest.raises(DataError, match=words):
        packed(tmp_path, labels)


def test_more_texts_than_can_be_learned_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "MOST_CLASSES", 29)
    with pytest.raises(DataError, match="30 different texts, such as '0'; at most 29 can be learned"):
        packed(tmp_path, {"labels": np.arange(30).astype(str)})


def test_named_classes_of_texts_are_in_the_order_of_names(tmp_path):
    dataset = packed(tmp_path, {"labels": NAMES, "label_names": ["dog", "cat", "cow", "ant"]})
    assert dataset.class_names == ("dog", "cat", "cow", "ant")
    assert [dataset.class_names[label] for label in by_image(dataset)] == NAMES.tolist()


def test_a_label_missing_in_test_images_alone_is_told(tmp_path):
    lines: list[str] = []
    np.savez(tmp_path / "a.npz", x=IMAGES, labels=np.arange(30) % 2, x_test=IMAGES[:3], labels_test=[0, -1, 1])
    packing = DataConfig(cache_dir=str(tmp_path), missing_labels="unknown")
    open_dataset(f"array:{tmp_path / 'a.npz'}", "", packing, lines.append)
    assert any(
        "1 image has no label, all of them test images: what stands for it is not learned" in one for one in lines
    )


def test_lines_about_missing_labels_are_few(tmp_path):
    lines: list[str] = []
    np.savez(tmp_path / "a.npz", x=IMAGES, labels=np.where(np.arange(30)[:, None] == 3, -1, np.ones((30, 50), int)))
    packing = DataConfig(cache_dir=str(tmp_path), missing_labels="unknown")
    open_dataset(f"array:{tmp_path / 'a.npz'}", "", packing, lines.append)
    assert 20 < len(lines) < 25 and any("and 30 more labels alike" in line for line in lines)


def test_images_of_one_class_or_none_have_a_contact_sheet(tmp_path):
    np.savez(tmp_path / "a.npz", x=IMAGES, labels=np.where(np.arange(30) < 4, -1, 0))
    packing = DataConfig(cache_dir=str(tmp_path), missing_labels="unknown")
    survey = survey_source(f"array:{tmp_path / 'a.npz'}", "", packing)
    save_contact_sheet(tmp_path / "sheet.png", survey)
    assert set(survey.sheet_labels) == {0, 1} and len(survey.class_names) == 2


def test_items_without_labels_are_those_of_images_alone(tmp_path):
    alone, with_none = (
        pack_given(items, packing=DataConfig(cache_dir=str(tmp_path)), announce=print)
        for items in (list(IMAGES), [(image, None) for image in IMAGES])
    )
    assert alone == with_none


def test_a_test_split_without_labels_is_refused_beside_labels(tmp_path):
    packing = DataConfig(cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="train data have labels and test data have none"):
        pack_given((IMAGES, np.arange(30) % 2), IMAGES[:5], packing=packing, announce=print)


def test_labels_of_other_data_are_taken_where_they_mean_the_same():
    classes = LabelScheme("classes", ("a", "b", "unknown"), unknown=(True,))
    assert classes.takes(LabelScheme("classes", ("a", "b")))
    assert not classes.takes(LabelScheme("classes", ("b", "a")))
    assert not LabelScheme("classes", ("a", "b")).takes(classes)
    attributes = LabelScheme("attributes", ("hat", "pose"), (("no", "yes"), ("0", "1")), (False, False))
    assert attributes.takes(attributes) and not attributes.takes(classes)
    assert not attributes.takes(LabelScheme("attributes", ("pose", "hat"), attributes.values, (False, False)))
    numbers = LabelScheme("numbers", ("age",), unknown=(False,), mean=(0.0,), deviation=(1.0,))
    assert numbers.takes(replace(numbers, mean=(7.0,))) and not numbers.takes(replace(numbers, unknown=(True,)))


def test_images_beside_class_directories_have_no_label(tmp_path):
    for place, image in enumerate(IMAGES):
        directory = tmp_path / "images" / ("" if place < 6 else NAMES[place])
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(directory / f"{place:02}.png")
    with pytest.raises(DataError, match=r"6 images beside its class directories.*--missing-labels unknown"):
        open_dataset(f"folder:{tmp_path / 'images'}", "", DataConfig(cache_dir=str(tmp_path)), print)
    packing = DataConfig(cache_dir=str(tmp_path), missing_labels="unknown")
    dataset = open_dataset(f"folder:{tmp_path / 'images'}", "", packing, print)
    assert [dataset.class_names[label] for label in by_image(dataset)] == ["unknown"] * 6 + NAMES[6:].tolist()
    survey = survey_source(f"folder:{tmp_path / 'images'}", "", packing)
    assert survey.class_names == dataset.class_names
    assert any("6 images have no label" in line for line in survey.lines())


@pytest.mark.parametrize(
    ("columns", "kind", "third"),
    [
        (("age",), "numbers", [22.0]),
        (("hat",), "attributes", [2]),
        (("age", "pose"), "numbers", [22.0, 2.0]),
        (("kind", "pose"), "attributes", [0, 2]),
        (("flags",), "attributes", [0, 1]),
        (("kind",), "classes", 0),
        (("gap",), "classes", 2),
    ],
)
def test_columns_of_a_parquet_file_are_labels(tmp_path, columns, kind, third):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))

    table = {
        "image": [{"bytes": png(image)} for image in IMAGES],
        "age": AGES,
        "pose": np.arange(30) % 3,
        "kind": NAMES,
        "flags": [[place % 2, 1] for place in range(30)],
        "hat": [None if place == 2 else place % 2 == 0 for place in range(30)],
        "gap": [None if place == 3 else place % 3 for place in range(30)],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    packing = DataConfig(cache_dir=str(tmp_path), label_columns=columns, missing_labels="unknown")
    dataset = open_dataset(f"parquet:{tmp_path / 'a.parquet'}", "", packing, print)
    assert dataset.labels.kind == kind
    assert by_image(dataset)[2].tolist() == third
    if kind != "classes" and columns != ("flags",):
        assert dataset.labels.names == columns
    if columns == ("gap",):
        assert dataset.class_names[by_image(dataset)[3]] == "unknown"
    survey = survey_source(f"parquet:{tmp_path / 'a.parquet'}", "", packing)
    assert survey.bytes == sum(of.images.nbytes + of.labels.nbytes for of in (dataset.train, dataset.test))
    if len(columns) > 1:
        assert any(line.strip().startswith(("labels", "pose")) for line in survey.lines())


@pytest.mark.parametrize(("labels", "names"), [([0, 1, 2], "012"), (["a", "b", "c"], "abc")])
def test_a_shard_of_rows_without_labels_lies_beside_others(tmp_path, labels, names):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))

    images = [{"bytes": png(image)} for image in IMAGES]
    column = pyarrow.array(labels * 5)
    for place, of_shard in enumerate((column, pyarrow.nulls(15, column.type))):
        table = {"image": images[15 * place : 15 * (place + 1)], "label": of_shard}
        parquet.write_table(pyarrow.table(table), tmp_path / f"train-{place:05}-of-00002.parquet")
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), missing_labels="unknown")
    dataset = open_dataset(f"parquet:{tmp_path}", "", packing, print)
    assert dataset.class_names == (*names, "unknown")
    assert [dataset.class_names[label] for label in by_image(dataset)] == [*names] * 5 + ["unknown"] * 15


def test_a_column_that_is_not_there_is_one_line(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))

    parquet.write_table(pyarrow.table({"image": [b"x"], "age": [1.0]}), tmp_path / "a.parquet")
    packing = DataConfig(cache_dir=str(tmp_path), label_columns=("years",))
    with pytest.raises(DataError, match="no column years of --label-columns, only image, age"):
        open_dataset(f"parquet:{tmp_path / 'a.parquet'}", "", packing, print)
