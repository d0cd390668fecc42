"""16-bit scans from end to end, at their size, and all types of values by two processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gen_dist
from gen_dist.data import open_dataset
from tests.conftest import REPOSITORY
from tests.data.test_deep_files import tiff
from tests.data.test_values import RANGES, values_of
from tests.support.warm_python import in_two_ranks

CALM = {"log_every": 1, "checkpoint_every": 10_000, "sample_every": 10_000, "evaluate_every": 10_000}


def scan(place: int) -> NDArray[np.uint16]:
    """512 x 384 pixels of 12 bits: a bright spot on a slope."""
    height, width = np.mgrid[:384, :512]
    draws = np.random.default_rng(place).random(3)
    spot = np.exp(-((height - 384 * draws[0]) ** 2 + (width - 512 * draws[1]) ** 2) / 4000)
    return np.rint(150 + 400 * width / 512 * draws[2] + 2000 * spot).astype(np.uint16)


@pytest.mark.slow
def test_300_scans_train_a_vae_that_gives_their_units_back(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for place in range(300):
        (tmp_path / f"scans/{place:03}.tif").write_bytes(tiff(scan(place), "<>"[place % 2], deflated=place % 3 == 0))
    config = gen_dist.preset("vae-conv-mnist").with_options(
        data=f"folder:{tmp_path / 'scans'}",
        run_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        likelihood="gaussian",
        feature_maps=(4, 8, 8, 8),
        hidden_size=32,
        latent_dim=8,
        global_batch_size=8,
        steps=240,
        **CALM,
    )
    gen_dist.train(config, say=lambda _line: None)
    model = gen_dist.load(tmp_path / "run")
    assert model.image_shape == (1, 384, 512)
    assert model.scale.dtype == "uint16"
    dataset = open_dataset(config.data, "", config.packing, lambda _line: None)
    images = torch.from_numpy(dataset.test.images[:8])
    back = model.scale.values(model.scale.for_model(images) / 255)
    assert int((back.int() - images.int()).abs().max()) <= 1  # of the scaling: a level of 65,536
    given = model.reconstruct(images)
    assert given.dtype == torch.uint16
    error = (given.double() - images.double()).abs().mean()
    of_mean = (images.double() - images.double().mean()).abs().mean()
    assert error < 0.9 * of_mean  # in the units of the scans, and better than one gray for all


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "form"),
    [*((name, "images") for name in RANGES if name != "uint8"), ("float32", "vectors"), ("int16", "signals")],
)
def test_two_ranks_equal_one_for_every_type_of_values(tmp_path: Path, dtype: str, form: str) -> None:
    values = values_of(dtype)
    shape = {"images": values.shape[1:], "vectors": (-1,), "signals": (2, -1)}[form]
    np.save(tmp_path / "values.npy", values.reshape(len(values), *shape))
    losses: dict[str, list[float]] = {}
    for name, run in (("one", _in_this_process), ("two", _in_two_processes)):
        config = gen_dist.preset("vae-mnist").with_options(
            data=f"array:{tmp_path / 'values.npy'}",
            layout="NCHW" if form == "images" else None,
            array_of=form,
            run_dir=str(tmp_path / name),
            cache_dir=str(tmp_path / "cache"),
            likelihood="laplace",
            hidden_sizes=(16,),
            global_batch_size=12,
            steps=6,
            **CALM,
        )
        run(config, tmp_path / f"{name}.json")
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses["one"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)


def _in_this_process(config: Any, _file: Path) -> None:
    gen_dist.train(config, say=lambda _line: None)


def _in_two_processes(config: Any, file: Path) -> None:
    file.write_text(config.to_json())
    command = [*in_two_ranks(), str(REPOSITORY / "launch/train.py"), "--config", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
