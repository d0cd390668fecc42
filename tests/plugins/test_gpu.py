"""Plug-ins on a GPU: their steps are recorded, resumed and read as those of our own parts."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from gen_dist.config import TrainConfig
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.export import export
from gen_dist.inference.loading import load
from gen_dist.plugins import loading
from gen_dist.plugins.tables import FILES
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.training.run import train
from tests.support.loaded_plugins import forgetting_plugins
from tests.support.runs import all_tensors, assert_same_bits, make_trainer, run_steps, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module", params=["spatial VAE", "GAN with feature matching"])
def config(request: pytest.FixtureRequest) -> Iterator[TrainConfig]:
    """Config of a worked plug-in with a network of its own, and an objective of its own if it has one."""
    name = {"spatial VAE": "spatial_vae", "GAN with feature matching": "feature_matching_gan"}[request.param]
    with forgetting_plugins():
        loading.load(str(Path(__file__).with_name(f"{name}.py")))
        module = sys.modules[f"{FILES}.{name}"]
        if name == "spatial_vae":
            network = module.SpatialConfig(feature_maps=(4, 4, 8), latent_dim=2)
            yield small_config("vae", network=network, device="cuda", steps=12)
        else:
            network = module.UShapedConfig(feature_maps=(4, 8), hidden_size=8, latent_dim=5)
            objective = module.FeatureMatchingConfig()
            config = small_config("gan", network=network, device="cuda", steps=12)
            yield dataclasses.replace(config, objective=objective)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recorded_steps_have_the_bits_of_launched_ones(
    config: TrainConfig, precision: Literal["float32", "bf16"]
) -> None:
    config = dataclasses.replace(config, precision=precision)
    recorded, launched = make_trainer(config), make_trainer(dataclasses.replace(config, cuda_graphs=False))
    assert run_steps(recorded, 0, config.steps) == run_steps(launched, 0, config.steps)
    assert_same_bits(all_tensors(recorded), all_tensors(launched))


def test_compiled_steps_are_the_eager_ones(config: TrainConfig) -> None:
    config = dataclasses.replace(config, precision="float32")
    compiled = dataclasses.replace(config, compile=True)
    losses = run_steps(make_trainer(config), 0, config.steps)
    assert run_steps(make_trainer(compiled), 0, config.steps) == pytest.approx(losses, rel=1e-3)


def test_a_resumed_run_ends_with_the_same_bits_and_is_read(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(config, steps=8, checkpoint_every=4, run_dir=str(run))
    train(config, say=_silent)
    whole, _ = checkpoints.load(checkpoint_paths(run)[0])
    shutil.rmtree(run / "checkpoints/step_00000008")
    train(config, say=_silent)
    resumed, _ = checkpoints.load(checkpoint_paths(run)[0])
    assert resumed.step == whole.step == 8
    for group in whole.tensors:
        assert_same_bits(dict(resumed.tensors[group]), dict(whole.tensors[group]))

    images = load(run, "cuda", _silent).sample(4, seed=1)
    assert images.shape == (4, 1, 28, 28) and images.dtype == torch.uint8
    assert evaluate(run, ("diversity",), samples=64, device="cuda", announce=_silent).metrics
    assert (export(run, "safetensors", tmp_path / "exported", (), _silent) / "README.md").exists()
