"""Values other than 8-bit ones: kept in the cache, scaled for the model, and given back in their units."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gen_dist
from gen_dist.config import DataConfig, MlpConfig, TrainConfig, VaeConfig
from gen_dist.data import Dataset, TrainBatches, cache, open_dataset, pack_given, ranges
from gen_dist.data.values import DTYPES, PLAIN, ValueScale, scale_of_json
from gen_dist.errors import ConfigError, DataError
from gen_dist.evaluation.metrics.psnr import ROUNDING, peak_signal_to_noise
from gen_dist.inference.export import _parts_of, export
from gen_dist.pictures.grids import save_reconstructions, split_pairs
from gen_dist.records.checkpoint import SCALE

RANGES = {"uint8": (0, 255), "uint16": (150, 2599), "int16": (-900, 3000), "float16": (-1.5, 2), "float32": (-7, 1e5)}


def values_of(dtype: str, shape: Sequence[int] = (40, 2, 6, 8)) -> NDArray[Any]:
    """Values that fill the range of a dtype in `RANGES`, both ends included."""
    low, high = RANGES[dtype]
    shares = np.random.default_rng(len(dtype)).random(shape)
    shares.flat[:2] = 0, 1
    found = low + shares * (high - low)
    return (np.rint(found) if dtype[0] in "ui" else found).astype(dtype)


def packed(tmp_path: Path, values: Any, layout: Any = "NCHW", **options: Any) -> Dataset:
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), **options)
    name = pack_given(values, layout=layout, packing=packing, announce=lambda _line: None)
    return open_dataset(name, "", packing, lambda _line: None)


def gathered(dataset: Dataset, budget: int, steps: int = 4, ranks: int = 1) -> list[torch.Tensor]:
    """Images of some steps as so many ranks see them, from memory or from the map."""
    rows = 12 // ranks
    of_ranks = [_of_rank(dataset, budget, steps, (rank * rows, rows)) for rank in range(ranks)]
    return [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]


def _of_rank(dataset: Dataset, budget: int, steps: int, rows: tuple[int, int]) -> list[torch.Tensor]:
    device = torch.device("cpu")
    batches = TrainBatches(
        *(dataset.train,),
        seed=3,
        global_batch_size=12,
        micro_batches=[rows],
        device=device,
        resident_budget_bytes=budget,
    )
    assert batches.resident == bool(budget)
    found = [batches.micro_batch(step, 0)[0] for step in range(steps)]
    batches.close()
    return found


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_gives_the_values_back(tmp_path, dtype, per_channel):
    values = values_of(dtype)
    rule = {"value_range": "data", "range_per_channel": per_channel}
    dataset = packed(tmp_path, values, **rule)
    images = dataset.train.for_model(slice(None))
    assert images.dtype == (torch.uint8 if dataset.scale.is_plain else torch.float32)
    assert 0 <= float(images.min()) <= float(images.max()) <= 255
    back = dataset.scale.values(images / 255).numpy()
    assert back.dtype == dataset.train.images.dtype == values.dtype
    if values.dtype.kind in "iu":
        assert np.array_equal(back, dataset.train.images)
    else:
        low, high = RANGES[dtype]
        assert np.abs(back.astype(float) - dataset.train.images).max() <= 0.5 * (high - low) / 65_536


def test_every_16_bit_level_survives_a_round_trip():
    levels = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(1, 1, 256, 256)
    scale = ValueScale("uint16", (0.0,), (65_535.0,))
    assert torch.equal(scale.values(scale.for_model(levels) * (1.0 / 255.0)), levels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mapped_and_resident_values_are_equal(tmp_path, dtype):
    dataset = packed(tmp_path, values_of(dtype))
    assert all(map(torch.equal, gathered(dataset, 0), gathered(dataset, 2**30)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_epoch_of_two_ranks_has_each_image_once(tmp_path, dtype):
    values = values_of(dtype)
    dataset = packed(tmp_path, values)
    seen = torch.cat(gathered(dataset, 0, 3, ranks=2))  # 36 of 40 images are trained on
    expected = dataset.train.for_model(slice(None))
    rows = [sorted(map(tuple, images.flatten(1).tolist())) for images in (seen, expected)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_packed_twice_have_one_digest(tmp_path, dtype):
    values = values_of(dtype)
    first, second = (packed(tmp_path / name, values) for name in "ab")
    assert first.digest == second.digest
    assert first.scale == second.scale
    assert np.array_equal(first.train.images, second.train.images)


def test_another_range_is_other_data(tmp_path):
    values = values_of("uint16")
    digests = {rule: packed(tmp_path, values, value_range=rule).digest for rule in (None, "data", "dtype", "100:3000")}
    assert digests[None] == digests["data"]
    assert len(set(digests.values())) == 3


def test_8_bit_caches_know_no_range(tmp_path):
    """Key and digest of 8-bit images are those of versions that had no other values."""
    packing = DataConfig(cache_dir=str(tmp_path), synthetic_images=32)
    dataset = open_dataset("synthetic", "", packing, lambda _line: None)
    (meta,) = (json.loads(path.read_text()) for path in tmp_path.glob("*/meta.json"))
    assert dataset.scale is PLAIN or dataset.scale == PLAIN
    assert "values" not in meta
    assert set(meta["options"]) == {"image_size", "channels"}
    assert dataset.train.for_model(slice(2)).dtype == torch.uint8
    assert cache._digest(meta) == dataset.digest


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ({}, [0], [999]),
        ({"value_range": "dtype"}, [0], [65_535]),
        ({"value_range": "10:20"}, [10], [20]),
        ({"value_range": "percentile:10"}, [99], [900]),
        ({"range_per_channel": True}, [0, 500], [499, 999]),
    ],
)
def test_ranges_are_those_that_the_config_says(tmp_path, rule, low, high):
    values = np.arange(1000, dtype=np.uint16).reshape(2, 10, 5, 10).transpose(1, 0, 2, 3)
    scale = packed(tmp_path, (values, np.zeros(10, int)), **rule, test_fraction=0.01).scale
    slack = 100 if "percentile:10" in rule.values() else 0  # one image of ten is held out
    assert np.allclose(scale.low, low, atol=slack)
    assert np.allclose(scale.high, high, atol=slack)


def test_values_beyond_the_range_are_cut_off_and_told(tmp_path):
    lines: list[str] = []
    packing = DataConfig(cache_dir=str(tmp_path), value_range="1000:2000")
    name = pack_given(values_of("uint16"), layout="NCHW", packing=packing, announce=lines.append)
    assert any("% of the values are beyond" in line and "150..2,599" in line for line in lines)
    images = open_dataset(name, "", packing, lambda _line: None).train.for_model(slice(None))
    assert (float(images.min()), float(images.max())) == (0.0, 255.0)


def test_a_few_values_beyond_the_range_are_told(tmp_path, monkeypatch):
    """A sample of floating-point values may lack them."""
    monkeypatch.setattr(ranges, "_LEAST_SAMPLED", 16)
    monkeypatch.setattr(ranges, "_SAMPLED", 16)
    values = np.full((200, 1, 6, 8), 0.5, np.float32)
    values[:, 0, 2, 3] = 7.0
    lines: list[str] = []
    packing = DataConfig(cache_dir=str(tmp_path), value_range="0:1")
    pack_given(values, layout="NCHW", packing=packing, announce=lines.append)
    assert any("some values are beyond that range and are cut off: all are 0.5..7" in line for line in lines)


@pytest.mark.parametrize(("channels", "side"), [(1, 64), (200, 4)])
def test_a_sample_of_values_is_of_all_images(monkeypatch, channels, side):
    """However large they are; and of many channels it takes no more memory than of one."""
    monkeypatch.setattr(ranges, "_LEAST_SAMPLED", 64)
    monkeypatch.setattr(ranges, "_SAMPLED", 2048)
    columns = np.linspace(0, 0.5, side, dtype=np.float32)
    values = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1) + np.tile(columns, (channels, side, 1))
    tables = [ranges._Values(values, channel) for channel in range(channels)]
    assert sum(int(table.counts.sum()) for table in tables) <= channels * 128 + 8192
    assert tables[0].percentile(10) == pytest.approx(5, abs=1)
    assert tables[0].percentile(90) == pytest.approx(45, abs=1)
    assert len(np.unique(tables[-1].values % 1)) > side / 2  # not of a few columns


@pytest.mark.parametrize("value", [0, 7, -3e8, 1e20, -3e38])
def test_equal_values_have_a_range(tmp_path, value):
    dataset = packed(tmp_path, np.full((8, 1, 6, 8), value, np.float32))
    assert dataset.scale.low == (float(np.float32(value)),)
    assert dataset.scale.high > dataset.scale.low
    assert (dataset.scale.values(dataset.train.for_model(slice(None)) / 255).numpy() == np.float32(value)).all()


@pytest.mark.parametrize(
    ("values", "options", "line"),
    [
        (values_of("float32"), {"value_range": "dtype"}, r"beyond 0..1 of --value-range dtype.*percentile:1"),
        (np.full((4, 1, 5, 5), np.nan, np.float32), {}, "not finite"),
        (values_of("uint16"), {"dtype": "uint8"}, "--dtype uint8 reduces files only"),
        (values_of("uint16"), {"channels": 1}, "--channels makes gray of RGB"),
        (values_of("uint16", (4, 1, 6, 8)), {"image_size": 4, "fit": "pad"}, "no white to pad with"),
        ([values_of("uint16")[0], values_of("int16")[0]], {}, "differ in type"),
    ],
)
def test_values_that_cannot_be_packed_are_one_line(tmp_path, values, options, line):
    with pytest.raises(DataError, match=line) as caught:
        packed(tmp_path, values, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "min", "5:1", "nan:2", "percentile:50", "percentile:0", "1:2:3"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="value_range"):
        DataConfig(value_range=text)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_resized_values_keep_type_and_range(tmp_path, channels):
    values = values_of("uint16", (12, channels, 9, 12))
    dataset = packed(tmp_path, values, image_size="8x6")
    assert dataset.train.images.shape[1:] == (channels, 6, 8)
    assert dataset.train.images.dtype == np.uint16
    assert np.abs(dataset.train.images.mean() - values.mean()) < 100
    flat = packed(tmp_path, np.full((4, channels, 9, 12), 40_000, np.uint16), image_size="8x6")
    assert (flat.train.images == 40_000).all()


def trained(tmp_path: Path, values: Any, steps: int, **changes: Any) -> Path:
    config = TrainConfig(
        preset="small",
        steps=steps,
        global_batch_size=16,
        log_every=1,
        run_dir=str(tmp_path / "run"),
        objective=VaeConfig(likelihood="gaussian"),
        network=MlpConfig(hidden_sizes=(16,), latent_dim=3),
        packing=DataConfig(cache_dir=str(tmp_path / "cache"), **changes),
    )
    config = replace(config, checkpoint_every=4, sample_every=4, evaluate_every=4)
    gen_dist.train(config, data=values, layout="NCHW", say=lambda _line: None)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_resumed_run_of_16_bit_values_has_the_same_bits(tmp_path):
    values = values_of("uint16")
    whole = trained(tmp_path / "a", values, 8)
    trained(tmp_path / "b", values, 4)
    resumed = trained(tmp_path / "b", values, 8)
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, resumed)]
    losses = [[json.loads(line).get("train/loss") for line in of] for of in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8 and None not in losses[0]


@pytest.mark.parametrize("dtype", ["uint16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_trained_model_gives_units_back(tmp_path, dtype):
    values = values_of(dtype)
    run = trained(tmp_path, values, 4)
    model = gen_dist.load(run)
    images = torch.from_numpy(values[:3])
    low, high = RANGES[dtype]
    back = model.reconstruct(images)
    assert back.dtype == images.dtype and back.shape == images.shape
    assert low <= back.double().min() and back.double().max() <= high
    assert back.double().mean() > low + 0.1 * (high - low)
    exported = gen_dist.load(export(run, "safetensors", announce=lambda _line: None))
    assert exported.scale == model.scale == ValueScale(dtype, (float(low),), (float(high),), model.scale.shown)
    assert torch.equal(exported.reconstruct(images), back)
    parts = {one.part.name: one.function for one in _parts_of(model, "onnx", ())}
    units = parts["decoder"](parts["encoder"](images.float())[0])
    assert torch.allclose(units.double(), back.double(), rtol=0, atol=0.5 if dtype == "uint16" else 1e-5 * high)
    with pytest.raises(gen_dist.errors.UserError, match=f"the model takes {dtype}"):
        model.encode(images.to(torch.uint8))


def test_a_scale_is_read_back_from_json():
    scale = ValueScale("int16", (-3.0, 0.5), (7.0, 9.0), (0.25, 0.75))
    assert scale_of_json(json.loads(json.dumps(scale.as_json()))) == scale
    assert scale_of_json(None) == PLAIN
    assert SCALE.fits(None) and SCALE.fits(scale.as_json())
    for damage in ({"dtype": "int64"}, {"low": [9.0, 9.0]}, {"high": [1.0]}, {"shown": [1, 0]}, {"low": "a"}):
        assert not SCALE.fits(scale.as_json() | damage)
    for damage in ({"low": [-(10**400), 0.5]}, {"shown": [0, math.inf]}):
        assert not SCALE.fits(scale.as_json() | damage)


def test_the_range_of_many_channels_fits_a_line():
    scale = ValueScale("uint16", (0.0,) * 200, tuple(map(float, range(1, 201))))
    assert str(scale) == "uint16 0..1, 0..2, ..., 0..200"
    assert str(ValueScale("int16", (-5.0,), (0.5,))) == "int16 -5..0.5"


def test_pictures_stretch_values_and_put_channels_side_by_side():
    scale = ValueScale("uint16", (100.0,), (300.0,), (0.25, 0.75))
    values = np.array([100, 150, 200, 250, 300], np.uint16).reshape(1, 5, 1, 1).repeat(2, 2)
    shown = scale.eight_bit(values)
    assert shown.tolist() == [[[[0, 0, 128, 255, 255]] * 2]]
    assert scale.shown_values == ("150", "250")
    assert PLAIN.shown_values is None


@pytest.mark.parametrize(("height", "width"), [(12, 16), (20, 60)])
def test_pairs_are_cut_from_a_picture_with_a_scale(tmp_path, height, width):
    """A scale of values is as high as a row of images of 20 pixels."""
    from PIL import Image

    pairs = np.random.default_rng(0).integers(0, 256, (2, 16, 1, height, width), np.uint8)
    for bar in (None, ("150", "2,599")):
        save_reconstructions(tmp_path / "pairs.png", pairs[0], pairs[1], bar=bar)
        picture = np.asarray(Image.open(tmp_path / "pairs.png"))[:, :, None]
        found = split_pairs(picture, (1, height, width), has_bar=bar is not None)
        assert found is not None
        assert np.array_equal(found, pairs)


def test_psnr_of_16_bit_values_sees_below_8_bits():
    values = torch.linspace(0, 255, 64).view(1, 1, 8, 8)
    near = values + 255 / 65_535
    of_16_bits = peak_signal_to_noise(near, values, (1 / 65_535) ** 2 / 12)
    assert float(of_16_bits) == pytest.approx(20 * np.log10(65_535), abs=0.1)
    assert float(peak_signal_to_noise(near, values)) == pytest.approx(-10 * np.log10(ROUNDING))
