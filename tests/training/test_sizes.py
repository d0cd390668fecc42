"""Images need not be square: training, resuming and using a model are the same at any width and height."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.encoding import encode
from gen_dist.inference.export import export
from gen_dist.testing import check_objective
from gen_dist.testing.objectives import check_resume_is_bit_equal
from gen_dist.testing.report import Check, raise_failures, run_checks
from gen_dist.testing.trial import ObjectiveTrial
from gen_dist.training.run import train
from tests.support.runs import OBJECTIVES, small_config

WIDE = DataConfig(image_size="24x16", fit="none", channels=3, synthetic_images=96)


def silent(_line: str) -> None:
    pass


def trained(path: Path, objective: str = "vae, convolutional", **changes: object) -> TrainConfig:
    config = small_config(objective, packing=WIDE, steps=4, checkpoint_every=2, run_dir=str(path), **changes)
    train(config, say=silent)
    return config


@pytest.mark.parametrize("objective", ["vae", "vae, convolutional", "dcgan"])
def test_runs_of_wide_images_resume_exactly(objective: str) -> None:
    trial = ObjectiveTrial(*OBJECTIVES[objective], image_shape=(3, 16, 24))
    raise_failures(run_checks(objective, [Check(check_resume_is_bit_equal)], trial))


def test_a_model_of_wide_images_encodes_other_data(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    model = gen_dist.load(tmp_path / "run")
    assert model.sample(3).shape == (3, 3, 16, 24)
    with Image.open(next((tmp_path / "run" / "samples").iterdir())) as picture:
        assert picture.width > picture.height
    # Images of another size are cropped: an option for it is one of training, and the run had none.
    encode(tmp_path / "run", tmp_path / "latents", data="mnist5k", file_format="npz", announce=silent)
    with np.load(next((tmp_path / "latents").glob("*.npz"))) as latents:
        assert any(len(array) >= 1000 for array in latents.values())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vae, convolutional", "dcgan", "r3gan", "vae-gan"])
def test_our_objectives_pass_at_wide_images(objective: str) -> None:
    config, network = OBJECTIVES[objective]
    check_objective(config, network, image_shape=(3, 16, 24))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vae, convolutional", "sngan"])
def test_wide_images_are_evaluated_and_exported(objective: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", objective)
    found = evaluate(tmp_path / "run", None, samples=64, nll_samples=4, nll_images=16, announce=silent)
    assert found is not None
    export(tmp_path / "run", "torch-export", tmp_path / "exported", (), silent)
    program = torch.export.load(tmp_path / "exported" / "decoder.pt2").module()
    assert program(torch.zeros(2, 5)).shape == (2, 3, 16, 24)
