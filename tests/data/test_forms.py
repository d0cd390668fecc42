"""Vectors and signals: told from images, packed as they are, and drawn as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset, pack_given, survey_source
from gen_dist.data.forms import as_held, as_own
from gen_dist.data.given import images_given
from gen_dist.data.values import ValueScale, scale_of_json
from gen_dist.errors import DataError
from gen_dist.pictures.contact_sheet import save_contact_sheet
from gen_dist.pictures.plots import TILE, tiles

VECTORS = np.random.default_rng(0).normal(5.0, 2.0, (40, 6)).astype(np.float32)
VECTORS[:, 2] *= 1000.0
SIGNALS = np.cumsum(np.random.default_rng(1).integers(-9, 10, (40, 2, 64)), axis=2).astype(np.int16)
LABELS = np.arange(40) % 3


def opened(source: str, cache: Path, **options: Any) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    return open_dataset(source, "", DataConfig(cache_dir=str(cache), **options), lines.append), lines


def saved(path: Path, array: Any) -> str:
    np.save(path / "a.npy", array)
    return f"array:{path / 'a.npy'}"


def both(dataset: Dataset) -> list[bytes]:
    return sorted(map(bytes, [*dataset.train.images, *dataset.test.images]))


@pytest.mark.parametrize(
    ("array", "options", "form", "shape"),
    [
        (VECTORS, {}, "vectors", (6, 1, 1)),
        (VECTORS, {"array_of": "vectors"}, "vectors", (6, 1, 1)),
        (VECTORS, {"array_of": "signals"}, "signals", (1, 1, 6)),
        (SIGNALS, {"array_of": "signals"}, "signals", (2, 1, 64)),
        (SIGNALS.transpose(0, 2, 1), {"array_of": "signals", "layout": "NHWC"}, "signals", (2, 1, 64)),
        (SIGNALS, {}, "images", (1, 2, 64)),
        (SIGNALS, {"array_of": "images"}, "images", (1, 2, 64)),
    ],
)
def test_an_array_is_taken_for_what_it_is_said_to_hold(tmp_path, array, options, form, shape):
    dataset, lines = opened(saved(tmp_path, array), tmp_path / "cache", **options)
    assert (dataset.scale.form, dataset.image_shape) == (form, shape)
    rows = array.transpose(0, 2, 1) if options.get("layout") else array
    assert both(dataset) == sorted(map(bytes, np.ascontiguousarray(rows)))
    again, lines_again = opened(saved(tmp_path, array), tmp_path / "other", **options)
    assert again.digest == dataset.digest
    # Grey images of this shape are likely signals.
    assert any("for signals [N, C, L] say --array-of signals" in line for line in lines) == (
        form == "images" and not options
    )
    assert [line for line in lines if "array-of" in line] == [
        line.replace(str(tmp_path / "other"), str(tmp_path / "cache")) for line in lines_again if "array-of" in line
    ]


def test_forms_of_one_array_are_different_data(tmp_path):
    name = saved(tmp_path, SIGNALS)
    found = {opened(name, tmp_path, array_of=form)[0].digest for form in (None, "images", "signals")}
    assert len(found) == 2  # images, said or not, are one
    assert len({images_given(SIGNALS, array_of=form).digest() for form in ("images", "signals")}) == 2
    assert images_given(SIGNALS, array_of="images").digest() == images_given(SIGNALS).digest()


GIVEN: dict[str, tuple[Any, Any, str]] = {
    "array of vectors": (VECTORS, None, "vectors"),
    "tensor of vectors": (torch.from_numpy(VECTORS), None, "vectors"),
    "items that are vectors": (list(VECTORS), None, "vectors"),
    "torch's data set of vectors": (
        TensorDataset(torch.from_numpy(VECTORS), torch.from_numpy(LABELS)),
        None,
        "vectors",
    ),
    "vectors and labels": ((VECTORS, LABELS), None, "vectors"),
    "vectors and a list of labels": ((VECTORS, LABELS.tolist()), None, "vectors"),
    "vectors and attributes": ((VECTORS, np.stack([LABELS, LABELS], 1)), "vectors", "vectors"),
    "vectors and columns": ((VECTORS, {"kind": LABELS}), None, "vectors"),
    "signals": (SIGNALS, "signals", "signals"),
    "items that are signals": (list(SIGNALS), "signals", "signals"),
    "signals and labels": ((SIGNALS, LABELS), "signals", "signals"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_vectors_and_signals_from_python_keep_their_values(tmp_path, name):
    data, array_of, form = GIVEN[name]
    packing = DataConfig(cache_dir=str(tmp_path), array_of=array_of)
    source = pack_given(data, packing=packing, announce=lambda _line: None)
    dataset, _ = opened(source, tmp_path)  # found again without a word on its form
    assert dataset.scale.form == form
    assert both(dataset) == sorted(map(bytes, VECTORS if form == "vectors" else SIGNALS))
    has_labels = "labels" in name or "columns" in name or "attributes" in name or "torch's" in name
    assert (dataset.labels.are_labels or dataset.labels.kind != "classes") == has_labels


def test_two_grey_images_in_a_tuple_stay_two_images():
    pair = (np.zeros((8, 6), np.uint8), np.ones((8, 6), np.uint8))
    given = images_given(pair)
    assert (given.form, np.shape(given.images)) == ("images", (2, 1, 8, 6))


def test_each_number_of_vectors_may_have_its_range(tmp_path):
    name = saved(tmp_path, VECTORS)
    whole, each = (opened(name, tmp_path, range_per_channel=each)[0] for each in (False, True))
    assert len(whole.scale.low) == 1 and whole.scale.high == (float(VECTORS.max()),)
    assert each.scale.low == tuple(map(float, VECTORS.min(axis=0)))
    assert each.scale.high == tuple(map(float, VECTORS.max(axis=0)))
    held = torch.from_numpy(each.train.images)
    seen = each.scale.for_model(held)
    assert float(seen.min()) == 0.0 and float(seen.max()) == 255.0
    back = each.scale.values(seen / 255.0)
    assert torch.allclose(back, held, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
def test_every_type_of_vectors_has_a_range(tmp_path, dtype):
    values = (np.abs(VECTORS[:, :2]) * 9).astype(dtype)
    for options in ({}, {"range_per_channel": True}, {"value_range": "percentile:2"}):
        scale = opened(saved(tmp_path, values), tmp_path, **options)[0].scale
        assert (scale.form, scale.dtype) == ("vectors", dtype)
        assert not scale.is_plain
        assert scale_of_json(scale.as_json()) == scale
    usual = opened(saved(tmp_path, values), tmp_path)[0].scale
    ends = (0.0, 255.0) if dtype == "uint8" else (float(values.min()), float(values.max()))
    assert (usual.low[0], usual.high[0]) == ends


def test_rows_are_held_and_given_back_in_their_own_shape():
    for form, own in (("vectors", (7, 6)), ("signals", (7, 2, 5)), ("images", (7, 3, 4, 5))):
        rows = torch.arange(float(np.prod(own))).view(own)
        held = as_held(form, rows)  # type: ignore[arg-type]
        assert held.ndim == 4
        assert torch.equal(as_own(form, held), rows)  # type: ignore[arg-type]
        assert as_held(form, held) is held  # type: ignore[arg-type]


def test_images_have_the_scale_that_they_had():
    assert "form" not in ValueScale("uint16", (0.0,), (9.0,)).as_json()
    with pytest.raises(ValueError, match="no range of values"):
        scale_of_json({"dtype": "uint8", "low": [0], "high": [1], "shown": [0, 1], "form": "songs"})


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a size": (VECTORS, {"image_size": 32}, "--image-size 32 is for images, and these are vectors; leave it out"),
    "a fit": (VECTORS, {"fit": "pad"}, "--fit pad is for images"),
    "channels": (VECTORS, {"channels": 1}, "--channels 1 is for images"),
    "8 bits": (VECTORS, {"dtype": "uint8"}, "--dtype uint8 is for images"),
    "pages": (VECTORS, {"pages": "first"}, "--pages first is for images"),
    "encoded storage": (VECTORS, {"packed_as": "encoded"}, "--packed-as encoded is for images"),
    "vectors of two axes": (SIGNALS, {"array_of": "vectors"}, r"int16 \[40, 2, 64\]; \[N, D\] is needed for vectors"),
    "signals of three axes": (
        SIGNALS[:, None],
        {"array_of": "signals"},
        r"\[40, 1, 2, 64\]; \[N, C, L\] or \[N, L\] is needed for signals",
    ),
    "more channels than values": (
        SIGNALS.transpose(0, 2, 1),
        {"array_of": "signals"},
        r"as \[N, C, L\] these would be signals of 64 channels and 2 values each; .*--layout",
    ),
    "images of two axes": (VECTORS, {"array_of": "images"}, r"\[N, H, W\].* is needed"),
    "double precision": (VECTORS.astype(float), {}, r"float64 \[40, 6\].*astype\('float32'\)"),
    "values that are not finite": (
        np.where(np.arange(len(VECTORS))[:, None] < 3, np.float32(np.nan), VECTORS),
        {},
        r": vectors are float32 \[40, 6\], and 3 of them have values that are not finite, first image 0; ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_for_vectors_or_signals_is_one_line(tmp_path, name):
    array, options, line = BAD[name]
    with pytest.raises(DataError, match=line) as caught:
        opened(saved(tmp_path, array), tmp_path / "cache", **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        survey = survey_source(saved(tmp_path, array), "", DataConfig(cache_dir=str(tmp_path), **options))
        raise survey.problem or AssertionError("gen-dist data takes it")


def test_the_form_is_an_option_of_arrays_alone(tmp_path):
    for source in ("synthetic", "mnist5k", "folder:images", "shards:*.tar"):
        with pytest.raises(DataError, match=r"array.of signals is "):
            opened(source, tmp_path, array_of="signals")


def test_items_of_two_forms_are_one_line():
    with pytest.raises(DataError, match=r"item 1 of data is float32 \[1, 6\]; \[D\] is needed for vectors"):
        images_given([VECTORS[0], VECTORS[:1]])
    with pytest.raises(DataError, match="train data are vectors and test data images"):
        pack_given(VECTORS, SIGNALS, packing=DataConfig(), announce=print)


@pytest.mark.parametrize(
    ("array", "array_of", "words"),
    [
        (VECTORS, None, ["40 vectors", "vectors   float32 [6] each", "36 train and 4 test"]),
        (SIGNALS, "signals", ["40 signals", "signals   int16 [2, 64] each"]),
    ],
)
def test_a_survey_says_form_and_draws_plots(tmp_path, array, array_of, words):
    packing = DataConfig(cache_dir=str(tmp_path), array_of=array_of)
    survey = survey_source(saved(tmp_path, array), "", packing)
    text = "\n".join(survey.lines()).replace(str(tmp_path), "")
    assert not [word for word in words if word not in text], text
    assert "sizes" not in text
    save_contact_sheet(tmp_path / "sheet.png", survey)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * TILE[1] and sheet.mode == "RGB"


def test_a_plot_shows_its_values():
    scale = ValueScale("float32", (0.0,), (1.0,), form="signals")
    rising = np.linspace(0.0, 1.0, 500, dtype=np.float32)[None, None]
    drawn = tiles(np.concatenate([rising, rising[:, :, ::-1], 0.5 + 0 * rising]), scale)
    ink = (drawn.min(axis=1) < 200).astype(float)
    heights = (ink * np.arange(TILE[0])[None, :, None]).sum(1) / ink.sum(1)  # rows from the top; no column is empty
    assert np.all(np.diff(heights[0]) <= 0) and heights[0, 0] > TILE[0] - 3 and heights[0, -1] < 3
    assert np.allclose(heights[0], heights[1, ::-1], atol=1.0)
    assert np.ptp(heights[2]) == 0
    bars = tiles(np.array([[0.0, 1.0, -1.0]], np.float32), ValueScale("float32", (-1.0,), (1.0,), form="vectors"))
    counts = (bars[0].min(axis=0) < 200).sum(axis=0)
    third = TILE[1] // 3
    assert counts[: third - 2].max() <= 3 and counts[third + 5] == counts[2 * third + 7] == TILE[0] // 2 + 1


def test_a_reconstruction_is_drawn_over_its_original():
    scale = ValueScale("float32", (0.0,), (1.0,), form="signals")
    low, high = np.full((1, 1, 9), 0.2, np.float32), np.full((1, 1, 9), 0.8, np.float32)
    both = tiles(high, scale, under=low)
    assert len({tuple(pixel) for pixel in both[0].reshape(3, -1).T.tolist()}) > len(
        {tuple(pixel) for pixel in tiles(high, scale)[0].reshape(3, -1).T.tolist()}
    )
    assert np.array_equal(tiles(high, scale, under=high), tiles(high, scale))
