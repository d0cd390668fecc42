"""Samples are compared with the images that `--reference` names, under names that say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.errors import UserError
from gen_dist.evaluation import reference
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.features import FeatureNetwork, feature_network
from gen_dist.evaluation.guide import base_name, metric_of
from gen_dist.evaluation.metrics import measured_metrics
from gen_dist.evaluation.metrics.frechet import frechet_distance, moments
from gen_dist.evaluation.plan import MetricPlan, Setting
from gen_dist.evaluation.record import read_evaluation
from gen_dist.training.run import train
from tests.support.digits import digits
from tests.support.runs import small_config


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train(small_config("gan", steps=2, data="mnist5k", run_dir=str(path)), say=_silent)
    return path


def _features(images: np.ndarray) -> torch.Tensor:
    return feature_network("digits", torch.device("cpu")).of_images(torch.from_numpy(images))[0]


@pytest.mark.slow
def test_training_images_may_be_the_reference(run: Path) -> None:
    evaluate(run, ["fid"], samples=200, announce=_silent)
    found = evaluate(run, ["fid", "kid", "coverage", "sharpness"], samples=200, reference="train", announce=_silent)
    assert {"fid_200", "fid_200_train", "kid_200_train", "coverage_200_train", "sharpness_200"} <= set(found.metrics)
    real = _features(open_dataset("mnist5k", "data", DataConfig(), _silent).train.images)
    fake = _features(gen_dist.load(run).sample(200).numpy())
    expected = frechet_distance(moments(real), moments(fake))
    assert found.metrics["fid_200_train"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["fid_200_train"] != found.metrics["fid_200"]
    assert found.intervals["fid_200_train"][0] < expected < found.intervals["fid_200_train"][1]
    assert found.references["train"].startswith("4,000 images of train, digest")
    assert read_evaluation(run) == found


def test_images_of_a_folder_may_be_the_reference(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are brought to the size of the run's, and all of them are taken, whatever the splits."""
    images = digits()[0][:30]
    for place, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / f"{place:02}.png")
    found = evaluate(run, ["fid"], samples=200, reference=f"folder:{tmp_path}", announce=_silent)
    ((name, told),) = [one for one in found.references.items() if one[0] != "train"]
    assert told.startswith(f"30 images of folder:{tmp_path}, digest {name.removeprefix('ref-')}")
    fake = _features(gen_dist.load(run).sample(200).numpy())
    expected = frechet_distance(moments(_features(images)), moments(fake))
    assert found.metrics[f"fid_200_{name}"] == pytest.approx(expected, rel=1e-5)
    assert base_name(f"fid_200_{name}") == "fid"
    assert metric_of(f"fid_200_{name}").label == f"FID, 200 samples, against {name}"
    lines: list[str] = []
    monkeypatch.setattr(reference, "MOST_IMAGES", 12)
    evaluate(run, ["fid"], samples=200, reference=f"folder:{tmp_path}", announce=lines.append)
    assert any("12 of 30 images, spread evenly" in line for line in lines)


def test_options_of_a_run_refuse_no_reference() -> None:
    """Options that are for the run's own source, or that its shape and range take the place of, are left out."""
    own = DataConfig(pages="channels", fit="none", range_per_channel=True, array_of="images")
    deep = ValueScale("uint16", (0.0,), (900.0,))
    data: Any = SimpleNamespace(image_shape=(3, 20, 10), scale=deep)
    found = reference.packing_like(data, own, "folder:others")
    assert (found.image_size, found.fit, found.channels, found.dtype) == ("10x20", "crop", None, "source")
    assert (found.value_range, found.range_per_channel, found.array_of) == ("0.0:900.0", False, None)
    data = SimpleNamespace(image_shape=(1, 20, 10), scale=PLAIN)
    found = reference.packing_like(data, own, "shards:others")
    assert (found.pages, found.channels, found.dtype, found.value_range) == (None, 1, "uint8", None)


@pytest.mark.slow
def test_a_reference_that_is_none_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data source 'trian'"):
        evaluate(run, ["fid"], samples=20, reference="trian", announce=_silent)
    np.save(tmp_path / "deep.npy", np.zeros((40, 28, 28), np.uint16))
    with pytest.raises(UserError, match=r"reference array:.* has images 1 x 28 x 28 of values uint16"):
        evaluate(run, ["fid"], samples=20, reference=f"array:{tmp_path / 'deep.npy'}", announce=_silent)
    few = tmp_path / "few"
    few.mkdir()
    for place in range(4):
        Image.fromarray(digits()[0][place, 0]).save(few / f"{place}.png")
    found = evaluate(run, ["fid"], samples=20, reference=f"folder:{few}", announce=_silent)
    assert "the reference has 4 images, fewer than 10" in found.unavailable.values()


def test_names_have_the_network_but_for_digits() -> None:
    data = open_dataset("mnist5k", "data", DataConfig(), _silent)
    names = {}
    for network in ("digits", "efficientnet-lite0", "inception"):
        features = FeatureNetwork(network, "", lambda images: (images, None), None)
        model = gen_dist.inference.model.GenerativeModel(None, None, (1, 28, 28), ("all",))  # type: ignore[arg-type]
        train_split = reference.reference_images("train", data, "data", DataConfig(), _silent)
        setting = Setting(model, data, features, reference=train_split)
        plan = MetricPlan(setting, [], 50_000, 1, None)
        names[network] = plan.full_name(measured_metrics()["fid"]), plan.full_name(measured_metrics()["sharpness"])
    assert names == {
        "digits": ("fid_50k_train", "sharpness_50k"),
        "efficientnet-lite0": ("fid_efficientnet-lite0_50k_train", "sharpness_50k"),
        "inception": ("fid_inception_50k_train", "sharpness_50k"),
    }
    assert {base_name(name) for name, _ in names.values()} == {"fid"}
